"""The application on Ray Serve: thin shells around `LocalParts` and `Service`.

    fused    one deployment, `ingress`: HTTP and all parts in each replica
    split    `ingress` for HTTP; `text`, `retriever`, `reranker` and `localiser` do the work

A call from one replica to another costs some 3 ms on two slow cores, a whole search some 15
(docs/serve.md), so small machines fuse. The same classes do the work in both.

`build_app` is what a Serve config file names: `reir_serving.deployments:build_app`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError

from reir import __version__
from reir.config import load_config, reir_home
from reir.models.seams import EncodedExpression
from reir.records import FloatArray, MaskRle
from reir.retrieval import Retrieved
from reir.stages import Refined, Refinement, Reordered, Reordering
from reir.store import VersionSpec, open_store
from reir_serving.app import create_app
from reir_serving.backend import Box, Localisation, Overloaded
from reir_serving.config import Layout, LiveSettings, Replicas, ServeConfig
from reir_serving.early import stand_at
from reir_serving.logs import open_logs
from reir_serving.metrics import Metrics
from reir_serving.parts import LocalParts, Model, Models, Wanted
from reir_serving.photos import Seen
from reir_serving.service import Service
from reir_serving.store_folder import folder_check

APP, INGRESS = "reir", "ingress"
FUSED_BELOW_CPUS = 8

RETRY_AFTER_S = 1.0
"""When a call that found the queue of a part full should come again."""

ATTEMPTS = 3
"""A part whose replica died before it answered is asked again: no call changes anything."""

HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2.0, 30.0
SPARE_REQUESTS = 64
"""What a replica takes beyond requests to be answered: health, metrics, the page, refusals."""

T = TypeVar("T")


def build_app(args: ServeConfig) -> Any:
    """Return the application to run on Serve; `args` are those of the Serve config file."""
    ingress = _deployment(Ingress, INGRESS, args.ingress, args)
    ingress = ingress.options(user_config=args.live.model_dump(mode="json"))
    values = args.model_dump(mode="json")
    if layout_of(args) == "fused":
        return ingress.bind(values)
    parts = {
        name: _deployment(Part, name, replicas, args).bind(values)
        for name, replicas in (
            ("text", args.text),
            ("retriever", args.retriever),
            ("reranker", args.reranker),
            ("localiser", args.localiser),
        )
    }
    return ingress.bind(values, parts)


def layout_of(config: ServeConfig, resources: Mapping[str, float] | None = None) -> Layout:
    """Return the layout that is meant: "auto" is "fused" where there are few CPUs and no GPU.

    Args:
        config: says "auto", or decides.
        resources: as Ray counts them; None asks the cluster.
    """
    if config.layout != "auto":
        return config.layout
    found = ray.cluster_resources() if resources is None else resources
    small = found.get("CPU", 0) < FUSED_BELOW_CPUS and not found.get("GPU", 0)
    return "fused" if small else "split"


class Ingress:
    """Shell of `Service`: HTTP, and all parts unless they are given."""

    def __init__(self, values: dict[str, Any], parts: dict[str, Any] | None = None) -> None:
        config = load_config(ServeConfig, values)
        open_logs(config.access_log)
        check = folder_check(config.store)
        check()
        store = open_store(config.store, patient=False)
        self._config, self._is_warm, self._metrics = config, False, Metrics()
        local = LocalParts(store, Models(), config.limits, self._metrics.note_batch, check)
        self._service = Service(
            config,
            store,
            RemoteParts(parts) if parts else local,
            config.uploads or reir_home() / "uploads",
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return what answers HTTP."""
        app = create_app(self._service, self._config, self._metrics)
        stand_at(app.state.door)
        return app

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take other settings; Serve calls it before the replica counts as ready, too."""
        self._service.live = load_config(LiveSettings, user_config)
        if not self._is_warm:
            await self._service.warm_up()
            self._is_warm = True

    async def check_health(self) -> None:
        """Ask the canary query."""
        await self._service.check_health()


class Part:
    """Shell of `LocalParts`: a replica loads what it is asked for, and nothing else."""

    def __init__(self, values: dict[str, Any]) -> None:
        config = load_config(ServeConfig, values)
        check = folder_check(config.store)
        check()
        store = open_store(config.store, patient=False)
        self._parts = LocalParts(store, Models(), config.limits, check=check)

    async def ask(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Call a method of the parts."""
        return await getattr(self._parts, name)(*args, **options)

    async def check_health(self) -> None:
        """Ask the models that are loaded."""
        await self._parts.check_health()


class RemoteParts:
    """Parts that are deployments of their own; see `Parts`."""

    def __init__(self, handles: dict[str, Any]) -> None:
        """Ask the deployments behind Serve's handles, by name."""
        self._handles = handles

    async def describe(self, spec: str) -> Model:
        """Load an encoder, and say what it is."""
        model: Model = await self._ask("text", "describe", spec)
        return model

    async def encode(
        self, spec: str, expressions: tuple[str, ...]
    ) -> tuple[EncodedExpression, ...]:
        """Vector of each expression, and its words for a re-ranker."""
        encoded: tuple[EncodedExpression, ...] = await self._ask(
            "text", "encode", spec, expressions
        )
        return encoded

    async def retrieve(self, wanted: Wanted) -> tuple[Retrieved, ...]:
        """Best rows."""
        found: tuple[Retrieved, ...] = await self._ask("retriever", "retrieve", wanted)
        return found

    async def masks(
        self, gallery: str, version: str, instance_ids: tuple[str, ...]
    ) -> dict[str, MaskRle]:
        """Masks of those instances that have one."""
        masks: dict[str, MaskRle] = await self._ask(
            "retriever", "masks", gallery, version, instance_ids
        )
        return masks

    async def rerank(
        self, spec: str, gallery: str, requests: tuple[Reordering, ...]
    ) -> tuple[Sequence[Reordered], ...]:
        """The re-ranker's scores."""
        found: tuple[Sequence[Reordered], ...] = await self._ask(
            "reranker", "rerank", spec, gallery, requests
        )
        return found

    async def refine(self, spec: str, requests: tuple[Refinement, ...]) -> tuple[Refined, ...]:
        """Boxes and masks of hits, on their pixels."""
        refined: tuple[Refined, ...] = await self._ask("localiser", "refine", spec, requests)
        return refined

    async def see(self, spec: str, version: VersionSpec, data: bytes) -> Seen:
        """Decode and encode a photo as indexing into a version does."""
        seen: Seen = await self._ask("localiser", "see", spec, version, data)
        return seen

    async def look(self, spec: str, data: bytes, box: Box | None) -> FloatArray:
        """(D,) vector of an instance of a photo."""
        vector: FloatArray = await self._ask("localiser", "look", spec, data, box)
        return vector

    async def localise(
        self, spec: str, data: bytes, expression: str, k: int, *, masks: bool
    ) -> Localisation:
        """Where an expression is in a photo."""
        found: Localisation = await self._ask(
            "localiser", "localise", spec, data, expression, k, masks=masks
        )
        return found

    async def _ask(self, part: str, name: str, *args: Any, **options: Any) -> Any:
        """Ask a deployment; again where the replica that had the call is gone."""
        for left in reversed(range(ATTEMPTS)):
            try:
                with _our_errors(part):
                    return await self._handles[part].ask.remote(name, args, options)
            except RayActorError:
                if not left:
                    raise
        raise AssertionError("the last attempt returns or raises")


@contextmanager
def _our_errors(part: str) -> Iterator[None]:
    """Raise what the part raised, without Ray's wrapping."""
    try:
        yield
    except RayTaskError as error:
        raise error.cause from error
    except BackPressureError as error:
        raise Overloaded(f"the queue of {part}", RETRY_AFTER_S) from error


def _deployment(shell: type, name: str, replicas: Replicas, config: ServeConfig) -> Any:
    """Return a shell as a deployment."""
    limits = config.limits
    waiting = limits.image_queue if name == "localiser" else limits.queued
    options: dict[str, Any] = {
        "max_ongoing_requests": limits.ongoing,
        "max_queued_requests": waiting,
    }
    if name == INGRESS:  # it counts itself, so that health and metrics always get through
        options = {"max_ongoing_requests": limits.ongoing + waiting + SPARE_REQUESTS}
        shell = serve.ingress()(shell)
    if replicas.least == replicas.most:
        options["num_replicas"] = replicas.least
    else:
        options["autoscaling_config"] = _autoscaling(replicas)
    found = serve.deployment(
        shell,
        name=name,
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        graceful_shutdown_timeout_s=config.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        **options,
    )
    # Without a version of its own every serve.run draws one at random and replaces all replicas,
    # also where nothing but `user_config` has changed, for which none has to restart.
    return found.options(version=_version(config), _internal=True)


def _version(config: ServeConfig) -> str:
    """Name for all of the settings that a replica is started with."""
    fixed = config.model_dump_json(exclude={"live"})
    return hashlib.sha256(f"{__version__} {fixed}".encode()).hexdigest()[:16]


def _autoscaling(replicas: Replicas) -> dict[str, Any]:
    return {
        "min_replicas": replicas.least,
        "max_replicas": replicas.most,
        "target_ongoing_requests": replicas.target_ongoing,
        "upscale_delay_s": replicas.up_s,
        "downscale_delay_s": replicas.down_s,
        "metrics_interval_s": 1.0,
        "look_back_period_s": max(replicas.up_s, 2.0),
    }
