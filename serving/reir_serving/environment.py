"""What has to stand in the environment before Ray starts: set by `reir serve`, read by Ray Serve.

On KubeRay the same variables belong into the pods (docs/serve.md). Knows no Ray.
"""

from __future__ import annotations

import os
import resource
import secrets
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from reir.cores import num_cores
from reir.errors import ConfigError

MARK = "REIR_SERVE_MARK"
"""A secret of one server, that its proxy and its replicas know each other by; without it they take
each other for what Ray says."""

HOST, LOOPBACK = "REIR_SERVE_HOST", "127.0.0.1"
"""Where HAProxy serves; without the variable it is where Ray says, as replicas do."""

CONNECTIONS = 16_384
"""Of all clients together, where that many files may be open: two each, and some."""

FIRST_PORT, PAST_PORTS, PORTS = 20_000, 32_000, 200
"""Where blocks of ports are taken: below those that the system gives to connections."""

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
    # Of a client that neither sends nor reads, whatever it is about to.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
    # No two processes may listen on one port: either would answer for the other.
    "SERVE_SOCKET_REUSE_PORT_ENABLED": "0",
    # Serve starts what looks after HAProxy anew when three of its questions were not answered.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # What finds no room is refused before Ray has spent anything on it.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "reir_serving.early:middlewares",
    # HAProxy leaves out a replica that goes within this time.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # Models compute on one thread a replica, unless a call is alone (`sharing.py`).
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}


_claimed: list[socket.socket] = []

LONGEST_FOLDER = 28
"""Characters of the folder's path: the system takes some 100 for a socket below it."""


@contextmanager
def own_folder() -> Iterator[Path]:
    """Make a folder for one server, and remove it with all that is in it."""
    parent = Path(tempfile.gettempdir())
    if len(str(parent / "reir-12345678")) > LONGEST_FOLDER:
        parent = Path("/tmp")
    with tempfile.TemporaryDirectory(
        prefix="reir-", dir=parent, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def settings(folder: Path) -> dict[str, str]:
    """Return the variables of one server on this machine, those set already left out.

    Args:
        folder: of this server alone: HAProxy's files, and the figures of all its processes.

    Raises:
        ConfigError: there is no room for another server.
    """
    cores, port = num_cores(), claim_ports()
    wanted = {
        **SWITCHES,
        MARK: secrets.token_hex(16),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / "balancer"),
        "RAY_SERVE_HAPROXY_MAXCONN": str(max_connections()),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, cores // 4))),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "balancer.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(port + 1),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(port + 2),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(port + 3),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port + 4),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + PORTS),
        "PROMETHEUS_MULTIPROC_DIR": str(folder / "metrics"),
    }
    if not os.environ.get("RAY_ADDRESS"):
        # A Ray of this machine alone takes the loopback address for its own, so that its control
        # and its exporters listen there only. (Ray's name for it comes from where it does so by
        # default.)
        wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return {name: value for name, value in wanted.items() if name not in os.environ}


def apply(folder: Path) -> None:
    """Set the variables in this process, whose children inherit them; before Ray is imported.

    Raises:
        ConfigError: there is no room for another server.
    """
    program = folder / "balancer"
    command = f"{shlex.quote(sys.executable)} -P -m reir_serving.load_balancer"
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    program.chmod(0o700)
    os.environ.update(settings(folder))


def claim_ports() -> int:
    """Return the first of `PORTS` ports that no other server of this machine takes.

    Whoever holds the first port has them all, as long as its process lives.

    Raises:
        ConfigError: all are taken.
    """
    for port in range(FIRST_PORT, PAST_PORTS, PORTS):
        claim = socket.socket()
        try:
            claim.bind((LOOPBACK, port))
        except OSError:
            claim.close()
            continue
        _claimed.append(claim)
        return port
    raise ConfigError(
        f"no block of {PORTS} ports from {FIRST_PORT} to {PAST_PORTS} is left: end other servers"
    )


def max_connections() -> int:
    """Return how many clients may be connected: as many as this process may open files for."""
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most_files == resource.RLIM_INFINITY:
        return CONNECTIONS
    return max(100, min(CONNECTIONS, most_files // 2 - 500))


def free_port(host: str = LOOPBACK) -> int:
    """Return a port of this machine that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
