"""Ray Train around the loop: workers, states to resume from, progress, the final checkpoint."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import ray
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file, save_file

from reir.checkpoint import save_checkpoint
from reir_training.assemble import align_streams, parameter_groups, start_model, training_sentences
from reir_training.batches import BatchMaker
from reir_training.cache import FrozenCache
from reir_training.card import write_model_card
from reir_training.config import TrainConfig
from reir_training.examples import read_source
from reir_training.gather import gather_others
from reir_training.loop import Averaged, Progress, TrainLoop, plan
from reir_training.objective import ClareObjective
from reir_training.validate import validate

METRICS = "metrics.jsonl"
TAG = "state"
AVERAGED = "averaged.safetensors"
SHM_OP = "deepspeed_shm_comm"


def train(  # noqa: PLR0913 - one by one is clearer than a bag
    config: TrainConfig,
    *,
    output: Path,
    cache: Path,
    stage: str,
    init: Path | None = None,
    num_workers: int = 1,
    use_gpu: bool = False,
) -> Path:
    """Train on a local or remote Ray cluster; returns the checkpoint directory.

    A run with the same `output` goes on from its last completed epoch.

    Args:
        config: of the run.
        output: gets `checkpoint/`, `metrics.jsonl` and Ray's states; all workers must see it.
        cache: folder of the frozen part's output, already built.
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
        ray.init(include_dashboard=False, runtime_env={"env_vars": variables}, log_to_driver=False)
    try:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "config": config.model_dump(mode="json"),
                "output": str(output),
                "cache": str(cache),
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
    config = TrainConfig.model_validate(job["config"])
    settings, output = config.optimisation, Path(job["output"])
    model, tokenizer = start_model(config, Path(job["init"]) if job["init"] else None)
    photos = [photo for source in config.data for photo in read_source(source)]
    if not job["init"]:
        align_streams(model, tokenizer, training_sentences(photos))
    cache = FrozenCache(Path(job["cache"]))
    half = settings.precision == "bf16"
    objective = ClareObjective(
        model,
        tokenizer,
        config.loss,
        gather=gather_others if world_size > 1 else None,
        half=half,
    )
    device = ray.train.torch.get_device()
    engine = _engine(objective.to(device), config, world_size)
    averaged = Averaged(settings.ema_decay) if settings.ema_decay else None
    maker = BatchMaker(photos, cache, settings)
    metrics_file = output / METRICS

    def log(line: dict[str, Any]) -> None:
        if rank == 0:
            with metrics_file.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def on_progress(progress: Progress) -> None:
        log({"event": "progress", **asdict(progress)})

    loop = TrainLoop(
        engine,
        maker,
        settings,
        rank=rank,
        world_size=world_size,
        zero_stage=config.zero_stage,
        averaged=averaged,
        on_progress=on_progress,
    )
    epochs = plan(settings, job["stage"])
    done = _restore(engine, averaged)
    metrics: dict[str, float] = {}
    for epoch in epochs[done:]:
        losses = loop.run_epoch(epoch, len(epochs))
        with loop.final_weights() as final:
            if rank == 0:
                metrics = validate(final.model, tokenizer, photos, cache, half=half)
                log({"event": "epoch", "epoch": epoch.number + 1, "losses": losses, **metrics})
                if epoch is epochs[-1]:
                    about = _about(config, job, photos, metrics)
                    save_checkpoint(output / "checkpoint", final.model, tokenizer, about)
                    write_model_card(output / "checkpoint", about)
        _report(engine, averaged, epoch.number + 1, {**losses, **metrics})


def _engine(objective: ClareObjective, config: TrainConfig, world_size: int) -> Any:
    """Wrap the objective in DeepSpeed with our optimiser."""
    settings = config.optimisation
    # DeepSpeed would compile a shared-memory collective at the first start on a CPU, under a file
    # lock that outlives a killed process and blocks every later run; gloo does the same work.
    deepspeed.ops.__compatible_ops__[SHM_OP] = False
    optimiser = torch.optim.AdamW(parameter_groups(objective, settings), betas=(0.9, 0.98))
    micro = max(settings.photos_per_batch // world_size, 1)
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=optimiser,
        config={
            "train_micro_batch_size_per_gpu": micro,
            "train_batch_size": micro * world_size,
            "gradient_clipping": settings.max_gradient_norm,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
    )
    return engine


def _report(
    engine: Any, averaged: Averaged | None, epochs_done: int, metrics: dict[str, float]
) -> None:
    """Hand the state after an epoch to Ray Train, from where a rerun goes on."""
    with tempfile.TemporaryDirectory() as folder:
        client_state = {"epochs_done": epochs_done, "updates": averaged.updates if averaged else 0}
        engine.save_checkpoint(
            folder, tag=TAG, client_state=client_state, exclude_frozen_parameters=True
        )
        if averaged is not None and ray.train.get_context().get_world_rank() == 0:
            save_file(averaged.weights, Path(folder) / AVERAGED)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _restore(engine: Any, averaged: Averaged | None) -> int:
    """Load the last reported state; returns the number of completed epochs."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        _, client_state = engine.load_checkpoint(folder, tag=TAG, load_module_strict=False)
        if averaged is not None:
            averaged.weights = load_file(Path(folder) / AVERAGED)
            averaged.updates = int(client_state["updates"])
    return int(client_state["epochs_done"])


def _about(
    config: TrainConfig, job: Mapping[str, Any], photos: list[Any], metrics: dict[str, float]
) -> dict[str, Any]:
    """What the checkpoint says of its own making."""
    train = [p for p in photos if p.split == "train"]
    lines = [json.loads(line) for line in (Path(job["output"]) / METRICS).read_text().splitlines()]
    starts = [line for line in lines if line["event"] == "start"]
    from time import time

    return {
        "stage": job["stage"],
        "photos": len(train),
        "boxes": sum(len(p.boxes) for p in train),
        "expressions": sum(len(p.expressions) for p in train),
        "captions": sum(len(p.captions) for p in train),
        "held_out_photos": len(photos) - len(train),
        "steps": sum(1 for line in lines if line["event"] == "epoch")
        * (len(train) // config.optimisation.photos_per_batch),
        "hours": round((time() - starts[0]["time"]) / 3600, 2) if starts else None,
        "metrics": metrics,
        "settings": {
            "model": config.model.model_dump(),
            "loss": config.loss.model_dump(),
            "optimisation": config.optimisation.model_dump(),
            "zero_stage": config.zero_stage,
        },
    }
