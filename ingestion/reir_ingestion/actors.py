"""Ray workers that encode the photos of an evaluation: shells around `reir.evaluate.shards`."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import services
from ray.exceptions import RayError, RayTaskError

from reir.errors import ConfigError, ReirError, WorkersUnavailable
from reir.evaluate.shards import EncodedShard, Runner, Shard, encode_shard
from reir.models.seams import InstanceEncoder
from reir_ingestion.threads import beside

logger = logging.getLogger(__name__)

LOCAL = "local"
RETRIES = 3
IDLE_MS = 60_000
"""How long a worker of a Ray started here may be idle. Ray's own second is less than a stage waits
for its turn on a small machine, and a new worker costs seconds of CPU."""

VITAL = frozenset({"raylet", "gcs_server"})
"""Ray's processes on this machine that a job cannot survive without."""

WATCH_S = 0.5

CONNECT_S = 10.0
"""Time limit for connecting to a cluster."""

SHARDS_A_WORKER = 2
"""One that is encoded and one that waits, so that no worker waits for the driver."""


class ShardEncoder:
    """What a worker is: an encoder, loaded once.

    Args:
        load: returns the encoder; every machine must be able to.
    """

    def __init__(self, load: Callable[[], InstanceEncoder]) -> None:
        self._encoder = load()

    def encode(self, shard: Shard) -> tuple[int, EncodedShard]:
        """Encode a shard; returns it with its number."""
        return shard.number, encode_shard(self._encoder, shard)


def ray_runner(
    load: Callable[[], InstanceEncoder], *, num_workers: int, use_gpu: bool, threads: int
) -> Runner:
    """Return the runner that encodes shards on Ray workers, of this machine or of a cluster.

    The cluster is the one that `RAY_ADDRESS` names, as it does in a submitted job; without it, Ray
    is started on this machine and stopped at the end. A worker that dies is started again and does
    its shards again, up to `RETRIES` times.

    Args:
        load: returns the encoder, picklable.
        num_workers: workers.
        use_gpu: one GPU a worker.
        threads: CPUs that Ray reserves for a worker.
    """

    def run(shards: Iterable[Shard]) -> Iterator[tuple[int, EncodedShard]]:
        waiting = iter(shards)
        first = next(waiting, None)
        if first is None:
            return
        with cluster(num_workers * threads):
            _check_room(num_workers, use_gpu)
            make = ray.remote(ShardEncoder).options(
                num_cpus=threads,
                num_gpus=int(use_gpu),
                max_restarts=RETRIES,
                max_task_retries=RETRIES,
            )
            workers = [make.remote(load) for _ in range(num_workers)]
            running = {workers[0].encode.remote(first): workers[0]}
            for worker in workers * SHARDS_A_WORKER:
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


def _check_room(num_workers: int, use_gpu: bool) -> None:
    """Refuse to wait for GPUs that can never come; a cluster may still grow.

    Raises:
        ConfigError: Ray runs on this machine alone, and it has fewer GPUs than workers.
    """
    found = int(ray.cluster_resources().get("GPU", 0))
    if not use_gpu or found >= num_workers:
        return
    if _address() == LOCAL:
        raise ConfigError(
            f"--gpu with {num_workers} workers needs {num_workers} GPUs, this machine has {found}; "
            f"name a cluster with RAY_ADDRESS, or use fewer workers"
        )
    logger.warning("the cluster has %d GPUs for %d workers; waiting for more", found, num_workers)


def _address() -> str:
    """Where Ray is: what the environment names, else a new one on this machine."""
    return os.environ.get("RAY_ADDRESS") or LOCAL


@contextmanager
def cluster(num_cpus: int) -> Iterator[None]:
    """Use the running Ray, join the cluster at `RAY_ADDRESS`, or start Ray here and stop it after.

    Args:
        num_cpus: number of CPUs to report to a Ray started here, if this machine has fewer.

    Raises:
        WorkersUnavailable: Ray could not start, or the cluster does not answer.
    """
    if ray.is_initialized():
        yield
        return
    # Without an address Ray joins any cluster that it finds on the machine, also somebody else's.
    # A cluster has its own number of CPUs, and refuses to be told.
    options: dict[str, Any] = {}
    if _address() == LOCAL:
        cpus = max(os.cpu_count() or 1, num_cpus)
        kept = {"idle_worker_killing_time_threshold_ms": IDLE_MS}
        options = {"num_cpus": cpus, "include_dashboard": False, "_system_config": kept}
    _start(options)
    try:
        with beside("reir-ray", _watch):
            yield
    finally:
        ray.shutdown()


def _start(options: dict[str, Any]) -> None:
    try:
        _check_listens(_address())
        ray.init(address=_address(), log_to_driver=False, **options)
    except Exception as error:
        reason = _first_line(error)
        if _address() == LOCAL:
            raise WorkersUnavailable(
                f"Ray could not start on this machine: {reason}. It needs a few GB of free memory, "
                f"and free space in /dev/shm and in its temporary folder (RAY_TMPDIR, now "
                f"{os.environ.get('RAY_TMPDIR', '/tmp')}), which also holds its logs. To index "
                f"without Ray, run `reir index --runner local`"
            ) from error
        raise WorkersUnavailable(
            f"the Ray cluster at RAY_ADDRESS {_address()} does not answer: {reason}. Check the "
            f"address with `ray status --address {_address()}`, or unset RAY_ADDRESS to use this "
            f"machine"
        ) from error


def _check_listens(address: str) -> None:
    """Connect to a cluster once, since Ray itself would retry for a quarter of an hour, silently.

    Raises:
        OSError: nothing listens there.
    """
    if address == LOCAL or "://" in address:
        return
    found = services.canonicalize_bootstrap_address(address)
    host, _, port = found.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


def _watch(stop: threading.Event) -> None:
    """Report that a Ray process on this machine has died, and exit.

    Otherwise Ray's C++ code would end this process a few seconds later, with a page of log lines
    and no exception that could be caught.
    """
    node = ray._private.worker._global_node
    while node is not None and not stop.wait(WATCH_S):
        dead = VITAL & {name for name, _ in node.dead_processes()}
        if dead:
            logger.error(
                "Ray's process %s has died; the system kills such processes when memory runs out. "
                "What was written is kept: run the same command again to continue, with fewer "
                "workers (--num-workers) to need less memory",
                ", ".join(sorted(dead)),
            )
            logging.shutdown()
            os._exit(1)


@contextmanager
def our_errors() -> Iterator[None]:
    """Unwrap the errors that stages raise on purpose, and explain those of Ray itself."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, ReirError):
            raise error.cause from error
        raise
    except RayError as error:
        raise WorkersUnavailable(
            f"Ray lost a worker, a machine or data of this job: {_first_line(error).rstrip('.')}. "
            f"What was written is kept: run the same command again to continue, with fewer workers "
            f"(--num-workers) if memory ran out"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
