"""What places over a network have in common: errors that may pass, and how long to wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from reir.errors import ImageError, ImageFailure, SourceError
from reir_ingestion.writer import patiently

RETRY_AFTER_S = (0.5, 1.0, 2.0, 4.0)
"""Pauses between attempts to reach a place; after the last one the image, or the job, fails."""

Answer = TypeVar("Answer")


class Unreachable(OSError):
    """A place did not answer, or answered that it is too busy: another attempt may succeed."""


def reading(call: Callable[[], Answer]) -> Answer:
    """Return `call()`, which reads one image, tried again while the place cannot be reached.

    Raises:
        ImageError: UNREACHABLE after the last attempt.
    """
    try:
        return patiently(call, pauses_s=RETRY_AFTER_S, passing=Unreachable)
    except Unreachable as error:
        attempts = len(RETRY_AFTER_S) + 1
        raise ImageError(ImageFailure.UNREACHABLE, f"{error} ({attempts} attempts)") from error


def listing(call: Callable[[], Answer], what: str) -> Answer:
    """Return `call()`, which lists a part of a source, tried again likewise.

    Raises:
        SourceError: the part still could not be reached, or was refused.
    """
    try:
        return patiently(call, pauses_s=RETRY_AFTER_S, passing=Unreachable)
    except Unreachable as error:
        raise SourceError(
            f"{what} cannot be listed: {error} ({len(RETRY_AFTER_S) + 1} attempts); check the "
            f"address and the network, then run again: what was written stays"
        ) from error
    except OSError as error:
        raise SourceError(f"{what} cannot be listed: {error}") from error
