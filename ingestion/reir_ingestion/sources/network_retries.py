"""Retries for files that are read over a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from reir.errors import ImageError, ImageFailure, SourceError
from reir_ingestion.retries import call_with_retries

# These attempts come on top of the few that the clients of S3 and Google Cloud Storage make
# themselves.
RETRY_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
"""Pauses between attempts to reach a server. If the attempt after the last pause fails too, the
image fails, or, for a listing, the run."""

Answer = TypeVar("Answer")


class LocationUnreachable(OSError):
    """A server did not answer, or answered that it is too busy; another attempt may succeed."""


def read_with_retries(call: Callable[[], Answer]) -> Answer:
    """Return the result of `call()`, which reads one image, with retries.

    Raises:
        ImageError: UNREACHABLE, after the last attempt.
        Exception: any other error of `call`, which is not repeated.
    """
    try:
        return call_with_retries(call, pauses_s=RETRY_PAUSES_S, retry_on=LocationUnreachable)
    except LocationUnreachable as error:
        attempts = len(RETRY_PAUSES_S) + 1
        raise ImageError(ImageFailure.UNREACHABLE, f"{error} ({attempts} attempts)") from error


def list_with_retries(call: Callable[[], Answer], name: str) -> Answer:
    """Return the result of `call()`, which lists a part of a source, with retries.

    Args:
        call: lists the part.
        name: name of the part, for the error message.

    Raises:
        SourceError: the part could not be reached even after retries, or the server refused.
    """
    try:
        return call_with_retries(call, pauses_s=RETRY_PAUSES_S, retry_on=LocationUnreachable)
    except LocationUnreachable as error:  # is an OSError too, so this clause has to come first
        raise SourceError(
            f"{name} cannot be listed: {error} ({len(RETRY_PAUSES_S) + 1} attempts). Check the "
            f"address and the network, then run the same command again: everything written so far "
            f"is kept"
        ) from error
    except OSError as error:
        raise SourceError(f"{name} cannot be listed: {error}") from error
