"""`LiteVersionSource`: reads a version from Milvus Lite, to verify or rebuild its journal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from reir.records import Attributes, FloatArray
from reir.store import rows
from reir.store.catalog import Catalog
from reir.store.collection import MilvusCollection
from reir.store.embedded.journal import Change, JournalImage
from reir.store.filter_milvus import quote
from reir.store.rows import PENDING

_CHANGE_IMAGES = 256
"""Number of photos per change."""

_INDEXED = f"status == {quote('indexed')}"


@dataclass(frozen=True)
class LiteVersionSource:
    """One version in Milvus Lite; implements `version_journals.VersionSource`."""

    gallery: str
    version: str
    catalog: Catalog

    def dim(self) -> int:
        """Dimension of the vectors."""
        return self.catalog.spec(self.gallery, self.version).dim

    def difference(self, holders: Mapping[str, JournalImage]) -> str:
        """Describe how the photos of a journal differ from those in the store; "" if they agree.

        A photo whose instances the store itself has lost does not count as missing from the
        journal: rebuilding the journal could not bring them back.
        """
        # Photos without instances are left out, because searches do not find them.
        stored = {row["image_id"]: row for row in self._rows() if row["num_instances"]}
        unfinished = self.unfinished()
        extra = holders.keys() - stored.keys() - unfinished
        lacking = [stored[key] for key in stored.keys() - holders.keys() - unfinished]
        missing = sum(
            bool(found)
            for chunk in _chunks(iter(lacking))
            for found in self._instances(chunk).values()
        )
        outdated = sum(
            _fingerprint(stored[key]) != (holders[key].attributes, holders[key].content_hash)
            for key in (stored.keys() & holders.keys()) - unfinished
        )
        if not extra and not missing and not outdated:
            return ""
        return (
            f"{missing} photos were missing, {len(extra)} were not in the store, "
            f"{outdated} had other content"
        )

    def unfinished(self) -> Set[str]:
        """Ids of photos whose last write was interrupted: see the steps in `reir.store.milvus`."""
        condition = f"status == {quote(PENDING)} or reach != num_instances"
        # In parentheses, because `pages` puts another condition and `and` before it.
        return {row["image_id"] for row in self._ledger.pages(f"({condition})")}

    def changes(self) -> Iterator[Change]:
        """All photos of the version, as the changes of a new journal."""
        for chunk in _chunks(self._rows()):
            found = self._instances(chunk)
            # Rows are counted: the number in the ledger is too large if some were lost.
            puts = [
                JournalImage(row["image_id"], row["uri"], len(of_it), *_fingerprint(row))
                for row, of_it in zip(chunk, found.values(), strict=True)
            ]
            numbers = [_numbers(each) for each in itertools.chain(*found.values())]
            yield Change(puts, np.array(numbers, dtype=np.float32))

    @property
    def _ledger(self) -> MilvusCollection:
        return self.catalog.images(self.gallery, self.version)

    def _rows(self) -> Iterator[rows.Row]:
        self.dim()  # raises if there is no such version
        return iter(self._ledger.pages(_INDEXED))

    def _instances(self, ledger: list[rows.Row]) -> dict[str, list[rows.Row]]:
        """The instances of these photos with their vectors, in the order of their numbers."""
        images: dict[str, Mapping[str, Any]] = {row["image_id"]: row for row in ledger}
        table = self.catalog.instances(self.gallery, self.version)
        ids = rows.instance_ids(images, "num_instances")
        with self.catalog.translate_errors(self.gallery, self.version):
            found = table.get(ids, [*rows.INSTANCE_OUTPUT_FIELDS, "vector"], consistency="Session")
        return {key: rows.instances_of(found, {key: row}) for key, row in images.items()}


def _chunks(found: Iterator[rows.Row]) -> Iterator[list[rows.Row]]:
    while chunk := list(itertools.islice(found, _CHANGE_IMAGES)):
        yield chunk


def _fingerprint(row: rows.Row) -> tuple[Attributes, str]:
    """Attributes and content hash: if they agree, so do the instances."""
    return row["attributes"], row["content_hash"]


def _numbers(row: rows.Row) -> FloatArray:
    corners = [row[name] for name in rows.CORNERS]
    return np.array([*corners, row["objectness"], *row["vector"]], dtype=np.float32)
