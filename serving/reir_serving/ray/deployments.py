"""The application on Ray Serve: deployments that wrap `Service` and `SearchWorkers`.

    fused    one deployment, `ingress`: each replica serves HTTP and has its own workers
    split    `ingress` serves HTTP; the workers are the deployments `text`, `retriever`, `reranker`
             and `localizer`

A call from one replica to another takes about 3 ms on two slow cores, a whole search about 15 ms
(docs/serve.md), so small machines use the fused layout. The same classes do the work in both.

`build_app` is what a Serve config file names: `reir_serving.ray.deployments:build_app`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError

from reir import __version__
from reir.config import load_config, reir_home
from reir.errors import Overloaded
from reir.store import InstanceStore, open_store
from reir.tracing import start_tracing
from reir_serving.backend.models import ModelCache, model_loader
from reir_serving.backend.service import Service
from reir_serving.backend.store_folder import folder_check
from reir_serving.backend.workers import DEPLOYMENT_OF, SearchWorkers
from reir_serving.config import Layout, LiveSettings, Replicas, ServeConfig
from reir_serving.http.app import create_app
from reir_serving.middleware.early_rejection import set_admission_control
from reir_serving.middleware.logs import open_logs
from reir_serving.middleware.metrics import Metrics

APP, INGRESS = "reir", "ingress"
SERVICE = "reir-serve"
"""Name of this service in traces."""

# With fewer CPUs, calls between replicas would make searches slower (docs/serve.md).
FUSED_BELOW_CPUS = 8

RETRY_AFTER_S = 1.0
"""`Retry-After` of a request that found the queue of a deployment full."""

ATTEMPTS = 3
"""Maximum number of attempts of a call whose replica died before it answered. Calls can be repeated
because none of them changes anything: the replicas of `ingress` write to the store themselves."""

HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2.0, 30.0
SPARE_REQUESTS = 64
"""Number of requests beyond the limits that Serve passes to a replica: health checks, metrics, the
page, and requests that the replica itself rejects."""


def build_app(args: ServeConfig | Mapping[str, Any]) -> Any:
    """Return the application to run on Serve; `args` is the section `args` of its config file.

    Raises:
        ConfigError: a setting is wrong.
    """
    # Serve passes a mapping: it makes an object only of a class that the annotation names alone.
    config = args if isinstance(args, ServeConfig) else load_config(ServeConfig, args)
    ingress = _deployment(Ingress, INGRESS, config.ingress, config)
    ingress = ingress.options(user_config=config.live.model_dump(mode="json"))
    values = config.model_dump(mode="json")
    if layout_of(config) == "fused":
        return ingress.bind(values)
    # The names are the values of `DEPLOYMENT_OF`, by which `RemoteWorkers` finds the handles.
    workers = {
        name: _deployment(WorkerReplica, name, replicas, config).bind(values)
        for name, replicas in (
            ("text", config.text),
            ("retriever", config.retriever),
            ("reranker", config.reranker),
            ("localizer", config.localizer),
        )
    }
    return ingress.bind(values, workers)


def layout_of(config: ServeConfig, resources: Mapping[str, float] | None = None) -> Layout:
    """Return the layout to use: "auto" becomes "fused" if there are few CPUs and no GPU.

    Args:
        config: the settings; a `layout` other than "auto" is returned as it is.
        resources: resources of the cluster by name; None asks Ray.
    """
    if config.layout != "auto":
        return config.layout
    available = ray.cluster_resources() if resources is None else resources
    is_small = available.get("CPU", 0) < FUSED_BELOW_CPUS and not available.get("GPU", 0)
    return "fused" if is_small else "split"


class Ingress:
    """Deployment that serves HTTP; in the fused layout its replicas do all the work."""

    def __init__(self, values: dict[str, Any], handles: dict[str, Any] | None = None) -> None:
        """Create the service of one replica.

        Args:
            values: `ServeConfig` as JSON values.
            handles: handles of the deployments that do the work, by name; None in the fused layout,
                in which this replica does the work.
        """
        config = load_config(ServeConfig, values)
        open_logs(config.access_log)
        # Before `create_app`, which asks only once whether there are traces.
        start_tracing(SERVICE)
        store, check = _open_store(config)
        self._config, self._is_warm, self._metrics = config, False, Metrics()
        if handles is None:
            models = ModelCache(model_loader(config.zoomer))
            workers = SearchWorkers(store, models, config.limits, self._metrics.note_batch, check)
        else:
            # Type checkers do not see the methods that `__getattr__` provides.
            workers = cast("SearchWorkers", RemoteWorkers(handles))
        self._service = Service(config, store, workers, config.uploads or reir_home() / "uploads")

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application that answers HTTP; Serve calls this method by its name."""
        app = create_app(self._service, self._config, self._metrics)
        # The code that rejects requests before they reach the application needs the same counts.
        set_admission_control(app.state.admission)
        return app

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply live settings. The first call also warms the replica up.

        Serve calls this before a replica counts as ready, so no request waits for a model to load.
        It calls this again for every change of the live settings.
        """
        self._service.live = load_config(LiveSettings, user_config)
        if not self._is_warm:
            await self._service.warm_up()
            self._is_warm = True

    async def check_health(self) -> None:
        """Search for the canary expression; Serve replaces a replica for which this fails."""
        await self._service.check_health()


class WorkerReplica(SearchWorkers):
    """`SearchWorkers` as a deployment: a replica loads only the models that its calls need."""

    def __init__(self, values: dict[str, Any]) -> None:
        """Create the workers of one replica; `values` is `ServeConfig` as JSON values."""
        config = load_config(ServeConfig, values)
        store, check = _open_store(config)
        models = ModelCache(model_loader(config.zoomer))
        super().__init__(store, models, config.limits, check=check)


def _open_store(config: ServeConfig) -> tuple[InstanceStore, Callable[[], None]]:
    """Open the store, and return it with the function that checks that its folder exists."""
    check = folder_check(config.store)
    check()  # opening would create an empty store in a folder that does not exist
    # Not patient, because the circuit breaker answers clients at once, and they try again.
    return open_store(config.store, patient=False), check


class RemoteWorkers:
    """The methods of `SearchWorkers`, each of which calls a replica of a worker deployment."""

    def __init__(self, handles: dict[str, Any]) -> None:
        """Call the deployments behind Serve's handles, by name."""
        self._handles = handles

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        """Return a function that calls a method of `SearchWorkers` remotely."""
        if method not in DEPLOYMENT_OF:
            raise AttributeError(f"no deployment is known for the method {method!r}")
        return partial(self._call, DEPLOYMENT_OF[method], method)

    async def _call(self, deployment: str, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of a deployment; repeat the call if the replica that had it died."""
        for left in reversed(range(ATTEMPTS)):
            try:
                with _original_errors(deployment):
                    remote_method = getattr(self._handles[deployment], method)
                    return await remote_method.remote(*args, **options)
            except RayActorError:
                if not left:
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")


@contextmanager
def _original_errors(deployment: str) -> Iterator[None]:
    """Raise the errors that `SearchWorkers` raises in place of Ray's, which wrap them."""
    try:
        yield
    except RayTaskError as error:
        raise error.cause from error
    except BackPressureError as error:
        raise Overloaded(f"the queue of {deployment}", RETRY_AFTER_S) from error


def _deployment(cls: type, name: str, replicas: Replicas, config: ServeConfig) -> Any:
    """Return a class as a Serve deployment."""
    limits = config.limits
    waiting = limits.max_queued_photos if name == "localizer" else limits.max_queued_requests
    options: dict[str, Any] = {
        "max_ongoing_requests": limits.max_ongoing_requests,
        "max_queued_requests": waiting,
    }
    if name == INGRESS:
        # `AdmissionControl` applies the limits of this deployment. Serve's own limit would count
        # health checks and metrics too, and reject them when the server is busy.
        options = {"max_ongoing_requests": limits.max_ongoing_requests + waiting + SPARE_REQUESTS}
        # Without an application: each replica builds its own in `__serve_build_asgi_app__`.
        cls = serve.ingress()(cls)
    if replicas.min_replicas == replicas.max_replicas:  # Serve accepts one of the two options only
        options["num_replicas"] = replicas.min_replicas
    else:
        options["autoscaling_config"] = _autoscaling(replicas)
    deployment = serve.deployment(
        cls,
        name=name,
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        graceful_shutdown_timeout_s=config.graceful_shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,  # Serve's 2 s would delay each shutdown by as much
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        **options,
    )
    # Without an explicit version, each `serve.run` generates a random one and therefore replaces
    # all replicas, even if only `user_config` has changed, for which none has to restart. Serve
    # accepts a version from its own code only, hence `_internal`.
    return deployment.options(version=_version(config), _internal=True)


def _version(config: ServeConfig) -> str:
    """Return a version that changes with any setting for which replicas have to restart."""
    fixed = config.model_dump_json(exclude={"live"})
    return hashlib.sha256(f"{__version__} {fixed}".encode()).hexdigest()[:16]


def _autoscaling(replicas: Replicas) -> dict[str, Any]:
    return {
        "min_replicas": replicas.min_replicas,
        "max_replicas": replicas.max_replicas,
        "target_ongoing_requests": replicas.target_ongoing_requests,
        "upscale_delay_s": replicas.upscale_delay_s,
        "downscale_delay_s": replicas.downscale_delay_s,
        # Serve's defaults, 10 s and 30 s, are longer than `upscale_delay_s` usually is.
        "metrics_interval_s": 1.0,
        "look_back_period_s": max(replicas.upscale_delay_s, 2.0),
    }
