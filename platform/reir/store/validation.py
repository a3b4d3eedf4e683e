"""Checks and errors that all stores share, so that none accepts what another refuses."""

# Shapes: Q queries, D vector dimension

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reir.errors import ConfigError, GalleryNotFound, QueryError, SchemaMismatch, StoreError
from reir.records import FloatArray, IndexedImage
from reir.store.contract import InstanceStore, ServerStore, VersionSpec

# What Milvus returns at most for one query. The other stores have the same limit, so that a call
# that works on one of them works on all.
MAX_LIMIT = 16_384

MAX_DOCUMENT_BYTES = 60_000
"""Limit of one document as JSON; a text column of Milvus holds 65,535 bytes."""


def instance_id(image_id: str, number: int) -> str:
    """Return the id of an instance; the instances of an image are numbered from 0."""
    return f"{image_id}#{number}"


def latest_by_id(images: Sequence[IndexedImage]) -> dict[str, IndexedImage]:
    """Return the batch by image id; if an id occurs twice, the last image counts."""
    return {image.record.image_id: image for image in images}


def check_images(images: Iterable[IndexedImage], dim: int, version: str) -> None:
    """Check that the vectors of all instances have the dimension of the version.

    Raises:
        SchemaMismatch: a dimension differs; the message gives both.
    """
    for image in images:
        if image.instances is not None:
            check_dim(image.instances.dim, dim, version)


def check_dim(found: int, dim: int, version: str) -> None:
    """Check that vectors have the dimension of the version.

    Raises:
        SchemaMismatch: it differs; the message gives both.
    """
    if found != dim:
        raise SchemaMismatch(
            f"version '{version}' has vectors of dimension {dim}, got {found}; use the "
            f"checkpoint it was indexed with, or index into a new version"
        )


def check_spec(found: VersionSpec, wanted: VersionSpec, version: str) -> None:
    """Check that an existing version was created with the same spec.

    Raises:
        SchemaMismatch: they differ; the message gives both.
    """
    if not same_spec(found, wanted):
        raise SchemaMismatch(
            f"version '{version}' exists with {found}, expected {wanted}; index into a new version "
            f"or use the checkpoint and the settings it was created with"
        )


def same_spec(first: VersionSpec, second: VersionSpec) -> bool:
    """Whether both specs give equal vectors for equal images."""
    # As dicts, since mappings of different types need not be equal. `encoder` is left out: the same
    # weights may be in another folder.
    return (first.dim, first.digest, dict(first.settings)) == (
        second.dim,
        second.digest,
        dict(second.settings),
    )


def check_queries(vectors: npt.ArrayLike, limit: int) -> FloatArray:
    """Return the queries as (Q, D) float32.

    Raises:
        QueryError: the shape, a value or the limit is not allowed.
    """
    queries = np.ascontiguousarray(vectors, dtype=np.float32)
    if queries.ndim != 2:
        raise QueryError("vectors", f"must have shape (Q, D), got {queries.shape}")
    if not np.isfinite(queries).all():
        raise QueryError("vectors", "must be finite, got NaN or infinity")
    if not 1 <= limit <= MAX_LIMIT:
        raise QueryError("limit", f"must be 1 to {MAX_LIMIT}, got {limit}")
    return queries


def unknown_version_error(
    gallery: str, version: str, known: Mapping[str, object]
) -> GalleryNotFound:
    """Return the error for a version that does not exist; `known` are those that do."""
    if not known:
        return unknown_gallery_error(gallery)
    return GalleryNotFound(
        f"gallery '{gallery}' has no version '{version}'; it has {', '.join(known)}"
    )


def unknown_gallery_error(gallery: str) -> GalleryNotFound:
    """Return the error for a gallery that does not exist."""
    return GalleryNotFound(
        f"no gallery '{gallery}' in this store; `reir galleries` lists them, "
        f"`reir index SOURCE --gallery {gallery}` creates it"
    )


def no_live_version_error(gallery: str) -> GalleryNotFound:
    """Return the error for a gallery none of whose versions is live."""
    return GalleryNotFound(
        f"gallery '{gallery}' has no live version yet; make one live with "
        f"`reir promote {gallery} VERSION`"
    )


def drop_live_version_error(gallery: str, version: str) -> StoreError:
    """Return the error for dropping the live version."""
    return StoreError(
        f"version '{version}' of gallery '{gallery}' is live and cannot be dropped; "
        f"promote another version first"
    )


def import_needs_server_error(place: str) -> ConfigError:
    """Return the error for a bulk import into a store that is not a Milvus server."""
    return ConfigError(
        f"bulk import needs a Milvus server; the store is {place}; choose a server with "
        f"--store http://HOST:PORT, or leave out --bulk-import"
    )


def require_server(store: InstanceStore) -> ServerStore:
    """Return the store if it can import files.

    Raises:
        ConfigError: it is not a Milvus server.
    """
    if not isinstance(store, ServerStore):
        raise import_needs_server_error(f"a {type(store).__name__}")
    return store


def read_only_error(address: str, why: str) -> StoreError:
    """Return the error for an attempt to change a store in a read-only folder."""
    return StoreError(
        f"the store at {address} can be searched but not changed: its folder is not writable "
        f"({why}); make it writable, or choose another store with --store"
    )


def encode_document(kind: str, name: str, value: Mapping[str, Any]) -> str:
    """Return a document as JSON.

    Raises:
        StoreError: it is too large for one row of the store.
    """
    text = json.dumps(value, allow_nan=False)
    size = len(text.encode())
    if size > MAX_DOCUMENT_BYTES:
        raise StoreError(
            f"document {kind}/{name} has {size:,} bytes as JSON; at most {MAX_DOCUMENT_BYTES:,} "
            f"are allowed"
        )
    return text
