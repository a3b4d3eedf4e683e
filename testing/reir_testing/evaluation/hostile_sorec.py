"""Malformed annotation files of SOREC, each with the key that an error about it must name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from reir.datasets import read_sorec
from reir_testing.evaluation.hostile_resedis import HostileFile, problem_of

SIZE_PX = (64, 48)
"""Width and height of the only photo, 1.jpg."""
NO_PHOTO = "2.jpg"
"""The name of a file that is no photo."""


def valid_entry(**changes: Any) -> dict[str, Any]:
    """Return a valid annotation of 1.jpg, with some values changed."""
    valid = {"image": "1.jpg", "bbox": [4, 6, 10, 20], "ref": "the red sign", "id": 1}
    return valid | changes


def save_photo(folder: Path) -> None:
    """Write 1.jpg, and a file beside it that is no photo."""
    Image.new("RGB", SIZE_PX, "gray").save(folder / "1.jpg")
    (folder / NO_PHOTO).write_bytes(b"no photo")


def problem(hostile: HostileFile, folder: Path) -> str:
    """Read a malformed file, and return what is wrong with its error; empty if nothing is.

    Args:
        hostile: the file.
        folder: an empty folder.
    """
    save_photo(folder)
    path = folder / "val.json"
    return problem_of(hostile, path, lambda: read_sorec(path, folder))


def hostile_files() -> tuple[HostileFile, ...]:
    """Return the malformed files."""
    return (*_no_lists(), *_entries())


def _no_lists() -> Iterator[HostileFile]:
    whole = json.dumps([valid_entry()])
    for name, content in {
        "empty": b"",
        "truncated": whole[:-9].encode(),
        "not-utf-8": whole.replace("red", "r\u00e9d").encode("latin-1"),
        "nested-too-deep": b"[" * 100_000,
        "number-of-5000-digits": whole.replace("20", "2" * 5000).encode(),
        "object": json.dumps(valid_entry()).encode(),
        "list-of-texts": b'["the red sign"]',
        "list-without-entries": b"[]",
    }.items():
        yield HostileFile(name, content, "")


def _entries() -> Iterator[HostileFile]:
    """Yield files with a valid entry, and then one with a wrong value."""
    changes: dict[str, dict[str, Any]] = {
        "image-null": {"image": None},
        "image-number": {"image": 1},
        "image-blank": {"image": " "},
        "image-in-another-folder": {"image": "../1.jpg"},
        "image-absolute": {"image": "/1.jpg"},
        "image-parent": {"image": ".."},
        "image-with-zero-byte": {"image": "1.jpg\0"},
        "image-half-a-character": {"image": "\ud800.jpg"},
        "image-of-a-million-characters": {"image": "1" * 1_000_000},
        "image-that-is-no-photo": {"image": NO_PHOTO},
        "bbox-null": {"bbox": None},
        "bbox-of-three-numbers": {"bbox": [4, 6, 10]},
        "bbox-texts": {"bbox": ["4", "6", "10", "20"]},
        "bbox-nan": {"bbox": [4, 6, float("nan"), 20]},
        "bbox-too-large-for-a-float": {"bbox": [4, 6, 10**400, 20]},
        "bbox-beyond-infinity": {"bbox": [1e308, 6, 1e308, 20]},
        "bbox-negative-width": {"bbox": [4, 6, -10, 20]},
        "bbox-without-area": {"bbox": [4, 6, 0, 20]},
        "bbox-outside": {"bbox": [64, 6, 10, 20]},
        "ref-null": {"ref": None},
        "ref-blank": {"ref": " \n"},
        "ref-invisible": {"ref": "\u200b\u200d"},
        "ref-list": {"ref": ["the red sign"]},
        "ref-of-a-million-characters": {"ref": "sign " * 200_000},
        "id-null": {"id": None},
        "id-fraction": {"id": 1.5},
        "id-true": {"id": True},
        "id-twice": {"id": 1},
    }
    for name, change in changes.items():
        entries = [valid_entry(), valid_entry(**{"id": 2} | change)]
        yield HostileFile(name, json.dumps(entries).encode(), f"[1].{next(iter(change))}")
    for key in valid_entry():
        rest = valid_entry(id=2)
        del rest[key]
        content = json.dumps([valid_entry(), rest]).encode()
        yield HostileFile(f"without-{key}", content, f"[1].{key}")
