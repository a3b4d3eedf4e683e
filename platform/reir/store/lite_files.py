"""Checksums for the files of Milvus Lite, which has none: damaged data is refused, never served.

`guard` patches Lite in the process that serves a store, so that these checksums are written and
verified:

    manifest.json      contains checksums of itself, of schema.json, and of the Parquet files that
                       it names; each is verified before Lite reads the file
    wal/NAME.sum       records the length and checksum of the write-ahead log NAME after each write;
                       what a killed process wrote beyond that was never acknowledged
    aliases.json.sum   checksums of aliases.json before and after the last change

Collections of an earlier release have no checksums, and get them with their next change.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from milvus_lite import db
from milvus_lite.adapter.grpc.errors import success_status_kwargs
from milvus_lite.adapter.grpc.servicer import MilvusServicer
from milvus_lite.constants import SEQ_FORMAT_WIDTH, WAL_DATA_TEMPLATE, WAL_DELTA_TEMPLATE
from milvus_lite.engine.collection import Collection
from milvus_lite.exceptions import MilvusLiteError
from milvus_lite.schema.persistence import load_schema
from milvus_lite.storage import data_file, delta_file
from milvus_lite.storage.manifest import MANIFEST_FILENAME, Manifest
from milvus_lite.storage.segment import Segment
from milvus_lite.storage.wal import WAL
from pymilvus.grpc_gen import common_pb2, milvus_pb2

from reir.store.damage import describe_damage

_CHECKSUMS = "checksums"
_ENTRY = struct.Struct("<QII")
"""One entry of a .sum file: length of the log, its checksum, and a checksum of these two."""
_BLOCK_BYTES = 1 << 20

_UNEQUAL = "does not match its checksum"

_known: dict[str, int] = {}
"""Checksum of each Parquet file that this process wrote, or that a manifest it read names."""

_states: dict[Path, tuple[int, int]] = {}
"""Length and checksum of each write-ahead log that this process writes."""


class DamagedError(MilvusLiteError):  # type: ignore[misc]  # Lite has no types
    """A file is missing or corrupted; `reir.store.damage` parses the message."""

    def __init__(self, path: Path | str, why: str) -> None:
        super().__init__(describe_damage(path, why))


@cache
def guard() -> None:
    """Patch Milvus Lite, for all stores that this process opens."""
    data_file.pq = delta_file.pq = _CheckedParquet
    db.load_schema, db.Collection = _checked_schema, _opened
    Manifest._to_payload = _with_checksums(Manifest._to_payload)
    WAL.write_insert = _recording(WAL.write_insert, "data")
    WAL.write_delete = _recording(WAL.write_delete, "delta")
    Segment.build_or_load_index = _rebuilding(Segment.build_or_load_index)
    db.MilvusLite._save_aliases = _recording_aliases(db.MilvusLite._save_aliases)
    db.MilvusLite._load_aliases = _checking_aliases(db.MilvusLite._load_aliases)
    db.MilvusLite.has_collection, db.MilvusLite.list_collections = _has_collection, _collections
    MilvusServicer.ShowCollections = _show_collections


def check_collection(folder: Path) -> Iterator[tuple[Path, int]]:
    """Verify the checksums of the manifest, the schema and the logs of a collection.

    Yields:
        The Parquet files and their checksums, which are not verified yet.

    Raises:
        DamagedError: a file is damaged or missing.
    """
    path = folder / MANIFEST_FILENAME
    payload = _parsed(path) if path.exists() else None
    if payload is None:
        if any(folder.glob("partitions/*/*/*.parquet")) or any(folder.glob("wal/*.arrow")):
            raise DamagedError(path, "is missing")
        return
    recorded = payload.pop(_CHECKSUMS, None)
    if recorded is None:
        _check_logs(folder / "wal", 0, adopt=True)
        return
    if recorded["manifest"] != _text_checksum(payload, recorded["files"]):
        raise DamagedError(path, _UNEQUAL)
    for name, checksum in recorded["files"].items():
        file = folder / name
        if not file.exists():
            raise DamagedError(file, "is missing")
        if name == db.SCHEMA_FILENAME:
            _compare(file, checksum)
        else:
            yield file, checksum
    _check_logs(folder / "wal", payload["active_wal_number"] or 0)


def _checked_schema(path: str) -> Any:
    """Replaces `load_schema`, which reads the first file of a collection."""
    _known.update((str(file), checksum) for file, checksum in check_collection(Path(path).parent))
    try:
        return load_schema(path)
    except (ValueError, KeyError, TypeError, MilvusLiteError) as error:
        raise DamagedError(path, f"cannot be read ({error})") from error


def _opened(name: str, data_dir: str, *arguments: Any, **options: Any) -> Any:
    """Replaces `Collection`: files without checksums, of an earlier release, may fail to parse."""
    try:
        return Collection(name, data_dir, *arguments, **options)
    except DamagedError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, MilvusLiteError) as error:
        if getattr(error, "errno", None) is not None:  # an I/O error, not corrupted data
            raise
        raise DamagedError(data_dir, f"cannot be read ({error})") from error


class _CheckedParquet:
    """Replaces `pyarrow.parquet`; has the functions that Lite uses."""

    @staticmethod
    def write_table(table: pa.Table, path: str) -> None:
        pq.write_table(table, path)
        _known[path] = _checksum(Path(path))

    @staticmethod
    def read_table(path: str) -> pa.Table:
        if path in _known:
            _compare(Path(path), _known[path])
        return pq.read_table(path)


def _with_checksums(to_payload: Callable[[Any], dict[str, Any]]) -> Callable[[Any], Any]:
    def with_checksums(manifest: Any) -> dict[str, Any]:
        payload = to_payload(manifest)
        folder = Path(manifest.data_dir)
        names = [
            f"partitions/{partition}/{name}"
            for partition, kinds in payload["partitions"].items()
            for files in kinds.values()
            for name in files
        ]
        files = {name: _checksum_of(folder / name) for name in [db.SCHEMA_FILENAME, *names]}
        written = {**payload, "version": manifest.version + 1}  # Lite increments it on saving
        return payload | {_CHECKSUMS: {"files": files, "manifest": _text_checksum(written, files)}}

    return with_checksums


def _checksum_of(path: Path) -> int:
    """Return the known checksum of a file; a file of an earlier release is trusted as it is."""
    if path.name == db.SCHEMA_FILENAME:
        return _checksum(path)
    if str(path) not in _known:
        _known[str(path)] = _checksum(path)
    return _known[str(path)]


def _recording(write: Callable[[Any, Any], None], kind: str) -> Callable[[Any, Any], None]:
    """Record the length and checksum of a log after each write, before it is acknowledged."""

    def recording(wal: Any, batch: Any) -> None:
        path = _log_path(wal, kind)
        if getattr(wal, f"{kind}_path") is None:  # nothing has been written to it yet
            _states[path] = (0, 0)
            _sum_path(path).write_bytes(b"")
        try:
            write(wal, batch)
        except (OSError, pa.ArrowException):
            _start_new_logs(wal)
            raise
        length, checksum = _states[path]
        checksum = _checksum(path, length, checksum)
        _states[path] = (path.stat().st_size, checksum)
        with _sum_path(path).open("ab", buffering=0) as file:
            file.write(_entry(*_states[path]))

    return recording


def _start_new_logs(wal: Any) -> None:
    """Make the next write start a new pair of logs: Lite reads no log past an incomplete record."""
    wal._data_writer = wal._delta_writer = wal._data_sink = wal._delta_sink = None
    wal._number += 1


def _check_logs(folder: Path, first: int, *, adopt: bool = False) -> None:
    """Verify the logs, and delete those whose content Lite has moved to Parquet files.

    Args:
        folder: folder of the logs.
        first: number of the first log that Lite still needs.
        adopt: trust logs without a .sum file, which an earlier release wrote.

    Raises:
        DamagedError: a log is damaged or missing.
    """
    logs = set(folder.glob("wal_*.arrow"))
    logs |= {sum_file.with_suffix("") for sum_file in folder.glob("wal_*.arrow.sum")}
    for log in sorted(logs):
        sum_file = _sum_path(log)
        if int(log.stem.rpartition("_")[2]) < first:
            log.unlink(missing_ok=True)
            sum_file.unlink(missing_ok=True)
            continue
        if adopt and not sum_file.exists():
            sum_file.write_bytes(_entry(log.stat().st_size, _checksum(log)))
        _check_log(log, sum_file)


def _check_log(log: Path, sum_file: Path) -> None:
    """Verify the acknowledged part of a log; of the rest, Lite reads the complete records."""
    if not sum_file.exists():
        raise DamagedError(sum_file, "is missing")
    length = checksum = 0
    for length, checksum, own in _ENTRY.iter_unpack(_complete_entries(sum_file)):
        if _entry(length, checksum) != _ENTRY.pack(length, checksum, own):
            raise DamagedError(sum_file, _UNEQUAL)
    if length:
        if not log.exists():
            raise DamagedError(log, "is missing")
        if log.stat().st_size < length:
            raise DamagedError(log, f"is shorter than the {length:,} bytes written to it")
        if _checksum(log, stop=length) != checksum:
            raise DamagedError(log, _UNEQUAL)


def _complete_entries(sum_file: Path) -> bytes:
    data = sum_file.read_bytes()
    return data[: len(data) // _ENTRY.size * _ENTRY.size]


def _entry(length: int, checksum: int) -> bytes:
    return _ENTRY.pack(length, checksum, zlib.crc32(struct.pack("<QI", length, checksum)))


def _log_path(wal: Any, kind: str) -> Path:
    template = WAL_DATA_TEMPLATE if kind == "data" else WAL_DELTA_TEMPLATE
    name: str = template.format(n=wal.number, w=SEQ_FORMAT_WIDTH)
    return Path(wal.wal_dir) / name


def _sum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sum")


def _recording_aliases(save: Callable[..., None]) -> Callable[..., None]:
    def recording(lite: Any, database_name: str = db.DEFAULT_DATABASE_NAME) -> None:
        path = Path(lite._aliases_path(database_name))
        aliases = lite._aliases(database_name)
        text = json.dumps(aliases, ensure_ascii=False, indent=2, sort_keys=True)
        before = _checksum(path) if path.exists() else 0
        temporary = path.with_name(f"{path.name}.sum.tmp")
        temporary.write_text(json.dumps([before, zlib.crc32(text.encode())]))
        temporary.replace(_sum_path(path))
        save(lite, database_name)

    return recording


def _checking_aliases(load: Callable[..., dict[str, str]]) -> Callable[..., dict[str, str]]:
    def checking(lite: Any, database_name: str = db.DEFAULT_DATABASE_NAME) -> dict[str, str]:
        path = Path(lite._aliases_path(database_name))
        sum_file = _sum_path(path)
        if sum_file.exists() and (_checksum(path) if path.exists() else 0) not in _parsed(sum_file):
            raise DamagedError(path, _UNEQUAL if path.exists() else "is missing")
        if path.exists():
            _parsed(path)
        return load(lite, database_name)

    return checking


def _rebuilding(build: Callable[[Any, Any, str], None]) -> Callable[[Any, Any, str], None]:
    """Rebuild an index file that cannot be read: it is derived from the rows."""

    def rebuilding(segment: Any, spec: Any, index_dir: str) -> None:
        try:
            build(segment, spec, index_dir)
        except (ValueError, EOFError):
            os.unlink(segment.index_file_path(index_dir, spec.index_type, spec.field_name))
            build(segment, spec, index_dir)

    return rebuilding


def _has_collection(lite: Any, name: str, database_name: str = db.DEFAULT_DATABASE_NAME) -> bool:
    """Whether a collection exists, even if schema.json, the only file Lite looks at, is lost."""
    return lite.resolve_collection_name(name, database_name) in _collections(lite, database_name)


def _collections(lite: Any, database_name: str = db.DEFAULT_DATABASE_NAME) -> list[str]:
    names = (db.SCHEMA_FILENAME, MANIFEST_FILENAME)
    root = Path(lite._collections_root(lite._require_database(database_name)))
    folders = root.iterdir() if root.exists() else ()
    return sorted(each.name for each in folders if any((each / name).exists() for name in names))


def _show_collections(servicer: Any, request: Any, context: Any) -> Any:
    """List names only; Lite opens every collection, so a damaged one would hide all others."""
    names = servicer._db.list_collections(servicer._database_name(request, context))
    return milvus_pb2.ShowCollectionsResponse(
        status=common_pb2.Status(**success_status_kwargs()), collection_names=names
    )


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedError(path, f"cannot be read ({error})") from error


def _text_checksum(*values: Any) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _compare(path: Path, checksum: int) -> None:
    if _checksum(path) != checksum:
        raise DamagedError(path, _UNEQUAL)


def _checksum(path: Path, start: int = 0, so_far: int = 0, *, stop: int | None = None) -> int:
    """CRC-32 of a file from byte `start` to `stop`; `so_far` is that of the bytes before."""
    remaining = (path.stat().st_size if stop is None else stop) - start
    with path.open("rb") as file:
        file.seek(start)
        while remaining > 0 and (block := file.read(min(_BLOCK_BYTES, remaining))):
            so_far = zlib.crc32(block, so_far)
            remaining -= len(block)
    return so_far
