"""Settings of `reir index`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from reir.config import StrictConfig
from reir.images.large_photos import LargePhotos
from reir_ingestion.runner_choice import RunnerName


class IndexSettings(StrictConfig):
    """Settings of `reir index`.

    `reir reindex` uses `large_photos`, and `runner` with what follows it.

    Attributes:
        batch_size: number of photos per batch.
        max_failures: stop when more photos fail, such as "100" or "5%"; None never stops.
        large_photos: how to encode large photos: as a "whole" only, also in parts chosen by "zoom",
            or in "tiles"; None keeps what the gallery has.
        allow_http: whether to download images from http:// and https:// addresses.
        allow_private: with `allow_http`, whether to download from private network addresses, too.
        follow_links: whether to index photos behind symlinks that leave the folder.
        bulk_import: storage of a Milvus server through which new photos reach it.
        runner: where to index: in threads of this process, or with Ray Data; "auto" chooses by the
            number of files, cores and GPUs.
        num_workers: largest number of encoders on Ray; None for as many as the cluster can run.
        num_gpus: GPUs of each encoder on Ray; with 0.5, two encoders share a GPU.
        events: file to which every batch appends a line.
        metrics_port, metrics_host: port and address of the metrics during a run.
    """

    batch_size: int = Field(16, ge=1)
    max_failures: str | None = None
    large_photos: LargePhotos | None = None
    allow_http: bool = False
    allow_private: bool = False
    follow_links: bool = False
    bulk_import: str = ""
    runner: RunnerName = RunnerName.AUTO
    num_workers: int | None = Field(None, ge=1)
    num_gpus: float | None = Field(None, ge=0)
    events: Path | None = None
    metrics_port: int | None = Field(None, ge=0, le=65_535)
    metrics_host: str = "127.0.0.1"
