"""A training run on Ray Train: its workers, their failures, where their states are kept."""

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
from reir_training.checks import NumWorkers, shares_evenly
from reir_training.config import CommonConfig
from reir_training.storage import CHECKPOINT, Storage, open_storage

READERS = 1
"""CPUs for what loads steps, beyond those of the workers."""


def train(  # noqa: PLR0913 - one by one is clearer than a bag
    preset: str,
    config: CommonConfig,
    *,
    output: Path,
    cache: Path,
    stage: str,
    init: Path | None = None,
    num_workers: NumWorkers = 1,
    use_gpu: bool = False,
    storage: str | None = None,
) -> Path:
    """Train on a local or remote Ray cluster; returns the checkpoint directory.

    A run with the same `output` (and `storage`) resumes from its last saved state.

    Args:
        preset: name of the model.
        config: of the run, of the kind that the preset takes.
        output: gets `checkpoint/`, `metrics.jsonl` and Ray's states; all workers must see it.
        cache: for `clare-nano`, folder with the output of its frozen part, already built; for
            other models, folder in which workers share the annotations.
        stage: "grounding", "clia", "all" (both) or "rerank".
        init: checkpoint directory to start from.
        num_workers: Ray Train workers.
        use_gpu: one GPU a worker.
        storage: URI that gets the states instead, and copies of the rest.
    """
    most = num_workers if isinstance(num_workers, int) else num_workers[1]
    cores = max((os.cpu_count() or 1) // most, 1)
    started_here = not ray.is_initialized()
    if started_here:
        _start_ray(most, cores, use_gpu)
    states = open_storage(storage) if storage else Storage(LocalFileSystem(), str(output.resolve()))
    try:
        trainer = _EvenTrainer(
            _work,
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
            run_config=RunConfig(
                name="run",
                storage_path=f"{states.path}/ray",
                storage_filesystem=states.filesystem,
                checkpoint_config=CheckpointConfig(
                    num_to_keep=config.keep_checkpoints, checkpoint_score_attribute=config.best_by
                ),
                failure_config=FailureConfig(max_failures=config.max_failures),
            ),
        )
        trainer.can_share = lambda workers: shares_evenly(config.optimisation, workers)
        with _our_errors():
            trainer.fit()
    finally:
        if started_here:
            ray.shutdown()
    return output / CHECKPOINT


def _start_ray(num_workers: int, cores: int, use_gpu: bool) -> None:
    """Join the cluster that `RAY_ADDRESS` names, as within `ray job submit`; else start a Ray."""
    variables = {"OMP_NUM_THREADS": str(cores)}
    if not use_gpu:
        variables["DS_ACCELERATOR"] = "cpu"
    own = {
        "address": "local",
        "num_cpus": max(os.cpu_count() or 1, num_workers + READERS),
        "include_dashboard": False,
    }
    ray.init(
        **({} if os.environ.get("RAY_ADDRESS") else own),
        runtime_env={"env_vars": variables},
        log_to_driver=False,
    )


@contextmanager
def _our_errors() -> Iterator[None]:
    """Tell a mistake of the user's as such, not as a crash of workers."""
    try:
        yield
    except WorkerGroupError as failed:
        for error in failed.worker_failures.values():
            cause = getattr(error, "_base_exc", error)
            if isinstance(cause, ReirError):
                raise cause from failed
        raise


class _EvenTrainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
    """Elastic within what can share the photos of a step.

    Ray 2.60 would take any number of the range, and has no public place to say which.
    """

    can_share: Callable[[int], bool]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if isinstance(parts["scaling_policy"], ElasticScalingPolicy):
            parts["scaling_policy"] = EvenPolicy(self.scaling_config, self.can_share)
        return super()._initialize_and_run_controller(**parts)


class EvenPolicy(ElasticScalingPolicy):  # type: ignore[misc]  # Ray has no types
    """As many workers as there is room for and as can share the photos of a step.

    Args:
        scaling_config: with a range of workers.
        can_share: whether so many can.
    """

    def __init__(self, scaling_config: ScalingConfig, can_share: Callable[[int], bool]) -> None:
        super().__init__(scaling_config)
        self._can_share = can_share

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return next((n for n in range(room, 0, -1) if self._can_share(n)), 0)


def _work(job: Mapping[str, Any]) -> None:
    """Import what trains in the workers alone: the driver and Ray's controller start sooner."""
    from reir_training.actors import train_worker

    train_worker(job)
