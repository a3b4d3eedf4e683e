"""The results that users get: hits of a search, and boxes of an expression in one photo."""

# Shapes: H x W pixels of the upright photo

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload
from urllib.parse import unquote

from PIL import Image

from reir.images.decode import decode, path_of_uri
from reir.images.drawing import Sheet, Tile, contact_sheet, save_picture
from reir.images.photo_files import read_photo
from reir.models.color_reading import ColorReading
from reir.models.zoom_steps import ZoomSearch
from reir.records import Attributes, Box, MaskRle
from reir.store.contract import VersionInfo

if TYPE_CHECKING:
    import pandas as pd

PhotoReader = Callable[[str], bytes]
"""Returns the bytes of a photo by its image id."""

Likelihood = Literal["likely", "possible", "unlikely"]
LIKELY, POSSIBLE = 0.5, 0.2
"""A presence counts as likely from the first limit on, as possible from the second one on, and as
unlikely below it. Command line, API, page and notebooks all use these words."""


def likelihood_of(presence: float | None) -> Likelihood | None:
    """Return a calibrated probability in words; None without a calibration."""
    if presence is None:
        return None
    return "likely" if presence >= LIKELY else "possible" if presence >= POSSIBLE else "unlikely"


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """Another instance of a hit's photo, which the re-ranker took into account.

    Attributes:
        instance_id: `<image_id>#<n>`.
        box: xyxy in [0, 1] of the upright photo.
        weight: its share of the re-ranker's attention, in [0, 1].
    """

    instance_id: str
    box: Box
    weight: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Explains the rank of a hit; returned on request (`explain`).

    Attributes:
        dual_score: inner product of instance and query vector.
        rerank_score: score of the relation re-ranker; None if it did not run.
        margin: by how much the score exceeds that of the next hit, also if that is on the next
            page; None if there is no next hit, or if its score is not comparable.
        neighbors: the instances of the photo with the largest attention weights, largest first.
        colors: what the pixels say about each color word; empty if they were not verified.
    """

    dual_score: float
    rerank_score: float | None = None
    margin: float | None = None
    neighbors: tuple[Neighbor, ...] = ()
    colors: tuple[ColorReading, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A word of the expression that does not fit a hit, and the word that fits better.

    Attributes:
        kind: "color", "side" or "object".
        wanted: the word of the expression.
        seen: the word that fits the instance better.
    """

    kind: str
    wanted: str
    seen: str

    def __str__(self) -> str:
        return f"{self.seen}, not {self.wanted}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Hit:
    """One instance returned for an expression.

    Attributes:
        instance_id: `<image_id>#<n>`.
        image_id, uri: the photo.
        box: xyxy in [0, 1] of the upright photo.
        score: the score that orders hits: that of the re-ranker if it ran, otherwise the inner
            product of instance and expression vector; higher is better.
        objectness: query-free confidence in [0, 1].
        attributes: the user's attributes of the photo.
        mask: pixels of the instance, if the gallery was indexed with masks, or if the hit was
            localized by an encoder with masks.
        presence: calibrated probability in [0, 1] that this is the described instance; None
            without a calibration. It is small where many photos fit.
        photo_presence: calibrated probability in [0, 1] that its photo shows the described
            instance, however many other photos show it too, but not above the presence of an answer
            that was not found; None without a calibration.
        differs: what differs between the expression and this instance, as far as it is clear; only
            on request (`explain`), and for the first hits of an answer that was not found.
        evidence: explains the rank; only on request.
        zoom: how the photo was searched by zooming in, and what was found, which is then the box of
            the hit; None if it was not searched. The instance id is still that of the instance for
            which the index returned the photo.
        reader: reads the photo by its image id; None means that it is read by its URI. It is not
            compared, and not part of the JSON.
    """

    instance_id: str
    image_id: str
    uri: str
    box: Box
    score: float
    objectness: float
    attributes: Attributes = field(default_factory=dict)
    mask: MaskRle | None = None
    presence: float | None = None
    photo_presence: float | None = None
    differs: tuple[Difference, ...] = ()
    evidence: Evidence | None = None
    zoom: ZoomSearch | None = None
    reader: PhotoReader | None = field(default=None, repr=False, compare=False)

    @property
    def likelihood(self) -> Likelihood | None:
        """Whether its photo shows the described instance, in words; None without a calibration."""
        return likelihood_of(self.photo_presence)

    @property
    def area(self) -> float:
        """Share of the photo that the box covers."""
        x1, y1, x2, y2 = self.box
        return (x2 - x1) * (y2 - y1)

    @property
    def path(self) -> Path:
        """Path of the photo's file on this machine.

        Raises:
            SourceError: the photo is in a bucket, from which `open` can read it.
        """
        return path_of_uri(self.uri)

    @property
    def box_px(self) -> tuple[int, int, int, int]:
        """The box in pixels of the upright photo: left, top, right, bottom.

        Reads the photo to learn its size, with the errors of `read`.
        """
        # Decoded as small as possible, since only the size of the photo is needed.
        photo = decode(self.read(), at_least_px=1)
        return _to_px(self.box, photo.width_px, photo.height_px)

    def read(self) -> bytes:
        """Return the bytes of the photo.

        Raises:
            ImageError: the photo is missing or cannot be read.
        """
        return read_photo(self.uri) if self.reader is None else self.reader(self.image_id)

    def open(self) -> Image.Image:
        """Return the photo as an upright RGB picture; errors are those of `read`."""
        return Image.fromarray(decode(self.read()).pixels)

    def crop(self, margin: float = 0.0) -> Image.Image:
        """Return the part of the photo inside the box.

        Args:
            margin: added on each side, as a share of the side of the box; 0.1 shows some of the
                surroundings of the instance.

        Raises:
            ValueError: `margin` is negative.
        """
        if margin < 0:
            raise ValueError(f"margin must be 0 or more, got {margin}")
        photo = self.open()
        x1, y1, x2, y2 = self.box
        wide, high = margin * (x2 - x1), margin * (y2 - y1)
        return photo.crop(_to_px((x1 - wide, y1 - high, x2 + wide, y2 + high), *photo.size))

    def __repr__(self) -> str:
        box = ", ".join(f"{side:.2f}" for side in self.box)
        words = "".join(f", {each}" for each in (self.likelihood, *self.differs) if each)
        return f"Hit({file_name(self.uri)!r}, box ({box}), score {self.score:.3f}{words})"


@dataclass(frozen=True, kw_only=True)
class LocalizedBox:
    """One instance of a photo, as the answer to an expression.

    Attributes:
        box: xyxy in [0, 1] of the upright photo.
        score: inner product of instance and expression vector, corrected by what the candidate head
            and the color head say, if the checkpoint has them; higher is better.
        presence: calibrated probability that this is the described instance; None without a
            calibration.
        mask: pixels of the instance, if the checkpoint has a mask branch.
    """

    box: Box
    score: float
    presence: float | None
    mask: MaskRle | None = None

    @property
    def likelihood(self) -> Likelihood | None:
        """Whether this is the described instance, in words; None without a calibration."""
        return likelihood_of(self.presence)


@dataclass(frozen=True, kw_only=True)
class Localization:
    """The instances of one photo that fit an expression best.

    Attributes:
        expression: as it was given.
        width_px, height_px: size of the upright photo.
        present: whether the described instance is there: `presence` reaches the threshold of the
            checkpoint. Without a calibration, whether the photo has any instance.
        presence: calibrated probability that the described instance is in this photo; None without
            a calibration.
        boxes: best first.
        timings_ms: stage -> milliseconds.
    """

    expression: str
    width_px: int
    height_px: int
    present: bool
    presence: float | None
    boxes: tuple[LocalizedBox, ...]
    timings_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def likelihood(self) -> Likelihood | None:
        """Whether the described instance is in this photo, in words; None if not calibrated."""
        return likelihood_of(self.presence)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without masks."""
        return {
            "expression": self.expression,
            "width_px": self.width_px,
            "height_px": self.height_px,
            "present": self.present,
            "presence": self.presence,
            "likelihood": self.likelihood,
            "boxes": [
                {
                    "box": each.box,
                    "score": each.score,
                    "presence": each.presence,
                    "likelihood": each.likelihood,
                }
                for each in self.boxes
            ],
            "timings_ms": dict(self.timings_ms),
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class SearchResult(Sequence[Hit]):
    """The answer to one query: a sequence of hits, best first, with details of the search.

    A notebook shows it as a contact sheet of the photos.

    Attributes:
        expression: as it was given.
        gallery, version: the version of a gallery that was searched.
        hits: best first; at most `per_image` of each photo.
        timings_ms: stage -> milliseconds (`text`, `search`, `rerank`, `verify`, `zoom`, `localize`,
            `compare`, `rank`).
        degraded: names of the stages that were left out, because the time budget did not allow
            them or because they failed.
        digest: digest of the checkpoint that computed the vectors.
        presence: calibrated probability in [0, 1] that the described instance is in the gallery;
            None without a calibration.
        found: False if there is no hit, or if `presence` is below the threshold of the checkpoint.
            Then the described instance is probably not in the gallery, and the hits are only the
            most similar instances.
        equally_good: number of first hits whose scores are too close to tell which is best; 1 means
            a clear answer, and 0 no hit, or that zooming found nothing in the first photos.
        cursor: where the next page begins; empty if there is none.
    """

    expression: str
    gallery: str
    version: str
    hits: tuple[Hit, ...]
    timings_ms: Mapping[str, float]
    degraded: tuple[str, ...] = ()
    digest: str = ""
    presence: float | None = None
    found: bool = True
    equally_good: int = 0
    cursor: str = ""

    @property
    def likelihood(self) -> Likelihood | None:
        """Whether the described instance is in the gallery, in words; None if not calibrated."""
        return likelihood_of(self.presence)

    @property
    def headline(self) -> str:
        """A line to show above the hits; empty if there is nothing to say."""
        if not self.hits:
            return ""
        if not self.found and any(hit.zoom for hit in self.hits):
            # The probability was computed before anything was zoomed into.
            return "By the index alone, probably not in this gallery. Zooming in found:"
        if not self.found:
            return "Probably not in this gallery. The nearest misses:"
        if self.likelihood not in ("likely", None):
            return "It may not be in this gallery. The closest matches:"
        if self.equally_good > 1:
            photos = len({hit.image_id for hit in self.hits[: self.equally_good]})
            what = "photos" if photos == self.equally_good else "hits"
            return f"The first {self.equally_good} {what} fit equally well."
        return ""

    def __len__(self) -> int:
        """Number of hits."""
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Hit, ...]: ...
    def __getitem__(self, index: int | slice) -> Hit | tuple[Hit, ...]:
        return self.hits[index]

    def __repr__(self) -> str:
        expression = f"{self.expression!r}, " if self.expression else ""
        presence = "" if self.presence is None else f", presence {self.presence:.0%}"
        return f"SearchResult({expression}{_several_hits(len(self))}{presence})"

    def _repr_html_(self) -> str:
        """Return the HTML for notebooks: the contact sheet, with the hits as alternative text."""
        # Embedded in the page, because a notebook is often opened on a machine without the photos.
        picture = io.BytesIO()
        self.draw().save(picture, "JPEG", quality=85)
        data = base64.b64encode(picture.getvalue()).decode("ascii")
        # File names of a user could contain markup, or a quote that ends the attribute.
        text = escape("; ".join(f"{rank} {hit!r}" for rank, hit in enumerate(self, 1)), quote=True)
        return f'<img alt="{text}" src="data:image/jpeg;base64,{data}">'

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the form that `reir search --json` prints.

        Each hit has its `likelihood`, too.
        """
        # Without the readers first: `asdict` would try to copy them, with the connection they use.
        values = asdict(replace(self, hits=tuple(replace(hit, reader=None) for hit in self)))
        for told, hit in zip(values["hits"], self, strict=True):
            del told["reader"]
            told["likelihood"] = hit.likelihood
        return values

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with one row for each hit, and one column for each attribute.

        Columns: rank, instance_id, image_id, uri, x1, y1, x2, y2 (in [0, 1]), score, objectness,
        presence, photo_presence, likelihood, and `attr.NAME` for each attribute.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas as pd  # an optional dependency

        rows = [
            {
                "rank": rank,
                "instance_id": hit.instance_id,
                "image_id": hit.image_id,
                "uri": hit.uri,
                **dict(zip(("x1", "y1", "x2", "y2"), hit.box, strict=True)),
                "score": hit.score,
                "objectness": hit.objectness,
                "presence": hit.presence,
                "photo_presence": hit.photo_presence,
                "likelihood": hit.likelihood,
                **{f"attr.{name}": value for name, value in hit.attributes.items()},
            }
            for rank, hit in enumerate(self, 1)
        ]
        # Without rows, pandas cannot know the columns.
        return pd.DataFrame(rows, columns=None if rows else [*_COLUMNS])

    @property
    def sheet(self) -> Sheet:
        """The content of the contact sheet of this answer."""
        # First, because a narrow sheet cuts off the end.
        notes = [self.headline] if self.headline else []
        notes += [f"gallery {self.gallery}", _several_hits(len(self))]
        if self.timings_ms:
            notes.append(f"{sum(self.timings_ms.values()):.0f} ms")
        if self.degraded:
            notes.append("without " + ", ".join(self.degraded))
        tiles = [
            Tile(file_name(hit.uri), hit.box, hit.score, hit.mask, hit.read, hit.likelihood or "")
            for hit in self
        ]
        return Sheet(self.expression, notes, tiles, f"in gallery '{self.gallery}'")

    def draw(self, columns: int = 4, tile_px: int = 320) -> Image.Image:
        """Return a contact sheet of the hits with boxes and scores; see `contact_sheet`."""
        return contact_sheet(self.sheet, columns, tile_px)

    def save_drawing(self, path: str | Path) -> None:
        """Write `draw()` to a file; the ending chooses the format.

        Raises:
            ConfigError: there is no format for the ending.
            ReirError: the format cannot hold a picture of so many hits.
        """
        save_picture(self.draw(), path, "use .png, or a smaller k")


@dataclass(frozen=True, kw_only=True)
class GalleryInfo:
    """A gallery of a store or of a server.

    Attributes:
        name: name of the gallery.
        live: name of the live version; empty if none is live.
        versions: oldest first. A server returns counts of 0 for an API key that has a tenant.
        searchable: whether it can be searched now.
        writable: whether photos can be added and deleted.
    """

    name: str
    live: str
    versions: tuple[VersionInfo, ...]
    searchable: bool = True
    writable: bool = True

    @property
    def num_images(self) -> int:
        """Photos of the live version, including those that could not be indexed."""
        return self._of_live("num_images")

    @property
    def num_instances(self) -> int:
        """Instances that searches of the live version can find."""
        return self._of_live("num_instances")

    def _of_live(self, name: str) -> int:
        return sum(getattr(each, name) for each in self.versions if each.live)


_COLUMNS = (
    *("rank", "instance_id", "image_id", "uri", "x1", "y1", "x2", "y2"),
    *("score", "objectness", "presence", "photo_presence", "likelihood"),
)


def file_name(uri: str) -> str:
    """Return the last part of a URI as a person reads it."""
    # File names need not be valid UTF-8, so some bytes may have no character.
    return unquote(uri.rsplit("/", 1)[-1], errors="replace")


def _several_hits(number: int) -> str:
    return f"{number} hit{'' if number == 1 else 's'}"


def _to_px(box: Box, width_px: int, height_px: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom in whole pixels, at least one pixel wide and high."""
    # Clipped, because margins may reach beyond the photo.
    x1, y1, x2, y2 = (min(max(side, 0.0), 1.0) for side in box)
    left, top = min(round(x1 * width_px), width_px - 1), min(round(y1 * height_px), height_px - 1)
    return left, top, max(round(x2 * width_px), left + 1), max(round(y2 * height_px), top + 1)
