"""The exceptions that the platform raises on purpose.

    ReirError
    ├── ConfigError            a setting is wrong: fix the value that the message names
    ├── DataError              an annotation file, a source or a photo cannot be used
    │   ├── SourceError        the source to index does not exist or contains no images
    │   ├── TooManyFailures    more images of a job failed than its limit allows
    │   ├── UnknownPhoto       a list names a photo that is not there
    │   ├── PhotoErased        the photo was erased from the gallery, and must not come back
    │   └── ImageError         one image cannot be read or decoded (`reason` says why)
    │       └── ImageUnreachable   its bytes cannot be fetched at the moment: try again
    ├── QueryError             the request cannot be answered as written (`field` names the part)
    │   ├── KeyReused          an idempotency key came again with another request: send a new key
    │   └── FilterError        the filter expression cannot be parsed or names an unknown field
    ├── CheckpointError        a checkpoint is incomplete, damaged or of the wrong kind
    ├── Overloaded             a queue is full: try again after `retry_after_s`
    ├── JobRunning             another process does the same job now: wait for it
    ├── LeaseLost              another process has taken the job over from this one
    ├── WorkersUnavailable     Ray, which runs the workers of a job, failed or did not start
    ├── ServerError            the server of a `reir.Client` refused a request or failed
    │   ├── ServerUnavailable  not reachable, or too busy for longer than the client waits
    │   ├── AccessDenied       the request needs an API key, or a key with more rights
    │   └── ImageNotFound      the gallery has no such image
    └── StoreError             the store refused a request or failed
        ├── StoreUnavailable   not reachable: check the address, or retry later
        ├── StoreFull          no space is left on the disk of the store
        ├── StoreDamaged       files of the store are damaged or missing
        ├── GalleryNotFound    there is no such gallery or version
        └── SchemaMismatch     the gallery was indexed with another dimension or checkpoint

All of them can be pickled, since Ray passes errors between processes.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Any

FREE_SPACE = "free up space on its disk, then run the same command again; what was written is kept"
"""Advice for messages about a full disk."""


class ReirError(Exception):
    """Base class of all errors that the platform raises on purpose."""


class ConfigError(ReirError):
    """A setting is missing, unknown or out of range."""


class DataError(ReirError):
    """An annotation file or data source cannot be used as it is."""


class UnknownPhoto(DataError):
    """A list names a photo that is not there."""


class SourceError(DataError):
    """The source to index does not exist or contains no images."""


class ImageFailure(StrEnum):
    """Why an image could not be indexed, as kept in the ledger."""

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
        reason: the kind of failure, kept in the ledger.
        detail: what was found, in words.
    """

    def __init__(self, reason: ImageFailure, detail: str) -> None:
        # Here and below, the base class gets all arguments, with which unpickling calls this again.
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}"


class ImageUnreachable(ImageError):
    """The bytes of an image could not be fetched; another attempt may succeed."""


class TooManyFailures(DataError):
    """More images of a job failed than its limit allows; what was written is kept."""


class PhotoErased(DataError):
    """The photo, or its content, was erased from the gallery, and must not come back."""


class QueryError(ReirError):
    """A request cannot be answered as written.

    Attributes:
        field: the part of the request that is wrong, e.g. "k" or "expression".
        detail: the value, what is allowed, and how to fix it.
    """

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(field, detail)
        self.field = field
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.field}: {self.detail}"


class KeyReused(QueryError):
    """An idempotency key was sent again with other feedback."""


class FilterError(QueryError):
    """A filter expression cannot be parsed or names an unknown field."""


class CheckpointError(ReirError):
    """A checkpoint directory is incomplete, damaged or of the wrong kind."""


class Overloaded(ReirError):
    """A queue is full.

    Attributes:
        what: name of the queue.
        retry_after_s: seconds to wait before the next attempt.
    """

    def __init__(self, what: str, retry_after_s: float = 1.0) -> None:
        super().__init__(what, retry_after_s)
        self.what = what
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.what} is full; try again in {self.retry_after_s} s"


class JobRunning(ReirError):
    """Another process does this job now.

    Attributes:
        job: name of the job.
        host, pid: the machine and the process.
        since_s: Unix time since when.
    """

    def __init__(self, job: str, host: str, pid: int, since_s: float) -> None:
        super().__init__(job, host, pid, since_s)
        self.job, self.host, self.pid, self.since_s = job, host, pid, since_s

    def __str__(self) -> str:
        minutes = max(0.0, time.time() - self.since_s) / 60
        return (
            f"{self.job} is already running, as process {self.pid} on {self.host} for "
            f"{minutes:.0f} min; wait until it has ended, or end that process"
        )


class LeaseLost(ReirError):
    """Another process has taken over the job of this one, which stood still for too long."""


class WorkersUnavailable(ReirError):
    """Ray, which runs the workers of a job, failed or did not start; what was written is kept."""


class ServerError(ReirError):
    """The server of a `reir.Client` refused a request or failed; the message is the server's."""


class ServerUnavailable(ServerError):
    """The server cannot be reached, or was too busy for longer than the client waits."""


class AccessDenied(ServerError):
    """The request needs an API key, or a key with more rights."""


class ImageNotFound(ServerError):
    """The gallery has no such image."""


class StoreError(ReirError):
    """The store refused a request or failed."""


class StoreUnavailable(StoreError):
    """The store cannot be reached.

    Attributes:
        address: of the store.
        detail: why the connection failed.
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
    """Files of the store are damaged or missing; the message names them and says what to do."""


class GalleryNotFound(StoreError):
    """There is no gallery of that name, or no such version of it."""


class SchemaMismatch(StoreError):
    """The gallery was indexed with another vector dimension or checkpoint than the one in use."""


def nearest_name(name: str, known: list[str] | tuple[str, ...] | set[str] | dict[str, Any]) -> str:
    """Return `"; did you mean 'x'?"` for the closest of `known`, or an empty string."""
    import difflib  # only for errors, which most processes never raise

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
