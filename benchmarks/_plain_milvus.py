"""Plain pymilvus, for comparison with our store: a collection with the same vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _vectors import Case, Corpus, K
from pymilvus import DataType, MilvusClient

from reir.records import FloatArray
from reir.store.client import MilvusConnection
from reir.store.collection import VECTOR, MilvusCollection

_INSERT_ROWS = 2_000
_HNSW = {"M": 16, "efConstruction": 200}
_TIMEOUT_S = 600.0
_INDEX_TIMEOUT_S = 3600.0


class PlainMilvus:
    """A collection with id, vector, tenant and area of every instance."""

    def __init__(self, uri: str, name: str, index_type: str) -> None:
        """Connect; the first `fill` creates the collection."""
        self._uri = uri
        self._client = MilvusClient(uri, timeout=_TIMEOUT_S)
        self._name = name
        self._index_type = index_type

    def fill(self, corpus: Corpus, start: int) -> None:
        """Insert the instances from number `start` on."""
        if not self._client.has_collection(self._name):
            self._create(corpus.vectors.shape[1])
        for first in range(start, len(corpus), _INSERT_ROWS):
            self._client.insert(self._name, _rows(corpus, first))
        self._client.flush(self._name, timeout=_TIMEOUT_S)

    def wait_until_indexed(self) -> None:
        """Wait until a server searches all rows by the index."""
        # Our own wait, so that both sides are measured in the same state of the server.
        collection = MilvusCollection(MilvusConnection(self._uri), self._name, "id", {})
        if not collection.wait_until_indexed(0, _INDEX_TIMEOUT_S):
            raise SystemExit(f"not indexed within {_INDEX_TIMEOUT_S:g} s")

    def searching(self, ef: int) -> Callable[[FloatArray, Case], list[int]]:
        """Return a search with this `ef`: query (1, D) and case -> numbers of the hits."""

        def search(query_1D: FloatArray, case: Case) -> list[int]:
            (hits,) = self._client.search(
                self._name,
                data=query_1D.tolist(),
                limit=K,
                filter=case.plain,
                anns_field=VECTOR,
                search_params={"metric_type": "IP", "params": {"ef": ef}},
            )
            return [int(hit["id"]) for hit in hits]

        return search

    def _create(self, dim: int) -> None:
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        # Plain columns, which filter faster than the JSON attributes of our store.
        schema.add_field("tenant", DataType.INT64)
        schema.add_field("area", DataType.FLOAT)
        schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=dim)
        indexes = MilvusClient.prepare_index_params()
        parameters = _HNSW if self._index_type == "HNSW" else {}
        indexes.add_index(VECTOR, index_type=self._index_type, metric_type="IP", params=parameters)
        self._client.create_collection(self._name, schema=schema, index_params=indexes)
        self._client.load_collection(self._name)


def _rows(corpus: Corpus, first: int) -> list[dict[str, Any]]:
    """Return the next instances from number `first` on, as rows."""
    part = corpus.first(first + _INSERT_ROWS)
    columns = zip(part.tenants[first:], part.areas[first:], part.vectors[first:], strict=True)
    return [
        {"id": number, "tenant": int(tenant), "area": float(area), VECTOR: vector}
        for number, (tenant, area, vector) in enumerate(columns, first)
    ]
