"""Starts Ray and Ray Serve for one application, reconfigures the application, and stops it."""

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
from reir_serving.ray.deployments import APP, build_app, layout_of
from reir_serving.ray.draining import drain
from reir_serving.ray.environment import HOST, LOOPBACK

LOCAL = "local"
CONTROLLER = {"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}
"""Name of Ray Serve's controller, the actor that keeps the replicas and HAProxy running."""

LOOPBACK_OF = {"0.0.0.0": LOOPBACK, "::": "::1"}
"""Wildcard address that a server listens on -> address at which this machine reaches it."""

HAPROXY_TIMEOUT_S = 10.0
"""Seconds to wait until HAProxy knows a replica; if it takes longer, clients get 503 until then."""

SPARE_CPUS = 1
"""Number of CPUs that Ray gets in addition to those of the replicas, so that one more replica
always fits, for example while a replica that shuts down still occupies its CPUs."""


@contextmanager
def serving(config: ServeConfig, folder: Path) -> Iterator[str]:
    """Serve an application on the cluster of `RAY_ADDRESS`, or on a Ray started here.

    Call `environment.apply` first. When the context ends, open requests have up to
    `graceful_shutdown_timeout_s` to finish; then everything stops. An existing cluster keeps
    running without the application.

    Args:
        config: what to serve.
        folder: folder that only this server uses; holds HAProxy's settings and Ray's files.

    Yields:
        The server's address, once all replicas are ready.

    Raises:
        ReirError: a replica could not start; the message says why.
    """
    address = _ray_address()
    options: dict[str, Any] = {}
    if address == LOCAL:
        # Ray's files go to a folder that is deleted at the end, and not to /tmp/ray.
        options = {
            "num_cpus": num_cpus(config),
            "include_dashboard": False,
            "_temp_dir": str(folder / "ray"),
            "_metrics_export_port": config.ray_metrics_port or None,
        }
        os.environ[HOST] = config.host  # for HAProxy; all else listens on the loopback address
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    try:
        # Replicas listen on this host too. A local HAProxy gets the configured one from `HOST`.
        host = LOOPBACK if address == LOCAL else config.host
        serve.start(http_options={"host": host, "port": config.port})
        with _plain_errors():
            serve.run(build_app(_with_layout(config, address)), name=APP, route_prefix="/")
        if address == LOCAL:  # on a cluster, HAProxy may run on other machines only
            _wait_for_haproxy(config)
        yield f"http://{_url_host(config.host)}:{config.port}/"
    finally:
        with _stdout_discarded():
            if address == LOCAL:
                _stop(folder, config.graceful_shutdown_timeout_s)
            else:  # others may use the cluster and its Serve
                serve.delete(APP)
            ray.shutdown()


def _wait_for_haproxy(config: ServeConfig) -> None:
    """Wait until HAProxy knows a replica, which is shortly after Serve reports that it is ready."""
    host = LOOPBACK_OF.get(config.host, config.host)
    until_s = time.monotonic() + HAPROXY_TIMEOUT_S
    while time.monotonic() < until_s:
        connection = HTTPConnection(host, config.port, timeout=HAPROXY_TIMEOUT_S)
        with closing(connection), suppress(OSError, HTTPException):
            # HAProxy itself answers 503 to this path while it knows no replica.
            connection.request("GET", "/healthz")
            if connection.getresponse().status != HTTPStatus.SERVICE_UNAVAILABLE:
                return
        time.sleep(0.05)


@contextmanager
def _stdout_discarded() -> Iterator[None]:
    """Discard what Ray prints about tasks that fail because of the shutdown."""
    with open(os.devnull, "w", encoding="utf-8") as null, redirect_stdout(null):
        yield


def _stop(folder: Path, within_s: float) -> None:
    """Finish open requests before Ray and its processes are shut down.

    Serve's own shutdown would kill HAProxy first and abort open requests. The controller must be
    killed before HAProxy is drained, because it would start another HAProxy.
    """
    with suppress(ValueError):  # there is no controller, since Serve did not start
        ray.kill(ray.get_actor(**CONTROLLER), no_restart=True)
    drain(folder, within_s)


def reconfigure(config: ServeConfig, live: LiveSettings) -> None:
    """Apply new live settings to a running application, without a restart of any replica.

    Serve compares the whole application with the running one, and finds that only the `user_config`
    of `ingress` differs.
    """
    changed = _with_layout(config, _ray_address()).model_copy(update={"live": live})
    serve.run(build_app(changed), name=APP, route_prefix="/")


def num_cpus(config: ServeConfig) -> int:
    """Return the number of CPUs to give to a Ray started here: at least what the replicas need.

    Ray uses the number only to decide what fits. With the machine's number of cores, a user who
    asks for more replicas would wait forever for the last of them.
    """
    deployments = (config.ingress, config.text, config.retriever, config.reranker, config.localizer)
    needed = sum(each.max_replicas * each.num_cpus for each in deployments)
    return max(os.cpu_count() or 1, int(needed) + SPARE_CPUS)


def _ray_address() -> str:
    """Return the address of the Ray cluster in the environment; `LOCAL` to start one here."""
    return os.environ.get("RAY_ADDRESS") or LOCAL


def _with_layout(config: ServeConfig, address: str) -> ServeConfig:
    """Return the settings with the layout to use in place of "auto"."""
    resources = dict(ray.cluster_resources())
    if address == LOCAL:  # `num_cpus` may have given Ray more CPUs than there are
        resources["CPU"] = os.cpu_count() or 1
    return config.model_copy(update={"layout": layout_of(config, resources)})


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the error that prevented the start of a replica, without Serve's traceback.

    Serve reports the error only as text. The last line that names one of our errors is the cause.
    """
    try:
        yield
    except RuntimeError as error:
        causes = [line for line in str(error).splitlines() if line.startswith("reir.errors.")]
        if not causes:
            raise
        cause = causes[-1].partition(": ")[2]
        raise ReirError(f"the server could not start: {cause}") from error


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
