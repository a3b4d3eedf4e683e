"""Runs training on Ray Train: starts the workers, restarts failed ones, stores their states."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from pyarrow.fs import LocalFileSystem
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from reir.errors import ReirError
from reir_training.config import TrainConfig
from reir_training.run.num_workers import NumWorkers, shares_evenly
from reir_training.run.schedule import best_figure
from reir_training.run.storage import CHECKPOINT, Storage, open_storage

READER_CPUS = 1
"""CPUs for loading steps, in addition to one per worker."""


def train(  # noqa: PLR0913 - most are keyword-only
    preset: str,
    config: TrainConfig,
    *,
    output: Path,
    cache: Path,
    stage: str,
    init: Path | None = None,
    num_workers: NumWorkers = 1,
    use_gpu: bool = False,
    storage: str | None = None,
) -> Path:
    """Train on a local or remote Ray cluster, and return the checkpoint directory.

    A run with the same `output` (and `storage`) resumes from its last saved state.

    Args:
        preset: name of the model.
        config: settings of the run, of the class that the preset needs.
        output: folder for `checkpoint/`, `metrics.jsonl` and the saved states; all workers need
            access to it.
        cache: for `clare-nano`, folder with the output of its frozen part, already computed; for
            other models, folder in which workers share the annotations.
        stage: "grounding", "clia", "all" (both), or one of `ADDED_PARTS`.
        init: checkpoint directory to start from.
        num_workers: number of Ray Train workers, or a range.
        use_gpu: use one GPU per worker.
        storage: URI where the states are saved instead, and the other output is copied.
    """
    max_workers = num_workers if isinstance(num_workers, int) else num_workers[1]
    # Without a limit, the PyTorch threads of all workers would compete for the same cores.
    cores = max((os.cpu_count() or 1) // max_workers, 1)
    started_here = not ray.is_initialized()
    if started_here:
        _start_ray(max_workers, cores, use_gpu)
    try:
        trainer = _EvenElasticTrainer(
            _run_worker,
            train_loop_config={
                "preset": preset,
                "config": config.model_dump(mode="json"),
                "output": str(output),
                "cache": str(cache),
                "stage": stage,
                "init": str(init) if init else None,
                "threads": cores,
                "storage": storage,
            },
            scaling_config=ScalingConfig(
                num_workers=num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1}
            ),
            run_config=_run_config(config, stage, output, storage),
        )
        trainer.can_share = lambda workers: shares_evenly(config.optimization, workers)
        with _reraised_user_errors():
            trainer.fit()
    finally:
        # A Ray that the caller had started may be running other work.
        if started_here:
            ray.shutdown()
    return output / CHECKPOINT


def _run_config(config: TrainConfig, stage: str, output: Path, storage: str | None) -> RunConfig:
    """Return where Ray Train stores the states, which ones it keeps, and how often it restarts."""
    # Ray Train gets the file system itself, so that it accepts the same URIs as our other storage.
    states = open_storage(storage) if storage else Storage(LocalFileSystem(), str(output.resolve()))
    return RunConfig(
        # Ray Train resumes a run if it finds states of the same name in the same storage.
        name="run",
        storage_path=f"{states.path}/ray",
        storage_filesystem=states.filesystem,
        checkpoint_config=CheckpointConfig(
            num_to_keep=config.keep_checkpoints,
            checkpoint_score_attribute=best_figure(config, stage),
        ),
        failure_config=FailureConfig(max_failures=config.max_failures),
    )


def _start_ray(num_workers: int, cores: int, use_gpu: bool) -> None:
    """Connect to the cluster in `RAY_ADDRESS`, as `ray job submit` sets it, or start Ray here."""
    variables = {"OMP_NUM_THREADS": str(cores)}
    if not use_gpu:
        # On a machine with a GPU, DeepSpeed would otherwise place its tensors there.
        variables["DS_ACCELERATOR"] = "cpu"
    local = {
        "address": "local",
        # Each worker reserves a CPU. On a small machine, none would be left for the actors that
        # load the steps, and training would wait for them forever.
        "num_cpus": max(os.cpu_count() or 1, num_workers + READER_CPUS),
        "include_dashboard": False,
    }
    ray.init(
        **({} if os.environ.get("RAY_ADDRESS") else local),
        runtime_env={"env_vars": variables},
        log_to_driver=False,
    )


@contextmanager
def _reraised_user_errors() -> Iterator[None]:
    """Reraise a worker's `ReirError`, so that the user sees its message without a traceback."""
    try:
        yield
    except WorkerGroupError as failed:
        for error in failed.worker_failures.values():
            cause = getattr(error, "_base_exc", error)
            if isinstance(cause, ReirError):
                raise cause from failed
        raise


class _EvenElasticTrainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
    """A `TorchTrainer` that only uses numbers of workers that divide the photos of a step evenly.

    Ray 2.60 may use any number in the range, and has no public setting to restrict it.
    """

    can_share: Callable[[int], bool]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if isinstance(parts["scaling_policy"], ElasticScalingPolicy):
            parts["scaling_policy"] = EvenScalingPolicy(self.scaling_config, self.can_share)
        return super()._initialize_and_run_controller(**parts)


class EvenScalingPolicy(ElasticScalingPolicy):  # type: ignore[misc]  # Ray has no types
    """Uses as many workers as the cluster has room for and as divide the photos of a step evenly.

    Args:
        scaling_config: has a range of workers.
        can_share: returns whether this number of workers divides the photos evenly.
    """

    def __init__(self, scaling_config: ScalingConfig, can_share: Callable[[int], bool]) -> None:
        super().__init__(scaling_config)
        self._can_share = can_share

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        fitting = super()._count_possible_workers(reserved_resources)
        return next((n for n in range(fitting, 0, -1) if self._can_share(n)), 0)


def _run_worker(job: Mapping[str, Any]) -> None:
    """Run a worker. The import is here so that the driver and Ray's controller start faster."""
    from reir_training.run.worker import train_worker

    train_worker(job)
