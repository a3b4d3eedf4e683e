"""The samples of a step are a pure function of its seed and number."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reir.errors import ConfigError
from reir_training.data.sampling import Sampler, TaskStream


@given(
    shapes=st.lists(st.booleans(), min_size=1, max_size=60),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_an_epoch_uses_every_sample_and_never_mixes_orientations(
    shapes: list[bool], batch_size: int, seed: int
) -> None:
    stream = TaskStream("a", shapes, batch_size, seed)
    wide = np.array(shapes)
    seen: Counter[int] = Counter()
    for number in range(stream.batches_per_epoch):
        rows = stream.batch(number)
        assert len(rows) == batch_size
        assert len(set(wide[rows].tolist())) == 1
        seen.update(rows.tolist())
    assert set(seen) == set(range(len(shapes)))
    extra = sum(seen.values()) - len(shapes)
    assert extra < 2 * batch_size


def test_epochs_differ_and_repeat_exactly() -> None:
    first, again = (TaskStream("a", [True] * 40, 4, seed=1) for _ in range(2))
    epochs = [np.concatenate([first.batch(10 * e + i) for i in range(10)]) for e in range(3)]
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    # from the middle of the third epoch, without anything before
    np.testing.assert_array_equal(again.batch(25), epochs[2][20:24])
    other = TaskStream("a", [True] * 40, 4, seed=2)
    assert not np.array_equal(other.batch(0), first.batch(0))


def test_a_stream_can_be_pickled() -> None:
    stream = TaskStream("a", [True] * 40, 4, seed=1)
    expected = stream.batch(13)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(stream)).batch(13), expected)


def test_tasks_alternate() -> None:
    sampler = Sampler([TaskStream("a", [True] * 8, 2, 0), TaskStream("b", [False] * 20, 2, 0)])
    steps = [sampler.step(n) for n in range(10)]
    assert [s.task for s in steps] == ["a", "b"] * 5
    assert [s.epoch for s in steps if s.task == "a"] == [0, 0, 0, 0, 1]
    assert {s.epoch for s in steps if s.task == "b"} == {0}
    assert sampler.steps_per_epoch == 8


def test_the_samples_of_all_workers_are_those_of_a_single_one() -> None:
    sampler = Sampler([TaskStream("a", [True, False] * 30, 6, 3)])
    for number in range(15):
        whole = sampler.step(number).rows
        shares = [sampler.step(number, rank, 3).rows for rank in range(3)]
        np.testing.assert_array_equal(np.concatenate(shares), whole)
    with pytest.raises(ConfigError, match=r"batch_size=6 cannot be shared by 4 workers"):
        sampler.step(0, 0, 4)


def test_a_task_without_samples_is_refused() -> None:
    with pytest.raises(ConfigError, match="task 'rec' has no samples"):
        TaskStream("rec", [], 4, 0)
