"""`Documents`: small JSON documents beside the galleries, such as the state of a re-indexing job.

They are in the store, and not in files, so that every process that uses the store sees them, also
on other machines. All documents are in one collection of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pymilvus import DataType

from reir.errors import StoreError
from reir.store.client import MilvusConnection
from reir.store.collection import VECTOR, MilvusCollection
from reir.store.filter_milvus import quote
from reir.store.validation import encode_document

COLLECTION = "reir__documents"
"""No version's collection has this name: those end in `__instances` and `__images`."""

# Milvus requires every collection to have a vector. This one is never searched.
_DIM = 2
_NO_VECTOR = [0.0] * _DIM


class Documents:
    """The documents of a store in Milvus."""

    def __init__(self, connection: MilvusConnection) -> None:
        """Use a connection; the collection is created with the first document."""
        columns = {"kind": DataType.VARCHAR, "value": DataType.VARCHAR}
        self._table = MilvusCollection(connection, COLLECTION, "document_id", columns)
        self._exists = False

    def put(self, kind: str, name: str, value: Mapping[str, Any]) -> None:
        """Write a document, and replace the one of the same kind and name."""
        text = encode_document(kind, name, value)
        self._create_table()
        row = {"document_id": _key(kind, name), "kind": kind, "value": text, VECTOR: _NO_VECTOR}
        self._table.upsert([row])

    def find(self, kind: str, prefix: str) -> dict[str, dict[str, Any]]:
        """Documents of a kind whose name starts with `prefix`, by name."""
        if not self._table_exists():
            return {}
        start = len(_key(kind, ""))
        rows = self._table.pages(f"kind == {quote(kind)}")
        found = {row["document_id"][start:]: json.loads(row["value"]) for row in rows}
        return {name: value for name, value in found.items() if name.startswith(prefix)}

    def delete(self, kind: str, names: Iterable[str]) -> None:
        """Delete documents; names that do not exist are ignored."""
        if self._table_exists():
            self._table.delete(_key(kind, name) for name in names)

    def compact(self) -> None:
        """Remove replaced and deleted documents from disk."""
        if self._table_exists():
            self._table.compact()

    def _table_exists(self) -> bool:
        # Another process may create the collection at any time, but nobody ever drops it.
        if not self._exists and self._table.describe() is not None:
            # That process may have been killed before it created the index.
            self._table.ensure_index(searched=False)
            self._exists = True
        return self._exists

    def _create_table(self) -> None:
        if self._table_exists():
            return
        try:
            self._table.create(_DIM, {})
        except StoreError:
            if self._table.describe() is None:
                raise  # otherwise another process has created it at the same moment
        self._table.ensure_ready(searched=False)
        self._exists = True


def _key(kind: str, name: str) -> str:
    return f"{kind}/{name}"
