"""Remembers what was found on the pixels of photos, until a photo changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Protocol, TypeVar

from reir.images.photo_files import file_state


class PhotoRequest(Hashable, Protocol):
    """Asks for something about the photo of a URI."""

    @property
    def uri(self) -> str:
        """URI of the photo."""
        ...


RequestT = TypeVar("RequestT", bound=PhotoRequest)
ResultT = TypeVar("ResultT")


def remembered(
    work: Callable[[RequestT], ResultT], max_results: int
) -> Callable[[RequestT], ResultT]:
    """Return `work`, which is done only once for equal requests until the photo's file changes.

    Nothing is remembered about photos that are not in a local file, because only a request to the
    other machine would tell whether they have changed.

    Args:
        work: reads a photo; errors are not remembered.
        max_results: number of latest results to keep.
    """

    # The state is only there to be part of the key.
    @lru_cache(max_results)
    def of_state(request: RequestT, _: tuple[int, ...]) -> ResultT:
        return work(request)

    def result(request: RequestT) -> ResultT:
        # Before the photo is read: if it is replaced meanwhile, the next request reads it again.
        state = file_state(request.uri)
        return work(request) if state is None else of_state(request, state)

    return result
