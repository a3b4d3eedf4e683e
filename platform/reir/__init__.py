"""Find the one object that a sentence describes, among millions of photos.

    import reir

    reir.index("~/Pictures", gallery="photos")
    with reir.open("photos") as gallery:
        for hit in gallery.search("the red mug left of the laptop", k=5):
            print(hit.path, hit.box_px, hit.presence)

Importing `reir` is fast: modules that take long to import are imported by the first call.
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
    from reir.models.interfaces import InstanceEncoder, Segmenter, Zoomer
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
# Public classes and their modules, which `__getattr__` imports on first access: they need numpy and
# Pillow, and some of them torch.
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


def open(  # noqa: A001, PLR0913 - `reir.open("gallery")` reads as what it does
    gallery: str = "default",
    *,
    store: InstanceStore | str | None = None,
    encoder: InstanceEncoder | str | None = None,
    checkpoint: Path | None = None,
    segmenter: Segmenter | str | None = None,
    zoomer: Zoomer | str | None = None,
    version: str = "",
) -> Gallery:
    """Open a gallery for searching: `reir.open("photos").search("the red mug", k=5)`.

    Arguments and errors are those of `reir.query.search.open_gallery`.
    """
    from reir.query.search import open_gallery

    return open_gallery(
        gallery,
        store=store,
        encoder=encoder,
        checkpoint=checkpoint,
        segmenter=segmenter,
        zoomer=zoomer,
        version=version,
    )


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
        source: a folder, image file, pattern, bucket, list, archive or table; the same sources that
            `reir index` accepts.
        gallery: name of the gallery, which is created if it does not exist.
        store: an open store, or a location in the form that `reir.store.open_store` accepts; None
            means the default location.
        encoder: finds the instances; or its name in the form that `reir.encoders` accepts. If
            neither this nor `checkpoint` is given, a new gallery is indexed with the shipped
            checkpoint, and any other with the encoder that it was indexed with before.
        checkpoint: checkpoint directory, instead of an encoder.
        progress: True shows a progress bar on standard error. A function is called with the
            progress, from several threads, but never from two at the same time.
        batch_size: number of photos to encode at once.
        prune: remove photos from the gallery if their files are gone from the source.
        retry_failed: also try photos that failed before and have not changed since.

    Returns:
        What happened to every photo of the source.

    Raises:
        SourceError: the source does not exist or has no images.
        ConfigError: the name of the gallery or of the encoder is not allowed, or the packages for
            indexing are not installed.
        CheckpointError: the checkpoint cannot be loaded.
        StoreUnavailable: the store cannot be reached.
    """
    # Indexing is an app of its own, which this package does not import: apps depend on the core.
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
    """Import a public class when it is first accessed."""
    if name in _CLASSES:
        from importlib import import_module

        return getattr(import_module(_CLASSES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names only."""
    return sorted(__all__)
