"""What has to stand in the environment before Ray starts: set by `reir serve`, read by Ray Serve.

On KubeRay the same variables belong into the pods (docs/serve.md). Knows no Ray.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from reir.cores import num_cores

SWITCHES: Mapping[str, str] = {
    # HAProxy in place of Serve's own proxy: several times the throughput.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A request whose replica died before it said anything goes to another one. All requests may be
    # sent twice: searches change nothing, and photos are added and deleted under the same id.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_RETRIES": "10",
    # A dead replica has the fewest connections, so it would get every attempt until it is left out.
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
    # A request can only be sent again while HAProxy holds all of it.
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    # One that is only slow, because another one starts beside it, stays in.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "5",
    # A line of log for each request, parsed in Python on the cores that should answer; what is
    # counted there our own metrics count as well.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # What finds no room is refused before Ray has spent anything on it.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "reir_serving.early:middlewares",
    # HAProxy leaves out a replica that goes within this time.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # Models compute on one thread a replica, unless a call is alone (`sharing.py`).
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def settings(folder: Path) -> dict[str, str]:
    """Return the variables of one server on this machine, those set already left out.

    Args:
        folder: of this server alone: HAProxy's files, and the figures of all its processes.
    """
    cores = num_cores()
    wanted = {
        **SWITCHES,
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, cores // 4))),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "PROMETHEUS_MULTIPROC_DIR": str(folder / "metrics"),
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}


def apply(folder: Path) -> None:
    """Set the variables in this process, whose children inherit them; before Ray is imported."""
    os.environ.update(settings(folder))


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port of this machine that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
