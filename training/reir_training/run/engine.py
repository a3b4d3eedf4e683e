"""Wraps an objective in a DeepSpeed engine, and saves and loads the state of a run."""

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
from reir_training.config import TrainConfig
from reir_training.report.memory import bucket_size
from reir_training.run.loop import ExponentialMovingAverage, Position
from reir_training.run.tasks import AnyTask

STATE, TAG, AVERAGED = "run.json", "state", "averaged.safetensors"
# DeepSpeed's name for its shared-memory operator, see `_engine`.
SHM_OP = "deepspeed_shm_comm"


@dataclass
class BestEpoch:
    """The epoch, counted from 1, with the highest value of the `best_by` figure."""

    epoch: int
    value: float


@dataclass
class RunState:
    """The state of a run besides that of the engine.

    Attributes:
        num_workers, zero_stage: with which the state of the engine was saved.
        done: completed epochs and steps.
        updates: number of updates of the weight average.
        best: None until an epoch has the figure.
    """

    num_workers: int
    zero_stage: int
    done: Position = field(default_factory=Position)
    updates: int = 0
    best: BestEpoch | None = None


def start_engine(  # noqa: PLR0913 - most are keyword-only
    task: AnyTask,
    config: TrainConfig,
    averaged: ExponentialMovingAverage | None,
    *,
    num_workers: int = 1,
    local_rank: int = 0,
    resume_from: Path | None = None,
    zero: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Any, RunState]:
    """Wrap the objective in a DeepSpeed engine with an optimizer, and load a saved state.

    Args:
        task: task whose objective is already on its device.
        config: settings of the run.
        averaged: weight average, loaded from `resume_from`; None without averaging.
        num_workers: number of workers of the run.
        local_rank: rank of this worker on its machine.
        resume_from: folder that `save_state` wrote, possibly with another number of workers; None
            to start from the beginning.
        zero: additional `zero_optimization` settings of DeepSpeed.

    Raises:
        ConfigError: the state was saved with another ZeRO stage.
    """
    if resume_from is None:
        return _engine(task, config, num_workers, zero), RunState(num_workers, config.zero_stage)
    state = read_state(resume_from)
    if state.zero_stage != config.zero_stage:
        raise ConfigError(
            f"zero_stage={config.zero_stage}, but the run was started with {state.zero_stage}: set "
            f"zero_stage={state.zero_stage} to resume it, or start a new --output with --init"
        )
    # From ZeRO stage 1 on, each worker's file holds its own shard of the optimizer states.
    convert = config.zero_stage > 0 and state.num_workers != num_workers
    engine = _engine(task, config, num_workers, zero, universal=convert)
    own = [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.param_groups]
    with (
        _universal_checkpoint(resume_from, local_rank)
        if convert
        else nullcontext(resume_from) as folder
    ):
        # Not strict, because `save_state` leaves out frozen parameters.
        engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
    if convert:
        _restore_parameter_groups(engine, own)
    if averaged is not None:
        averaged.weights = load_file(resume_from / AVERAGED)
        averaged.updates = state.updates
    return engine, RunState(num_workers, config.zero_stage, state.done, state.updates, state.best)


def save_state(
    folder: Path,
    engine: Any,
    averaged: ExponentialMovingAverage | None,
    state: RunState,
    *,
    rank: int,
) -> None:
    """Save this worker's part of the state; all workers must call it at the same step."""
    engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)
    if rank:
        return
    if averaged is not None:
        state.updates = averaged.updates
        save_file(averaged.weights, folder / AVERAGED)
    (folder / STATE).write_text(json.dumps(asdict(state)))


def read_state(folder: Path) -> RunState:
    """Load the `RunState` that `save_state` wrote."""
    values = json.loads((folder / STATE).read_text())
    best = values.pop("best")
    done = Position(**values.pop("done"))
    return RunState(**values, done=done, best=BestEpoch(**best) if best else None)


def _engine(
    task: AnyTask,
    config: TrainConfig,
    num_workers: int,
    zero: Mapping[str, Any],
    *,
    universal: bool = False,
) -> Any:
    # On a CPU, DeepSpeed would compile a shared-memory collective under a file lock. If the process
    # is killed, the lock remains and blocks all later runs. gloo works without it.
    deepspeed.ops.__compatible_ops__[SHM_OP] = False
    if config.zero_stage == 3:
        # Stage 3 gathers the parameters of a module when that module runs. The scales and biases of
        # the scores belong to the model, but the losses outside of it use them.
        for parameter in task.model.parameters(recurse=False):
            deepspeed.zero.register_external_parameter(task.objective, parameter)
    parts = config.optimization.accumulate_steps
    trainable = sum(p.numel() for p in task.objective.parameters() if p.requires_grad)
    engine, *_ = deepspeed.initialize(
        model=task.objective,
        optimizer=torch.optim.AdamW(task.groups(), betas=config.optimization.betas),
        config={
            "train_micro_batch_size_per_gpu": task.photos_per_step // (num_workers * parts),
            "train_batch_size": task.photos_per_step,
            "gradient_accumulation_steps": parts,
            "gradient_clipping": config.optimization.max_gradient_norm,
            "zero_optimization": {
                "stage": config.zero_stage,
                "reduce_bucket_size": bucket_size(trainable),
                **zero,
            },
            # Without these two settings, DeepSpeed would insist on its own Adam.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "checkpoint": {"load_universal": universal},
            "steps_per_print": 10**9,  # never: the training loop reports progress itself
        },
    )
    return engine


@contextmanager
def _universal_checkpoint(resume_from: Path, local_rank: int) -> Iterator[Path]:
    """Convert a state to DeepSpeed's universal format, which any number of workers can load.

    One worker per machine converts it; the others wait.
    """
    name = sha256(str(resume_from).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"reir-universal-{name}"
    if local_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        ds_to_universal.main(
            Namespace(
                input_folder=str(resume_from / TAG),
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


def _restore_parameter_groups(engine: Any, groups: list[dict[str, Any]]) -> None:
    """Fix the parameter groups after loading a universal checkpoint under ZeRO stage 3.

    DeepSpeed 0.19 gives all groups the settings of the first. It also makes them share one step
    counter, which would then be incremented once per group.
    """
    for group, own in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(own)
    for state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
