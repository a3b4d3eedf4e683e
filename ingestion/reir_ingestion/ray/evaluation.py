"""Encode the photos of an evaluation on Ray workers; see `reir.evaluate.shards`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import ray
from ray.exceptions import RayTaskError

from reir.errors import ConfigError
from reir.evaluate.shards import EncodedShard, Runner, Shard, encode_shard
from reir.models.interfaces import InstanceEncoder
from reir_ingestion.ray.cluster import is_local, start_or_join_ray

logger = logging.getLogger(__name__)

RETRIES = 3

SHARDS_PER_WORKER = 2
"""Shards that a worker has at a time: one is encoded while the other waits, so that no worker is
idle until the driver sends the next one."""


class ShardEncoder:
    """An actor with an encoder, which it loads once.

    Args:
        load: returns the encoder; every machine must be able to call it.
    """

    def __init__(self, load: Callable[[], InstanceEncoder]) -> None:
        self._encoder = load()

    def encode(self, shard: Shard) -> tuple[int, EncodedShard]:
        """Encode a shard; returns its number and the result."""
        return shard.number, encode_shard(self._encoder, shard)


def ray_evaluation_runner(
    load: Callable[[], InstanceEncoder], *, num_workers: int, use_gpu: bool, threads: int
) -> Runner:
    """Return a runner that encodes shards on Ray workers, on this machine or on a cluster.

    The cluster is the one that `RAY_ADDRESS` names, which Ray sets in a submitted job. Without it,
    Ray is started on this machine and stopped at the end. A worker that dies is restarted and
    repeats its shards, up to `RETRIES` times.

    Args:
        load: returns the encoder, picklable.
        num_workers: number of workers.
        use_gpu: whether each worker takes one GPU.
        threads: number of CPUs that Ray reserves for each worker.
    """

    def run(shards: Iterable[Shard]) -> Iterator[tuple[int, EncodedShard]]:
        waiting = iter(shards)
        first = next(waiting, None)
        if first is None:  # everything is encoded already: do not start Ray
            return
        with start_or_join_ray(num_workers * threads):
            _check_gpus(num_workers, use_gpu)
            make = ray.remote(ShardEncoder).options(
                num_cpus=threads,
                num_gpus=int(use_gpu),
                max_restarts=RETRIES,
                # Restarting the actor alone would not repeat the calls that it was working on.
                max_task_retries=RETRIES,
            )
            workers = [make.remote(load) for _ in range(num_workers)]
            waiting = chain([first], waiting)
            running: dict[Any, Any] = {}
            # Each worker gets a first shard before any of them gets a second one.
            for worker in workers * SHARDS_PER_WORKER:
                _submit(waiting, worker, running)
            while running:
                [done], _ = ray.wait(list(running))
                yield _result(done)
                _submit(waiting, running.pop(done), running)

    return run


def _submit(waiting: Iterator[Shard], worker: Any, running: dict[Any, Any]) -> None:
    """Give a worker the next shard, if there is one."""
    for shard in waiting:
        running[worker.encode.remote(shard)] = worker
        return


def _result(done: Any) -> tuple[int, EncodedShard]:
    """Return what a worker returned, or raise what it raised, without Ray's wrapping."""
    try:
        number, encoded = ray.get(done)
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise
    return number, encoded


def _check_gpus(num_workers: int, use_gpu: bool) -> None:
    """Fail if Ray would wait forever for GPUs; on a cluster, which may still grow, only warn.

    Raises:
        ConfigError: Ray runs on this machine alone, and it has fewer GPUs than workers.
    """
    found = int(ray.cluster_resources().get("GPU", 0))
    if not use_gpu or found >= num_workers:
        return
    if is_local():
        raise ConfigError(
            f"--gpu with {num_workers} workers needs {num_workers} GPUs, this machine has {found}; "
            f"use fewer workers, or set RAY_ADDRESS to the address of a cluster"
        )
    logger.warning("the cluster has %d GPUs for %d workers; waiting for more", found, num_workers)
