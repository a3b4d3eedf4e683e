"""Images in Parquet tables: bytes or URIs."""

from __future__ import annotations

import datetime
import decimal
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reir.errors import ConfigError, ImageError, ImageFailure, SourceError
from reir.images.decode import canonical_uri
from reir.store.memory import MemoryStore
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.sources import SourceFile, SourceOptions, open_source, parquet_rows
from reir_ingestion.sources.contract import Source
from reir_testing import FakeEncoder
from reir_testing.s3 import Bucket


def listed(source: Source) -> tuple[list[SourceFile], list[str]]:
    messages: list[str] = []

    def note(part: str, error: Exception) -> None:
        messages.append(f"{part.rpartition('/')[2]}: {error}")

    return list(source.files(note)), messages


def test_rows_of_bytes_with_typed_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    count = 10
    table = pa.table(
        {
            "id": list(range(count)),
            "jpg": [f"photo {n}".encode() for n in range(count)],
            "price": pa.array([float("nan"), 2.5] * 5, pa.float32()),
            "day": [datetime.date(2026, 11, 21)] * count,
            "cost": [decimal.Decimal("1.50")] * count,
            "tags": [["a"]] * count,
            "brand": pa.array(["x", None] * 5).dictionary_encode(),
            "sold": [True] * count,
        }
    )
    pq.write_table(table, path, row_group_size=3)
    source = open_source(path)
    monkeypatch.setattr(parquet_rows, "ROWS_AT_ONCE", 2)
    files, messages = listed(source)
    assert messages == []
    assert [file.uri for file in files] == [
        f"parquet+{canonical_uri(path)}#{n}" for n in range(1, count + 1)
    ]
    status = path.stat()
    marks = {(file.size_bytes, file.mtime_ns) for file in files}
    assert marks == {(0, status.st_mtime_ns + status.st_size)}
    common = {"day": "2026-11-21", "cost": 1.5, "sold": True}
    assert files[0].attributes == {"id": 0, "brand": "x"} | common
    assert files[1].attributes == {"id": 1, "price": 2.5} | common
    again = pickle.loads(pickle.dumps(source))
    for number in (9, 0, 5, 2, 8, 1):
        assert again.read(files[number]) == f"photo {number}".encode()


def test_times_that_python_cannot_represent_count_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table(
        {
            "jpg": [b"one", b"two"],
            "day": pa.array([0, 10**8], pa.int32()).view(pa.date32()),
            "at": pa.array([2**61, 0], pa.int64()).view(pa.timestamp("us")),
            "n": [1, 2],
        }
    )
    pq.write_table(table, path)
    files, messages = listed(open_source(path))
    assert messages == []
    assert [file.attributes for file in files] == [
        {"day": "1970-01-01", "n": 1},
        {"at": "1970-01-01T00:00:00", "n": 2},
    ]


def test_structs_with_bytes_and_empty_cells(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    cells = [{"bytes": b"one", "path": "1.jpg"}, {"bytes": None, "path": "2.jpg"}, None]
    pq.write_table(pa.table({"image": cells}), path)
    source = open_source(path)
    files, _ = listed(source)
    assert [file.attributes for file in files] == [{}] * 3
    assert source.read(files[0]) == b"one"
    for file in files[1:]:
        with pytest.raises(ImageError) as caught:
            source.read(file)
        assert caught.value.reason is ImageFailure.MISSING


def test_a_column_of_uris(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"123")
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"n": [1, 2, 3], "file_name": ["1.jpg", None, "3.jpg"]}), path)
    source = open_source(path)
    files, messages = listed(source)
    assert [file.uri for file in files] == [
        canonical_uri(tmp_path / "1.jpg"),
        canonical_uri(tmp_path / "3.jpg"),
    ]
    assert (files[0].size_bytes, files[0].attributes) == (3, {"n": 1})
    assert source.read(files[0]) == b"123"
    assert messages == ["t.parquet line 2: column 'file_name' must name an image, got NoneType"]


def test_the_image_column_is_detected_or_must_be_given(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": [b"1"], "b": [b"2"], "n": [1]}), path)
    with pytest.raises(ConfigError, match="several columns contain bytes: a, b"):
        open_source(path)
    with pytest.raises(ConfigError, match="'c' is not a column; the columns are a, b, n"):
        open_source(path, SourceOptions(image_column="c"))
    source = open_source(path, SourceOptions(image_column="b"))
    (file,), _ = listed(source)
    assert source.read(file) == b"2"
    pq.write_table(pa.table({"mask": [b"1"], "image": [b"2"]}), path)
    source = open_source(path)
    (file,), _ = listed(source)
    assert source.read(file) == b"2"
    pq.write_table(pa.table({"n": [1]}), path)
    with pytest.raises(ConfigError, match="no column contains bytes"):
        open_source(path)


def test_bad_rows_and_damaged_tables_are_reported(tmp_path: Path) -> None:
    good = pa.table({"jpg": [b"1", b"2", b"3"], "n": [1.0, float("inf"), 3.0]})
    pq.write_table(good, tmp_path / "1.parquet")
    (tmp_path / "2.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-10])
    pq.write_table(pa.table({"other": [1]}), tmp_path / "3.parquet")
    source = open_source(tmp_path / "*.parquet")
    files, messages = listed(source)
    assert [text.split(":")[0] for text in messages] == ["1.parquet#2", "2.parquet"]
    assert [file.uri.rpartition("/")[2] for file in files] == [
        *("1.parquet#1", "1.parquet#3", "3.parquet#1")
    ]
    with pytest.raises(ImageError, match="no column 'jpg'") as caught:
        source.read(files[-1])
    assert caught.value.reason is ImageFailure.UNREADABLE
    with pytest.raises(SourceError, match="is not a Parquet table"):
        open_source(tmp_path / "2.parquet")
    pq.write_table(good[:0], tmp_path / "4.parquet")
    with pytest.raises(SourceError, match="contains no images"):
        open_source(tmp_path / "4.parquet")


def test_the_life_of_a_gallery_in_a_table(
    bucket: Bucket, photos: Path, store: MemoryStore, tmp_path: Path
) -> None:
    contents = [path.read_bytes() for path in sorted(photos.iterdir())]

    def run(images: list[bytes], shelves: list[int]) -> tuple[int, ...]:
        pq.write_table(pa.table({"image": images, "shelf": shelves}), tmp_path / "t.parquet")
        bucket.put("t.parquet", (tmp_path / "t.parquet").read_bytes())
        source = bucket.source("t.parquet")
        done = index(source, "g", store, FakeEncoder(), options=IndexOptions(prune=True))
        return done.new, done.changed, done.unchanged, done.removed, done.num_failed

    assert run(contents, [1] * 20) == (20, 0, 0, 0, 0)
    assert run(contents, [1] * 20) == (0, 0, 20, 0, 0)
    changed = [contents[3], *contents[1:-1]]
    assert run(changed, [1, 2] + [1] * 17) == (0, 2, 17, 1, 0)
