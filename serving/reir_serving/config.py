"""Settings of `reir serve`: `ServeConfig`, and `LiveSettings`, which may change while it runs.

Both are read from YAML by `reir.config.load_config`. Settings that are passed on to Ray Serve have
the names that Ray gives them. This module depends neither on Ray nor on a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from reir.config import StrictConfig
from reir.operations.search_log import KEEP_DAYS
from reir.store import default_location

Layout = Literal["auto", "fused", "split"]
MIB = 2**20
# Sentences about what is in most galleries. What users of a gallery have searched for, which the
# search log knows, is not suggested to others: it is personal data.
EXAMPLES = (
    "a person wearing a red shirt",
    "a white cup on a table",
    "the largest animal",
)


class LiveSettings(StrictConfig):
    """Settings that may change while the service runs, without a restart of any replica.

    Serve passes them to the replicas as the `user_config` of the deployment `ingress`.

    Attributes:
        k: number of hits if the request does not specify it.
        rerank: whether the re-ranker orders the best photos if the request does not specify it, nor
            asks for `verify`.
        budget_ms: time budget if the request does not specify one; stages that would exceed it are
            skipped.
        hits: maximum number of hits in one request, over all its queries.
        explained_hits: the same for a request with `explain`, which makes a hit about four times
            as large.
        localized_queries: maximum number of queries in one request that set `localize`, and of
            those that set `verify`; either makes a query take about ten times as long.
        zoomed_queries: maximum number of queries in one request with `zoom`, which opens up to five
            photos for each query and takes about a second for each of them.
        pinned: gallery -> version to serve, whichever version is live; other galleries always
            serve their live version.
    """

    k: int = Field(10, ge=1, le=1000)
    rerank: bool = False
    budget_ms: float | None = Field(None, gt=0, le=60_000)
    hits: int = Field(10_000, ge=1)
    explained_hits: int = Field(1_000, ge=1)
    localized_queries: int = Field(20, ge=1)
    zoomed_queries: int = Field(4, ge=1)
    pinned: Mapping[str, str] = Field(default_factory=dict)


class Limits(StrictConfig):
    """Limits of one request, one client and one replica.

    Attributes:
        body_bytes: maximum size of a request with JSON.
        upload_bytes: maximum size of a request with a photo.
        pixels: maximum number of pixels of an uploaded photo, checked before it is decoded.
        request_timeout_s: a request that takes longer is answered with status 503.
        max_ongoing_requests: searches, uploads and deletions that a replica processes at the same
            time.
        max_queued_requests: further ones that may wait in a replica; requests beyond that are
            answered with status 503 at once.
        max_queued_photos: requests whose photo may wait for the model of a replica, because photos
            are processed one at a time.
        rate_per_s: average number of requests per second that one API key may send to a replica;
            None for no limit.
        burst: requests that one key may send at once, beyond its rate.
        feedback_rate_per_s, feedback_burst: the same for feedback alone, so that no user can flood
            it; on a server without keys, for each client address.
    """

    body_bytes: int = Field(MIB, ge=1024)
    upload_bytes: int = Field(32 * MIB, ge=1024)
    pixels: int = Field(50_000_000, ge=1)
    request_timeout_s: float = Field(30.0, gt=0)
    max_ongoing_requests: int = Field(8, ge=1)
    # Small, because a longer queue adds waiting time but no throughput (docs/serve.md).
    max_queued_requests: int = Field(8, ge=0)
    max_queued_photos: int = Field(8, ge=0)
    rate_per_s: float | None = Field(None, gt=0)
    burst: int = Field(50, ge=1)
    feedback_rate_per_s: float | None = Field(1.0, gt=0)
    feedback_burst: int = Field(100, ge=1)


class Replicas(StrictConfig):
    """Number of replicas of one deployment, and their resources.

    Serve adjusts the number to the load. The names are those of Ray Serve's `AutoscalingConfig`.

    Attributes:
        min_replicas: minimum number of replicas.
        max_replicas: maximum number of replicas; equal to `min_replicas` for a fixed number.
        target_ongoing_requests: average number of ongoing requests that each replica should have.
        upscale_delay_s: how long the load must be higher before replicas are added.
        downscale_delay_s: how long the load must be lower before replicas are removed.
        num_cpus, num_gpus: resources of one replica; fractions are allowed.
    """

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(4.0, gt=0)
    upscale_delay_s: float = Field(5.0, ge=0)
    downscale_delay_s: float = Field(60.0, ge=0)
    num_cpus: float = Field(0.5, ge=0)
    num_gpus: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) must be at least min_replicas "
                f"({self.min_replicas})"
            )
        return self


class ServeConfig(StrictConfig):
    """Settings of one server: what it serves, at which address, and within which limits.

    Attributes:
        store: location of the store, as `reir.store.open_store` takes it.
        galleries: names of the galleries to serve; None serves all, including those created later.
        encoder: name of the encoder, as `reir.encoders` takes it; None uses for each gallery the
            one that it was indexed with.
        zoomer: name of the localizer that looks at the first photos of searches with `zoom`, as
            `reir.models.localizers` takes it; None uses the encoder.
        host, port: address of the server.
        uploads: folder for uploaded photos; None for `$REIR_HOME/uploads`. Replicas on several
            machines must share it.
        examples: expressions that the page suggests; it shows the first three.
        keys_file: file with API keys. Without it everyone may do everything, so only a loopback
            address is allowed.
        limits: see `Limits`.
        live: see `LiveSettings`.
        layout: "fused": each replica does everything. "split": text encoder, retriever, re-ranker
            and localizer are deployments of their own. "auto": "fused" if there are few CPUs and no
            GPU, otherwise "split".
        ingress, text, retriever, reranker, localizer: replicas of each deployment.
        access_log: file for one JSON line per request; None for standard error.
        search_log: folder for searches and feedback; None logs neither. It contains expressions,
            which are personal data (docs/serve.md).
        search_log_days: number of days for which the search log is kept.
        graceful_shutdown_timeout_s: how long a replica that shuts down may take to finish its
            requests.
        ray_metrics_port: port of the metrics of Ray itself, on the loopback address; 0 picks a free
            one. A Ray cluster that is running already keeps its own.
    """

    store: str = Field(default_factory=default_location)
    galleries: tuple[str, ...] | None = None
    encoder: str | None = None
    zoomer: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65_535)
    uploads: Path | None = None
    examples: tuple[str, ...] = EXAMPLES
    keys_file: Path | None = None
    limits: Limits = Limits()
    live: LiveSettings = LiveSettings()
    layout: Layout = "auto"
    ingress: Replicas = Replicas()
    text: Replicas = Replicas()
    retriever: Replicas = Replicas()
    reranker: Replicas = Replicas()
    # A replica processes one photo at a time, so every further one waits.
    localizer: Replicas = Replicas(target_ongoing_requests=1.0)
    access_log: Path | None = None
    search_log: Path | None = None
    # The date so many days ago must exist, and dates begin with the year 1; a hundred years are
    # enough.
    search_log_days: int = Field(KEEP_DAYS, ge=1, le=36_500)
    graceful_shutdown_timeout_s: float = Field(20.0, gt=0)
    ray_metrics_port: int = Field(0, ge=0, le=65_535)
