"""Find the one object that a sentence describes, among millions of photos."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from reir.client import Client as Client
    from reir.models.seams import InstanceEncoder
    from reir.search import Gallery
    from reir.store import InstanceStore

__all__ = ["Client", "__version__", "open"]
__version__ = "0.1.0"

# By default gRPC, which connects to the store, restarts its threads in every forked child. If exec
# follows the fork, as when Ray starts its processes, Python has closed their file descriptors by
# then, and the child aborts: "Epoll1Poller ... Bad file descriptor". gRPC reads this variable once,
# on import. Nothing here uses a store on both sides of a fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def open(  # noqa: A001, `reir.open("gallery")` reads as what it does
    gallery: str = "default",
    *,
    store: InstanceStore | str | None = None,
    encoder: InstanceEncoder | None = None,
    checkpoint: Path | None = None,
) -> Gallery:
    """Open a gallery for searching: `reir.open("photos").search("the red mug", k=5)`.

    Arguments and errors are those of `reir.search.open_gallery`; nothing heavy is imported before
    the first call.
    """
    from reir.search import open_gallery

    return open_gallery(gallery, store=store, encoder=encoder, checkpoint=checkpoint)


def __getattr__(name: str) -> object:
    """Import `Client` when it is asked for."""
    if name == "Client":
        from reir.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
