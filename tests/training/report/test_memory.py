"""Estimated memory, compared with values worked out by hand."""

from __future__ import annotations

import pytest

from reir_training.report.memory import (
    MAX_BUCKET,
    MAX_LIVE,
    MemoryEstimate,
    bucket_size,
    estimate_memory,
)

MILLION = 1_000_000


def test_estimated_memory_by_hand() -> None:
    """Ten million trainable and two million frozen parameters of 4 bytes on four workers, in MB."""

    def of(stage: int) -> tuple[float, ...]:
        found = estimate_memory(stage, trainable=10 * MILLION, frozen=2 * MILLION, num_workers=4)
        fields = (found.weights, found.gradients, found.optimizer, found.buffers, found.total)
        return tuple(number / MILLION for number in fields)

    assert of(0) == (48, 40, 80, 0, 168)
    assert of(1) == (48, 40, 30, 40, 158)
    assert of(2) == (48, 10, 30, 40, 128)
    assert of(3) == (12, 10, 30, 40 + 48, 140)  # small enough to stay whole once fetched


def test_buffers_have_a_maximum_size() -> None:
    assert bucket_size(0) == 1
    assert bucket_size(7) == 7
    assert bucket_size(2 * MAX_BUCKET) == MAX_BUCKET
    large = estimate_memory(3, trainable=3 * MAX_LIVE, frozen=0, num_workers=2)
    assert large.buffers == 4 * (MAX_BUCKET + MAX_LIVE)


@pytest.mark.parametrize("num_workers", [1, 2, 8])
def test_later_zero_stages_need_less_memory(num_workers: int) -> None:
    """Without buffers, no stage needs more memory than the one before, from stage 1 on."""

    def held(memory: MemoryEstimate) -> int:
        return memory.total - memory.buffers

    stages = [
        held(estimate_memory(s, trainable=10**8, frozen=10**7, num_workers=num_workers))
        for s in range(4)
    ]
    assert stages[1:] == sorted(stages[1:], reverse=True)
