"""Shared by the benchmarks of indexing: the encoder, and folders of photos."""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from pathlib import Path

from reir.checkpoint import load_encoder
from reir.models.interfaces import InstanceEncoder
from reir_testing import FakeEncoder, data_dir


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that choose the encoder."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="Checkpoint; default: the shipped one.")
    parser.add_argument(
        "--fake", action="store_true", help="Use a fake encoder, to try things out."
    )
    return parser


def encoder_of(arguments: argparse.Namespace) -> InstanceEncoder:
    """Return the encoder that the command line names."""
    return FakeEncoder() if arguments.fake else load_encoder(arguments.checkpoint)


# As in training/recipes/nano.yaml.
TEST_PHOTOS = 250


def real_photos(count: int | None = None) -> list[Path]:
    """Return the first `count` photos of `REIR_DATA`, or all of them."""
    data = data_dir()
    if data is None:
        raise SystemExit("no real photos: set REIR_DATA to the folder that holds photos/images")
    files = (data / "photos" / "images").iterdir()
    photos = sorted(path.resolve() for path in files)[:count]
    if count is not None and len(photos) < count:
        raise SystemExit(f"{count} photos wanted, {len(photos)} found in {data.name}/photos")
    return photos


def expressions(count: int) -> list[str]:
    """Return `count` expressions of the real photos, spread over the whole file."""
    data = data_dir()
    assert data is not None
    content = json.loads((data / "photos" / "expressions.json").read_text(encoding="utf-8"))
    texts = [each["expression"] for each in content["expressions"]]
    # Neighbors in the file are about the same photo, so its beginning would cover only few photos.
    return texts[:: max(1, len(texts) // count)][:count]


def copy_photos(folder: Path, count: int) -> Path:
    """Copy the first `count` real photos into a new folder; returns the folder."""
    photos = real_photos(count)
    folder.mkdir(parents=True)
    for photo in photos:
        shutil.copyfile(photo, folder / photo.name)
    return folder


def repeat_photos(folder: Path, count: int) -> Path:
    """Fill a new folder with `count` files: the real photos, then copies of them; returns it.

    A copy has the pixels of its photo but different bytes, so that no copy counts as a duplicate.
    """
    photos = real_photos()
    folder.mkdir(parents=True)
    for number in range(count):
        lap, place = divmod(number, len(photos))
        photo = photos[place]
        path = folder / f"{lap:03}-{photo.name}"
        if lap:
            path.write_bytes(with_comment(photo.read_bytes(), f"copy {lap}"))
        else:
            shutil.copyfile(photo, path)
    return folder


def with_comment(jpeg: bytes, text: str) -> bytes:
    """Return a JPEG with a comment segment after its first marker."""
    if jpeg[:2] != b"\xff\xd8":
        raise SystemExit("a photo of REIR_DATA is no JPEG; only those can be repeated")
    comment = text.encode()
    return jpeg[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment + jpeg[2:]
