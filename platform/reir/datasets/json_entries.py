"""Typed access to annotation files; errors name the file, the entry and the key."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from reir.datasets.dataset import BoxPx
from reir.errors import DataError
from reir.images.rle import area_px, from_annotation
from reir.records import MaskRle
from reir.text import DEFAULT_MAX_CHARS, normalize_expression

MAX_CHARS = 8 * DEFAULT_MAX_CHARS
"""Length limit of an expression in a file."""
_TOP = "top level"


def read_object(path: str | Path) -> Entry:
    """Return the object in a JSON file.

    Raises:
        DataError: the file is missing, or contains something else.
    """
    return Entry.of(str(path), "", _read_json(path))


def read_list(path: str | Path) -> list[Entry]:
    """Return the objects of the list in a JSON file.

    Raises:
        DataError: the file is missing, or contains something else.
    """
    return entries_of(str(path), "", _read_json(path))


def entries_of(source: str, where: str, value: object) -> list[Entry]:
    """Return the items of a list of objects, each with its position for messages.

    Raises:
        DataError: `value` is not a list, or an item is not an object.
    """
    if not isinstance(value, list):
        raise DataError(f"{source}: {where or _TOP}: expected a list, got {shown(value)}")
    return [Entry.of(source, f"{where}[{at}]", item) for at, item in enumerate(value)]


def _read_json(path: str | Path) -> Any:
    try:
        # As bytes, whose encoding `json` detects itself, also if they start with a byte order mark.
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    # `json` raises a RecursionError for lists or objects that are nested too deeply.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON file: {error}") from error


@dataclass(frozen=True, slots=True)
class Entry:
    """One JSON object of a file, with its position for messages.

    Attributes:
        source: path of the file.
        where: position in the file, for example "images[3]"; empty for the top level.
        value: the object.
    """

    source: str
    where: str
    value: dict[str, Any]

    @classmethod
    def of(cls, source: str, where: str, value: object) -> Entry:
        """Return the entry for an object, or raise a `DataError` for any other value."""
        if not isinstance(value, dict):
            raise DataError(f"{source}: {where or _TOP}: expected an object, got {shown(value)}")
        return cls(source, where, value)

    def fail(self, key: str, expected: str) -> NoReturn:
        """Raise a `DataError` that names the file, the entry, the key and both values."""
        found = shown(self.value[key]) if key in self.value else "nothing"
        raise DataError(f"{self.source}: {self._at(key)}: expected {expected}, got {found}")

    def has(self, key: str) -> bool:
        """Whether the key exists and its value is not null."""
        return self.value.get(key) is not None

    def text(self, key: str) -> str:
        """Return text that is not blank."""
        value = self.value.get(key)
        if not isinstance(value, str) or not value.strip():
            self.fail(key, "a text that is not blank")
        return value

    def sentence(self, key: str) -> str:
        """Return an expression as written: some visible characters, at most `MAX_CHARS`."""
        value = self.text(key)
        if len(value) > MAX_CHARS or not normalize_expression(value):
            self.fail(key, f"up to {MAX_CHARS} characters, some of them visible")
        return value

    def sentences(self, key: str) -> list[str]:
        """Return a list of at least one expression; see `sentence`."""
        items = self._numbered(key, "a list of at least one sentence")
        if not items.value:
            self.fail(key, "a list of at least one sentence")
        return [items.sentence(at) for at in items.value]

    def texts(self, key: str) -> list[str]:
        """Return a list of texts that are not blank; a missing or null key counts as empty."""
        value = self.value.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self.fail(key, "a list of texts")
        if not all(isinstance(item, str) and item.strip() for item in value):
            self.fail(key, "a list of texts that are not blank")
        return value

    def identifier(self, key: str) -> str:
        """Return an id as text; files have whole numbers or text."""
        value = self.value.get(key)
        # `bool` is a subclass of `int`, so `true` would otherwise become the id "True".
        if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
            self.fail(key, "an id (a whole number or a text)")
        return str(value)

    def identifiers(self, key: str) -> list[str]:
        """Return a list of ids as text."""
        items = self._numbered(key, "a list of ids")
        return [items.identifier(at) for at in items.value]

    def pixels(self, key: str) -> int:
        """Return a length in whole pixels, at least 1."""
        value = self.value.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(key, "a whole number of pixels, at least 1")
        return value

    def share(self, key: str) -> float:
        """Return a number from 0 to 1."""
        value = self.value.get(key)
        if not _is_number(value) or not 0 <= float(value) <= 1:  # type: ignore[arg-type]
            self.fail(key, "a number from 0 to 1")
        return float(value)  # type: ignore[arg-type]

    def flag(self, key: str) -> bool:
        """Return a truth value, in files 0, 1, false or true; a missing key is false."""
        value = self.value.get(key, False)
        if value not in (0, 1):
            self.fail(key, "0, 1, false or true")
        return bool(value)

    def box(self, key: str) -> BoxPx:
        """Return an xywh box of the file as xyxy."""
        value = self.value.get(key)
        if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
            self.fail(key, "four finite numbers [left, top, width, height] in pixels")
        x, y, w, h = map(float, value)
        if w < 0 or h < 0:
            self.fail(key, "a width and height of at least 0")
        return x, y, x + w, y + h

    def mask(self, key: str, height_px: int, width_px: int) -> MaskRle | None:
        """Return a segmentation as a mask of a photo of this size.

        None if there is no segmentation, or if it covers no pixel.
        """
        if not self.value.get(key):
            return None
        try:
            found = from_annotation(self.value[key], height_px, width_px)
        except ValueError as error:
            self.fail(key, f"a segmentation as COCO has it ({error})")
        # A polygon thinner than a pixel gives an empty mask, which has no bounding box.
        return found if area_px(found) else None

    def object(self, key: str) -> Entry:
        """Return an object within this one."""
        return Entry.of(self.source, self._at(key), self.value.get(key))

    def entries(self, key: str) -> list[Entry]:
        """Return the objects of a list within this one."""
        return entries_of(self.source, self._at(key), self.value.get(key))

    def _numbered(self, key: str, expected: str) -> Entry:
        """Return a list as an object, so that a message names the place of a wrong item."""
        value = self.value.get(key)
        if not isinstance(value, list):
            self.fail(key, expected)
        return Entry(self.source, self._at(key), {str(at): item for at, item in enumerate(value)})

    def _at(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    # JSON allows whole numbers that no float can hold.
    except OverflowError:
        return False


def shown(value: object, most_chars: int = 80) -> str:
    """Return a value of a file for a message, shortened."""
    text = repr(value)
    return text if len(text) <= most_chars else f"{text[:most_chars]}..."
