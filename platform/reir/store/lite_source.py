"""Reads one version from Milvus Lite, to check its journal or to rebuild it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from reir.records import Attributes, FloatArray
from reir.store import rows
from reir.store.catalogue import Catalogue
from reir.store.filter_milvus import quote
from reir.store.journal import Change, JournalImage
from reir.store.rows import PENDING
from reir.store.table import Table

_CHANGE_IMAGES = 256
_INDEXED = f"status == {quote('indexed')}"


@dataclass(frozen=True)
class LiteSource:
    """One version in Milvus Lite; implements `mirror.Source`."""

    gallery: str
    version: str
    catalogue: Catalogue

    def dim(self) -> int:
        """Dimension of the vectors."""
        return self.catalogue.spec(self.gallery, self.version).dim

    def difference(self, holders: Mapping[str, JournalImage]) -> str:
        """Describe how the photos of a journal differ from those in the store; "" if they agree.

        A photo whose ledger row exists but whose instances are lost from the store does not count
        as missing from the journal.
        """
        stored = {row["image_id"]: row for row in self._rows() if row["num_instances"]}
        unfinished = self.unfinished()
        surplus = holders.keys() - stored.keys() - unfinished
        lacking = [stored[key] for key in stored.keys() - holders.keys() - unfinished]
        missing = sum(
            bool(found)
            for chunk in _chunks(iter(lacking))
            for found in self._instances(chunk).values()
        )
        outdated = sum(
            _shared(stored[key]) != (holders[key].attributes, holders[key].content_hash)
            for key in (stored.keys() & holders.keys()) - unfinished
        )
        if not surplus and not missing and not outdated:
            return ""
        return (
            f"{missing} photos were missing, {len(surplus)} were not in the store, "
            f"{outdated} had other content"
        )

    def unfinished(self) -> Set[str]:
        """Ids of photos whose last write was interrupted."""
        condition = f"status == {quote(PENDING)} or reach != num_instances"
        return {row["image_id"] for row in self._ledger.pages(f"({condition})")}

    def changes(self) -> Iterator[Change]:
        """The whole version, as the changes of a new journal."""
        for chunk in _chunks(self._rows()):
            found = self._instances(chunk)
            puts = [
                JournalImage(row["image_id"], row["uri"], len(of_it), *_shared(row))
                for row, of_it in zip(chunk, found.values(), strict=True)
            ]
            numbers = [_numbers(each) for each in itertools.chain(*found.values())]
            yield Change(puts, np.array(numbers, dtype=np.float32))

    @property
    def _ledger(self) -> Table:
        return self.catalogue.images(self.gallery, self.version)

    def _rows(self) -> Iterator[rows.Row]:
        self.dim()  # raises if there is no such version
        return iter(self._ledger.pages(_INDEXED))

    def _instances(self, ledger: list[rows.Row]) -> dict[str, list[rows.Row]]:
        """The instances of these photos with their vectors, in the order of their numbers."""
        images: dict[str, Mapping[str, Any]] = {row["image_id"]: row for row in ledger}
        table = self.catalogue.instances(self.gallery, self.version)
        ids = rows.instance_ids(images, "num_instances")
        with self.catalogue.errors_of(self.gallery, self.version):
            found = table.get(ids, [*rows.INSTANCE_FIELDS, "vector"], consistency="Session")
        return {key: rows.instances_of(found, {key: row}) for key, row in images.items()}


def _chunks(found: Iterator[rows.Row]) -> Iterator[list[rows.Row]]:
    while chunk := list(itertools.islice(found, _CHANGE_IMAGES)):
        yield chunk


def _shared(row: rows.Row) -> tuple[Attributes, str]:
    """Attributes and content hash, which decide whether a journal has the current photo."""
    return row["attributes"], row["content_hash"]


def _numbers(row: rows.Row) -> FloatArray:
    corners = [row[name] for name in rows.CORNERS]
    return np.array([*corners, row["objectness"], *row["vector"]], dtype=np.float32)
