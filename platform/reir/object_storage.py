"""Access to object storage by URI, through pyarrow, which is an optional dependency."""

from __future__ import annotations

from pyarrow import ArrowException
from pyarrow.fs import FileSystem

STORAGE_ERRORS = (ArrowException, OSError)
"""The exceptions that pyarrow raises if storage cannot be used."""


def open_filesystem(uri: str) -> tuple[FileSystem, str]:
    """Return the file system that a URI names, and the path within it.

    Args:
        uri: "s3://bucket/path" or "gs://bucket/path". Options follow a "?", such as
            "endpoint_override=..."; credentials come from the environment (AWS_*, GOOGLE_*).

    Raises:
        ArrowException, OSError: the kind of storage or an option is unknown. The message does not
            contain what may be secret in the URI.
    """
    try:
        filesystem, path = FileSystem.from_uri(uri)
    except ArrowException as error:
        # Its message may repeat the URI. Without the original error, which tracebacks would show.
        raise type(error)(str(error).replace(uri, without_secrets(uri))) from None
    return filesystem, path.rstrip("/")  # callers append "/name", and "//" would be another key


def without_secrets(uri: str) -> str:
    """Return a URI for messages, without the parts that may be secret: before "@" and after "?"."""
    scheme, separator, rest = uri.partition("?")[0].rpartition("://")
    # Up to the last "@", since a password may contain one, too.
    return scheme + separator + rest.rpartition("@")[2]
