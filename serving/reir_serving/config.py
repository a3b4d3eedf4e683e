"""What `reir serve` can be told: `ServeConfig` at start, `LiveSettings` also while it runs.

Both come from YAML through `reir.config.load_config`. Knows no Ray and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from reir.config import StrictConfig
from reir.store import default_location

Layout = Literal["auto", "fused", "split"]
MIB = 2**20


class LiveSettings(StrictConfig):
    """What may change while the service runs: Serve's `user_config`; no replica restarts.

    Attributes:
        k: number of hits if the request does not specify it.
        rerank: whether the re-ranker orders the best photos if the request does not specify it.
        budget_ms: time budget if the request does not specify one; stages that would exceed it are
            skipped.
        hits: maximum number of hits in one request, over all its queries.
        explained_hits: the same for a request with `explain`, which makes a hit about four times
            as large.
        localized_queries: maximum number of queries in one request with `localize`, which makes a
            query take about ten times as long.
        pinned: gallery -> version to serve, whichever version is live; other galleries always
            serve their live version.
    """

    k: int = Field(10, ge=1, le=1000)
    rerank: bool = False
    budget_ms: float | None = Field(None, gt=0, le=60_000)
    hits: int = Field(10_000, ge=1)
    explained_hits: int = Field(1_000, ge=1)
    localized_queries: int = Field(20, ge=1)
    pinned: Mapping[str, str] = Field(default_factory=dict)


class Limits(StrictConfig):
    """What one request, one client and one replica may take.

    Attributes:
        body_bytes: of a request with JSON.
        upload_bytes: of a request with a photo.
        pixels: of an uploaded photo, before it is decoded.
        request_s: a request that takes longer is answered with 503.
        ongoing: searches, uploads and deletions that one replica works on at a time.
        queued: those that may wait in one replica besides; more are answered 503 at once.
        image_queue: requests with a photo to look at that may wait for the localiser.
        rate_per_s: requests a second of one key, in the long run; None is no limit.
        burst: requests that one key may send at once, beyond its rate.
    """

    body_bytes: int = Field(MIB, ge=1024)
    upload_bytes: int = Field(32 * MIB, ge=1024)
    pixels: int = Field(50_000_000, ge=1)
    request_s: float = Field(30.0, gt=0)
    ongoing: int = Field(8, ge=1)
    queued: int = Field(8, ge=0)
    image_queue: int = Field(8, ge=0)
    rate_per_s: float | None = Field(None, gt=0)
    burst: int = Field(50, ge=1)


class Replicas(StrictConfig):
    """How many replicas of one deployment; Serve picks a number between by load.

    Attributes:
        least: kept at all times.
        most: at most; equal to `least` for a fixed number.
        target_ongoing: requests under way that one replica should have on average.
        up_s, down_s: how long the load has to ask for more, or for fewer, before that happens.
        num_cpus, num_gpus: that one replica takes of the cluster, fractions allowed.
    """

    least: int = Field(1, ge=1)
    most: int = Field(1, ge=1)
    target_ongoing: float = Field(4.0, gt=0)
    up_s: float = Field(5.0, ge=0)
    down_s: float = Field(60.0, ge=0)
    num_cpus: float = Field(0.5, ge=0)
    num_gpus: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.most < self.least:
            raise ValueError(f"most ({self.most}) must be at least least ({self.least})")
        return self


class ServeConfig(StrictConfig):
    """One application: what it serves, where, and within which limits.

    Attributes:
        store: location as `reir.store.open_store` takes it.
        galleries: that are served; None serves all, those of later as well.
        encoder: as `reir.encoders` takes it; None takes the one that each gallery was indexed with.
        host, port: where HTTP is served.
        uploads: folder of photos that are added online, None for `$REIR_HOME/uploads`; replicas on
            several machines must share it.
        examples: sentences that the page offers.
        keys_file: API keys; without it everyone may do everything, on a loopback address only.
        limits: see `Limits`.
        live: see `LiveSettings`.
        layout: "fused" has each replica do everything, "split" gives text encoder, retriever,
            re-ranker and localiser deployments of their own; "auto" fuses where there are few CPUs
            and no GPU.
        ingress, text, retriever, reranker, localiser: replicas of each deployment.
        access_log: one JSON line a request, to this file; None writes it to standard error.
        drain_s: how long a replica that goes may finish what it has begun.
    """

    store: str = Field(default_factory=default_location)
    galleries: tuple[str, ...] | None = None
    encoder: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65_535)
    uploads: Path | None = None
    examples: tuple[str, ...] = ()
    keys_file: Path | None = None
    limits: Limits = Limits()
    live: LiveSettings = LiveSettings()
    layout: Layout = "auto"
    ingress: Replicas = Replicas()
    text: Replicas = Replicas()
    retriever: Replicas = Replicas()
    reranker: Replicas = Replicas()
    localiser: Replicas = Replicas(target_ongoing=1.0)
    access_log: Path | None = None
    drain_s: float = Field(20.0, gt=0)
