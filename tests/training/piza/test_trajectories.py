"""Searches that are generated from true boxes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reir.errors import ConfigError
from reir.records import Box
from reir_training.piza.trajectories import TrajectorySettings, search_trajectory

SMALL = (0.7, 0.2, 0.707, 0.216)


@st.composite
def targets(draw: st.DrawFn) -> Box:
    """Boxes in [0, 1] from a pixel of a large photo to the whole photo."""
    sides = draw(st.tuples(*[st.floats(1e-4, 1.0)] * 2))
    x1, y1 = (draw(st.floats(0, 1)) * (1 - side) for side in sides)
    return x1, y1, min(x1 + sides[0], 1.0), min(y1 + sides[1], 1.0)


@st.composite
def settings(draw: st.DrawFn) -> TrajectorySettings:
    return TrajectorySettings(
        usual_share=draw(st.floats(0.001, 0.5)),
        share_spread=draw(st.floats(0, 2)),
        max_boxes=draw(st.integers(1, 8)),
        growth=draw(st.floats(-1, 1)),
        jitter=draw(st.floats(0, 1)),
        least_side_px=draw(st.integers(1, 300)),
    )


@given(
    target=targets(),
    chosen=settings(),
    size_px=st.tuples(*[st.integers(1, 12_000)] * 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_search_leads_from_the_photo_to_the_target(
    target: Box, chosen: TrajectorySettings, size_px: tuple[int, int], seed: int
) -> None:
    found = search_trajectory(target, size_px, np.random.default_rng(seed), chosen)

    assert 2 <= len(found.boxes) <= chosen.max_boxes + 1
    assert found.boxes[0].tolist() == [0, 0, 1, 1]
    assert np.array_equal(found.boxes[-1], np.array(target, dtype=np.float32))
    assert (found.boxes[1:, :2] >= found.boxes[:-1, :2]).all()
    assert (found.boxes[1:, 2:] <= found.boxes[:-1, 2:]).all()
    assert found.progress[0] == 0
    assert found.progress[-1] == 1
    assert (np.diff(found.progress) > 0).all()
    assert found.end.tolist() == [False] * (len(found.boxes) - 1) + [True]


def test_smaller_targets_have_longer_searches() -> None:
    exact = TrajectorySettings(share_spread=0, usual_share=0.01)
    shares = (0.5, 0.01, 0.0001, 0.000001)
    lengths = []
    for share in shares:
        side = share**0.5
        target = (0.0, 0.0, side, side)
        random = np.random.default_rng(0)
        lengths.append(len(search_trajectory(target, (4000, 3000), random, exact).boxes) - 1)
    assert lengths == [1, 1, 2, 3]


def test_sides_fall_geometrically_to_those_of_the_target() -> None:
    exact = TrajectorySettings(share_spread=0, usual_share=0.01, growth=0, least_side_px=1)
    found = search_trajectory(SMALL, (6000, 4000), np.random.default_rng(3), exact)
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    assert found.progress.tolist() == [0, 0.5, 1]
    assert sides[1] == pytest.approx(sides[2] ** 0.5, rel=1e-3)


def test_growth_makes_the_first_zoom_the_most_careful() -> None:
    chosen = TrajectorySettings(share_spread=0, usual_share=0.1, growth=0.5)
    progress = search_trajectory(SMALL, (6000, 4000), np.random.default_rng(0), chosen).progress
    steps = np.diff(progress)
    assert steps[1:] / steps[:-1] == pytest.approx(np.full(len(steps) - 1, np.exp(0.5)), rel=1e-4)


def test_boxes_before_the_last_have_a_least_side() -> None:
    chosen = TrajectorySettings(share_spread=0, usual_share=0.1, least_side_px=600)
    found = search_trajectory(SMALL, (6000, 4000), np.random.default_rng(0), chosen)
    sides_px = (found.boxes[:, 2:] - found.boxes[:, :2]) * (6000, 4000)
    assert len(found.boxes) > 3
    assert (sides_px[:-1] >= 599.9).all()


def test_jitter_moves_the_target_off_the_center() -> None:
    target, size_px = (0.49, 0.49, 0.51, 0.51), (4000, 4000)

    def off_center(jitter: float) -> float:
        chosen = TrajectorySettings(jitter=jitter, share_spread=0)
        random = np.random.default_rng(5)
        boxes = [search_trajectory(target, size_px, random, chosen).boxes[1] for _ in range(50)]
        centers = np.array([(box[:2] + box[2:]) / 2 for box in boxes])
        return float(np.abs(centers - 0.5).mean())

    assert off_center(0) == pytest.approx(0, abs=1e-6)
    assert off_center(1) > 2 * off_center(0.3) > 0.01


@pytest.mark.parametrize("target", [(0.5, 0.5, 0.5, 0.6), (-0.1, 0, 0.5, 0.5), (0, 0, 0.5, 1.1)])
def test_unusable_target_is_refused(target: Box) -> None:
    with pytest.raises(ValueError, match=r"a box with an area in \[0, 1\], got"):
        search_trajectory(target, (100, 100), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "value"), [("usual_share", 0.9), ("max_boxes", 0), ("jitter", 2), ("growth", 11)]
)
def test_setting_out_of_range_is_refused(name: str, value: float) -> None:
    changed: Any = {name: value}
    with pytest.raises(ConfigError, match=f"{name} must be .* got {value}"):
        TrajectorySettings(**changed)
