"""Checksums for the files of Milvus Lite, which has none: damage is refused, never served.

`guard` stands between Lite and its disk, in the process that serves a store:

    manifest.json      has a checksum of itself, of schema.json, and of the Parquet files that it
                       names; each is compared before Lite reads it
    wal/NAME.sum       after each write to the log NAME its length and checksum so far; of what a
                       killed process wrote beyond that, nobody was told
    aliases.json.sum   checksums of the aliases before and after the last change

Collections of an earlier release have none of these and get them with their next change.
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
_NOTE = struct.Struct("<QII")
"""Length of a log, its checksum, and the checksum of these two."""
_BLOCK_BYTES = 1 << 20

_UNEQUAL = "does not match its checksum"

_known: dict[str, int] = {}
"""Checksum of each Parquet file that this process has written, or read the manifest of."""

_noted: dict[Path, tuple[int, int]] = {}
"""Length and checksum of each log that this process writes."""


class DamagedError(MilvusLiteError):  # type: ignore[misc]  # Lite has no types
    """A file is not what was written; the message is for `reir.store.damage`."""

    def __init__(self, path: Path | str, why: str) -> None:
        super().__init__(describe_damage(path, why))


@cache
def guard() -> None:
    """Put the checks in place, for all stores that this process opens."""
    data_file.pq = delta_file.pq = _CheckedParquet
    db.load_schema, db.Collection = _checked_schema, _opened
    Manifest._to_payload = _with_checksums(Manifest._to_payload)
    WAL.write_insert = _noting(WAL.write_insert, "data")
    WAL.write_delete = _noting(WAL.write_delete, "delta")
    Segment.build_or_load_index = _rebuilding(Segment.build_or_load_index)
    db.MilvusLite._save_aliases = _noting_aliases(db.MilvusLite._save_aliases)
    db.MilvusLite._load_aliases = _checking_aliases(db.MilvusLite._load_aliases)
    db.MilvusLite.has_collection, db.MilvusLite.list_collections = _has_collection, _collections
    MilvusServicer.ShowCollections = _show_collections


def check_collection(folder: Path) -> Iterator[tuple[Path, int]]:
    """Compare the manifest, the schema and the logs of a collection with their checksums.

    Yields:
        The Parquet files and their checksums, which are not compared.

    Raises:
        DamagedError: a file is damaged or gone.
    """
    path = folder / MANIFEST_FILENAME
    payload = _parsed(path) if path.exists() else None
    if payload is None:
        if any(folder.glob("partitions/*/*/*.parquet")) or any(folder.glob("wal/*.arrow")):
            raise DamagedError(path, "is missing")
        return
    said = payload.pop(_CHECKSUMS, None)
    if said is None:
        _check_logs(folder / "wal", 0, adopt=True)
        return
    if said["manifest"] != _text_checksum(payload, said["files"]):
        raise DamagedError(path, _UNEQUAL)
    for name, checksum in said["files"].items():
        file = folder / name
        if not file.exists():
            raise DamagedError(file, "is missing")
        if name == db.SCHEMA_FILENAME:
            _compare(file, checksum)
        else:
            yield file, checksum
    _check_logs(folder / "wal", payload["active_wal_number"] or 0)


def _checked_schema(path: str) -> Any:
    """In the place of `load_schema`, the first that Lite reads of a collection."""
    _known.update((str(file), checksum) for file, checksum in check_collection(Path(path).parent))
    try:
        return load_schema(path)
    except (ValueError, KeyError, TypeError, MilvusLiteError) as error:
        raise DamagedError(path, f"cannot be read ({error})") from error


def _opened(name: str, data_dir: str, *arguments: Any, **options: Any) -> Any:
    """In the place of `Collection`, whose files of an earlier release have no checksums."""
    try:
        return Collection(name, data_dir, *arguments, **options)
    except DamagedError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, MilvusLiteError) as error:
        if getattr(error, "errno", None) is not None:  # of the disk, not of what is on it
            raise
        raise DamagedError(data_dir, f"cannot be read ({error})") from error


class _CheckedParquet:
    """What Lite uses of `pyarrow.parquet`."""

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
        written = {**payload, "version": manifest.version + 1}  # as Lite is about to set it
        return payload | {_CHECKSUMS: {"files": files, "manifest": _text_checksum(written, files)}}

    return with_checksums


def _checksum_of(path: Path) -> int:
    """What is known of a file; one of an earlier release is taken as it is."""
    if path.name == db.SCHEMA_FILENAME:
        return _checksum(path)
    if str(path) not in _known:
        _known[str(path)] = _checksum(path)
    return _known[str(path)]


def _noting(write: Callable[[Any, Any], None], kind: str) -> Callable[[Any, Any], None]:
    """Have a log note its length and checksum after each write, before anybody is told of it."""

    def noting(wal: Any, batch: Any) -> None:
        path = _log_path(wal, kind)
        if getattr(wal, f"{kind}_path") is None:  # nothing was written to it yet
            _noted[path] = (0, 0)
            _note_path(path).write_bytes(b"")
        try:
            write(wal, batch)
        except (OSError, pa.ArrowException):
            _begin_anew(wal)
            raise
        length, checksum = _noted[path]
        checksum = _checksum(path, length, checksum)
        _noted[path] = (path.stat().st_size, checksum)
        with _note_path(path).open("ab", buffering=0) as file:
            file.write(_note(*_noted[path]))

    return noting


def _begin_anew(wal: Any) -> None:
    """Let the next write begin a new pair of logs: Lite reads none beyond where it is torn."""
    wal._data_writer = wal._delta_writer = wal._data_sink = wal._delta_sink = None
    wal._number += 1


def _check_logs(folder: Path, first: int, *, adopt: bool = False) -> None:
    """Compare logs with their notes, and remove those that Lite has taken over into Parquet files.

    Args:
        folder: of the logs.
        first: number of the first that Lite still needs.
        adopt: take logs without notes as they are, which an earlier release has written.

    Raises:
        DamagedError: a log is damaged or gone.
    """
    logs = set(folder.glob("wal_*.arrow"))
    logs |= {note.with_suffix("") for note in folder.glob("wal_*.arrow.sum")}
    for log in sorted(logs):
        note = _note_path(log)
        if int(log.stem.rpartition("_")[2]) < first:
            log.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
            continue
        if adopt and not note.exists():
            note.write_bytes(_note(log.stat().st_size, _checksum(log)))
        _check_log(log, note)


def _check_log(log: Path, note: Path) -> None:
    """Compare what was acknowledged of a log with its checksum; Lite takes what is whole beyond."""
    if not note.exists():
        raise DamagedError(note, "is missing")
    length = checksum = 0
    for length, checksum, own in _NOTE.iter_unpack(_whole_notes(note)):
        if _note(length, checksum) != _NOTE.pack(length, checksum, own):
            raise DamagedError(note, _UNEQUAL)
    if length:
        if not log.exists():
            raise DamagedError(log, "is missing")
        if log.stat().st_size < length:
            raise DamagedError(log, f"is shorter than the {length:,} bytes written to it")
        if _checksum(log, stop=length) != checksum:
            raise DamagedError(log, _UNEQUAL)


def _whole_notes(note: Path) -> bytes:
    data = note.read_bytes()
    return data[: len(data) // _NOTE.size * _NOTE.size]


def _note(length: int, checksum: int) -> bytes:
    return _NOTE.pack(length, checksum, zlib.crc32(struct.pack("<QI", length, checksum)))


def _log_path(wal: Any, kind: str) -> Path:
    template = WAL_DATA_TEMPLATE if kind == "data" else WAL_DELTA_TEMPLATE
    name: str = template.format(n=wal.number, w=SEQ_FORMAT_WIDTH)
    return Path(wal.wal_dir) / name


def _note_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sum")


def _noting_aliases(save: Callable[..., None]) -> Callable[..., None]:
    def noting(lite: Any, database_name: str = db.DEFAULT_DATABASE_NAME) -> None:
        path = Path(lite._aliases_path(database_name))
        aliases = lite._aliases(database_name)
        text = json.dumps(aliases, ensure_ascii=False, indent=2, sort_keys=True)
        before = _checksum(path) if path.exists() else 0
        temporary = path.with_name(f"{path.name}.sum.tmp")
        temporary.write_text(json.dumps([before, zlib.crc32(text.encode())]))
        temporary.replace(_note_path(path))
        save(lite, database_name)

    return noting


def _checking_aliases(load: Callable[..., dict[str, str]]) -> Callable[..., dict[str, str]]:
    def checking(lite: Any, database_name: str = db.DEFAULT_DATABASE_NAME) -> dict[str, str]:
        path = Path(lite._aliases_path(database_name))
        note = _note_path(path)
        if note.exists() and (_checksum(path) if path.exists() else 0) not in _parsed(note):
            raise DamagedError(path, _UNEQUAL if path.exists() else "is missing")
        if path.exists():
            _parsed(path)
        return load(lite, database_name)

    return checking


def _rebuilding(build: Callable[[Any, Any, str], None]) -> Callable[[Any, Any, str], None]:
    """An index file that cannot be read is made anew: it says nothing that the rows do not."""

    def rebuilding(segment: Any, spec: Any, index_dir: str) -> None:
        try:
            build(segment, spec, index_dir)
        except (ValueError, EOFError):
            os.unlink(segment.index_file_path(index_dir, spec.index_type, spec.field_name))
            build(segment, spec, index_dir)

    return rebuilding


def _has_collection(lite: Any, name: str, database_name: str = db.DEFAULT_DATABASE_NAME) -> bool:
    """Also where schema.json is lost, by which alone Lite goes."""
    return lite.resolve_collection_name(name, database_name) in _collections(lite, database_name)


def _collections(lite: Any, database_name: str = db.DEFAULT_DATABASE_NAME) -> list[str]:
    names = (db.SCHEMA_FILENAME, MANIFEST_FILENAME)
    root = Path(lite._collections_root(lite._require_database(database_name)))
    folders = root.iterdir() if root.exists() else ()
    return sorted(each.name for each in folders if any((each / name).exists() for name in names))


def _show_collections(servicer: Any, request: Any, context: Any) -> Any:
    """The names; Lite would open all of them, so that a damaged one would hide the others."""
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
    """CRC-32 of a file from byte `start` to `stop`, going on from that of what is before."""
    remaining = (path.stat().st_size if stop is None else stop) - start
    with path.open("rb") as file:
        file.seek(start)
        while remaining > 0 and (block := file.read(min(_BLOCK_BYTES, remaining))):
            so_far = zlib.crc32(block, so_far)
            remaining -= len(block)
    return so_far
