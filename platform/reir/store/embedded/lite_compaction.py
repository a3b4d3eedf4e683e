"""Compaction on request for Milvus Lite, which ignores such requests.

Milvus Lite merges files only when many have the same size, so deleted rows can stay on disk without
end. `install_compaction` patches Milvus Lite in the process that serves a store: afterwards,
`MilvusClient.compact` rewrites every file that contains a deleted row, and then deletes the list of
deleted keys, too.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

from milvus_lite.adapter.grpc.errors import (
    UNEXPECTED_ERROR,
    success_status_kwargs,
    to_status_kwargs,
)
from milvus_lite.adapter.grpc.servicer import MilvusServicer
from milvus_lite.exceptions import MilvusLiteError
from milvus_lite.storage.data_file import read_data_file
from pymilvus.grpc_gen import common_pb2, milvus_pb2

logger = logging.getLogger(__name__)


@cache
def install_compaction() -> None:
    """Patch Milvus Lite for all stores that this process opens; further calls do nothing."""
    MilvusServicer.ManualCompaction = _manual_compaction


def _manual_compaction(servicer: Any, request: Any, context: Any) -> Any:
    """Answer a request; the server takes one request at a time, so nobody writes meanwhile."""
    try:
        name = servicer._database_name(request, context)
        compact(servicer._db.get_collection(request.collection_name, database_name=name))
    except MilvusLiteError as error:
        status = common_pb2.Status(**to_status_kwargs(error))
    except OSError as error:
        status = common_pb2.Status(code=UNEXPECTED_ERROR, reason=str(error))
    else:
        status = common_pb2.Status(**success_status_kwargs())
    return milvus_pb2.ManualCompactionResponse(status=status)


def compact(collection: Any) -> None:
    """Rewrite the data files of a collection without deleted rows, and forget the deletions."""
    # The log holds rows that were deleted since the last flush; flushing deletes it.
    collection._trigger_flush()
    # The flush starts a merge in the background, which would change the same manifest.
    collection._wait_for_bg()
    with collection._maintenance_lock:
        manifest, deletions = collection._manifest, collection._delta_index
        for partition in manifest.list_partitions():
            folder = os.path.join(collection._data_dir, "partitions", partition)
            # A copy of the list, because rewriting a file changes the manifest.
            for file in list(manifest.get_data_files(partition)):
                if _has_deleted_rows(collection, os.path.join(folder, file)):
                    # One file at a time, so that memory holds one file and not the collection.
                    collection._compaction_mgr._compact_files(
                        partition, folder, [file], manifest, deletions
                    )
        _forget_deletions(collection)
        collection._refresh_segment_cache()
        collection._cleanup_orphan_index_files()
    collection._ensure_loaded_segments_indexed()


def _has_deleted_rows(collection: Any, path: str) -> bool:
    table = read_data_file(path).select([collection._pk_name, "_seq"])
    keys, numbers = (column.to_pylist() for column in table.columns)
    is_deleted = collection._delta_index.is_deleted
    return any(is_deleted(key, number) for key, number in zip(keys, numbers, strict=True))


def _forget_deletions(collection: Any) -> None:
    """Delete the lists of deleted keys, of which no data file has a row any more."""
    manifest = collection._manifest
    forgotten = manifest.get_all_delta_files()
    for partition, files in forgotten.items():
        manifest.remove_delta_files(partition, list(files))
    # Before the files are deleted: a manifest that names missing files counts as damaged.
    manifest.save()
    collection._delta_index._map.clear()
    for partition, files in forgotten.items():
        for file in files:
            Path(collection._data_dir, "partitions", partition, file).unlink(missing_ok=True)
