"""Calls of parts elsewhere: asked again when a replica dies, and with our own errors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from reir.errors import QueryError
from reir_serving.backend import Overloaded
from reir_serving.deployments import ATTEMPTS, RemoteParts


class Handle:
    """A deployment handle whose calls come out as told, in turn."""

    def __init__(self, outcomes: Sequence[Any]) -> None:
        self.outcomes, self.calls = list(outcomes), list[Any]()
        self.ask = self

    async def remote(self, *call: Any) -> Any:
        self.calls.append(call)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def encode(handle: Handle) -> Any:
    return asyncio.run(RemoteParts({"text": handle}).encode("clare-nano", ("red",)))


def test_a_call_whose_replica_died_is_made_again() -> None:
    handle = Handle([ActorDiedError(), ("encoded",)])
    assert encode(handle) == ("encoded",)
    assert handle.calls == [("encode", ("clare-nano", ("red",)), {})] * 2


def test_it_is_not_made_again_for_ever() -> None:
    handle = Handle([ActorDiedError()] * 10)
    with pytest.raises(ActorDiedError):
        encode(handle)
    assert len(handle.calls) == ATTEMPTS


def test_a_full_queue_says_when_to_try_again() -> None:
    with pytest.raises(Overloaded, match="queue of text") as caught:
        encode(Handle([BackPressureError(9, 8)]))
    assert caught.value.retry_after_s > 0


def test_errors_of_a_part_are_those_that_it_raised() -> None:
    wrong = RayTaskError("ask", "traceback", QueryError("k", "must be less"))
    with pytest.raises(QueryError, match="k: must be less"):
        encode(Handle([wrong]))
