"""DeepSpeed around an objective, and the state from which a run goes on. Knows no Ray."""

from __future__ import annotations

import json
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from safetensors.torch import load_file, save_file

from reir.errors import ConfigError
from reir_training.config import CommonConfig
from reir_training.loop import Averaged, Position
from reir_training.memory import bucket_size
from reir_training.tasks import AnyTask

STATE, TAG, AVERAGED = "run.json", "state", "averaged.safetensors"
SHM_OP = "deepspeed_shm_comm"


@dataclass
class Best:
    """The epoch, counted from 1, with the highest value of the figure that is gone by."""

    epoch: int
    value: float


@dataclass
class RunState:
    """What is kept of a run besides the engine's state.

    Attributes:
        num_workers, zero_stage: under which the engine's state was written.
        done: how far the run has come.
        updates: of the averaged weights.
        best: None before an epoch has the figure.
    """

    num_workers: int
    zero_stage: int
    done: Position = field(default_factory=Position)
    updates: int = 0
    best: Best | None = None


def start_engine(  # noqa: PLR0913 - all but the three parts are by name
    task: AnyTask,
    config: CommonConfig,
    averaged: Averaged | None,
    *,
    num_workers: int = 1,
    local_rank: int = 0,
    kept: Path | None = None,
    zero: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Any, RunState]:
    """Wrap the objective in DeepSpeed with our optimiser, and go on from what was kept.

    Args:
        task: whose objective is on its device.
        config: of the run.
        averaged: weight average, filled from `kept`.
        num_workers: that train together.
        local_rank: of this worker on its machine.
        kept: folder that `save_state` filled, maybe with another number of workers.
        zero: more settings of ZeRO, as DeepSpeed names them.

    Raises:
        ConfigError: `kept` was written with another ZeRO stage.
    """
    if kept is None:
        return _engine(task, config, num_workers, zero), RunState(num_workers, config.zero_stage)
    state = read_state(kept)
    if state.zero_stage != config.zero_stage:
        raise ConfigError(
            f"zero_stage={config.zero_stage}, but the run was begun with {state.zero_stage}; go on "
            "with that, or start another output with --init"
        )
    reshare = config.zero_stage > 0 and state.num_workers != num_workers
    engine = _engine(task, config, num_workers, zero, reshared=reshare)
    own = [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.param_groups]
    with _reshared(kept, local_rank) if reshare else nullcontext(kept) as folder:
        engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
    if reshare:
        _mend(engine, own)
    if averaged is not None:
        averaged.weights = load_file(kept / AVERAGED)
        averaged.updates = state.updates
    return engine, RunState(num_workers, config.zero_stage, state.done, state.updates, state.best)


def save_state(
    folder: Path, engine: Any, averaged: Averaged | None, state: RunState, *, rank: int
) -> None:
    """Write this worker's part of the state; every worker must be at the same step."""
    engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)
    if rank:
        return
    if averaged is not None:
        state.updates = averaged.updates
        save_file(averaged.weights, folder / AVERAGED)
    (folder / STATE).write_text(json.dumps(asdict(state)))


def read_state(folder: Path) -> RunState:
    """Return what `save_state` wrote."""
    values = json.loads((folder / STATE).read_text())
    best = values.pop("best")
    done = Position(**values.pop("done"))
    return RunState(**values, done=done, best=Best(**best) if best else None)


def _engine(
    task: AnyTask,
    config: CommonConfig,
    num_workers: int,
    zero: Mapping[str, Any],
    *,
    reshared: bool = False,
) -> Any:
    # DeepSpeed would compile a shared-memory collective at the first start on a CPU, under a file
    # lock that outlives a killed process and blocks every later run; gloo does the same work.
    deepspeed.ops.__compatible_ops__[SHM_OP] = False
    if config.zero_stage == 3:
        # the scales and biases of scores: held by the model, used by the losses around it
        for parameter in task.model.parameters(recurse=False):
            deepspeed.zero.register_external_parameter(task.objective, parameter)
    parts = config.optimisation.accumulate_steps
    trainable = sum(p.numel() for p in task.objective.parameters() if p.requires_grad)
    engine, *_ = deepspeed.initialize(
        model=task.objective,
        optimizer=torch.optim.AdamW(task.groups(), betas=config.optimisation.betas),
        config={
            "train_micro_batch_size_per_gpu": task.photos_per_step // (num_workers * parts),
            "train_batch_size": task.photos_per_step,
            "gradient_accumulation_steps": parts,
            "gradient_clipping": config.optimisation.max_gradient_norm,
            "zero_optimization": {
                "stage": config.zero_stage,
                "reduce_bucket_size": bucket_size(trainable),
                **zero,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "checkpoint": {"load_universal": reshared},
            "steps_per_print": 10**9,
        },
    )
    return engine


@contextmanager
def _reshared(kept: Path, local_rank: int) -> Iterator[Path]:
    """Rewrite ZeRO's shares by parameter, as any number of workers can load; once a machine."""
    name = sha256(str(kept).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"reir-reshared-{name}"
    if local_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        ds_to_universal.main(
            Namespace(
                input_folder=str(kept / TAG),
                output_folder=str(folder / TAG),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    dist.barrier()
    try:
        yield folder
    finally:
        dist.barrier()
        if local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _mend(engine: Any, groups: list[dict[str, Any]]) -> None:
    """Undo what DeepSpeed 0.19 does to ZeRO-3 on the way: all groups get the settings of the first,
    and share one counter of steps, which then counts every group."""
    for group, own in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(own)
    for state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
