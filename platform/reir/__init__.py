"""Find the one object that a sentence describes, among millions of photos.

    import reir

    reir.index("~/Pictures", gallery="photos")
    with reir.open("photos") as gallery:
        for hit in gallery.search("the red mug left of the laptop", k=5):
            print(hit.path, hit.box_px, hit.presence)

Nothing heavy is imported before the first call.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from reir.client.http_client import Client as Client
    from reir.index_report import IndexProgress as IndexProgress
    from reir.index_report import IndexReport as IndexReport
    from reir.models.interfaces import InstanceEncoder
    from reir.query.search import Gallery as Gallery
    from reir.results import GalleryInfo as GalleryInfo
    from reir.results import Hit as Hit
    from reir.results import Localization as Localization
    from reir.results import SearchResult as SearchResult
    from reir.store import InstanceStore

__version__ = "0.1.0"
__all__ = [
    "Client",
    "Gallery",
    "GalleryInfo",
    "Hit",
    "IndexProgress",
    "IndexReport",
    "Localization",
    "SearchResult",
    "__version__",
    "galleries",
    "index",
    "open",
]
_CLASSES = {
    "Client": "reir.client.http_client",
    "Gallery": "reir.query.search",
    "GalleryInfo": "reir.results",
    "Hit": "reir.results",
    "IndexProgress": "reir.index_report",
    "IndexReport": "reir.index_report",
    "Localization": "reir.results",
    "SearchResult": "reir.results",
}

# By default gRPC, which connects to the store, restarts its threads in every forked child. If exec
# follows the fork, as when Ray starts its processes, Python has closed their file descriptors by
# then, and the child aborts: "Epoll1Poller ... Bad file descriptor". gRPC reads this variable once,
# on import. Nothing here uses a store on both sides of a fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def open(  # noqa: A001, `reir.open("gallery")` reads as what it does
    gallery: str = "default",
    *,
    store: InstanceStore | str | None = None,
    encoder: InstanceEncoder | str | None = None,
    checkpoint: Path | None = None,
) -> Gallery:
    """Open a gallery for searching: `reir.open("photos").search("the red mug", k=5)`.

    Arguments and errors are those of `reir.query.search.open_gallery`.
    """
    from reir.query.search import open_gallery

    return open_gallery(gallery, store=store, encoder=encoder, checkpoint=checkpoint)


def galleries(store: InstanceStore | str | None = None) -> list[GalleryInfo]:
    """List the galleries of a store.

    Arguments and errors are those of `reir.query.search.list_galleries`.
    """
    from reir.query.search import list_galleries

    return list_galleries(store)


def index(  # noqa: PLR0913 - all but the source are by name
    source: str | Path,
    *,
    gallery: str = "default",
    store: InstanceStore | str | None = None,
    encoder: InstanceEncoder | str | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[IndexProgress], None] | bool = True,
    batch_size: int = 16,
    prune: bool = False,
    retry_failed: bool = False,
) -> IndexReport:
    """Make photos searchable, within this process; call it again to bring the gallery up to date.

    Args:
        source: folder, image file, pattern, bucket, list, archive or table, as `reir index` takes.
        gallery: to fill; made if there is none of that name.
        store: an open store, or a location as `reir.store.open_store` takes it, None being the
            default one.
        encoder: finds the instances; or its name as `reir.encoders` takes it. Without it and
            `checkpoint`, the one that the gallery was indexed with, at first the shipped one.
        checkpoint: checkpoint directory, instead of an encoder.
        progress: True shows a progress bar on standard error; or a function that gets the progress,
            called from several threads, one at a time.
        batch_size: number of photos encoded at once.
        prune: remove photos from the gallery whose file is gone from the source.
        retry_failed: try photos again that failed before and have not changed.

    Returns:
        What happened to every photo of the source.

    Raises:
        SourceError: the source does not exist or holds no image.
        ConfigError: the gallery's name or the encoder's is not allowed, or indexing is not
            installed.
        CheckpointError: the checkpoint does not load.
        StoreUnavailable: the store cannot be reached.
    """
    from reir.apps import app_function

    run: Callable[..., IndexReport] = app_function("index")
    return run(
        source,
        gallery=gallery,
        store=store,
        encoder=encoder,
        checkpoint=checkpoint,
        progress=progress,
        batch_size=batch_size,
        prune=prune,
        retry_failed=retry_failed,
    )


def __getattr__(name: str) -> object:
    """Import a class when it is asked for."""
    if name in _CLASSES:
        from importlib import import_module

        return getattr(import_module(_CLASSES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names alone."""
    return sorted(__all__)
