"""Checksums for the files of Milvus Lite, which has none: damaged data raises an error.

Without them, a flipped bit in a vector or a lost file would silently change search results.
`install_checksums` patches Milvus Lite in the process that serves a store. The patched functions
write and verify these checksums:

    manifest.json      contains checksums of itself, of schema.json, and of the Parquet files that
                       it names; each is verified before Lite reads the file
    wal/NAME.sum       records the length and checksum of the write-ahead log NAME after each write;
                       what a killed process wrote beyond that length was never acknowledged
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

from reir.store.embedded.damage_errors import damage_report

_CHECKSUMS = "checksums"
_ENTRY = struct.Struct("<QII")
"""One entry of a .sum file: length of the log, its checksum, and a checksum of these two."""
_BLOCK_BYTES = 1 << 20

_UNEQUAL = "does not match its checksum"

_known: dict[str, int] = {}
"""Checksum of each Parquet file that this process wrote, or that a manifest it read names."""

_log_states: dict[Path, tuple[int, int]] = {}
"""Length and checksum of each write-ahead log that this process writes.

Kept, so that each write only has to read the bytes that it added."""


class DamagedError(MilvusLiteError):  # type: ignore[misc]  # Lite has no types
    """A file is missing or corrupted; clients parse the message (`damage_errors.py`)."""

    def __init__(self, path: Path | str, why: str) -> None:
        super().__init__(damage_report(path, why))


@cache
def install_checksums() -> None:
    """Patch Milvus Lite for all stores that this process opens; further calls do nothing."""
    # Names are replaced in the modules that use them, which have imported them already.
    data_file.pq = delta_file.pq = _CheckedParquet
    db.load_schema, db.Collection = _load_checked_schema, _open_collection
    Manifest._to_payload = _with_manifest_checksums(Manifest._to_payload)
    WAL.write_insert = _with_log_checksums(WAL.write_insert, "data")
    WAL.write_delete = _with_log_checksums(WAL.write_delete, "delta")
    Segment.build_or_load_index = _with_index_rebuild(Segment.build_or_load_index)
    db.MilvusLite._save_aliases = _with_alias_checksums(db.MilvusLite._save_aliases)
    db.MilvusLite._load_aliases = _with_alias_check(db.MilvusLite._load_aliases)
    db.MilvusLite.has_collection, db.MilvusLite.list_collections = (
        _has_collection,
        _list_collections,
    )
    MilvusServicer.ShowCollections = _show_collections


def check_collection(folder: Path) -> Iterator[tuple[Path, int]]:
    """Verify the checksums of the manifest, the schema and the logs of a collection.

    Yields:
        The Parquet files and their checksums, which are not verified yet.

    Raises:
        DamagedError: a file is damaged or missing.
    """
    path = folder / MANIFEST_FILENAME
    payload = _read_json(path) if path.exists() else None
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
    # In a generator, this runs only after the caller has taken all files.
    _check_logs(folder / "wal", payload["active_wal_number"] or 0)


def _load_checked_schema(path: str) -> Any:
    """Replaces `load_schema`, the first function that reads a file of a collection."""
    _known.update((str(file), checksum) for file, checksum in check_collection(Path(path).parent))
    try:
        return load_schema(path)
    except (ValueError, KeyError, TypeError, MilvusLiteError) as error:
        raise DamagedError(path, f"cannot be read ({error})") from error


def _open_collection(name: str, data_dir: str, *arguments: Any, **options: Any) -> Any:
    """Replaces `Collection`; turns parse errors into `DamagedError`.

    They occur if files of an earlier release, which have no checksums, are damaged.
    """
    try:
        return Collection(name, data_dir, *arguments, **options)
    except DamagedError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, MilvusLiteError) as error:
        if getattr(error, "errno", None) is not None:  # an I/O error, not corrupted data
            raise
        raise DamagedError(data_dir, f"cannot be read ({error})") from error


class _CheckedParquet:
    """Replaces the module `pyarrow.parquet`, with the two functions that Lite uses."""

    @staticmethod
    def write_table(table: pa.Table, path: str) -> None:
        pq.write_table(table, path)
        # Of the whole file: Parquet's own page checksums do not cover the footer.
        _known[path] = _checksum(Path(path))

    @staticmethod
    def read_table(path: str) -> pa.Table:
        if path in _known:  # files of an earlier release are not
            _compare(Path(path), _known[path])
        return pq.read_table(path)


def _with_manifest_checksums(to_payload: Callable[[Any], dict[str, Any]]) -> Callable[[Any], Any]:
    def to_payload_with_checksums(manifest: Any) -> dict[str, Any]:
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

    return to_payload_with_checksums


def _checksum_of(path: Path) -> int:
    """Return the checksum of a file; a file of an earlier release is assumed to be intact."""
    # Computed each time, because Lite may write this file again. A Parquet file never changes.
    if path.name == db.SCHEMA_FILENAME:
        return _checksum(path)
    if str(path) not in _known:
        _known[str(path)] = _checksum(path)
    return _known[str(path)]


def _with_log_checksums(write: Callable[[Any, Any], None], kind: str) -> Callable[[Any, Any], None]:
    """Record the length and checksum of a log after each write, before it is acknowledged."""

    def write_and_record(wal: Any, batch: Any) -> None:
        path = _log_path(wal, kind)
        if getattr(wal, f"{kind}_path") is None:  # nothing has been written to it yet
            _log_states[path] = (0, 0)
            # Written before the log exists, because a log without a .sum file counts as damaged.
            _sum_path(path).write_bytes(b"")
        try:
            write(wal, batch)
        except (OSError, pa.ArrowException):
            _start_new_logs(wal)
            raise
        length, checksum = _log_states[path]
        checksum = _checksum(path, length, checksum)
        _log_states[path] = (path.stat().st_size, checksum)
        with _sum_path(path).open("ab", buffering=0) as file:
            file.write(_entry(*_log_states[path]))

    return write_and_record


def _start_new_logs(wal: Any) -> None:
    """Make the next write start new logs.

    The failed write may have left an incomplete record, and Lite does not read past one.
    """
    # The log of data and that of deletions share one number, so both have to start anew.
    wal._data_writer = wal._delta_writer = wal._data_sink = wal._delta_sink = None
    wal._number += 1


def _check_logs(folder: Path, first: int, *, adopt: bool = False) -> None:
    """Verify the logs, and delete those whose content Lite has moved to Parquet files.

    Args:
        folder: folder of the logs.
        first: number of the first log that Lite still needs.
        adopt: assume that logs without a .sum file, which an earlier release wrote, are intact.

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
    """Verify the part of a log that was acknowledged; Lite itself skips an incomplete record."""
    if not sum_file.exists():
        raise DamagedError(sum_file, "is missing")
    length = checksum = 0
    # Only the last entry counts, but a damaged one before it means that the file was changed.
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
    # A killed process may leave a part of an entry, for a write that it never acknowledged.
    return data[: len(data) // _ENTRY.size * _ENTRY.size]


def _entry(length: int, checksum: int) -> bytes:
    return _ENTRY.pack(length, checksum, zlib.crc32(struct.pack("<QI", length, checksum)))


def _log_path(wal: Any, kind: str) -> Path:
    template = WAL_DATA_TEMPLATE if kind == "data" else WAL_DELTA_TEMPLATE
    name: str = template.format(n=wal.number, w=SEQ_FORMAT_WIDTH)
    return Path(wal.wal_dir) / name


def _sum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sum")


def _with_alias_checksums(save: Callable[..., None]) -> Callable[..., None]:
    def record_and_save(lite: Any, database_name: str = db.DEFAULT_DATABASE_NAME) -> None:
        path = Path(lite._aliases_path(database_name))
        aliases = lite._aliases(database_name)
        # Exactly the text that Lite is about to write.
        text = json.dumps(aliases, ensure_ascii=False, indent=2, sort_keys=True)
        # Both checksums are valid, because a kill between the two writes leaves the old aliases.
        before = _checksum(path) if path.exists() else 0
        temporary = path.with_name(f"{path.name}.sum.tmp")
        temporary.write_text(json.dumps([before, zlib.crc32(text.encode())]))
        temporary.replace(_sum_path(path))
        save(lite, database_name)

    return record_and_save


def _with_alias_check(load: Callable[..., dict[str, str]]) -> Callable[..., dict[str, str]]:
    def check_and_load(lite: Any, database_name: str = db.DEFAULT_DATABASE_NAME) -> dict[str, str]:
        path = Path(lite._aliases_path(database_name))
        sum_file = _sum_path(path)
        if sum_file.exists() and (_checksum(path) if path.exists() else 0) not in _read_json(
            sum_file
        ):
            raise DamagedError(path, _UNEQUAL if path.exists() else "is missing")
        if path.exists():
            _read_json(path)
        return load(lite, database_name)

    return check_and_load


def _with_index_rebuild(build: Callable[[Any, Any, str], None]) -> Callable[[Any, Any, str], None]:
    """Rebuild an index file that cannot be read; it contains nothing but what the rows do."""

    def build_or_rebuild(segment: Any, spec: Any, index_dir: str) -> None:
        try:
            build(segment, spec, index_dir)
        except (ValueError, EOFError):
            os.unlink(segment.index_file_path(index_dir, spec.index_type, spec.field_name))
            build(segment, spec, index_dir)

    return build_or_rebuild


def _has_collection(lite: Any, name: str, database_name: str = db.DEFAULT_DATABASE_NAME) -> bool:
    """Whether a collection exists, even if its schema.json is lost, the only file Lite checks."""
    return lite.resolve_collection_name(name, database_name) in _list_collections(
        lite, database_name
    )


def _list_collections(lite: Any, database_name: str = db.DEFAULT_DATABASE_NAME) -> list[str]:
    names = (db.SCHEMA_FILENAME, MANIFEST_FILENAME)
    root = Path(lite._collections_root(lite._require_database(database_name)))
    folders = root.iterdir() if root.exists() else ()
    return sorted(each.name for each in folders if any((each / name).exists() for name in names))


def _show_collections(servicer: Any, request: Any, context: Any) -> Any:
    """List names only. Lite would open every collection, and fail if one of them is damaged."""
    names = servicer._db.list_collections(servicer._database_name(request, context))
    return milvus_pb2.ShowCollectionsResponse(
        status=common_pb2.Status(**success_status_kwargs()), collection_names=names
    )


def _read_json(path: Path) -> Any:
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
