"""A corrupted, truncated or lost file of Milvus Lite raises an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from milvus_lite.db import MilvusLite
from milvus_lite.schema.types import CollectionSchema, DataType, FieldSchema

from reir.store.embedded.lite_checksums import DamagedError, install_checksums

DIM = 4
Rows = dict[str, tuple[float, ...]]
Harm = Callable[[bytes, int], bytes | None]


def rows(first: int, last: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(first)
    return [
        {"key": f"k{number:03}", "vector": rng.random(DIM, dtype=np.float32).tolist()}
        for number in range(first, last)
    ]


def contents(directory: Path) -> tuple[Rows, dict[str, str]]:
    """All rows of the collection, and the aliases."""
    lite = MilvusLite(str(directory))
    try:
        aliases = lite._aliases("default")
        collection = lite.get_collection("c")
        collection.load()
        found = collection.query("key >= ''", output_fields=["key", "vector"])
    finally:
        lite._release_lock()  # as a kill does; `close` would move the log's rows to Parquet files
    return {row["key"]: tuple(row["vector"]) for row in found}, dict(aliases)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a killed process, with files and a log of rows and deletions."""
    install_checksums()
    directory = tmp_path_factory.mktemp("lite")
    lite = MilvusLite(str(directory))
    fields = [
        FieldSchema("key", DataType.VARCHAR, is_primary=True, max_length=64),
        FieldSchema("vector", DataType.FLOAT_VECTOR, dim=DIM),
    ]
    collection = lite.create_collection("c", CollectionSchema(fields=fields))
    collection.create_index("vector", {"index_type": "FLAT", "metric_type": "IP"})
    collection.load()
    lite.create_alias("c", "first")
    lite.create_alias("c", "second")
    collection.insert(rows(0, 20))
    collection.flush()
    collection.delete(["k003"])
    collection.flush()
    collection.insert(rows(20, 25))
    collection.insert(rows(25, 30))
    collection.delete(["k004"])
    collection._wait_for_bg()
    lite._release_lock()
    return directory


@pytest.fixture(scope="module")
def expected(directory: Path) -> tuple[Rows, dict[str, str]]:
    found = contents(directory)
    assert set(found[0]) == {f"k{number:03}" for number in range(30) if number not in (3, 4)}
    assert set(found[1]) == {"first", "second"}
    return found


def flipped(data: bytes, position: int) -> bytes | None:
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


def cut(data: bytes, position: int) -> bytes | None:
    return data[:position]


def lost(_: bytes, __: int) -> bytes | None:
    return None


KINDS = {
    "manifest": "collections/c/manifest.json",
    "schema": "collections/c/schema.json",
    "rows": "collections/c/partitions/*/data/*.parquet",
    "deletions": "collections/c/partitions/*/delta/*.parquet",
    "log of rows": "collections/c/wal/wal_data_*.arrow",
    "log of deletions": "collections/c/wal/wal_delta_*.arrow",
    "checksums of a log": "collections/c/wal/wal_data_*.sum",
    "aliases": "aliases.json",
    "checksums of the aliases": "aliases.json.sum",
}
"""Every file that a store needs, by its content."""


@pytest.mark.parametrize("harm", [flipped, cut, lost])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_raises_an_error(
    directory: Path,
    expected: tuple[Rows, dict[str, str]],
    tmp_path: Path,
    kind: str,
    harm: Harm,
) -> None:
    (found,) = directory.glob(KINDS[kind])
    data = found.read_bytes()
    step = 1 if len(data) < 60 else len(data) // 25
    positions = [0] if harm is lost else range(0, len(data), step)
    for number, position in enumerate(positions):
        copy = tmp_path / str(number)
        shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("LOCK"))
        harmed = copy / found.relative_to(directory)
        changed = harm(data, position)
        if changed is None:
            harmed.unlink()
        else:
            harmed.write_bytes(changed)
        if kind == "checksums of the aliases" and harm is lost:
            assert contents(copy) == expected, "an earlier release wrote none"
        elif kind == "checksums of a log" and harm is cut:
            assert contents(copy) == expected, "as after a kill between the write and its checksum"
        else:
            with pytest.raises(DamagedError, match=rf"{found.name}|{found.stem}"):
                contents(copy)
        shutil.rmtree(copy)


def test_a_partial_write_of_a_killed_process_is_ignored(
    directory: Path, expected: tuple[Rows, dict[str, str]], tmp_path: Path
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(directory, copy)
    (log,) = copy.glob(KINDS["log of rows"])
    log.write_bytes(log.read_bytes() + log.read_bytes()[-100:])
    assert contents(copy) == expected


def test_a_collection_of_an_earlier_release_opens(
    directory: Path, expected: tuple[Rows, dict[str, str]], tmp_path: Path
) -> None:
    """It has no checksums; its next change adds them."""
    copy = tmp_path / "store"
    shutil.copytree(directory, copy)
    for sum_file in copy.rglob("*.sum"):
        sum_file.unlink()
    manifest = copy / KINDS["manifest"]
    payload = json.loads(manifest.read_text())
    del payload["checksums"]
    manifest.write_text(json.dumps(payload))
    assert contents(copy) == expected
    lite = MilvusLite(str(copy))
    lite.get_collection("c").insert(rows(30, 31))
    lite.close()
    assert len(contents(copy)[0]) == 29
    assert "checksums" in json.loads(manifest.read_text())


def test_a_failed_write_loses_no_acknowledged_write(directory: Path, tmp_path: Path) -> None:
    """The disk is full when half of a batch is in the log; later there is space again."""
    copy = tmp_path / "store"
    shutil.copytree(directory, copy)
    lite = MilvusLite(str(copy))
    collection = lite.get_collection("c")
    collection.insert(rows(30, 31))

    class FullDisk:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write_batch(self, _: Any) -> None:
            self._file.write(b"half a batch")
            self._file.flush()
            raise OSError(28, "No space left on device")

    collection._wal._data_writer = FullDisk(collection._wal._data_sink)
    with pytest.raises(OSError, match="No space"):
        collection.insert(rows(31, 32))
    collection.insert(rows(32, 33))
    lite._release_lock()
    assert {"k030", "k032"} <= contents(copy)[0].keys()
    assert "k031" not in contents(copy)[0]


def test_a_damaged_index_file_is_rebuilt(
    directory: Path, expected: tuple[Rows, dict[str, str]], tmp_path: Path
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(directory, copy)
    indexes = list(copy.rglob("*.idx"))
    assert indexes
    for index in indexes:
        index.write_bytes(index.read_bytes()[:20])
    assert contents(copy) == expected
