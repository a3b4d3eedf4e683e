"""Repeat a call that failed for a reason that may go away, such as a server that restarts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from reir.errors import StoreUnavailable

RETRY_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Pauses between attempts to reach the store: together half a minute, which is long enough for a
Milvus server to restart."""

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


def call_with_retries(
    call: Callable[[], Answer],
    *,
    pauses_s: Sequence[float] = RETRY_PAUSES_S,
    sleep: Callable[[float], None] = time.sleep,
    retry_on: type[Exception] = StoreUnavailable,
) -> Answer:
    """Return the result of `call()`; if it fails, repeat it after each of the pauses.

    Args:
        call: function to call. It may be called several times, so it must be safe to repeat.
        pauses_s: seconds to wait before each repetition.
        sleep: function that waits.
        retry_on: the error after which the call is repeated. Any other error is raised at once.

    Raises:
        Exception: the error of the last attempt, or any error that is not `retry_on`.
    """
    for pause_s in pauses_s:
        try:
            return call()
        except retry_on as error:
            logger.warning("%s; next attempt in %g s", error, pause_s)
            sleep(pause_s)
    return call()  # outside of the `try`: the error of the last attempt is raised
