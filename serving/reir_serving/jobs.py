"""Ray and Serve around one application: started, kept up, drained."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve

from reir.errors import ReirError
from reir_serving.config import LiveSettings, ServeConfig
from reir_serving.deployments import APP, build_app, layout_of

LOCAL = "local"
SYSTEM_CPUS = 1
"""CPUs beyond those of the replicas that Ray is told of, so that one more replica always fits."""


@contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """Serve an application on the cluster of `RAY_ADDRESS`, or on a Ray started here.

    Call `environment.apply` first. At the end requests under way are answered, then all stops; a
    cluster that was there before goes on without the application.

    Yields:
        The address, once all replicas are ready.

    Raises:
        ReirError: a replica could not start; the message says why.
    """
    address = _address()
    options: dict[str, Any] = {}
    if address == LOCAL:
        options = {"num_cpus": num_cpus(config), "include_dashboard": False}
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    try:
        serve.start(http_options={"host": config.host, "port": config.port})
        with _told_plainly():
            serve.run(build_app(_laid_out(config, address)), name=APP, route_prefix="/")
        yield f"http://{_shown(config.host)}:{config.port}/"
    finally:
        if address == LOCAL:
            serve.shutdown()
        else:
            serve.delete(APP)
        ray.shutdown()


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
