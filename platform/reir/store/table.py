"""One Milvus collection with a string key: rows by key, pages in key order, counts."""

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
"""Rows a call, in either direction; Milvus returns at most 16,384."""

VECTOR = "vector"
_MAX_KEY_BYTES = 1024
_INDEXED_ROWS = 1024
"""Rows of a segment from which on a server gives it an index."""

_SCANNED_ROWS = 4_992
"""Rows from which on a server makes an interim index: its 128 lists by the 39 rows for each that
k-means wants. Recall@10 of text queries on 2.3.5: 1.0 with 4,500 rows; with 5,500 0.976, and 0.50
through a filter that keeps a hundredth."""

_IMPORT_S = 3600.0
_IMPORT_ENDS = (
    BulkInsertState.ImportCompleted,
    BulkInsertState.ImportFailed,
    BulkInsertState.ImportFailedAndCleaned,
)
_POLL_S = 0.5
_MAX_TEXT_BYTES = 65_535

Consistency = Literal["Strong", "Session"]
"""Strong sees every write there is; Session those of this client, without waiting for others."""

_T = TypeVar("_T")


class Table:
    """Rows of one collection."""

    def __init__(
        self, connection: MilvusConnection, name: str, key: str, columns: Mapping[str, DataType]
    ) -> None:
        """Name a collection; it need not exist yet.

        Args:
            connection: to Milvus.
            name: of the collection.
            key: the primary key, a string.
            columns: the other scalar columns; a column `vector` comes on top.
        """
        self.name = name
        self._connection = connection
        self.key = key
        self._columns = columns

    def stored_columns(self) -> list[tuple[str, DataType]]:
        """Name and type of all columns that the collection has, key and vector among them."""
        found = self._call("describe_collection")["fields"]
        return [(each["name"], DataType(each["type"])) for each in found]

    def describe(self) -> Row | None:
        """What Milvus says of the collection, None if there is none; `name` may be an alias."""
        try:
            return dict(self._call("describe_collection"))
        except GalleryNotFound:
            return None

    def create(
        self, dim: int, properties: Mapping[str, str], extra: Mapping[str, DataType] | None = None
    ) -> None:
        """Create the collection; `extra` columns are read only where they are named."""
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
        """Index and load the collection as far as that is still to be done.

        Args:
            searched: by vector; else Milvus wants an index all the same, and gets one that costs
                nothing.
        """
        if not self._call("list_indexes"):
            capabilities = self._connection.capabilities
            parameters = MilvusClient.prepare_index_params()
            parameters.add_index(
                VECTOR,
                index_type=capabilities.index_type if searched else "FLAT",
                metric_type="IP",
                params=dict(capabilities.index_params) if searched else {},
            )
            # Loading waits for the index; waiting here too would cost half a second more.
            self._call("create_index", index_params=parameters, sync=False)
        self._call("load_collection")

    def settle(self, fresh: int, within_s: float) -> bool:
        """Have a server search all rows by their index, or by a scan where they are few.

        Rows that are not sealed yet are scanned until there are `_SCANNED_ROWS` of them; beyond, an
        interim index finds half of the best through a narrow filter. Sealing fewer would harm: a
        small sealed segment gets that interim index and no other.

        Args:
            fresh: rows upserted lately, at least.
            within_s: how long to wait. Between the end of a build and its use a server lets some 15
                seconds pass.
        """
        deadline_s = time.monotonic() + within_s
        sealed = sum(each.num_rows for each in self._call("list_persistent_segments"))
        if max(fresh, self.count() - sealed) >= _SCANNED_ROWS:
            self._call("flush")
        while not self._is_settled():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_POLL_S)
        return True

    def _is_settled(self) -> bool:
        """Whether segments of all rows are searched, by an index where they are to have one.

        Not whether each stored segment is: where some were merged, the old ones are searched until
        the index of the new one is built, which is as well.
        """
        searched = self._call("list_loaded_segments")
        stored = self._call("list_persistent_segments")
        indexed = all(each.index_id for each in searched if each.num_rows >= _INDEXED_ROWS)
        return indexed and sum(each.num_rows for each in searched) >= sum(
            each.num_rows
            for each in stored
            if each.level_name != "L0"  # of deletions
        )

    def drop(self) -> None:
        """Drop the collection; does nothing when there is none."""
        self._call("drop_collection")

    def get(
        self,
        ids: Iterable[str],
        columns: Sequence[str] | None = None,
        consistency: Consistency = "Strong",
    ) -> dict[str, Row]:
        """Rows by key of those ids that exist, by default with all columns but the vector."""
        found: dict[str, Row] = {}
        for chunk in _chunks(dict.fromkeys(ids), PAGE_ROWS):
            answer = self._call(
                "query",
                filter=render_ids(self.key, chunk),
                output_fields=list(columns or [self.key, *self._columns]),
                consistency_level=consistency,
            )
            found.update((row[self.key], row) for row in answer)
        return found

    def pages(self, condition: str) -> Iterator[Row]:
        """Rows that meet a condition, without vectors, in the order of the key; streams."""
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
        """Write rows, replacing those with the same key."""
        for chunk in _chunks(rows, PAGE_ROWS):
            self._call("upsert", data=chunk)

    def import_file(self, file: str) -> None:
        """Have a server insert the rows of a file in its storage; they are searched soon after.

        Raises:
            StoreError: it could not, or not within `_IMPORT_S`.
            StoreUnavailable: at the first failure to begin. The server may have begun all the same,
                so that another attempt could bring every row twice.
        """
        task = self._connection.call_once(
            "do_bulk_insert", collection_name=self.name, partition_name="", files=[file]
        )
        end = self._end_of_import(task)
        if end.state != BulkInsertState.ImportCompleted:
            raise StoreError(f"the server cannot import {file}: {end.failed_reason}")

    def await_imports(self) -> None:
        """Return when what a server was importing before this call has ended, by whomever."""
        for begun in self._call("list_bulk_insert_tasks", limit=0):
            self._end_of_import(begun.task_id)

    def _end_of_import(self, task: int) -> BulkInsertState:
        deadline_s = time.monotonic() + _IMPORT_S
        while True:
            state = self._connection.call("get_bulk_insert_state", task_id=task)
            if state.state in _IMPORT_ENDS:
                return state
            if time.monotonic() > deadline_s:
                raise StoreError(f"import {task} into {self.name} has not ended in {_IMPORT_S:g} s")
            time.sleep(_POLL_S)

    def await_present(self, ids: Sequence[str]) -> None:
        """Return when all of these rows are searched."""
        deadline_s = time.monotonic() + _IMPORT_S
        for chunk in _chunks(ids, PAGE_ROWS):
            while (found := len(self.get(chunk, [self.key]))) < len(chunk):
                if time.monotonic() > deadline_s:
                    raise StoreError(
                        f"{self.name} has {found} of {len(chunk)} imported rows after "
                        f"{_IMPORT_S:g} s"
                    )
                time.sleep(_POLL_S)

    def delete(self, ids: Iterable[str]) -> None:
        """Delete rows by key; ids that do not exist are no error."""
        for chunk in _chunks(ids, PAGE_ROWS):
            self._call("delete", filter=render_ids(self.key, chunk))

    def search(self, vectors: Any, limit: int, condition: str) -> Any:
        """Milvus's own search: for each vector its hits with all columns but the vector."""
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
