"""Sources that are lists: JSONL, CSV, plain text."""

from __future__ import annotations

import gzip
import json
import pickle
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, cast

import pytest

from reir.errors import ImageError, ImageFailure, SourceError
from reir.images.decode import canonical_uri
from reir.store.memory import MemoryStore
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.sources import (
    SourceFile,
    SourceOptions,
    bucket_reader,
    list_rows,
    network_retries,
    open_source,
)
from reir_ingestion.sources.contract import Source
from reir_ingestion.sources.lists import ListSource
from reir_ingestion.sources.uri_reader import UriReader
from reir_ingestion.sources.uri_set import UriSet
from reir_testing import FakeEncoder
from reir_testing.ingestion import stored_rows, write_scenes
from reir_testing.s3 import Bucket

MANY_ROWS = 200_000


def write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def listed(source: Source) -> tuple[list[SourceFile], list[str]]:
    """Return what a source lists, and its error messages."""
    said: list[str] = []
    files = list(
        source.files(lambda part, error: said.append(f"{part.rpartition('/')[2]}: {error}"))
    )
    return files, said


def test_jsonl_lines_give_uris_and_typed_attributes(tmp_path: Path) -> None:
    (tmp_path / "a b.jpg").write_bytes(b"123")
    path = write(
        tmp_path / "list.jsonl",
        {
            "path": "a b.jpg",
            "price": 2.5,
            "stock": 3,
            "sale": True,
            "name": "M\u00fctze",
            "x": None,
        },
        {"uri": canonical_uri("/photos/2.jpg"), "price": 1},
        json.dumps("sub/3.jpg"),
        "",
        {"file_name": "s3.jpg", "note": ""},
    )
    files, said = listed(open_source(path))
    assert said == []
    assert [file.uri for file in files] == [
        canonical_uri(tmp_path / "a b.jpg"),
        "file:///photos/2.jpg",
        canonical_uri(tmp_path / "sub" / "3.jpg"),
        canonical_uri(tmp_path / "s3.jpg"),
    ]
    status = (tmp_path / "a b.jpg").stat()
    assert (files[0].size_bytes, files[0].mtime_ns) == (3, status.st_mtime_ns)
    assert (files[1].size_bytes, files[1].mtime_ns) == (0, 0)
    assert files[0].attributes == {"price": 2.5, "stock": 3, "sale": True, "name": "M\u00fctze"}
    assert [type(each) for each in files[0].attributes.values()] == [float, int, bool, str]
    assert files[3].attributes == {"note": ""}


def test_bad_lines_are_reported_and_the_others_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "list.jsonl",
        {"path": "1.jpg"},
        "{broken",
        {"price": 1},
        {"path": "2.jpg", "tags": ["a"]},
        {"path": 3},
        "[1]",
        {"path": "4.jpg", "n": 2**64},
        '{"path": "5.jpg", "n": NaN}',
        r'{"path": "6.jpg", "n": "\ud800"}',
        r'{"path": "\ud800.jpg"}',
        {"path": "https://example.org/7.jpg"},
        {"path": "x" * 9000},
        "[" * 100_000,
        {"path": "8.jpg", "text": "x" * 20_000},
        r'{"path": "8.jpg", "\ud83d": 1}',
        {"path": "9.jpg"},
    )
    files, said = listed(open_source(path))
    assert [file.uri.rpartition("/")[2] for file in files] == ["1.jpg", "9.jpg"]
    assert [text.split(":")[0] for text in said] == [f"list.jsonl line {n}" for n in range(2, 16)]
    expected = (
        "not valid JSON",
        "no column named uri, url, path",
        "column 'tags' contains a list; use numbers, strings and booleans",
        "column 'path' must name an image, got int",
        "expected an object or a string, got list",
        "an integer of 65 bits",
        "nan cannot be compared",
        "is not valid Unicode",
        "surrogates not allowed",
        "--allow-http permits that",
        "9000 characters",
        "not valid JSON",
        "more than 16384 bytes",
        r"column name '\ud83d' is not valid Unicode",
    )
    for text, part in zip(said, expected, strict=True):
        assert part in text


def test_no_row_of_a_table_whose_header_is_not_utf8_is_used(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(
        "image,Gr\u00f6\u00dfe\n1.jpg,2\n2.jpg,\n".encode("latin-1")
    )
    files, said = listed(open_source(tmp_path / "list.csv"))
    # An empty cell is no attribute, so its name does not matter.
    assert [file.uri.rpartition("/")[2] for file in files] == ["2.jpg"]
    (text,) = said
    assert text.startswith("list.csv line 2")
    assert r"column name 'Gr\udcf6\udcdfe' is not valid Unicode; write it in UTF-8" in text


def test_lines_that_are_too_long_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_rows, "MAX_LINE_BYTES", 50)
    path = write(tmp_path / "list.txt", "1.jpg", "y" * 120, "2.jpg", "z" * 49, "3.jpg")
    files, said = listed(open_source(path))
    assert [file.uri.rpartition("/")[2][:5] for file in files] == [
        "1.jpg",
        "2.jpg",
        "zzzzz",
        "3.jpg",
    ]
    assert [text.split(":")[0] for text in said] == ["list.txt line 2"]


def test_csv_cells_are_typed(tmp_path: Path) -> None:
    path = write(
        tmp_path / "list.csv",
        "\ufefffile,count,price,code,sold,name,empty",
        '1.jpg,12,-2.5e3,007,TRUE,"a, ""b""",',
        '2.jpg,1_0, 5,nan,yes,"two\nlines",',
        "3.jpg,1",
        '4.jpg,+1,1e999,1.0,false,x"y,',
        "12,99999999999999999999,0,0.5,,,",
    )
    files, said = listed(open_source(path))
    assert [file.uri.rpartition("/")[2] for file in files] == ["1.jpg", "2.jpg", "4.jpg", "12"]
    one, two, four, last = (file.attributes for file in files)
    assert one == {"count": 12, "price": -2500.0, "code": "007", "sold": True, "name": 'a, "b"'}
    assert two == {
        "count": "1_0",
        "price": " 5",
        "code": "nan",
        "sold": "yes",
        "name": "two\nlines",
    }
    assert four == {"count": 1, "price": "1e999", "code": 1.0, "sold": False, "name": 'x"y'}
    assert last == {"count": "99999999999999999999", "price": 0, "code": 0.5}
    assert said == ["list.csv line 5: 2 cells, but the header has 7 columns"]


def test_empty_lines_between_rows_are_skipped_and_within_a_cell_kept(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text('\nimage,note\n\n1.jpg,"a\n\nb"\n\n2.jpg,c\n')
    assert [file.attributes for file in open_source(path).files()] == [
        {"note": "a\n\nb"},
        {"note": "c"},
    ]


def test_a_header_that_is_too_long_stops_the_job(tmp_path: Path) -> None:
    """Otherwise the first row would become the header."""
    path = tmp_path / "list.csv"
    path.write_text("image," + "x" * list_rows.MAX_LINE_BYTES + "\n1.jpg,2\n3.jpg,4\n")
    with pytest.raises(SourceError, match="header of the list is too long"):
        open_source(path)


def test_plain_text_tsv_and_gzip_lists(tmp_path: Path) -> None:
    expected = [canonical_uri(tmp_path / name) for name in ("a b.jpg", "#c,d.jpg")]
    text = tmp_path / "list.txt"
    text.write_bytes(b"a b.jpg\r\n\r\n#c,d.jpg")
    assert [file.uri for file in open_source(text).files()] == expected
    (tmp_path / "list.txt.gz").write_bytes(gzip.compress(text.read_bytes()))
    assert list(open_source(tmp_path / "list.txt.gz").uris()) == expected
    table = tmp_path / "list.tsv"
    table.write_text("n\timage\n1\ta b.jpg\n2\t#c,d.jpg\n")
    assert [(file.uri, file.attributes["n"]) for file in open_source(table).files()] == [
        (expected[0], 1),
        (expected[1], 2),
    ]
    odd = tmp_path / "odd.txt"
    odd.write_bytes(b"caf\xe9.jpg\n")
    assert list(open_source(odd).uris()) == [f"{canonical_uri(tmp_path)}/caf%E9.jpg"]


def test_the_image_column_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "l.jsonl", {"left": "1.jpg", "path": "shelf 3"})
    (file,) = open_source(path, SourceOptions(image_column="left")).files()
    assert file.uri == canonical_uri(tmp_path / "1.jpg")
    assert file.attributes == {"path": "shelf 3"}
    with pytest.raises(SourceError, match=r"contains no images; .*line 1: no column 'right'"):
        open_source(path, SourceOptions(image_column="right"))


def test_a_list_that_is_cut_off_stops_the_job(tmp_path: Path) -> None:
    path = tmp_path / "list.txt.gz"
    packed = gzip.compress("\n".join(f"{n}.jpg" for n in range(100_000)).encode())
    path.write_bytes(packed[: len(packed) // 2])
    source = open_source(path)
    with pytest.raises(SourceError, match=r"list.txt.gz cannot be read after line [1-9]\d*: "):
        list(source.uris())


def test_paths_of_four_kib_and_any_script(tmp_path: Path, store: MemoryStore) -> None:
    write_scenes(tmp_path, 2)
    (tmp_path / "001.jpg").rename(tmp_path / "\u5199\u771f \U0001f4f7.jpg")
    long = "/".join(["d" * 100] * 41)[:4095] + ".jpg"
    path = write(tmp_path / "list.txt", "000.png", "\u5199\u771f \U0001f4f7.jpg", long)
    report = index(path, "g", store, FakeEncoder())
    assert (report.new, dict(report.failed)) == (2, {"unreadable": 1})


def test_listing_streams(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("".join(f"photos/{number:07}.jpg\n" for number in range(MANY_ROWS)))
    source = open_source(path)
    opened: list[IO[bytes]] = []

    class WatchedReader:
        def __init__(self, reader: UriReader) -> None:
            self.reader = reader

        @contextmanager
        def stream(self, uri: str) -> Iterator[IO[bytes]]:
            with self.reader.stream(uri) as stream:
                opened.append(stream)
                yield stream

        def __getattr__(self, name: str) -> object:
            return getattr(self.reader, name)

    assert isinstance(source, ListSource)
    watched = ListSource(source.text, source.lists, cast(UriReader, WatchedReader(source.reader)))
    tracemalloc.start()
    try:
        files = watched.files()
        first = next(files)
        assert first.uri == canonical_uri(tmp_path / "photos" / "0000000.jpg")
        assert opened[0].tell() < path.stat().st_size / 100
        assert sum(1 for _ in islice(files, MANY_ROWS // 20)) == MANY_ROWS // 20
        assert opened[0].tell() < path.stat().st_size / 10
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (
        peak_bytes < 2 * 1024**2
    )  # some rows at a time; all of them would take a hundred times that


def test_a_set_of_uris_takes_little_more_than_eight_bytes_each() -> None:
    count = 50_000
    tracemalloc.start()
    try:
        uris = UriSet(f"file:///photos/{number}.jpg" for number in range(count))
        kept_bytes, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(uris) == count
    assert kept_bytes < 10 * count
    assert peak_bytes < 20 * count
    assert all(f"file:///photos/{number}.jpg" in uris for number in range(0, count, 777))
    assert not any(f"file:///photos/{number}.png" in uris for number in range(0, count, 777))
    assert "x" not in UriSet([])


def test_images_that_the_list_no_longer_names_are_lost(tmp_path: Path) -> None:
    def uri(name: str) -> str:
        return canonical_uri(tmp_path / name)

    path = write(tmp_path / "data/list.txt", "a/1.jpg", "a/2.jpg")
    source = open_source(path)
    assert not source.has_lost(uri("data/a/1.jpg"))
    assert source.has_lost(uri("data/b/3.jpg"))  # the folder of the list holds all that it names
    assert not source.has_lost(uri("other/3.jpg"))
    assert not source.has_lost("s3://bucket/a/3.jpg")
    far = open_source(write(tmp_path / "lists/list.txt", uri("x/a/1.jpg"), uri("x/b/2.jpg")))
    assert [
        far.has_lost(uri(name)) for name in ("x/a/9.jpg", "x/b/9.jpg", "x/c.jpg", "y/1.jpg")
    ] == [
        True,
        True,
        True,
        False,
    ]
    broken = open_source(write(tmp_path / "data/list.jsonl", {"path": "a/1.jpg"}, "{"))
    assert not broken.has_lost(uri("data/a/3.jpg"))


def test_a_list_source_can_be_pickled(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"12")
    source = open_source(write(tmp_path / "list.txt", "1.jpg"))
    again = pickle.loads(pickle.dumps(source))
    (file,) = again.files()
    assert again.read(file) == b"12"


def test_the_life_of_a_gallery_from_a_list(store: MemoryStore, photos: Path) -> None:
    names = sorted(path.name for path in photos.iterdir())
    rows = [{"path": name, "shelf": n % 3} for n, name in enumerate(names)]
    path = write(photos / "list.jsonl", *rows)

    def run() -> tuple[int, ...]:
        done = index(path, "g", store, FakeEncoder(), options=IndexOptions(prune=True))
        return done.new, done.changed, done.unchanged, done.num_failed, done.removed, done.unlisted

    assert run() == (20, 0, 0, 0, 0, 0)
    assert run() == (0, 0, 20, 0, 0, 0)
    rows[4]["shelf"] = 7
    write(path, *rows[:-1])
    assert run() == (0, 1, 18, 0, 1, 0)
    assert run() == (0, 0, 19, 0, 0, 0)
    version = store.live_version("g")
    for record in store.iter_images("g", version):
        (name,) = [row["path"] for row in rows if record.uri.endswith(f"/{row['path']}")]
        shelf = next(row["shelf"] for row in rows if row["path"] == name)
        assert record.attributes == {"shelf": shelf}
        for instances in store.get_instances("g", version, [record.image_id]).values():
            assert all(instance.attributes == {"shelf": shelf} for instance in instances)
    fresh = MemoryStore()
    index(path, "g", fresh, FakeEncoder())
    assert stored_rows(store, "g") == stored_rows(fresh, "g")
    write(path, *rows[:5], "{broken")
    assert run() == (0, 0, 5, 0, 0, 1)  # the broken line may have named any of the others


def test_one_source_serves_two_runs(store: MemoryStore, photos: Path) -> None:
    options = IndexOptions(prune=True)
    path = write(photos / "list.txt", "000.png", "001.jpg")
    source = open_source(path)
    assert index(source, "g", store, FakeEncoder(), options=options).new == 2
    write(path, "001.jpg", "002.png")
    report = index(source, "g", store, FakeEncoder(), options=options)
    assert (report.new, report.unchanged, report.removed, report.num_images) == (1, 1, 1, 2)


def test_an_unreachable_bucket_fails_only_its_own_rows(
    photos: Path, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent:
        def get_file_info(self, _: object) -> object:
            raise OSError("AWS Error NETWORK_CONNECTION during HeadObject operation")

        open_input_file = get_file_info

    monkeypatch.setattr(network_retries, "RETRY_PAUSES_S", (0.0,))
    monkeypatch.setattr(bucket_reader, "_filesystem", lambda *_: Silent())
    (photos / "list.txt").write_text("000.png\ns3://silent/x.jpg\n001.jpg\n")
    report = index(photos / "list.txt", "g", store, FakeEncoder())
    assert (report.new, report.failed) == (2, {"unreachable": 1})


def test_a_list_in_a_bucket(bucket: Bucket) -> None:
    one = bucket.put("photos/a b.jpg".replace(" ", "_"), b"123")
    bucket.put("list.jsonl", b'{"path": "photos/a_b.jpg", "n": 1}\n{"path": "/etc/x.jpg"}\n')
    source = open_source(bucket.source("list.jsonl"))
    (file,), (said,) = listed(source)
    assert (file.uri, file.size_bytes, file.attributes) == (one, 3, {"n": 1})
    assert source.read(file) == b"123"
    assert "only a local list may name local files" in said
    bucket.delete("photos/a_b.jpg")
    (gone,), _ = listed(source)
    with pytest.raises(ImageError) as caught:
        source.read(gone)
    assert caught.value.reason is ImageFailure.MISSING
