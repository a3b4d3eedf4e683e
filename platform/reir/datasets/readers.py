"""Reads annotations of any format, given by name or detected from the path."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

from reir.datasets.coco import read_coco_instances
from reir.datasets.dataset import ReferringDataset
from reir.datasets.grefcoco import REFS, read_grefcoco
from reir.datasets.photo_sentences import read_photo_sentences
from reir.datasets.photos import EXPRESSIONS, read_photos
from reir.datasets.refer import read_refer, read_refer_json
from reir.datasets.reircoco import read_reircoco
from reir.datasets.resedis import read_resedis
from reir.datasets.simrec import read_simrec
from reir.datasets.sorec import read_sorec
from reir.errors import DataError

Format = Literal[
    "photos", "coco", "reircoco", "refer", "refer_json", "simrec", "sorec", "sentences"
]
SplitBy = Literal["unc", "umd", "google"]
IN_FOLDERS = ("photos", "refer")
"""Formats whose path is a folder; the path of all other formats is a file."""

_HEAD_BYTES = 4096
_KEY_OF_SOREC = re.compile(r'"ref"\s*:')
# The keys of an item, which come in any order; its sentences may be longer than the head.
_KEY_OF_SIMREC = re.compile(r'"(?:iid|refs)"\s*:')
_LISTS_OF_SENTENCES = (".csv", ".tsv", ".jsonl")

_WITH_PHOTOS: Mapping[str, tuple[Callable[..., ReferringDataset], str, str]] = {
    "simrec": (read_simrec, "SimREC", "rec"),
    "sorec": (read_sorec, "SOREC", "sorec"),
    "sentences": (read_photo_sentences, "a list of photos and sentences", "rec"),
}
"""Formats that do not state the sizes of photos -> reader, name, command that evaluates on them."""


def read_as(
    form: Format,
    path: str | Path,
    split_by: SplitBy = "unc",
    *,
    images_dir: str | Path | None = None,
    masks: bool = False,
) -> ReferringDataset:
    """Read annotations of a known format.

    Args:
        form: name of the format.
        path: a folder for formats in `IN_FOLDERS`, otherwise a file.
        split_by: for format "refer" only.
        images_dir: folder of the photos, for "simrec", "sorec" and "sentences" only.
        masks: also read masks, if the format has any.

    Raises:
        DataError: a file is missing or malformed.
    """
    if form in _WITH_PHOTOS:
        read, name, command = _WITH_PHOTOS[form]
        return read(path, _photos_of(Path(path), name, command, images_dir))
    if form == "refer":
        return read_refer(path, split_by, masks=masks)
    # This form of RefCOCO contains no masks.
    if form == "refer_json":
        return read_refer_json(path)
    readers = {
        "photos": read_photos,
        "coco": read_coco_instances,
        "reircoco": read_reircoco,
    }
    return readers[form](path, masks=masks)


def read_annotations(
    path: str | Path,
    split_by: SplitBy | None = None,
    *,
    images_dir: str | Path | None = None,
    masks: bool = False,
) -> ReferringDataset:
    """Read referring expressions; the format is detected from the path.

    A folder with `refs(...).p` is RefCOCO/+/g, one with `grefs(unc).json` gRefCOCO, one with
    `expressions.json` has format "photos", and one with other JSON files is ReSeDis. A JSON file
    with a list is SOREC if its first entry has a `ref`, otherwise RefCOCO/+/g; one with an object
    is SimREC if its first item has `refs`, otherwise REIRCOCO. A file named .csv, .tsv or .jsonl is
    a list of photos and sentences.

    Args:
        path: folder or file.
        split_by: which `refs(...).p` to read if a folder has several.
        images_dir: folder of the photos, with which ReSeDis, SOREC, SimREC and lists of sentences
            are read.
        masks: also read masks, if the format has any.

    Raises:
        DataError: the format is unknown, `split_by` is missing, or a file is malformed.
    """
    path = Path(path)
    if not path.is_dir():
        if path.suffix.lower() in _LISTS_OF_SENTENCES:
            return read_as("sentences", path, images_dir=images_dir)
        head = _head(path)
        if head.startswith("{") and _KEY_OF_SIMREC.search(head):
            return read_as("simrec", path, images_dir=images_dir)
        if head.startswith("[") and _KEY_OF_SOREC.search(head):
            return read_as("sorec", path, images_dir=images_dir)
        # The first character tells a list from an object, without parsing a large file twice.
        return read_as("refer_json" if head.startswith("[") else "reircoco", path, masks=masks)
    found = [name for name in get_args(SplitBy) if (path / f"refs({name}).p").exists()]
    if split_by is not None or len(found) == 1:
        return read_as("refer", path, split_by or found[0], masks=masks)
    if found:
        raise DataError(f"{path} has splits by {' and '.join(found)}; choose one with --split-by")
    if (path / REFS).exists():
        return read_grefcoco(path, masks=masks)
    if (path / EXPRESSIONS).exists():
        return read_as("photos", path, masks=masks)
    # With `instances.json`, it is one of the formats above without its other file, and the error
    # says which files were expected.
    if any(path.glob("*.json")) and not (path / "instances.json").exists():
        photos = _photos_of(path, "ReSeDis", "resedis", images_dir)
        return read_resedis(path, photos, masks=masks)
    raise DataError(
        f"{path} contains none of refs(unc|umd|google).p, {REFS}, {EXPRESSIONS}, or the JSON files "
        f"of ReSeDis"
    )


def _head(path: Path) -> str:
    """Return the beginning of a JSON file, without white space before it."""
    try:
        with path.open("rb") as file:
            data = file.read(_HEAD_BYTES)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    # In the encoding in which `json` reads it. The last character may be incomplete.
    return data.decode(json.detect_encoding(data), "replace").lstrip()


def _photos_of(path: Path, name: str, command: str, images_dir: str | Path | None) -> str | Path:
    """Return the folder of photos, without which the sizes of the photos are unknown."""
    if images_dir is None:
        raise DataError(
            f"{path} looks like {name}, which is read together with its photos; use "
            f"`reir eval {command}`"
        )
    return images_dir
