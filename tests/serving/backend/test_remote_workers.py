"""Calls to workers in other replicas: repeated if a replica dies, with the errors of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from reir.errors import Overloaded, QueryError
from reir_serving.backend.models import ModelKey
from reir_serving.backend.workers import DEPLOYMENT_OF, SearchWorkers
from reir_serving.ray.deployments import ATTEMPTS, RemoteWorkers

MODEL = ModelKey("clare-nano")


class Handle:
    """A deployment handle whose method `encode` returns or raises the outcomes in turn."""

    def __init__(self, outcomes: Sequence[Any]) -> None:
        self.outcomes, self.calls = list(outcomes), list[Any]()
        self.encode = self

    async def remote(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def encode(handle: Handle) -> Any:
    return asyncio.run(RemoteWorkers({"text": handle}).encode(MODEL, ("red",)))


def test_a_call_is_repeated_if_its_replica_dies() -> None:
    handle = Handle([ActorDiedError(), ("encoded",)])
    assert encode(handle) == ("encoded",)
    assert handle.calls == [(MODEL, ("red",))] * 2


def test_a_call_is_repeated_a_limited_number_of_times() -> None:
    handle = Handle([ActorDiedError()] * 10)
    with pytest.raises(ActorDiedError):
        encode(handle)
    assert len(handle.calls) == ATTEMPTS


def test_a_full_queue_raises_overloaded_with_a_retry_time() -> None:
    with pytest.raises(Overloaded, match="queue of text") as caught:
        encode(Handle([BackPressureError(9, 8)]))
    assert caught.value.retry_after_s > 0


def test_an_error_of_a_worker_is_raised_without_rays_wrapping() -> None:
    wrong = RayTaskError("ask", "traceback", QueryError("k", "must be less"))
    with pytest.raises(QueryError, match="k: must be less"):
        encode(Handle([wrong]))


def test_every_method_of_the_workers_has_a_deployment() -> None:
    methods = {name for name in vars(SearchWorkers) if not name.startswith("_")}
    assert set(DEPLOYMENT_OF) == methods - {"check_health"}
    with pytest.raises(AttributeError, match="no deployment"):
        _ = RemoteWorkers({}).unknown
