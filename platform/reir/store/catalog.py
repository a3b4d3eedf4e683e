"""`Catalog`: which galleries and versions Milvus has, and which version of a gallery is live."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future

from pymilvus import DataType

from reir.errors import GalleryNotFound
from reir.store import rows, validation
from reir.store.client import MilvusConnection
from reir.store.collection import MilvusCollection
from reir.store.contract import VersionSpec
from reir.store.embedded.damage_errors import missing_ledger_error
from reir.store.filter_milvus import quote
from reir.store.names import (
    VersionKey,
    images_collection,
    instances_collection,
    live_alias,
    parse_instances_collection,
)
from reir.store.rows import VERSION_PROPERTY, StoredVersion


class Catalog:
    """Reads and switches versions. A version exists as long as its instances collection does."""

    def __init__(self, connection: MilvusConnection) -> None:
        """Use a connection."""
        self._connection = connection
        # The columns of a collection never change, so each process asks Milvus for them only once.
        self._ledger_columns: dict[str, Mapping[str, DataType]] = {}
        self._derived: dict[tuple[str, str], bool] = {}

    def instances(self, gallery: str, version: str) -> MilvusCollection:
        """Instances collection of a version, whether or not it exists."""
        name = instances_collection(gallery, version)
        return MilvusCollection(self._connection, name, "instance_id", rows.INSTANCE_COLUMNS)

    def images(self, gallery: str, version: str) -> MilvusCollection:
        """Ledger of a version, whether or not it exists."""
        name = images_collection(gallery, version)
        columns = self._ledger_columns.get(name)
        if columns is None:
            columns = self._find_ledger_columns(gallery, version)
        return MilvusCollection(self._connection, name, "image_id", columns)

    def drop_ledger(self, gallery: str, version: str) -> None:
        """Drop the ledger of a version, even if it is damaged."""
        # Not `self.images`, which raises `StoreDamaged` if only the ledger is missing.
        MilvusCollection(
            self._connection, images_collection(gallery, version), "image_id", {}
        ).drop()

    def version_keys(self) -> Iterator[VersionKey]:
        """All versions of all galleries."""
        for collection in self._connection.call("list_collections"):
            key = parse_instances_collection(collection)
            if key is not None:
                yield key

    def version_names(self, gallery: str) -> list[str]:
        """Names of the versions of a gallery, including damaged ones."""
        return [key.version for key in self.version_keys() if key.gallery == gallery]

    def find(self, gallery: str, version: str) -> StoredVersion | None:
        """What was stored with a version when it was created; None if there is no such version."""
        found = self.instances(gallery, version).describe()
        # A server may also have collections of other programs, with names like ours.
        ours = found is not None and VERSION_PROPERTY in found["properties"]
        return StoredVersion.from_properties(found["properties"]) if found and ours else None

    def spec(self, gallery: str, version: str) -> VersionSpec:
        """Spec of a version.

        Raises:
            GalleryNotFound: there is no such version.
        """
        stored = self.find(gallery, version)
        if stored is None:
            raise validation.unknown_version_error(gallery, version, self.specs_by_age(gallery))
        return stored.spec

    def specs_by_age(self, gallery: str) -> dict[str, VersionSpec]:
        """Specs of the versions of a gallery, oldest first; empty if there is no such gallery."""
        found = [(name, self.find(gallery, name)) for name in self.version_names(gallery)]
        present = [(name, stored) for name, stored in found if stored is not None]
        present.sort(key=lambda item: item[1].created_ns)
        return {name: stored.spec for name, stored in present}

    def live(self, gallery: str) -> str | None:
        """Version that the gallery's alias points to; None if there is no alias."""
        # Described by the name of an alias, Milvus returns the collection that it points to.
        alias = MilvusCollection(self._connection, live_alias(gallery), "instance_id", {})
        found = alias.describe()
        key = None if found is None else parse_instances_collection(found["collection_name"])
        return None if key is None else key.version

    def promote(self, gallery: str, version: str) -> None:
        """Point the gallery's alias to an existing version."""
        target = {
            "collection_name": instances_collection(gallery, version),
            "alias": live_alias(gallery),
        }
        # Altered and not dropped and created again, so that a version is live at every moment.
        try:
            self._connection.call("alter_alias", **target)
        except GalleryNotFound:
            self._connection.call("create_alias", **target)

    def drop_alias(self, gallery: str) -> None:
        """Delete the gallery's alias, if it has one, so that none of its versions is live."""
        if self.live(gallery) is not None:
            self._connection.call("drop_alias", alias=live_alias(gallery))

    def count_images(
        self, gallery: str, version: str, pool: Executor
    ) -> tuple[Future[int], Future[int], Future[int]]:
        """Count the ledger rows of a version: all of them, those that are hidden, and failed ones.

        Images that are being written for the first time have rows that nobody may see yet.
        """
        images = self.images(gallery, version)
        conditions = [f"status == {quote(status)}" for status in (rows.PENDING, "failed")]
        every, pending, failed = (pool.submit(images.count, each) for each in ("", *conditions))
        return every, pending, failed

    def has_derived_columns(self, gallery: str, version: str) -> bool:
        """Whether the instances collection has `rows.DERIVED_COLUMNS`."""
        if (gallery, version) not in self._derived:
            found = self.instances(gallery, version).describe()
            if found is None:
                return True  # not cached; the caller's next call says that the version is missing
            present = {each["name"] for each in found["fields"]}
            self._derived[gallery, version] = present >= rows.DERIVED_COLUMNS.keys()
        return self._derived[gallery, version]

    def clear_cache(self, gallery: str, version: str) -> None:
        """Clear what is cached about a version that is dropped."""
        self._derived.pop((gallery, version), None)
        self._ledger_columns.pop(images_collection(gallery, version), None)

    def _find_ledger_columns(self, gallery: str, version: str) -> Mapping[str, DataType]:
        """The columns of `rows.IMAGE_COLUMNS` that a ledger has; older ledgers lack some of them.

        Raises:
            StoreDamaged: the version has an instances collection but no ledger.
        """
        name = images_collection(gallery, version)
        found = MilvusCollection(self._connection, name, "image_id", {}).describe()
        if found is None:
            if self.find(gallery, version) is not None:
                raise missing_ledger_error(self._connection.address, gallery, version)
            # There is no such version; if it is created now, its ledger gets all columns.
            return rows.IMAGE_COLUMNS
        present = {each["name"] for each in found["fields"]}
        columns = {each: kind for each, kind in rows.IMAGE_COLUMNS.items() if each in present}
        self._ledger_columns[name] = columns
        return columns

    @contextlib.contextmanager
    def translate_errors(self, gallery: str, version: str) -> Iterator[None]:
        """Turn the error about a missing collection into one about gallery and version."""
        try:
            yield
        except GalleryNotFound as error:
            # Another process has dropped the version, and may create it again with other columns.
            self.clear_cache(gallery, version)
            self.images(gallery, version)  # raises `StoreDamaged` if only the ledger is missing
            raise validation.unknown_version_error(
                gallery, version, self.specs_by_age(gallery)
            ) from error
