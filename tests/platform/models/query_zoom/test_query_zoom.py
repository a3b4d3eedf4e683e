"""Zooming into a photo: the grid of frames, the rule, the policy, and what they look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reir.checkpoint import SHIPPED, load_encoder, load_zoom_policy, weights_digest
from reir.images.boxes import elementwise_iou
from reir.models.interfaces import Zoomer
from reir.models.query_zoom.frames import MIN_SIDE_PX, OVERLAP, WHOLE, FrameGrid
from reir.models.query_zoom.looks import Look, PhotoLooks
from reir.models.query_zoom.policy import ZoomPolicy, ZoomPolicyConfig, closer_levels
from reir.models.query_zoom.rule import ZoomRule
from reir.models.query_zoom.zoomer import InstanceZoomer, ZoomStrategy
from reir.models.zoom_steps import ZoomSearch
from reir.query.search import load_extras
from reir.records import FloatArray, Instances, RgbImage
from reir_testing import FakeEncoder, draw_scene

SIDE = 1500
TINY = (500, 500, 520, 520)
"""Less than .05 % of the scene: `FakeEncoder` sees it only in a part of the photo."""
SCENE = draw_scene((SIDE, SIDE), [("green", (420, 420, 480, 480)), ("red", TINY)])
GRAY = np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)
SIDES = st.integers(1, 20_000)


class CountingEncoder(FakeEncoder):
    """Counts the looks."""

    def __init__(self) -> None:
        super().__init__()
        self.num_looks = 0

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        self.num_looks += len(images)
        return super().encode_images(images)


def policy(**changes: Any) -> ZoomPolicy:
    """A policy with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ZoomPolicy(ZoomPolicyConfig(**changes)).eval()


@given(SIDES, SIDES, st.floats(0, 1), st.floats(0, 1))
def test_frames_are_parts_of_the_photo_and_small_instances_lie_whole_in_one(
    width: int, height: int, x: float, y: float
) -> None:
    grid = FrameGrid(width, height)
    lengths = np.array([width, height])
    for level, side in enumerate(grid.sides_px):
        (frame,) = grid.around(level, np.array([[x, y]], dtype=np.float32))
        px = frame * np.tile(lengths, 2)
        np.testing.assert_allclose(px, np.rint(px), atol=0.01)
        sides = np.minimum(lengths, side)
        np.testing.assert_allclose(px[2:] - px[:2], sides, atol=0.01)
        assert frame.min() >= 0
        assert frame.max() <= 1
        # An instance of nearly the overlap around the place, as far as the photo goes.
        half = (side * OVERLAP - 3) / 2
        low = np.clip(np.array([x, y]) * lengths - half, 0, lengths)
        high = np.clip(np.array([x, y]) * lengths + half, 0, lengths)
        assert (px[:2] <= low + 1).all()
        assert (px[2:] >= high - 1).all()


def test_levels_have_smaller_and_smaller_frames_and_a_small_photo_has_none() -> None:
    assert FrameGrid(3500, 2000).sides_px == (1400, 560)
    assert FrameGrid(MIN_SIDE_PX * 2, 100).sides_px == ()
    grid = FrameGrid(3500, 2000)
    assert closer_levels(WHOLE, grid) == [0, 1]
    assert closer_levels(grid.around(0, np.array([[0.5, 0.5]], np.float32))[0], grid) == [1]
    assert closer_levels(grid.around(1, np.array([[0.5, 0.5]], np.float32))[0], grid) == []


@pytest.mark.parametrize("level", [0, 1])
def test_the_frames_of_a_level_cover_the_photo(level: int) -> None:
    grid = FrameGrid(1500, 700)
    covered = np.zeros((700, 1500), dtype=np.bool_)
    frames = list(grid.every(level))
    for frame in frames:
        x1, y1, x2, y2 = np.rint(frame * [1500, 700, 1500, 700]).astype(int)
        covered[y1:y2, x1:x2] = True
    assert covered.all()
    assert len({tuple(frame) for frame in frames}) == len(frames)


@pytest.mark.parametrize("strategy", [ZoomRule(), policy(end_at=1.0, look_at_least=0.0)])
def test_a_search_finds_what_no_look_at_the_whole_photo_shows(strategy: ZoomStrategy) -> None:
    encoder = FakeEncoder()
    (whole,) = encoder.encode_images([SCENE])
    assert len(whole) == 1  # the green one, which is beside the red one
    zoomer = InstanceZoomer(encoder, strategy)
    assert isinstance(zoomer, Zoomer)
    (search,) = zoomer.zoom([SCENE], ["the red one"])
    assert search.frames[0] == (0, 0, 1, 1)
    assert len(set(search.frames)) == len(search.frames) > 1
    assert search.score == max(step.score for step in search.steps)
    assert elementwise_iou(search.box, np.array(TINY) / SIDE) > 0.95


def test_the_rule_stops_when_the_score_no_longer_rises() -> None:
    (search,) = InstanceZoomer(FakeEncoder(), ZoomRule()).zoom([SCENE], ["the small green one"])
    assert len(search.steps) == 2
    assert search.steps[1].score <= search.steps[0].score
    assert search.box == search.steps[0].box


@pytest.mark.parametrize("strategy", [ZoomRule(), policy()])
def test_a_photo_without_instances_gives_its_whole(strategy: ZoomStrategy) -> None:
    (search,) = InstanceZoomer(FakeEncoder(), strategy).zoom([GRAY], ["the red one"])
    assert search.box == (0, 0, 1, 1)
    assert search.score == 0
    tiny = np.full((1, 1, 3), 200, dtype=np.uint8)
    assert len(InstanceZoomer(FakeEncoder(), strategy).zoom([tiny], ["red"])[0].steps) == 1


@pytest.mark.parametrize(
    ("strategy", "in_whole"),
    [
        (ZoomRule(), True),
        # Without an instance in the whole photo, only the rule looks again, around the center.
        (ZoomRule(), False),
        (policy(end_at=1.0, look_at_least=0.0), True),
    ],
)
def test_an_instance_with_a_negative_score_is_better_than_none(
    strategy: ZoomStrategy, in_whole: bool
) -> None:
    def encode(frame: FloatArray) -> Look:
        shown = (frame.tolist() == [0, 0, 1, 1]) == in_whole
        boxes = np.array([[0.49, 0.49, 0.51, 0.51]] * shown, np.float32).reshape(-1, 4)
        vectors = np.array([[-0.5, 0]] * shown, np.float32).reshape(-1, 2)
        return Look(frame, boxes, np.ones(len(boxes), np.float32), vectors)

    photo = PhotoLooks(FrameGrid(SIDE, SIDE), encode)
    search = strategy.search(photo, np.array([1, 0], np.float32))
    assert {step.score for step in search.steps} == {0, -0.5}
    assert search.score == -0.5
    assert search.box == pytest.approx((0.49, 0.49, 0.51, 0.51))


@pytest.mark.parametrize("strategy", [ZoomRule(), policy()])
def test_several_searches_equal_single_ones_and_share_their_looks(strategy: ZoomStrategy) -> None:
    words = ["the red one", "the green one", "the red one"]
    encoder = CountingEncoder()
    together = InstanceZoomer(encoder, strategy).zoom([SCENE] * 3, words)
    looks = {step for search in together for step in search.frames}
    assert encoder.num_looks == len(looks) < sum(len(search.steps) for search in together)
    single = [InstanceZoomer(FakeEncoder(), strategy).zoom([SCENE], [each])[0] for each in words]
    assert together == single


def searched(net: ZoomPolicy) -> ZoomSearch:
    photo = PhotoLooks.of(FakeEncoder(), SCENE)
    return net.search(photo, FakeEncoder().encode_expressions(["the red one"])[0])


def test_the_policy_looks_as_often_as_it_may_and_stops_when_it_is_sure() -> None:
    assert len(searched(policy(max_looks=1)).steps) == 1
    assert len(searched(policy(max_looks=3, end_at=1.0, look_at_least=0.0)).steps) == 3
    assert len(searched(policy(end_at=0.0)).steps) == 1
    assert len(searched(policy(look_at_least=1.0)).steps) == 1
    ends = [step.end for step in searched(policy(end_at=1.0, look_at_least=0.0)).steps]
    assert ends == sorted(ends)
    assert 0 < ends[0] < 1


def test_the_shipped_checkpoint_has_a_small_policy_for_its_own_vectors() -> None:
    assert load_zoom_policy(SHIPPED, weights_digest(SHIPPED)) is not None
    assert (SHIPPED / "query_zoom.safetensors").stat().st_size < 100_000
    assert load_extras(SHIPPED, load_encoder()).zoom_policy is not None
