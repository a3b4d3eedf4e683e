"""Every error that the platform raises on purpose, one tree.

    ReirError
    ├── ConfigError            a setting is wrong: fix the value that the message names
    ├── DataError              an annotation file or a gallery source cannot be used
    │   ├── SourceError        the source to index does not exist or holds nothing
    │   ├── TooManyFailures    more images of a job failed than its limit allows
    │   └── ImageError         one image cannot be decoded; the ledger stores its `reason`
    │       └── ImageUnreachable   its bytes could not be fetched just now: try again
    ├── QueryError             the request cannot be answered as written (`field` names the part)
    │   └── FilterError        the filter expression cannot be parsed or names an unknown field
    ├── CheckpointError        the checkpoint directory is incomplete or does not fit
    ├── Overloaded             a queue is full: try again after `retry_after_s`
    ├── WorkersUnavailable     Ray, which runs the workers of a job, could not start or failed
    ├── ServerError            a server that `reir.Client` asked refused or failed
    │   ├── ServerUnavailable  not reachable, or too busy for longer than the client waits
    │   ├── AccessDenied       it wants a key, or one that may do more
    │   └── ImageNotFound      its gallery has no such image
    └── StoreError             the store refused or failed
        ├── StoreUnavailable   not reachable: retry later, check the address
        ├── StoreFull          no space is left on its disk
        ├── StoreDamaged       its files are damaged or lost: the message says what to do
        ├── GalleryNotFound    no such gallery or version
        └── SchemaMismatch     dimension or digest differ from what the version was built with

Every class survives pickling, since errors cross process borders in the Ray apps.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

FREE_SPACE = "free up space on its disk, then run the same command again; what was written is kept"
"""What to do about a store whose disk is full."""


class ReirError(Exception):
    """Root of the tree; catch this to catch everything the platform raises on purpose."""


class ConfigError(ReirError):
    """A configuration value is missing, unknown or out of range."""


class DataError(ReirError):
    """An annotation file or data source cannot be used as it is."""


class SourceError(DataError):
    """The source to index does not exist or holds no image."""


class ImageFailure(StrEnum):
    """Why one image could not be indexed: the reason class kept in the ledger."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED = "truncated"
    TOO_LARGE = "too_large"
    UNREADABLE = "unreadable"
    MISSING = "missing"
    UNREACHABLE = "unreachable"
    UNSUPPORTED = "unsupported"
    NOT_ENCODED = "not_encoded"


class ImageError(DataError):
    """One image cannot be read or decoded.

    Attributes:
        reason: the class of failure, kept in the ledger.
        detail: what was found, for a person.
    """

    def __init__(self, reason: ImageFailure, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}"


class ImageUnreachable(ImageError):
    """The bytes of one image could not be fetched just now; another attempt may succeed."""


class TooManyFailures(DataError):
    """More images of a job failed than its limit allows; written data is kept."""


class QueryError(ReirError):
    """A request cannot be answered as written.

    Attributes:
        field: the part of the request that is wrong, e.g. "k" or "expression".
        detail: the value, what is allowed, and what to do.
    """

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(field, detail)
        self.field = field
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.field}: {self.detail}"


class FilterError(QueryError):
    """A filter expression cannot be parsed or names an unknown field."""


class CheckpointError(ReirError):
    """A checkpoint directory is incomplete, damaged or of the wrong kind."""


class Overloaded(ReirError):
    """A queue is full.

    Attributes:
        what: the queue.
        retry_after_s: when to try again.
    """

    def __init__(self, what: str, retry_after_s: float = 1.0) -> None:
        super().__init__(what, retry_after_s)
        self.what = what
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.what} is full; try again in {self.retry_after_s} s"


class WorkersUnavailable(ReirError):
    """Ray, which runs the workers of a job, could not start or failed; written data is kept."""


class ServerError(ReirError):
    """A server that `reir.Client` asked refused or failed; the message is the server's."""


class ServerUnavailable(ServerError):
    """A server cannot be reached, or was too busy for longer than the client waits."""


class AccessDenied(ServerError):
    """A server wants an API key, or one that may do more."""


class ImageNotFound(ServerError):
    """A gallery of a server has no such image."""


class StoreError(ReirError):
    """The store refused or failed."""


class StoreUnavailable(StoreError):
    """The store cannot be reached.

    Attributes:
        address: where it was expected.
        detail: what the connection said.
    """

    def __init__(self, address: str, detail: str) -> None:
        super().__init__(address, detail)
        self.address = address
        self.detail = detail

    def __str__(self) -> str:
        return f"store at {self.address} is not reachable: {self.detail}"


class StoreFull(StoreError):
    """No space is left on the disk of the store; the write that failed is not in the store."""


class StoreDamaged(StoreError):
    """Files of the store are damaged or lost; the message names them and says what to do."""


class GalleryNotFound(StoreError):
    """No gallery, or no version of it, under that name."""


class SchemaMismatch(StoreError):
    """A version was built with another dimension or checkpoint than the one in use."""


def nearest_name(name: str, known: list[str] | tuple[str, ...] | set[str] | dict[str, Any]) -> str:
    """Return `"; did you mean 'x'?"` for the closest of `known`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
