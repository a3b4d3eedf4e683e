"""The environment variables for Ray Serve and HAProxy, which `reir serve` sets before Ray starts.

With KubeRay, the same variables belong in the pods (docs/serve.md). This module does not import
Ray, because Ray reads most of the variables when it is imported.
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

SECRET = "REIR_SERVE_SECRET"
"""Variable with the secret by which the proxy and the replicas of one server recognize each other.
If it is not set, they do not check."""

HOST, LOOPBACK = "REIR_SERVE_HOST", "127.0.0.1"
"""Variable with the address that HAProxy listens on, and the loopback address. If the variable is
not set, HAProxy listens on the address in Ray's settings, as the replicas do."""

MAX_CONNECTIONS = 16_384
"""Connection limit for all clients together, if the limit of open files allows it
(`max_connections`)."""

FIRST_PORT, END_PORT, NUM_PORTS = 20_000, 32_000, 200
"""Range from which servers reserve blocks of ports (`END_PORT` excluded), and the size of a block.
It lies below the ports that the system assigns to outgoing connections."""

VARIABLES: Mapping[str, str] = {
    # HAProxy instead of Serve's own proxy has several times the throughput.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # If a replica dies before it has sent any of its answer, the request goes to another replica.
    # Any request may be sent twice: searches change nothing, and adding or deleting a photo again
    # has the same result, because its id is the same.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_RETRIES": "10",
    # HAProxy chooses the replica with the fewest connections. That is a dead one, which would get
    # every attempt until it is marked down, so one failed connection is enough for that.
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
    # A request can only be sent again while HAProxy holds all of it.
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    # A replica that is only slow, because another one is starting, stays in use.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "5",
    # Ray's metrics of HAProxy parse a log line for each request, in Python and on the cores that
    # should answer requests. Our own metrics count the same things.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # Timeout for a client that neither sends nor reads anything.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
    # If two processes shared a port, each would answer requests that are meant for the other.
    "SERVE_SOCKET_REUSE_PORT_ENABLED": "0",
    # Serve restarts the actor that manages HAProxy after three failed health checks.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # Refuses requests over the limit before Ray does any work for them.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": (
        "reir_serving.middleware.early_rejection:install"
    ),
    # Within this time HAProxy stops using a replica that shuts down.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # One thread computes in each replica: the other cores are for the other replicas, and for the
    # requests that arrive while a model computes. Two threads for the text model would answer a
    # single client 1.07 times faster, but two clients at once 0.93 times.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}


_reserved: list[socket.socket] = []
"""Sockets that are bound for as long as this process runs; see `reserve_ports`."""

MAX_FOLDER_LENGTH = 28
"""Maximum length of the folder's path in characters: the path of a socket in one of its subfolders
is limited to about 100."""


@contextmanager
def server_folder() -> Iterator[Path]:
    """Create a temporary folder for one server; at the end, delete it with its contents."""
    parent = Path(tempfile.gettempdir())
    # `TemporaryDirectory` adds eight characters to the prefix.
    if len(str(parent / "reir-12345678")) > MAX_FOLDER_LENGTH:
        parent = Path("/tmp")
    with tempfile.TemporaryDirectory(
        prefix="reir-", dir=parent, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def variables(folder: Path) -> dict[str, str]:
    """Return the environment variables of one server, without those that are set already.

    Args:
        folder: folder that only this server uses, for HAProxy's files and the metrics of all its
            processes.

    Raises:
        ConfigError: no block of ports is free.
    """
    cores, port = num_cores(), reserve_ports()
    values = {
        **VARIABLES,
        SECRET: secrets.token_hex(16),
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
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + NUM_PORTS),
        "PROMETHEUS_MULTIPROC_DIR": str(folder / "metrics"),
    }
    if not os.environ.get("RAY_ADDRESS"):
        # Have a local Ray use the loopback address, so that its control services and metrics
        # exporters are not reachable from other machines. (This is Ray's default on Windows and
        # macOS, hence the name of the variable.)
        values["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return {name: value for name, value in values.items() if name not in os.environ}


def apply(folder: Path) -> None:
    """Set the variables for this process and its children; call this before importing Ray.

    Raises:
        ConfigError: no block of ports is free.
    """
    program = folder / "balancer"
    # With `-P`, Python does not import modules from the current folder.
    command = f"{shlex.quote(sys.executable)} -P -m reir_serving.ray.load_balancer"
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    program.chmod(0o700)
    os.environ.update(variables(folder))


def reserve_ports() -> int:
    """Reserve a block of `NUM_PORTS` ports and return the first one.

    The process binds the first port for as long as it runs, which reserves the whole block against
    other servers on this machine.

    Raises:
        ConfigError: no block is free.
    """
    for port in range(FIRST_PORT, END_PORT, NUM_PORTS):
        reservation = socket.socket()
        try:
            reservation.bind((LOOPBACK, port))
        except OSError:  # another server has reserved this block
            reservation.close()
            continue
        _reserved.append(reservation)
        return port
    raise ConfigError(
        f"no block of {NUM_PORTS} ports between {FIRST_PORT} and {END_PORT} is free; "
        "stop one of the other servers on this machine first"
    )


def max_connections() -> int:
    """Return the connection limit: `MAX_CONNECTIONS`, or less if few open files are allowed.

    HAProxy needs two open files for each connection, and some for itself.
    """
    _, max_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if max_files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(100, min(MAX_CONNECTIONS, max_files // 2 - 500))
