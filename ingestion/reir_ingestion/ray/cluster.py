"""Start Ray on this machine or join a cluster, and translate its errors and quiet its logs."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import services
from ray.exceptions import RayError, RayTaskError

from reir.errors import ReirError, WorkersUnavailable
from reir_ingestion.threads import background_thread

logger = logging.getLogger(__name__)

LOCAL = "local"
IDLE_MS = 60_000
"""How long a worker process may be idle in a Ray that is started here. By default, Ray ends one
after a second if there are more of them than CPUs. On a small machine, a stage may wait longer than
that for its turn, and a new process costs seconds of CPU time."""

VITAL_PROCESSES = frozenset({"raylet", "gcs_server"})
"""Ray's processes on this machine without which no job can continue."""

# Shorter than the few seconds after which Ray itself ends the process; see `_watch`.
WATCH_INTERVAL_S = 0.5

CONNECT_TIMEOUT_S = 10.0


def is_local() -> bool:
    """Return whether Ray runs on this machine alone, rather than on a cluster."""
    return _address() == LOCAL


def _address() -> str:
    """Return the address that the environment names, or `LOCAL` to start Ray here."""
    return os.environ.get("RAY_ADDRESS") or LOCAL


@contextmanager
def start_or_join_ray(num_cpus: int) -> Iterator[None]:
    """Use the running Ray, or join the cluster at `RAY_ADDRESS`, or start Ray for this block.

    Args:
        num_cpus: number of CPUs to report to a Ray started here, if this machine has fewer.

    Raises:
        WorkersUnavailable: Ray could not start, or the cluster does not answer.
    """
    if ray.is_initialized():  # whoever started Ray also shuts it down
        yield
        return
    # `_start` always gives an address. Without one, Ray would join any cluster that it finds on
    # this machine, even one of another user. The options are for a new Ray only: `ray.init` fails
    # if they are given when it joins a cluster.
    options: dict[str, Any] = {}
    if is_local():
        # CPUs of Ray are slots, not cores. Even on a small machine, there must be enough of them
        # for everything that runs at the same time, or Ray would wait forever for a free one.
        cpus = max(os.cpu_count() or 1, num_cpus)
        system_config = {"idle_worker_killing_time_threshold_ms": IDLE_MS}
        options = {"num_cpus": cpus, "include_dashboard": False, "_system_config": system_config}
    _start(options)
    try:
        with background_thread("reir-ray", _watch):
            yield
    finally:
        ray.shutdown()


def describe_cluster() -> dict[str, Any]:
    """Return Ray's release, and the nodes and resources of the cluster at `RAY_ADDRESS`.

    Returns:
        `ray`, `nodes` (those that are alive), and `total` and `free`: resource -> amount.

    Raises:
        WorkersUnavailable: the cluster does not answer.
    """
    with start_or_join_ray(0):
        return {
            "ray": ray.__version__,
            "nodes": sum(bool(node["Alive"]) for node in ray.nodes()),
            "total": ray.cluster_resources(),
            "free": ray.available_resources(),
        }


def _start(options: dict[str, Any]) -> None:
    try:
        _check_listens(_address())
        ray.init(address=_address(), log_to_driver=False, **options)
    except Exception as error:
        reason = _first_line(error)
        if is_local():
            raise WorkersUnavailable(
                f"Ray could not start on this machine: {reason}. It needs a few GB of free memory "
                f"and free space in /dev/shm and in its temporary folder (RAY_TMPDIR, now "
                f"{os.environ.get('RAY_TMPDIR', '/tmp')}), which also holds its logs. "
                f"`reir index --runner local` and the other writers of `reir build-dataset` work "
                f"without Ray"
            ) from error
        raise WorkersUnavailable(
            f"the Ray cluster at RAY_ADDRESS {_address()} does not answer: {reason}. Check the "
            f"address with `ray status --address {_address()}`, or unset RAY_ADDRESS to use this "
            f"machine"
        ) from error


def _check_listens(address: str) -> None:
    """Check that a cluster accepts connections.

    Ray itself would retry for a quarter of an hour without any message.

    Raises:
        OSError: nothing listens at this address.
    """
    if address == LOCAL or "://" in address:
        return
    # Resolves "auto" to the address of the cluster that runs on this machine.
    found = services.canonicalize_bootstrap_address(address)
    host, _, port = found.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _watch(stop: threading.Event) -> None:
    """Exit with an explanation when a vital Ray process on this machine dies.

    Otherwise Ray's C++ code would end this process a few seconds later, with a page of log lines
    and no exception that could be caught.
    """
    node = ray._private.worker._global_node
    while node is not None and not stop.wait(WATCH_INTERVAL_S):
        dead = VITAL_PROCESSES & {name for name, _ in node.dead_processes()}
        if dead:
            logger.error(
                "Ray's process %s has died. The operating system kills processes when memory runs "
                "out. Everything written so far is kept: run the same command again to continue, "
                "with fewer workers (--num-workers, --engines) to use less memory",
                ", ".join(sorted(dead)),
            )
            # Not `sys.exit`, which would end this thread only: the main thread waits within Ray.
            logging.shutdown()
            os._exit(1)


@contextmanager
def translate_ray_errors() -> Iterator[None]:
    """Raise the errors of the stages without Ray's wrapping, and explain errors of Ray itself."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, ReirError):
            raise error.cause from error
        raise
    except RayError as error:
        raise WorkersUnavailable(
            f"Ray lost a worker, a machine or data of this job: {_first_line(error).rstrip('.')}. "
            f"Everything written so far is kept: run the same command again to continue, with "
            f"fewer workers (--num-workers, --engines) if memory ran out"
        ) from error


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Let Ray Data log warnings only, except the one that its progress bars are off."""
    levels = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
