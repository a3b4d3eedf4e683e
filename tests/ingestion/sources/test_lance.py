"""Images in a Lance table."""

from __future__ import annotations

import pickle
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from reir.errors import ConfigError, ImageError, ImageFailure, SourceError
from reir.images.decode import canonical_uri
from reir.store.memory import MemoryStore
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.sources import SourceOptions, open_source
from reir_ingestion.sources import lance as lance_module
from reir_ingestion.sources.contract import ignore_error
from reir_ingestion.sources.lance import LanceSource
from reir_testing import FakeEncoder

lance = pytest.importorskip("lance", reason="pip install 'reir-platform[lance]'")


def test_rows_with_typed_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.lance"
    lance.write_dataset(
        pa.table({"photo": [b"one", b"two", None], "n": [1, 2, 3], "tags": [["a"]] * 3}), path
    )
    source = open_source(path)
    files = list(source.files())
    base = f"lance+{canonical_uri(path)}#"
    assert [file.uri for file in files] == [f"{base}{n}" for n in range(3)]
    assert [file.attributes for file in files] == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert pickle.loads(pickle.dumps(source)).read(files[1]) == b"two"
    with pytest.raises(ImageError) as caught:
        source.read(files[2])
    assert caught.value.reason is ImageFailure.MISSING


@pytest.mark.parametrize("change", ["delete", "overwrite"])
@pytest.mark.parametrize("when", ["before the rows are listed", "before they are read"])
def test_a_row_is_read_as_it_was_listed(tmp_path: Path, change: str, when: str) -> None:
    path = tmp_path / "t.lance"
    table = lance.write_dataset(pa.table({"photo": [b"one", b"two"], "n": [1, 2]}), path)
    source = open_source(path)
    assert isinstance(source, LanceSource)
    (listed,) = source.containers.files()
    rows = source.images(listed, ignore_error)
    files = list(rows) if when == "before they are read" else []
    if change == "delete":
        table.delete("n = 1")
    else:
        swapped = pa.table({"photo": [b"two", b"one"], "n": [2, 1]})
        lance.write_dataset(swapped, path, mode="overwrite")
    images = {file.attributes["n"]: source.read(file) for file in files or rows}
    assert images == {1: b"one", 2: b"two"}


def test_a_row_of_a_version_that_is_gone_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "t.lance"
    table = lance.write_dataset(pa.table({"photo": [b"one", b"two"], "n": [1, 2]}), path)
    source = open_source(path)
    files = list(pickle.loads(pickle.dumps(source)).files())
    table.delete("n = 1")
    table.cleanup_old_versions(older_than=timedelta(0))
    # As in a worker that has not read from the table yet.
    lance_module._listed_version.cache_clear()
    with pytest.raises(ImageError, match="changed") as caught:
        source.read(files[1])
    assert caught.value.reason is ImageFailure.UNREADABLE


def test_times_that_python_cannot_represent_count_as_missing(tmp_path: Path) -> None:
    days = pa.array([0, 10**8], pa.int32()).view(pa.date32())
    lance.write_dataset(pa.table({"photo": [b"one", b"two"], "day": days}), tmp_path / "t.lance")
    source = open_source(tmp_path / "t.lance")
    assert [file.attributes for file in source.files()] == [{"day": "1970-01-01"}, {}]


def test_errors_name_the_table_or_column(tmp_path: Path) -> None:
    (tmp_path / "none.lance").mkdir()
    with pytest.raises(SourceError, match="is not a Lance table"):
        open_source(tmp_path / "none.lance")
    lance.write_dataset(pa.table({"path": ["1.jpg"]}), tmp_path / "t.lance")
    with pytest.raises(ConfigError, match=r"no column of .* contains bytes"):
        open_source(tmp_path / "t.lance")
    with pytest.raises(ConfigError, match="'x' is not a column"):
        open_source(tmp_path / "t.lance", SourceOptions(image_column="x"))


def test_the_life_of_a_gallery(photos: Path, tmp_path: Path, store: MemoryStore) -> None:
    contents = [path.read_bytes() for path in sorted(photos.iterdir())]
    path = tmp_path / "t.lance"
    table = lance.write_dataset(pa.table({"image": contents, "n": list(range(20))}), path)

    def run() -> tuple[int, ...]:
        done = index(path, "g", store, FakeEncoder(), options=IndexOptions(prune=True))
        return done.new, done.changed, done.unchanged, done.removed, done.read

    assert run() == (20, 0, 0, 0, 20)
    assert run() == (0, 0, 20, 0, 0)
    table.delete("n = 3")
    lance.write_dataset(pa.table({"image": contents[3:4], "n": [20]}), path, mode="append")
    assert run() == (1, 0, 19, 1, 20)
    assert run() == (0, 0, 20, 0, 0)
