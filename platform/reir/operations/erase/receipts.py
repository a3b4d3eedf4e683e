"""Receipts of erasures: what was erased, where and when, in a chain of hashes.

A receipt names nothing that was erased. It holds keyed hashes of the ids and contents, with a key
of its own, so that `reir erase --verify` can look for them again. Each receipt contains the hash of
the one before, so none can be changed or taken away unnoticed.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import itertools
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from reir.attributes import tenant_of
from reir.errors import ConfigError, DataError
from reir.records import ImageRecord
from reir.store.contract import InstanceStore

KIND = "receipt"
FORMAT = 1
MAX_KEPT_HASHES = 1_000
"""The store keeps the hashes of smaller erasures; those of larger ones are in the file alone, since
a document has a limited size."""

_TRIED_BYTES = 64 * 1024
"""Bytes that are written to try whether there is space: those of a receipt of some 800 photos."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """One receipt.

    Attributes:
        format: version of this layout.
        number: place in the chain of the store, from 0.
        gallery: name of the gallery.
        scope: "photo", "tenant" or "where".
        erased_s: Unix time.
        photos, instances: version -> how many were deleted from it.
        uploads, search_events, canaries, reports, log_lines: how many of each were deleted; after
            an interruption, by the run that finished the erasure.
        sources: sources of the gallery that were one of the photos; counted alike.
        is_gone_from_disk: whether nothing is left on disk; False on a Milvus server, which deletes
            old files itself, later.
        key: key of the hashes.
        hashes: keyed hashes of the image ids, and of the contents with their tenants.
        hashes_digest: hash of these hashes.
        previous: hash of the receipt before; empty for the first one.
        hash: of everything but `hashes`, for which their digest stands.
    """

    number: int
    gallery: str
    scope: str
    erased_s: float
    photos: Mapping[str, int]
    instances: Mapping[str, int]
    uploads: int
    search_events: int
    canaries: int
    reports: int
    log_lines: int
    sources: int
    is_gone_from_disk: bool
    key: str
    hashes: tuple[str, ...]
    hashes_digest: str
    previous: str
    hash: str = ""
    format: int = FORMAT

    @cached_property
    def _hash_set(self) -> frozenset[str]:
        return frozenset(self.hashes)

    def covers(self, text: str) -> bool:
        """Whether this image id, or another of `texts_of`, is among what was erased."""
        return keyed_hash(self.key, text) in self._hash_set

    @property
    def computed_hash(self) -> str:
        """The hash that the receipt must have."""
        # The store does not keep the list of a large erasure. Its digest stands for it, so that the
        # chain can be checked without the files of the receipts.
        values = {**asdict(self), "hash": "", "hashes": ()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def new_key() -> str:
    """Return a random key for the hashes of a receipt."""
    return secrets.token_hex(16)


def keyed_hash(key: str, text: str) -> str:
    """Return the hash of one of `texts_of`."""
    return hmac.new(bytes.fromhex(key), text.encode(), hashlib.sha256).hexdigest()[:32]


def texts_of(record: ImageRecord) -> list[str]:
    """Return what the hashes of a receipt are about: id, and tenant and content, of a photo."""
    content = record.content_hash and f"{tenant_of(record.attributes)}/{record.content_hash}"
    return [text for text in (record.image_id, content) if text]


def digest_of(hashes: Iterable[str]) -> str:
    """Return the SHA-256 of all hashes together, in their order; the receipt carries it."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def chain(store: InstanceStore) -> list[Receipt]:
    """Return all receipts of a store, oldest first."""
    found = [receipt_from(values) for values in store.find_documents(KIND).values()]
    return sorted(found, key=lambda each: each.number)


def save_receipt(store: InstanceStore, receipt: Receipt) -> None:
    """Add a receipt to the chain."""
    kept = receipt.hashes if len(receipt.hashes) <= MAX_KEPT_HASHES else ()
    store.put_document(KIND, f"{receipt.number:08d}", {**asdict(receipt), "hashes": kept})


def read_receipt(path: Path) -> Receipt:
    """Read a receipt from a file.

    Raises:
        DataError: the file is not a receipt.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return receipt_from(values)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not a receipt of `reir erase`: {error}") from error


def check_receipt_file(path: Path, *, is_interrupted: bool) -> None:
    """Check that a receipt can be written to a new file, which is not created yet.

    Args:
        path: the file.
        is_interrupted: whether an interrupted erasure is to be finished. Then the file may exist,
            since the interrupted command may have written it.

    Raises:
        ConfigError: it cannot, or the file exists.
    """
    try:
        if os.path.lexists(path) and not is_interrupted:
            raise FileExistsError(errno.EEXIST, "the file exists")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Real bytes, since an empty file can be created on a full disk, too.
        _write_beside(path, " " * _TRIED_BYTES).unlink()
    except OSError as error:
        stopped = "the erasure that was interrupted was not finished"
        raise ConfigError(
            f"the receipt cannot be written to {path} ({error.strerror}), so "
            f"{stopped if is_interrupted else 'nothing was erased'}; name another file with "
            f"--receipt"
        ) from error


def write_receipt(path: Path, receipt: Receipt) -> Path:
    """Write a receipt to a file of its own, and return its path.

    If the file exists, the name gets a number: the chains of two stores number their receipts
    alike.

    Raises:
        DataError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = _write_beside(path, json.dumps(asdict(receipt), indent=2) + "\n")
        try:
            return _publish(written, path)
        finally:
            written.unlink(missing_ok=True)  # its other name stays
    except OSError as error:
        raise DataError(
            f"the receipt cannot be written to {path} ({error.strerror}); the photos were erased: "
            f"free up space, or name another file with --receipt, and run the same command again "
            f"to write it"
        ) from error


def _write_beside(path: Path, text: str) -> Path:
    """Write a text durably to a temporary file in the folder of a file; return its path."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _publish(written: Path, path: Path) -> Path:
    """Give a file its name, with a number if another file has it; return its path."""
    candidate = path
    for number in itertools.count(2):
        try:
            _take_name(written, candidate)
            break
        except FileExistsError:
            candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _take_name(written: Path, path: Path) -> None:
    """Give a file a name; if two processes want the same one, the second gets `FileExistsError`."""
    try:
        os.link(written, path)  # unlike a rename, never replaces a file
    except FileExistsError:
        raise
    except OSError:  # the file system has no links; an interruption leaves an empty file there
        path.open("x").close()
        os.replace(written, path)


def receipt_from(values: Any) -> Receipt:
    """Return a receipt from JSON values.

    Raises:
        ValueError, TypeError: the values are not those of a receipt.
    """
    if not isinstance(values, dict):
        raise TypeError(f"expected an object, got {type(values).__name__}")
    if values.get("format") != FORMAT:
        raise ValueError(f"format {values.get('format')!r} is not {FORMAT}")
    known = {field.name for field in fields(Receipt)}
    if missing := known - values.keys():
        raise ValueError(f"{', '.join(sorted(missing))} is missing")
    return Receipt(**{**values, "hashes": tuple(values["hashes"])})
