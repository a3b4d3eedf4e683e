"""Malformed annotation files of ReSeDis, each with the key that an error about it must name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reir.datasets import read_resedis
from reir.errors import DataError

SIZE_PX = (32, 24)
"""Width and height of the only photo, COCO's number 7."""
SQUARE = [[2, 2, 12, 2, 12, 12, 2, 12]]
NUM_PIXELS = SIZE_PX[0] * SIZE_PX[1]


@dataclass(frozen=True)
class HostileFile:
    """One malformed file.

    Attributes:
        name: what is wrong with it; also the name of the file.
        content: its bytes.
        key: the key that the error must name; empty if the file is no JSON object.
    """

    name: str
    content: bytes
    key: str


def valid_file(**changes: Any) -> dict[str, Any]:
    """Return a valid annotation of photo 7, with some values changed."""
    valid = {
        "image_id": 7,
        "target_annotation": {"0": SQUARE},
        "expression": "the red mug",
        "category": "cup",
    }
    return valid | changes


def save_photo(folder: Path) -> None:
    """Write photo 7, under the name that COCO gives it."""
    pixels = np.full((SIZE_PX[1], SIZE_PX[0], 3), 128, dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "000000000007.jpg")


def problem(hostile: HostileFile, folder: Path) -> str:
    """Read a malformed file, and return what is wrong with its error; empty if nothing is.

    Args:
        hostile: the file.
        folder: an empty folder.
    """
    save_photo(folder)
    path = folder / f"{hostile.name}.json"
    return problem_of(hostile, path, lambda: read_resedis(folder, folder))


def problem_of(hostile: HostileFile, path: Path, read: Callable[[], object]) -> str:
    """Write a malformed file, read it, and return what is wrong with the error; see `problem`."""
    path.write_bytes(hostile.content)
    try:
        read()
    except DataError as error:
        message = str(error)
        missing = [part for part in (str(path), hostile.key) if part not in message]
        return f"the error does not name {missing}: {message}" if missing else ""
    return "it was read without an error"


def hostile_files() -> tuple[HostileFile, ...]:
    """Return the malformed files."""
    return (*_no_objects(), *_values(), *_segmentations())


def _no_objects() -> Iterator[HostileFile]:
    whole = json.dumps(valid_file())
    for name, content in {
        "empty": b"",
        "truncated": whole[:-9].encode(),
        "trailing-text": (whole + "}").encode(),
        "not-utf-8": whole.replace("red", "r\u00e9d").encode("latin-1"),
        "binary": bytes(range(256)),
        "nested-too-deep": b"[" * 100_000,
        "number-of-5000-digits": whole.replace("7", "7" * 5000).encode(),
        "list": b"[1, 2]",
        "text": b'"the red mug"',
    }.items():
        yield HostileFile(name, content, "")


def _values() -> Iterator[HostileFile]:
    changes: dict[str, dict[str, Any]] = {
        "image-id-null": {"image_id": None},
        "image-id-unknown": {"image_id": 8},
        "image-id-negative": {"image_id": -7},
        "image-id-fraction": {"image_id": 7.5},
        "image-id-nan": {"image_id": float("nan")},
        "image-id-true": {"image_id": True},
        "image-id-list": {"image_id": [7]},
        "image-id-path": {"image_id": "../7"},
        "image-id-of-40-digits": {"image_id": 10**40},
        "image-id-other-digits": {"image_id": "\u0667"},
        "expression-null": {"expression": None},
        "expression-empty": {"expression": ""},
        "expression-blank": {"expression": " \t\n"},
        "expression-invisible": {"expression": "\u200b\u200d"},
        "expression-number": {"expression": 7},
        "expression-of-a-million-characters": {"expression": "mug " * 250_000},
        "category-null": {"category": None},
        "category-number": {"category": 44},
        "target-annotation-null": {"target_annotation": None},
        "target-annotation-list": {"target_annotation": [SQUARE]},
        "target-annotation-empty": {"target_annotation": {}},
    }
    for name, change in changes.items():
        yield HostileFile(name, json.dumps(valid_file(**change)).encode(), next(iter(change)))
    for key in ("image_id", "target_annotation", "expression", "category"):
        rest = valid_file()
        del rest[key]
        yield HostileFile(f"without-{key}", json.dumps(rest).encode(), key)


def _segmentations() -> Iterator[HostileFile]:
    size = [SIZE_PX[1], SIZE_PX[0]]
    back_and_forth = [-9e5, 0, 9e5, 1] * 10_000
    for name, segmentation in {
        "segmentation-null": None,
        "segmentation-text": "2 2 12 2 12 12",
        "polygon-odd-length": [[2, 2, 12, 2, 12, 12, 2]],
        "polygon-of-two-points": [[2, 2, 12, 12]],
        "polygon-flat": SQUARE[0],
        "polygon-nan": [[2, 2, float("nan"), 2, 12, 12]],
        "polygon-outside": [[90, 90, 99, 90, 99, 99]],
        "polygon-coordinates-of-10-to-30": [[0, 0, 1e30, 0, 1e30, 1e30]],
        "polygon-outline-of-gigabytes": [back_and_forth],
        "runs-too-short": {"size": size, "counts": [5, 5]},
        "runs-negative": {"size": size, "counts": [-5, NUM_PIXELS + 5]},
        "runs-without-pixels": {"size": size, "counts": [NUM_PIXELS]},
        "runs-cut-off": {"size": size, "counts": "Ph0"},
        "runs-of-a-million-characters": {"size": size, "counts": "o" * 1_000_000},
        "size-negative": {"size": [-24, -32], "counts": [0, NUM_PIXELS]},
        "size-of-gigabytes": {"size": [2**20, 2**20], "counts": [0, 2**40]},
    }.items():
        content = json.dumps(valid_file(target_annotation={"target-0": segmentation}))
        yield HostileFile(name, content.encode(), "target_annotation.target-0")
