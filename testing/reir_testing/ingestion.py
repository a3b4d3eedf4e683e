"""Helpers for tests and benchmarks of indexing: photos, hostile files, and rows of a gallery."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from PIL.Image import Resampling

from reir.errors import ImageFailure
from reir.images.decode import DEFAULT_MAX_PIXELS, MAX_ASPECT, MAX_SIDE_PX
from reir.records import Instances, RgbImage
from reir.sinks import Record
from reir.store.contract import InstanceStore
from reir_testing import PALETTE, FakeEncoder, draw_scene

BOMB_SIDE_PX = 30_000
METADATA_BYTES = 8 * 1024**2
"""Unpacked size of a metadata chunk that is small in the file; an attack could reach gigabytes."""
ROWS_AT_ONCE = 256

_SIDES_PX = (1, 2, 3, 7, 16, 63, 64, 199, 200, 201, 415, 1000, 1601, 4001, 9000, 20_000)
_DRAWN_SIZES = ((1, 1), (1, 20_000), (20_000, 1), (1, 200), (201, 1), (50, 10_000), (4001, 30))
_CLAIMED_SIZES = ((30_000, 30_000), (12_000, 10_001), (2**31 - 1, 1), (1, 2**31 - 1), (65_536, 900))


class RecordBuffer:
    """A sink that keeps its records as they come back from JSON."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, record: Record) -> None:
        """Keep a record."""
        self.records.append(json.loads(json.dumps(record)))

    def close(self) -> None:
        """Do nothing: the records stay."""

    def of(self, event: str) -> list[dict[str, Any]]:
        """Return the records of an event."""
        return [each for each in self.records if each["event"] == event]


@dataclass(frozen=True)
class HostileFile:
    """A file that may break an indexing run.

    Attributes:
        path: absolute path, as `os.fsdecode` returns it.
        kind: what is wrong with the file.
        reason: reason that the ledger must name; None if only the name of the file is unusual, so
            that it must be indexed.
    """

    path: str
    kind: str
    reason: ImageFailure | None


def random_scene(rng: random.Random) -> RgbImage:
    """Draw a photo with one to four boxes of different colors, side by side."""
    colors = rng.sample(sorted(PALETTE), rng.randint(1, 4))
    shapes = []
    for number, color in enumerate(colors):
        left = number * 40 + rng.randint(2, 8)
        top = rng.randint(0, 60)
        shapes.append((color, (left, top, left + rng.randint(10, 28), top + rng.randint(10, 55))))
    return draw_scene((160, 120), shapes)


def write_scenes(folder: Path, count: int, seed: int = 0, *, scale: int = 1) -> list[Path]:
    """Write photos `000.jpg`, `001.png`, ... that `FakeEncoder` can read; returns their paths.

    Args:
        folder: created if it does not exist.
        count: number of photos.
        seed: seed of the pictures.
        scale: the photos have 160 x 120 pixels times this.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        path = folder / f"{number:03}.{'jpg' if number % 2 else 'png'}"
        image = Image.fromarray(random_scene(rng))
        # Other filters would blend colors at the edges into colors that belong to no blob.
        image.resize((image.width * scale, image.height * scale), Resampling.NEAREST).save(path)
        paths.append(path)
    return paths


def write_hostile_files(folder: Path, count: int, seed: int = 0) -> list[HostileFile]:
    """Write files of every kind that has broken an indexing run, one kind after the other.

    Args:
        folder: created if it does not exist.
        count: number of files; after the last kind, the first one follows again.
        seed: seed of the random offsets and pictures.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    # Paths are bytes here, because some of the names are not valid UTF-8.
    return [_KINDS[i % len(_KINDS)](os.fsencode(folder), i, rng) for i in range(count)]


def write_hostile_sizes(folder: Path, count: int = 100, seed: int = 0) -> list[HostileFile]:
    """Write photos of unusual sizes, and headers that claim impossible ones, in turn.

    Args:
        folder: created if it does not exist.
        count: number of files.
        seed: seed of the sizes after the first ones, and of the pictures.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    drawn, claimed = list(_DRAWN_SIZES), list(_CLAIMED_SIZES)
    while len(drawn) < count:
        width = rng.choice(_SIDES_PX)
        drawn.append((width, rng.choice([each for each in _SIDES_PX if each * width <= 1e6])))
        claimed.append((rng.randrange(11_000, 65_536), rng.randrange(11_000, 65_536)))
    files = []
    for number in range(count):
        width, height = (claimed if number % 2 else drawn)[number // 2]
        path = folder / f"size {number:03}.png"
        if number % 2:
            path.write_bytes(png_header(width, height))
        else:
            color = (width % 251, height % 241, number)
            Image.new("RGB", (width, height), color).save(path)
        refused = (
            width * height > DEFAULT_MAX_PIXELS
            or max(width, height) > MAX_SIDE_PX
            or max(width, height) > MAX_ASPECT * min(width, height)
        )
        reason = ImageFailure.TOO_LARGE if refused else None
        files.append(HostileFile(str(path.absolute()), f"{width} x {height} px", reason))
    return files


class CrashOnceEncoder(FakeEncoder):
    """An encoder that kills its process at the first photo.

    Only the first process is killed; the process that replaces it encodes as usual.
    """

    def __init__(self, mark: Path) -> None:
        """`mark` is a file that exists once a process has been killed."""
        super().__init__()
        self._mark = mark

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        """Encode the images, or kill this process."""
        # Creating the file is atomic, so that only one of several processes is killed.
        try:
            self._mark.touch(exist_ok=False)
        except FileExistsError:
            return super().encode_images(images)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")


def stored_rows(store: InstanceStore, gallery: str) -> dict[str, object]:
    """Return every row of the live version: ledger rows by image id, instances by instance id.

    Two galleries with equal rows have equal ids, boxes and vectors, bit for bit. Instances without
    a ledger row are not included; `InstanceStore.num_stored` counts them.
    """
    version = store.live_version(gallery)
    rows: dict[str, object] = {}
    records = store.iter_images(gallery, version)
    while chunk := list(islice(records, ROWS_AT_ONCE)):
        rows |= {record.image_id: record for record in chunk}
        ids = [record.image_id for record in chunk]
        for found in store.get_instances(gallery, version, ids, with_vectors=True).values():
            for row in found:
                vector = b"" if row.vector is None else row.vector.tobytes()
                rows[row.instance_id] = (row.image_id, row.uri, row.box, row.objectness, vector)
    return rows


def encode_image_file(image: RgbImage, file_format: str) -> bytes:
    """Return the bytes of an image file."""
    if file_format == "HEIF":
        from pillow_heif import register_heif_opener  # Pillow alone cannot write HEIC

        register_heif_opener()
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, file_format)
    return buffer.getvalue()


def png_header(width_px: int, height_px: int) -> bytes:
    """Return a PNG whose header claims this size, with almost no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    size = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    parts = (chunk(b"IHDR", size), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_header(width_px: int, height_px: int, rng: random.Random) -> bytes:
    """Return a JPEG whose frame header claims a size that its data does not have."""
    data = bytearray(encode_image_file(random_scene(rng), "JPEG"))
    # The frame header (SOF0) has the height and the width five bytes after its marker.
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height_px, width_px)
    return bytes(data)


_Maker = Callable[[bytes, int, random.Random], HostileFile]


def _file(
    name: str, kind: str, reason: ImageFailure | None, content: Callable[[random.Random], bytes]
) -> _Maker:
    """Return a function that writes a regular file; `{}` in `name` is replaced by its number."""

    def make(folder: bytes, number: int, rng: random.Random) -> HostileFile:
        path = os.path.join(folder, os.fsencode(name.format(f"{number:03}")))
        Path(os.fsdecode(path)).write_bytes(content(rng))
        return HostileFile(os.fsdecode(path), kind, reason)

    return make


def _special(kind: str, reason: ImageFailure, create: Callable[[bytes], None]) -> _Maker:
    """Return a function that creates a special file, such as a pipe or a broken link."""

    def make(folder: bytes, number: int, _: random.Random) -> HostileFile:
        path = os.path.join(folder, os.fsencode(f"{kind} {number:03}.jpg"))
        create(path)
        return HostileFile(os.fsdecode(path), kind, reason)

    return make


def _cut(file_format: str) -> Callable[[random.Random], bytes]:
    def content(rng: random.Random) -> bytes:
        data = encode_image_file(random_scene(rng), file_format)
        # The first bytes stay, so that the file is still recognized as an image.
        return data[: rng.randrange(4, len(data) - 1)]

    return content


def _whole(file_format: str) -> Callable[[random.Random], bytes]:
    return lambda rng: encode_image_file(random_scene(rng), file_format)


def _grey_png(width_px: int, height_px: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width_px, height_px)).save(buffer, "PNG")
    return buffer.getvalue()


def _heic_of_another_size(rng: random.Random) -> bytes:
    """Return a HEIC whose header claims 8 x 8 px, but which contains more pixels."""
    # `ispe` is the property that states the size of the image.
    plain = np.full((512, 512, 3), rng.randrange(256), dtype=np.uint8)
    data = bytearray(encode_image_file(plain, "HEIF"))
    start = data.index(b"ispe") + 8
    data[start : start + 8] = struct.pack(">II", 8, 8)
    return bytes(data)


def _png_with_long_text(rng: random.Random) -> bytes:
    buffer, text = io.BytesIO(), PngImagePlugin.PngInfo()
    text.add_text("comment", "0" * METADATA_BYTES, zip=True)
    Image.fromarray(random_scene(rng)).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def _png_with_long_profile(rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(random_scene(rng)).save(buffer, "PNG", icc_profile=bytes(METADATA_BYTES))
    return buffer.getvalue()


def _locked(path: bytes) -> None:
    """Create a file that cannot be read.

    It has no permissions. Because root may read any file, root gets a link to itself instead.
    """
    if os.geteuid() == 0:
        os.symlink(path, path)
    else:
        Path(os.fsdecode(path)).write_bytes(b"secret")
        os.chmod(path, 0)


def _kinds() -> Iterator[_Maker]:
    reason = ImageFailure
    for file_format, ending in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        yield _file(f"cut {{}}.{ending}", "truncated", reason.TRUNCATED, _cut(file_format))
    yield _file("empty {}.jpg", "zero bytes", reason.EMPTY, lambda _: b"")
    yield _file(
        "text {}.jpg", "text", reason.NOT_AN_IMAGE, lambda rng: b"Dear diary, " * rng.randint(1, 99)
    )
    yield _file(
        "zeros {}.png", "zeros", reason.NOT_AN_IMAGE, lambda rng: bytes(rng.randint(1, 999))
    )
    side = BOMB_SIDE_PX
    yield _file("bomb {}.png", "bomb", reason.TOO_LARGE, lambda _: png_header(side, side))
    yield _file("bomb {}.jpg", "bomb", reason.TOO_LARGE, lambda rng: jpeg_header(side, side, rng))
    yield _file("page {}.png", "wrong ending", reason.NOT_AN_IMAGE, lambda _: b"%PDF-1.7\n" * 50)
    jxl = b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64)
    yield _file("other {}.jpg", "wrong ending", reason.UNSUPPORTED, lambda _: jxl)
    yield _file("png {}.jpg", "wrong ending, sound", None, _whole("PNG"))
    yield _file("GIF {}.WEBP", "wrong ending, sound", None, _whole("GIF"))
    yield _special("locked", reason.UNREADABLE, _locked)
    yield _special("pipe", reason.UNREADABLE, os.mkfifo)
    yield _special("broken link", reason.MISSING, lambda path: os.symlink(path + b".gone", path))
    yield _file("new\nline {}.jpg", "newline in name, sound", None, _whole("JPEG"))
    yield _file("cut\n{}.jpg", "newline in name", reason.TRUNCATED, _cut("JPEG"))
    latin = os.fsdecode(b"caf\xe9 {}.jpg")
    yield _file(latin, "name in no UTF-8, sound", None, _whole("JPEG"))
    yield _file(os.fsdecode(b"\xff\xfe {}.png"), "name in no UTF-8", reason.EMPTY, lambda _: b"")
    yield _file("%20 #{}?.png", "name like a URI, sound", None, _whole("PNG"))
    yield _file("phone {}.jpg", "wrong ending, sound", None, _whole("HEIF"))
    yield _file("cut {}.heic", "truncated", reason.TRUNCATED, _cut("HEIF"))
    yield _file("claim {}.heic", "bomb", reason.TOO_LARGE, _heic_of_another_size)
    yield _file("line {}.png", "strip", reason.TOO_LARGE, lambda _: _grey_png(1, 10_000_000))
    yield _file("strip {}.png", "strip", reason.TOO_LARGE, lambda _: _grey_png(60_000, 3))
    yield _file("text {}.png", "metadata bomb", reason.TOO_LARGE, _png_with_long_text)
    yield _file("colors {}.png", "metadata bomb", reason.TOO_LARGE, _png_with_long_profile)


_KINDS: tuple[_Maker, ...] = tuple(_kinds())


def ray_workers(driver: int, title: str) -> list[int]:
    """Return the ids of a driver's descendant processes whose title contains `title`.

    Ray sets the title of a worker process to the name of the task that it runs. Linux only.
    """
    # Only descendants, because other tests may run a Ray of their own on this machine.
    processes = {
        int(entry.name): entry for entry in Path("/proc").iterdir() if entry.name.isdigit()
    }
    parents = {pid: _parent(entry) for pid, entry in processes.items()}

    def descends(pid: int) -> bool:
        return pid == driver or (pid in parents and descends(parents[pid]))

    return sorted(pid for pid in processes if descends(pid) and title in _title(processes[pid]))


def _parent(entry: Path) -> int:
    try:
        # The name of the process, in parentheses, may itself contain spaces and parentheses.
        return int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:  # the process has ended
        return 0


def _title(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_text(errors="replace")
    except OSError:
        return ""
