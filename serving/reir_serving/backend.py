"""`Backend`: what the HTTP interface asks for. One class keeps it, in process or over Ray Serve.

The interface (`app.py`) knows requests, keys and pictures; the backend knows galleries and models.
Every method raises the errors of `reir.errors`, and `Overloaded` where a queue is full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from reir.errors import Overloaded as Overloaded
from reir.query import Query
from reir.records import Attributes, FloatArray, ImageRecord, SearchResult
from reir.records import Localisation as Localisation
from reir.records import Located as Located
from reir.store.contract import InstanceRow, VersionInfo
from reir_serving.config import LiveSettings

Box = tuple[float, float, float, float]
"""xyxy in [0, 1] of the upright photo."""


@dataclass(frozen=True, kw_only=True)
class GalleryInfo:
    """A gallery as `GET /v1/galleries` lists it.

    Attributes:
        live: name of the live version; empty where none is live.
        loaded: whether this server has the checkpoint of the live version.
        versions: oldest first.
    """

    name: str
    live: str
    loaded: bool
    versions: tuple[VersionInfo, ...]


@dataclass(frozen=True, kw_only=True)
class GalleryImage:
    """One photo of a gallery: its ledger row and its instances, without vectors."""

    record: ImageRecord
    instances: tuple[InstanceRow, ...]


@dataclass(frozen=True, kw_only=True)
class Readiness:
    """Whether requests can be answered now.

    Attributes:
        ready: all checks hold.
        checks: name ("store", "model", "version", ..) -> "ok", or what is wrong.
    """

    ready: bool
    checks: Mapping[str, str]


class Backend(Protocol):
    """Galleries and models behind the HTTP interface.

    Attributes:
        live: settings that may change while it runs.
    """

    live: LiveSettings

    async def search(self, gallery: str, queries: Sequence[Query]) -> list[SearchResult]:
        """Answer queries to one gallery, in the order given.

        Raises:
            QueryError: a part of a query is wrong; `field` names it.
            GalleryNotFound: no such gallery, or none of its versions is live.
            StoreUnavailable: the store cannot be reached.
            Overloaded: too many requests wait.
        """
        ...

    async def vector_of(self, gallery: str, data: bytes, box: Box | None) -> FloatArray:
        """(D,) vector of the instance of an encoded photo that fits a box best; None: the photo.

        Raises:
            ImageError: the bytes are no photo that can be decoded.
            QueryError: no instance overlaps the box.
        """
        ...

    async def localise(self, data: bytes, expression: str, k: int, *, masks: bool) -> Localisation:
        """Find the instances of an encoded photo that fit an expression: plain REC, on pixels."""
        ...

    async def galleries(self) -> list[GalleryInfo]:
        """All galleries, by name."""
        ...

    async def image(self, gallery: str, image_id: str) -> GalleryImage | None:
        """One photo; None where the gallery has none under that id."""
        ...

    async def photo(self, gallery: str, image_id: str) -> bytes | None:
        """The encoded bytes of a photo of a gallery; None where the gallery has no such photo.

        Raises:
            ImageError: the photo is known but its bytes cannot be had any more.
        """
        ...

    async def add_image(
        self, gallery: str, data: bytes, name: str, attributes: Attributes
    ) -> ImageRecord:
        """Keep an uploaded photo, index it, and return its ledger row when it can be found.

        Raises:
            ImageError: it cannot be decoded; nothing is kept.
        """
        ...

    async def delete_image(self, gallery: str, image_id: str) -> bool:
        """Delete a photo from a gallery; False where there was none."""
        ...

    async def readiness(self) -> Readiness:
        """Check what an answer needs: store, model, and that they belong together."""
        ...

    async def about(self) -> Mapping[str, Any]:
        """What the page shows of this server: checkpoint digest, whether there is a re-ranker..."""
        ...
