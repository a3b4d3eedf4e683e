"""Repeat a call that failed for a reason that may go away, such as a server that restarts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from reir.errors import StoreUnavailable

RETRY_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Pauses between attempts to reach the store. Half a minute covers a restart of a Milvus server."""

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


def call_with_retries(
    call: Callable[[], Answer],
    *,
    pauses_s: Sequence[float] = RETRY_PAUSES_S,
    sleep: Callable[[float], None] = time.sleep,
    retry_on: type[Exception] = StoreUnavailable,
) -> Answer:
    """Return the result of `call()`, and repeat the call after each pause if it fails.

    Args:
        call: what to do.
        pauses_s: one pause for each repetition.
        sleep: waits for a pause.
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
    return call()
