"""Finds the photos that an erasure is about, in all versions of a gallery."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from reir.attributes import tenant_of
from reir.errors import ConfigError, FilterError
from reir.images.decode import canonical_uri
from reir.records import ImageRecord
from reir.store.contract import InstanceStore
from reir.store.filter_numpy import Column, evaluate, objects
from reir.store.filters import Field, fields_of, parse

_CHUNK = 512
# The length of the ids that `reir.images.decode.image_id` returns.
_ID_DIGITS = 20


@dataclass(frozen=True, kw_only=True)
class EraseScope:
    """What to erase; exactly one of the fields is set.

    Attributes:
        photos: paths, URIs or image ids.
        tenant: all photos of a tenant.
        where: all photos whose attributes fit a filter.

    Raises:
        ConfigError: none of the fields is set, or several are.
    """

    photos: tuple[str, ...] = ()
    tenant: str = ""
    where: str = ""

    def __post_init__(self) -> None:
        """Check that exactly one field is set."""
        given = sum(map(bool, (self.photos, self.tenant, self.where)))
        if given != 1:
            raise ConfigError(
                f"say what to erase with --photo, --tenant or --where; exactly one of them is "
                f"needed, got {given}"
            )

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        return "photo" if self.photos else "tenant" if self.tenant else "where"

    @property
    def text(self) -> str:
        """What the user gave."""
        return "\n".join(self.photos) or self.tenant or self.where


def select_photos(
    store: InstanceStore, gallery: str, scope: EraseScope
) -> dict[str, dict[str, ImageRecord]]:
    """Return the photos of a scope, and all with the same content and tenant.

    Returns:
        Version -> image id -> ledger row; all versions of the gallery are there.

    Raises:
        FilterError: the filter cannot be parsed, or names something that photos do not have.
    """
    is_meant = _predicate(scope)
    versions = [each.name for each in store.versions(gallery)]
    found = {
        version: {row.image_id: row for row in _matching(store, gallery, version, is_meant)}
        for version in versions
    }
    # A copy under another name has the same bytes, and would be found by the same searches.
    contents = {
        (row.content_hash, tenant_of(row.attributes))
        for rows in found.values()
        for row in rows.values()
        if row.content_hash
    }
    for version, rows in photos_with(store, gallery, contents).items():
        found[version] |= rows
    return found


def photos_with(
    store: InstanceStore, gallery: str, contents: Collection[tuple[str, str]]
) -> dict[str, dict[str, ImageRecord]]:
    """Return the photos with one of these content hashes and the tenant beside it.

    Returns:
        Version -> image id -> ledger row; all versions of the gallery are there.
    """
    versions = [each.name for each in store.versions(gallery)]
    return {version: _with_content(store, gallery, version, contents) for version in versions}


def _matching(
    store: InstanceStore, gallery: str, version: str, is_meant: Callable[[ImageRecord], bool]
) -> Iterator[ImageRecord]:
    # Of these, the store may have vectors, but not yet a ledger row with attributes and content.
    unfinished = (
        ImageRecord(image_id=image_id, uri=uri, status="failed", reason="interrupted")
        for image_id, uri in store.unfinished_images(gallery, version)
    )
    return filter(is_meant, chain(store.iter_images(gallery, version), unfinished))


def _with_content(
    store: InstanceStore, gallery: str, version: str, contents: Collection[tuple[str, str]]
) -> dict[str, ImageRecord]:
    hashes = iter(sorted({content for content, _ in contents}))
    found: dict[str, ImageRecord] = {}
    while chunk := list(islice(hashes, _CHUNK)):
        for rows in store.find_content(gallery, version, chunk).values():
            for row in rows:
                if (row.content_hash, tenant_of(row.attributes)) in contents:
                    found[row.image_id] = row
    return found


def _predicate(scope: EraseScope) -> Callable[[ImageRecord], bool]:
    if scope.tenant:
        return lambda row: tenant_of(row.attributes) == scope.tenant
    if scope.where:
        return _filter(scope.where)
    names = {name for each in scope.photos for name in (each, _uri(each))}
    return lambda row: row.uri in names or row.image_id in names


def _uri(photo: str) -> str:
    return photo if "://" in photo or _is_image_id(photo) else canonical_uri(photo)


def _is_image_id(text: str) -> bool:
    return len(text) == _ID_DIGITS and set(text) <= set("0123456789abcdef")


def _filter(where: str) -> Callable[[ImageRecord], bool]:
    tree = parse(where)
    for field in fields_of(tree):
        # Other fields differ between the instances of a photo, so they cannot select photos.
        if not field.attribute and field.name not in ("uri", "image_id"):
            raise FilterError(
                "where",
                f"names {field}, which belongs to instances; photos are erased as a whole, so use "
                f"attr.NAME, uri or image_id",
            )

    def is_meant(row: ImageRecord) -> bool:
        def column(field: Field) -> Column:
            value = row.attributes.get(field.name) if field.attribute else getattr(row, field.name)
            return Column(objects([value]))

        return bool(evaluate(tree, column)[0])

    return is_meant
