"""`MilvusCollection`: a collection with a string key, whose rows are read and written by key."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, TypeVar

from pymilvus import BulkInsertState, DataType, MilvusClient

from reir.errors import GalleryNotFound, StoreError
from reir.store.client import MilvusConnection
from reir.store.filter_milvus import quote, render_ids
from reir.store.rows import Row

PAGE_ROWS = 4096
"""Number of rows per call, in either direction. Milvus returns at most 16,384."""

VECTOR = "vector"
_MAX_KEY_BYTES = 1024
_INDEXED_ROWS = 1024
"""Number of rows from which on a server builds an index for a segment."""

_SCANNED_ROWS = 4_992
"""Number of rows from which on a server builds an interim index: 128 lists, times the 39 rows per
list that k-means requires. Recall@10 of text queries on Milvus 2.3.5 is 1.0 with 4,500 rows. With
5,500 rows it is 0.976, and 0.50 with a filter that keeps 1% of the rows."""

_IMPORT_TIMEOUT_S = 3600.0
_IMPORT_END_STATES = (
    BulkInsertState.ImportCompleted,
    BulkInsertState.ImportFailed,
    BulkInsertState.ImportFailedAndCleaned,
)
_COMPACTION_TIMEOUT_S = 3600.0
_COMPACTED = "Completed"
_POLL_S = 0.5
# The largest length that Milvus allows for a text column.
_MAX_TEXT_BYTES = 65_535

Consistency = Literal["Strong", "Session"]
"""A Strong read sees all writes. A Session read sees those of this client, and is faster."""

_T = TypeVar("_T")


class MilvusCollection:
    """One collection of Milvus."""

    def __init__(
        self, connection: MilvusConnection, name: str, key: str, columns: Mapping[str, DataType]
    ) -> None:
        """Take the name of a collection, which need not exist yet.

        Args:
            connection: to Milvus.
            name: name of the collection.
            key: name of the primary key, a string.
            columns: the other scalar columns. There also is a column `vector`.
        """
        self.name = name
        self._connection = connection
        self.key = key
        self._columns = columns

    def stored_columns(self) -> list[tuple[str, DataType]]:
        """Name and type of all columns of the collection, including key and vector."""
        found = self._call("describe_collection")["fields"]
        return [(each["name"], DataType(each["type"])) for each in found]

    def describe(self) -> Row | None:
        """Description by Milvus; None if there is no such collection. `name` may be an alias."""
        try:
            return dict(self._call("describe_collection"))
        except GalleryNotFound:
            return None

    def create(
        self, dim: int, properties: Mapping[str, str], extra: Mapping[str, DataType] | None = None
    ) -> None:
        """Create the collection; `extra` columns are only read by calls that name them."""
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field(self.key, DataType.VARCHAR, is_primary=True, max_length=_MAX_KEY_BYTES)
        for name, kind in {**self._columns, **(extra or {})}.items():
            length = {"max_length": _MAX_TEXT_BYTES} if kind == DataType.VARCHAR else {}
            schema.add_field(name, kind, **length)
        schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=dim)
        self._call(
            "create_collection",
            schema=schema,
            consistency_level="Session",
            properties=dict(properties),
        )

    def ensure_ready(self, *, searched: bool) -> None:
        """Create the index and load the collection, unless that is already done.

        Args:
            searched: see `ensure_index`.
        """
        self.ensure_index(searched=searched)
        self._call("load_collection")

    def ensure_index(self, *, searched: bool) -> None:
        """Create the index, unless there is one.

        Args:
            searched: whether there will be vector searches. Otherwise the index is FLAT, which
                costs nothing: Milvus does not load a collection without an index.
        """
        if self._call("list_indexes"):
            return
        capabilities = self._connection.capabilities
        parameters = MilvusClient.prepare_index_params()
        parameters.add_index(
            VECTOR,
            index_type=capabilities.index_type if searched else "FLAT",
            metric_type="IP",
            params=dict(capabilities.index_params) if searched else {},
        )
        try:
            # Not synchronous: loading waits for the index anyway, and waiting here too would take
            # half a second longer.
            self._call("create_index", index_params=parameters, sync=False)
        except StoreError:
            if not self._call("list_indexes"):
                raise  # otherwise another process has created it at the same moment

    def wait_until_indexed(self, num_upserted: int, timeout_s: float) -> bool:
        """Have the server search all rows by their final index, or by a scan if they are few.

        Rows of a growing segment, which is not sealed yet, are scanned as long as there are fewer
        than `_SCANNED_ROWS`. Beyond that the server uses an interim index, which finds only half of
        the best rows through a narrow filter. Flushing seals the segments, so that they get their
        final index. Fewer rows are not flushed: a small sealed segment gets the interim index and
        no other, which would make searches worse.

        Args:
            num_upserted: number of rows that were upserted recently, or fewer.
            timeout_s: how long to wait. A server takes some 15 seconds from the end of a build
                until it uses the index.

        Returns:
            Whether the final index is in use.
        """
        deadline_s = time.monotonic() + timeout_s
        num_sealed = sum(each.num_rows for each in self._call("list_persistent_segments"))
        # Replaced rows count as sealed until they are compacted, so the caller's number may be the
        # larger one.
        if max(num_upserted, self.count() - num_sealed) >= _SCANNED_ROWS:
            self._call("flush")
        while not self._is_indexed():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_POLL_S)
        return True

    def _is_indexed(self) -> bool:
        """Whether loaded segments cover all rows, and all large ones have an index.

        Not whether each stored segment is loaded: after segments were merged, the server searches
        the old ones until the index of the new one is built, and the old ones have an index too.
        """
        loaded = self._call("list_loaded_segments")
        stored = self._call("list_persistent_segments")
        indexed = all(each.index_id for each in loaded if each.num_rows >= _INDEXED_ROWS)
        return indexed and sum(each.num_rows for each in loaded) >= sum(
            each.num_rows
            for each in stored
            if each.level_name != "L0"  # these hold deletions, not rows
        )

    def drop(self) -> None:
        """Drop the collection. Does nothing if it does not exist."""
        self._call("drop_collection")

    def get(
        self,
        ids: Iterable[str],
        columns: Sequence[str] | None = None,
        consistency: Consistency = "Strong",
    ) -> dict[str, Row]:
        """Rows by key, by default with all columns except the vector. Unknown ids are left out."""
        found: dict[str, Row] = {}
        for chunk in _chunks(dict.fromkeys(ids), PAGE_ROWS):  # each id once, in the order given
            answer = self._call(
                "query",
                filter=render_ids(self.key, chunk),
                output_fields=list(columns or [self.key, *self._columns]),
                consistency_level=consistency,
            )
            found.update((row[self.key], row) for row in answer)
        return found

    def pages(self, condition: str) -> Iterator[Row]:
        """Stream the rows that meet a condition, ordered by key, without vectors."""
        # By key and not by offset: Milvus refuses to skip more than 16,384 rows.
        last = ""
        while True:
            answer = self._call(
                "query",
                filter=f"{self.key} > {quote(last)} and {condition}",
                output_fields=[self.key, *self._columns],
                limit=PAGE_ROWS,
                consistency_level="Strong",
                **self._connection.capabilities.paging,
            )
            yield from answer
            if len(answer) < PAGE_ROWS:
                return
            last = answer[-1][self.key]

    def count(self, condition: str = "", consistency: Consistency = "Strong") -> int:
        """Number of rows that meet a condition."""
        found = self._call(
            "query",
            filter=condition,
            output_fields=["count(*)"],
            consistency_level=consistency,
        )
        return int(found[0]["count(*)"])

    def upsert(self, rows: Iterable[Row]) -> None:
        """Write rows, and replace rows of the same key."""
        # Also for rows that are certainly new: Milvus Lite takes twice as long to insert them.
        for chunk in _chunks(rows, PAGE_ROWS):
            self._call("upsert", data=chunk)

    def import_file(self, file: str) -> None:
        """Have a server insert the rows of a file in its storage; searches find them soon after.

        Raises:
            StoreError: the import failed, or did not finish within `_IMPORT_TIMEOUT_S`.
            StoreUnavailable: the server could not be reached. There is no second attempt: if the
                server has started the import nevertheless, it would insert every row twice.
        """
        task = self._connection.call_once(
            "do_bulk_insert", collection_name=self.name, partition_name="", files=[file]
        )
        end = self._await_import(task)
        if end.state != BulkInsertState.ImportCompleted:
            raise StoreError(f"the server cannot import {file}: {end.failed_reason}")

    def await_imports(self) -> None:
        """Wait until all imports that the server is running now have ended."""
        for task in self._call("list_bulk_insert_tasks", limit=0):  # 0 means no limit
            self._await_import(task.task_id)

    def _await_import(self, task: int) -> BulkInsertState:
        deadline_s = time.monotonic() + _IMPORT_TIMEOUT_S
        while True:
            state = self._connection.call("get_bulk_insert_state", task_id=task)
            if state.state in _IMPORT_END_STATES:
                return state
            if time.monotonic() > deadline_s:
                raise StoreError(
                    f"import {task} into {self.name} has not ended within {_IMPORT_TIMEOUT_S:g} s"
                )
            time.sleep(_POLL_S)

    def await_present(self, ids: Sequence[str]) -> None:
        """Wait until searches find all of these rows."""
        deadline_s = time.monotonic() + _IMPORT_TIMEOUT_S
        for chunk in _chunks(ids, PAGE_ROWS):
            while (found := len(self.get(chunk, [self.key]))) < len(chunk):
                if time.monotonic() > deadline_s:
                    raise StoreError(
                        f"{self.name} has {found} of {len(chunk)} imported rows after "
                        f"{_IMPORT_TIMEOUT_S:g} s"
                    )
                time.sleep(_POLL_S)

    def delete(self, ids: Iterable[str]) -> None:
        """Delete rows by key; ids that do not exist are ignored."""
        for chunk in _chunks(ids, PAGE_ROWS):
            self._call("delete", filter=render_ids(self.key, chunk))

    def compact(self) -> None:
        """Merge the files of the collection without deleted rows, and wait until that is done."""
        self._call("flush")
        # After the flush, because a server merges only segments that are sealed.
        job = self._call("compact")
        deadline_s = time.monotonic() + _COMPACTION_TIMEOUT_S
        while self._connection.call("get_compaction_state", job_id=job) != _COMPACTED:
            if time.monotonic() > deadline_s:
                raise StoreError(
                    f"the server has not compacted {self.name} within {_COMPACTION_TIMEOUT_S:g} s"
                )
            time.sleep(_POLL_S)

    def search(self, vectors: Any, limit: int, condition: str) -> Any:
        """Search in Milvus; return the hits of each vector, with all columns except the vector."""
        return self._call(
            "search",
            data=vectors,
            limit=limit,
            filter=condition,
            anns_field=VECTOR,
            output_fields=[self.key, *self._columns],
            search_params=self._connection.capabilities.search_params(
                limit, filtered=bool(condition)
            ),
            consistency_level="Session",
        )

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._connection.call(method, collection_name=self.name, **arguments)


def _chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk
