"""Ray Train around the loop: workers, states to resume from, progress, the final checkpoint."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import deepspeed
import ray
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from reir.checkpoint import NANO
from reir_training.actors import stream_steps
from reir_training.clare_task import ClareTask
from reir_training.config import ClareTrainConfig, CommonConfig, TrainConfig
from reir_training.loop import Averaged, Position, TrainLoop
from reir_training.nano_task import NanoTask
from reir_training.plan import plan
from reir_training.states import load_state, save_state

METRICS = "metrics.jsonl"
SHM_OP = "deepspeed_shm_comm"
READERS = 1
PLACES = {"data", "evaluation", "exclude_evaluation", "weights", "cache", "tokenizer", "towers"}
"""Settings that say where things lie on this machine, which a checkpoint does not keep."""


def train(  # noqa: PLR0913 - one by one is clearer than a bag
    preset: str,
    config: CommonConfig,
    *,
    output: Path,
    cache: Path | None,
    stage: str,
    init: Path | None = None,
    num_workers: int = 1,
    use_gpu: bool = False,
) -> Path:
    """Train on a local or remote Ray cluster; returns the checkpoint directory.

    A run with the same `output` goes on from its last completed epoch.

    Args:
        preset: name of the model.
        config: of the run, of the kind that the preset takes.
        output: gets `checkpoint/`, `metrics.jsonl` and Ray's states; all workers must see it.
        cache: folder of the frozen part's output, already built; for `clare-nano` only.
        stage: "grounding", "clia" or "all".
        init: checkpoint directory to start from.
        num_workers: Ray Train workers.
        use_gpu: one GPU a worker.
    """
    cores = max((os.cpu_count() or 1) // num_workers, 1)
    variables = {"OMP_NUM_THREADS": str(cores)}
    if not use_gpu:
        variables["DS_ACCELERATOR"] = "cpu"
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(
            num_cpus=max(os.cpu_count() or 1, num_workers + READERS),
            include_dashboard=False,
            runtime_env={"env_vars": variables},
            log_to_driver=False,
        )
    try:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "preset": preset,
                "config": config.model_dump(mode="json"),
                "output": str(output),
                "cache": str(cache) if cache else None,
                "stage": stage,
                "init": str(init) if init else None,
                "threads": cores,
            },
            scaling_config=ScalingConfig(
                num_workers=num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1}
            ),
            run_config=RunConfig(
                name="run",
                storage_path=str((output / "ray").resolve()),
                checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
                failure_config=FailureConfig(max_failures=2),
            ),
        )
        trainer.fit()
    finally:
        if started_here:
            ray.shutdown()
    return output / "checkpoint"


def train_worker(job: Mapping[str, Any]) -> None:
    """What each Ray Train worker runs."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(job["threads"])
    task, config = _task(job, rank, world_size)
    settings, output = config.optimisation, Path(job["output"])
    task.objective.to(ray.train.torch.get_device())
    engine = build_engine(task, config, world_size)
    averaged = Averaged(settings.ema_decay) if settings.ema_decay else None

    def log(line: dict[str, Any]) -> None:
        if rank == 0:
            with (output / METRICS).open("a") as file:
                file.write(json.dumps(line) + "\n")

    loop = TrainLoop(
        engine,
        task,
        settings,
        rank=rank,
        zero_stage=config.zero_stage,
        averaged=averaged,
        on_progress=lambda progress: log({"event": "progress", **asdict(progress)}),
        on_position=lambda position: _report(engine, averaged, position, position.sums),
    )
    epochs = plan(settings, job["stage"])
    done = _restore(engine, averaged)
    for epoch in epochs[done.epochs :]:
        losses = loop.run_epoch(epoch, len(epochs), done)
        done = Position(epoch.number + 1)
        metrics: dict[str, float] = {}
        with loop.final_weights():
            if rank == 0:
                metrics = task.validate()
                log({"event": "epoch", "epoch": epoch.number + 1, "losses": losses, **metrics})
                if epoch is epochs[-1]:
                    task.save(output / "checkpoint", _about(config, job, task, metrics))
        _report(engine, averaged, done, {**losses, **metrics})


def _task(
    job: Mapping[str, Any], rank: int, world_size: int
) -> tuple[NanoTask | ClareTask, CommonConfig]:
    """What the preset trains, with its configuration."""
    init = Path(job["init"]) if job["init"] else None
    if job["preset"] == NANO:
        nano = TrainConfig.model_validate(job["config"])
        cache = Path(job["cache"])
        return NanoTask(nano, cache=cache, init=init, rank=rank, world_size=world_size), nano
    config = ClareTrainConfig.model_validate(job["config"])
    task = ClareTask(
        job["preset"], config, init=init, rank=rank, world_size=world_size, stream=stream_steps
    )
    return task, config


def build_engine(
    task: NanoTask | ClareTask,
    config: CommonConfig,
    world_size: int,
    zero: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Wrap the objective in DeepSpeed with our optimiser; `zero` adds settings of ZeRO."""
    # DeepSpeed would compile a shared-memory collective at the first start on a CPU, under a file
    # lock that outlives a killed process and blocks every later run; gloo does the same work.
    deepspeed.ops.__compatible_ops__[SHM_OP] = False
    if config.zero_stage == 3:
        # The scales and biases of scores: held by the model, used by the losses around it.
        for parameter in task.model.parameters(recurse=False):
            deepspeed.zero.register_external_parameter(task.objective, parameter)
    micro = max(task.photos_per_step // world_size, 1)
    engine, *_ = deepspeed.initialize(
        model=task.objective,
        optimizer=torch.optim.AdamW(task.groups(), betas=(0.9, 0.98)),
        config={
            "train_micro_batch_size_per_gpu": micro,
            "train_batch_size": micro * world_size,
            "gradient_clipping": config.optimisation.max_gradient_norm,
            "zero_optimization": {"stage": config.zero_stage, **zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
    )
    return engine


def _report(
    engine: Any, averaged: Averaged | None, done: Position, metrics: Mapping[str, float]
) -> None:
    """Hand the state at a position to Ray Train, from where a rerun goes on."""
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder), engine, averaged, done)
        ray.train.report(dict(metrics), checkpoint=Checkpoint.from_directory(folder))


def _restore(engine: Any, averaged: Averaged | None) -> Position:
    """Load the last reported state; returns how far the run had come."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Position()
    with checkpoint.as_directory() as folder:
        return load_state(Path(folder), engine, averaged)


def _about(
    config: CommonConfig,
    job: Mapping[str, Any],
    task: NanoTask | ClareTask,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """What the checkpoint says of its own making."""
    lines = [json.loads(line) for line in (Path(job["output"]) / METRICS).read_text().splitlines()]
    starts = [line["time"] for line in lines if line["event"] == "start"]
    steps = {(line["epoch"], line["step"]) for line in lines if line["event"] == "progress"}
    last_steps = {epoch: max(s for e, s in steps if e == epoch) for epoch, _ in steps}
    return {
        **task.about(),
        "stage": job["stage"],
        "steps": sum(last_steps.values()),
        "hours": round((time.time() - starts[0]) / 3600, 2) if starts else None,
        "metrics": metrics,
        "settings": config.model_dump(mode="json", exclude=PLACES),
    }
