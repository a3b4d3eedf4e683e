"""Lone calls compute on all cores, others on one each."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from reir_serving.sharing import SharedCores


def threads_of(calls: list[str]) -> list[int]:
    """Threads of torch in the calling thread, for each call."""
    return [torch.get_num_threads()] * len(calls)


def test_a_lone_call_has_all_cores_and_a_batch_one() -> None:
    run = SharedCores(most=3).among(threads_of, gains=True)
    with ThreadPoolExecutor(1) as pool:
        found = [pool.submit(run, calls).result() for calls in (["a"], ["a", "b"], ["a"])]
    assert found == [[3], [1, 1], [3]]


def test_what_gains_nothing_has_one_core() -> None:
    run = SharedCores(most=3).among(threads_of)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, ["a"]).result() == [1]


def test_calls_beside_each_other_have_one_core_each() -> None:
    cores, inside, leave = SharedCores(most=3), threading.Event(), threading.Event()

    def wait(calls: list[str]) -> list[int]:
        inside.set()
        assert leave.wait(30)
        return threads_of(calls)

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        first = one.submit(cores.among(wait, gains=True), ["a"])
        assert inside.wait(30)
        second = other.submit(cores.among(threads_of, gains=True), ["b"]).result()
        leave.set()
        assert (first.result(), second) == ([3], [1]), "threads are not taken away under way"
        assert other.submit(cores.among(threads_of, gains=True), ["b"]).result() == [3]


def test_work_that_fails_is_no_longer_under_way() -> None:
    cores = SharedCores(most=3)

    def fail(_: list[str]) -> list[int]:
        raise ValueError("no")

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="no"):
            pool.submit(cores.among(fail, gains=True), ["a"]).result()
        assert pool.submit(cores.among(threads_of, gains=True), ["a"]).result() == [3]
