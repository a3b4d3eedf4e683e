"""Ray and Serve around one application: started, kept up, drained."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stdout, suppress
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import ray
from ray import serve

from reir.errors import ReirError
from reir_serving.config import LiveSettings, ServeConfig
from reir_serving.deployments import APP, build_app, layout_of
from reir_serving.draining import drain
from reir_serving.environment import HOST, LOOPBACK

LOCAL = "local"
CONTROLLER = {"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}
"""Name of Ray Serve's controller, the actor that keeps the replicas and HAProxy running."""

OWN_ADDRESS = {"0.0.0.0": LOOPBACK, "::": "::1"}
"""Wildcard address that a server listens on -> address at which this machine reaches it."""

HEARD_WITHIN_S = 10.0
"""Seconds to wait until HAProxy knows a replica; if it takes longer, clients get 503 until then."""

SYSTEM_CPUS = 1
"""CPUs given to Ray in addition to those of the replicas, so that one more replica always fits."""


@contextmanager
def serving(config: ServeConfig, folder: Path) -> Iterator[str]:
    """Serve an application on the cluster of `RAY_ADDRESS`, or on a Ray started here.

    Call `environment.apply` first. When the context ends, open requests have up to `drain_s`
    seconds to finish; then everything stops. An existing cluster keeps running without the
    application.

    Args:
        config: what to serve.
        folder: folder that only this server uses; holds HAProxy's settings and Ray's files.

    Yields:
        The server's address, once all replicas are ready.

    Raises:
        ReirError: a replica could not start; the message says why.
    """
    address = _address()
    options: dict[str, Any] = {}
    if address == LOCAL:
        own = {"include_dashboard": False, "_temp_dir": str(folder / "ray")}
        options = {"num_cpus": num_cpus(config), **own}
        os.environ[HOST] = config.host  # for HAProxy; all else listens on the loopback address
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    try:
        host = LOOPBACK if address == LOCAL else config.host
        serve.start(http_options={"host": host, "port": config.port})
        with _told_plainly():
            serve.run(build_app(_laid_out(config, address)), name=APP, route_prefix="/")
        if address == LOCAL:
            _wait_for_haproxy(config)
        yield f"http://{_shown(config.host)}:{config.port}/"
    finally:
        with _without_echo():
            if address == LOCAL:
                _end(folder, config.drain_s)
            else:
                serve.delete(APP)
            ray.shutdown()


def _wait_for_haproxy(config: ServeConfig) -> None:
    """Wait until HAProxy knows a replica, which is shortly after Serve reports that it is ready."""
    host = OWN_ADDRESS.get(config.host, config.host)
    until_s = time.monotonic() + HEARD_WITHIN_S
    while time.monotonic() < until_s:
        line = HTTPConnection(host, config.port, timeout=HEARD_WITHIN_S)
        with closing(line), suppress(OSError, HTTPException):
            line.request("GET", "/healthz")
            if line.getresponse().status != HTTPStatus.SERVICE_UNAVAILABLE:
                return
        time.sleep(0.05)


@contextmanager
def _without_echo() -> Iterator[None]:
    """Discard what Ray prints about tasks that fail because of the shutdown."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def _end(folder: Path, within_s: float) -> None:
    """Finish open requests before Ray and its processes are shut down.

    Serve's own shutdown would kill HAProxy first and abort open requests. The controller must be
    killed before HAProxy is drained, because it would start another HAProxy.
    """
    with suppress(ValueError):  # there is no controller, since Serve did not start
        ray.kill(ray.get_actor(**CONTROLLER), no_restart=True)
    drain(folder, within_s)


def reconfigure(config: ServeConfig, live: LiveSettings) -> None:
    """Give a running application other live settings; no replica restarts."""
    changed = _laid_out(config, _address()).model_copy(update={"live": live})
    serve.run(build_app(changed), name=APP, route_prefix="/")


def num_cpus(config: ServeConfig) -> int:
    """Return how many CPUs a Ray of this machine alone is told of: all, or what replicas need."""
    parts = (config.ingress, config.text, config.retriever, config.reranker, config.localiser)
    needed = sum(each.most * each.num_cpus for each in parts)
    return max(os.cpu_count() or 1, int(needed) + SYSTEM_CPUS)


def _address() -> str:
    """Where Ray is: what the environment names, else a new one on this machine."""
    return os.environ.get("RAY_ADDRESS") or LOCAL


def _laid_out(config: ServeConfig, address: str) -> ServeConfig:
    """Choose the layout by this machine's CPUs; a Ray started here may be told of more."""
    found = dict(ray.cluster_resources())
    if address == LOCAL:
        found["CPU"] = os.cpu_count() or 1
    return config.model_copy(update={"layout": layout_of(config, found)})


@contextmanager
def _told_plainly() -> Iterator[None]:
    """Raise why a replica could not start, without the traceback that Serve puts around it."""
    try:
        yield
    except RuntimeError as error:
        ours = [line for line in str(error).splitlines() if line.startswith("reir.errors.")]
        if not ours:
            raise
        raise ReirError(f"the service does not start: {ours[-1].partition(': ')[2]}") from error


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
