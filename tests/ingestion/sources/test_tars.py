"""Images in tar archives, as WebDataset lays them out."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from reir.errors import ImageError, ImageFailure, SourceError
from reir.images.decode import canonical_uri
from reir.store.memory import MemoryStore
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.sources import Source, SourceFile, open_source
from reir_ingestion.verify import verify
from reir_testing import FakeEncoder
from reir_testing.s3 import Bucket


def archive(members: Mapping[str, bytes]) -> bytes:
    """The bytes of a tar with these members, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def listed(source: Source) -> tuple[list[SourceFile], list[str]]:
    messages: list[str] = []

    def note(part: str, error: Exception) -> None:
        messages.append(f"{part.rpartition('/')[2]}: {error}")

    return list(source.files(note)), messages


def test_members_come_with_the_columns_of_their_sample(tmp_path: Path) -> None:
    path = tmp_path / "a b.tar"
    members = {
        "x/001.json": json.dumps({"price": 2, "tags": ["a"], "sub": {}, "none": None}).encode(),
        "x/001.jpg": b"one",
        "x/001.txt": "M\u00fctze \n".encode(),
        "x/001.cls": b"7",
        "x/002.left.png": b"left!",
        "x/002.right.PNG": b"right!!",
        "y/002.jpg": b"other",
        ".hidden.jpg": b"",
        "\u5199 #1.jpg": b"odd",
        "l" * 300 + ".jpg": b"long",
    }
    path.write_bytes(archive(members))
    source = open_source(path)
    files, messages = listed(source)
    assert messages == []
    base = f"tar+{canonical_uri(path)}#"
    assert [file.uri for file in files] == [
        f"{base}x/001.jpg",
        f"{base}x/002.left.png",
        f"{base}x/002.right.PNG",
        f"{base}y/002.jpg",
        f"{base}%E5%86%99%20%231.jpg",
        f"{base}{'l' * 300}.jpg",
    ]
    assert [source.read(file) for file in files] == [
        *(b"one", b"left!", b"right!!", b"other", b"odd", b"long")
    ]
    assert [file.size_bytes for file in files] == [3, 5, 7, 5, 3, 4]
    assert {file.mtime_ns for file in files} == {path.stat().st_mtime_ns + path.stat().st_size}
    assert [file.attributes for file in files] == [{"price": 2, "txt": "M\u00fctze"}, *[{}] * 5]
    again = pickle.loads(pickle.dumps(source))
    assert again.read(files[2]) == b"right!!"
    assert list(source.uris()) == [file.uri for file in files]


def test_member_names_that_are_not_utf_8_are_indexed(
    tmp_path: Path, photos: Path, store: MemoryStore
) -> None:
    contents = [path.read_bytes() for path in sorted(photos.iterdir())[:2]]
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, content in zip(("caf\u00e9.png", "b.png"), contents, strict=True):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = open_source(path)
    files, messages = listed(source)
    assert messages == []
    assert [file.uri.rpartition("#")[2] for file in files] == ["caf%E9.png", "b.png"]
    assert [source.read(file) for file in files] == contents
    assert not source.has_lost(files[0].uri)
    assert index(source, "g", store, FakeEncoder()).new == 2
    assert index(source, "g", store, FakeEncoder()).unchanged == 2


def test_the_time_of_an_archive_from_the_far_future_fits_into_the_ledger(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(archive({"1.jpg": b"one"}))
    os.utime(path, (10**10, 10**10))
    ((file,), _) = listed(open_source(path))
    assert file.mtime_ns == 2**63 - 1


def test_a_bad_sidecar_is_reported_and_the_rest_is_read(tmp_path: Path) -> None:
    members = {
        "1.jpg": b"1",
        "1.json": b"{",
        "2.jpg": b"2",
        "2.json": b"[1]",
        "3.jpg": b"3",
        "3.txt": b"\xff",
        "4.jpg": b"4",
        "5.json": b'{"n": 1e999}',
        "5.jpg": b"5",
        "6.jpg": b"6",
    }
    (tmp_path / "x.tar").write_bytes(archive(members))
    source = open_source(tmp_path / "x.tar")
    files, messages = listed(source)
    assert [file.uri[-5:] for file in files] == ["4.jpg", "6.jpg"]
    expected = (
        "x.tar#1: '1.json' is not valid JSON",
        "x.tar#2: '2.json' must contain a JSON object, got list",
        "x.tar#3: column 'txt'",
        "x.tar#5: column 'n': inf",
    )
    assert all(text.startswith(start) for text, start in zip(messages, expected, strict=True))
    assert not source.has_lost(files[0].uri.replace("4.jpg", "9.jpg"))


def test_damaged_archives_are_reported_and_read_up_to_the_damage(tmp_path: Path) -> None:
    good = archive({f"{n}.jpg": bytes([n]) * 700 for n in range(4)})
    (tmp_path / "1-cut.tar").write_bytes(good[:3000])
    (tmp_path / "2-damaged.tar").write_bytes(good[:3072] + b"garbage" + good[3079:])
    (tmp_path / "3-empty.tar").write_bytes(b"")
    (tmp_path / "4-packed.tar").write_bytes(gzip.compress(good))
    (tmp_path / "5-good.tar").write_bytes(good)
    source = open_source(tmp_path / "*.tar")
    files, messages = listed(source)
    assert [text.split(":")[0] for text in messages] == [
        *("1-cut.tar", "2-damaged.tar", "3-empty.tar", "4-packed.tar")
    ]
    assert "damaged at byte 3072" in messages[1]
    assert "it is compressed (gzip)" in messages[3]
    assert "decompress it to a plain .tar" in messages[3]
    # the sidecar of the last sample may be in the damaged part, so that sample is left out
    assert sum("2-damaged" in file.uri for file in files) == 1
    assert sum("5-good" in file.uri for file in files) == 4
    gone = canonical_uri(tmp_path)
    assert not source.has_lost(f"tar+{gone}/2-damaged.tar#3.jpg")
    assert source.has_lost(f"tar+{gone}/5-good.tar#9.jpg")


def test_of_two_members_with_one_name_the_second_is_skipped_and_reported(
    tmp_path: Path, photos: Path, store: MemoryStore
) -> None:
    one, two = ((photos / name).read_bytes() for name in ("000.png", "002.png"))
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("a.png", one), ("b.png", two), ("a.png", two + bytes(9))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = open_source(path)
    files, messages = listed(source)
    assert [file.uri.rpartition("#")[2] for file in files] == ["a.png", "b.png"]
    assert source.read(files[0]) == one
    assert messages == [
        "x.tar#a.png: the archive has two members of this name; only the first is used"
    ]
    report = index(source, "g", store, FakeEncoder())
    assert (report.new, report.unlisted) == (2, 1)
    assert index(source, "g", store, FakeEncoder()).read == 0
    assert verify(source, "g", store, store.live_version("g")).is_consistent


def test_images_are_lost_with_their_member_or_their_archive(tmp_path: Path) -> None:
    one, two = tmp_path / "1.tar", tmp_path / "2.tar"
    for path in (one, two):
        path.write_bytes(archive({"a.jpg": b"a", "b.jpg": b"b"}))
    uris = list(open_source(tmp_path / "*.tar").uris())
    one.write_bytes(archive({"a.jpg": b"a"}))
    two.rename(tmp_path / "3.tar")
    source = open_source(tmp_path / "*.tar")
    assert [source.has_lost(uri) for uri in uris] == [False, True, True, True]
    assert not source.has_lost(canonical_uri(tmp_path / "1.jpg"))
    assert not source.has_lost(f"tar+{canonical_uri(tmp_path / 'sub' / '1.tar')}#a.jpg")
    (tmp_path / "1.tar").unlink()
    with pytest.raises(ImageError) as caught:
        source.read(SourceFile(uris[0], 1, 1, {}, 512))
    assert caught.value.reason is ImageFailure.MISSING


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(SourceError, match=r"decompress it to a \.tar"):
        open_source(tmp_path / "x.tar.gz")
    (tmp_path / "none.tar").write_bytes(archive({"readme.md": b""}))
    with pytest.raises(SourceError, match="members with the suffix of an image"):
        open_source(tmp_path / "none.tar")


def test_the_life_of_a_gallery_in_archives_of_a_bucket(
    bucket: Bucket, photos: Path, store: MemoryStore
) -> None:
    contents = {path.name: path.read_bytes() for path in sorted(photos.iterdir())}
    names = list(contents)

    def put(members: Mapping[str, bytes]) -> None:
        bucket.put("shards/1.tar", archive(members))

    def run() -> tuple[int, ...]:
        source = bucket.source("shards/*.tar")
        done = index(source, "g", store, FakeEncoder(), options=IndexOptions(prune=True))
        return done.new, done.changed, done.unchanged, done.removed, done.instances

    put(contents)
    assert run()[:4] == (20, 0, 0, 0)
    put({**contents, names[0]: contents[names[1]]} | {"000.json": b'{"shelf": 3}'})
    assert run()[:4] == (0, 1, 19, 0)
    del contents[names[5]]
    put({**contents, "zzz.jpg": contents[names[3]]})
    assert run()[:4] == (1, 1, 18, 1)
    assert run() == (0, 0, 20, 0, 0)
