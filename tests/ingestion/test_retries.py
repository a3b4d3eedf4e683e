"""Retrying a call: pauses, the error of the last attempt, errors that are not retried."""

from __future__ import annotations

import pytest

from reir.errors import StoreError, StoreUnavailable
from reir_ingestion.retries import RETRY_PAUSES_S, call_with_retries


class FlakyCall:
    """Cannot reach the store in the first `failures` calls."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def __call__(self) -> str:
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("milvus:19530", "connection refused")
        return "answer"


@pytest.mark.parametrize("failures", [0, 1, len(RETRY_PAUSES_S)])
def test_a_call_is_repeated_until_the_store_is_back(failures: int) -> None:
    pauses: list[float] = []
    assert call_with_retries(FlakyCall(failures), sleep=pauses.append) == "answer"
    assert pauses == list(RETRY_PAUSES_S[:failures])


def test_the_last_error_names_the_address() -> None:
    pauses: list[float] = []
    with pytest.raises(StoreUnavailable, match="milvus:19530"):
        call_with_retries(FlakyCall(len(RETRY_PAUSES_S) + 1), sleep=pauses.append)
    assert pauses == list(RETRY_PAUSES_S)


def test_other_errors_are_not_retried() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise StoreError("no such collection")

    with pytest.raises(StoreError, match="no such collection"):
        call_with_retries(fail, sleep=lambda _: pytest.fail("must not wait"))
    assert calls == [1]
