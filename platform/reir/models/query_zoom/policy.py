"""`ZoomPolicy`: chooses which part of a photo to look at next, and when the search is over.

A look gives candidates: instances with boxes and scores. For each of them, the policy estimates two
kinds of probability: that it is the described instance, and that the frame around it on each closer
level contains the described instance. It reads the scores of the look, and the boxes on the way
from the whole photo to the candidate, which the history encoder of PIZA summarizes.
"""

# Shapes: N candidates of a look, T boxes of a path, F features, L levels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from reir.images.boxes import area
from reir.models.piza.history import HistoryConfig, HistoryEncoder
from reir.models.query_zoom.frames import NUM_LEVELS, WHOLE, FrameGrid
from reir.models.query_zoom.looks import Look, PhotoLooks, as_box
from reir.models.zoom_steps import ZoomSearch, ZoomStep
from reir.records import Box, FloatArray

MAX_BOXES = NUM_LEVELS + 2
"""Longest path: the whole photo, a frame of each level, and the candidate."""
NUM_FEATURES = 10 + 2 * NUM_LEVELS
SCORE_SCALE = 5.0
"""Factor that brings scores and their differences to about one."""
REFERENCE_PX = 416
"""Side of the detector's input, relative to which the side of a frame is measured."""
TOP = 5
"""Number of best candidates whose mean score describes a look."""
WHOLE_AREA = 0.999


@dataclass(frozen=True, kw_only=True)
class ZoomPolicyConfig:
    """The layer sizes and the thresholds of a `ZoomPolicy`.

    Attributes:
        hidden: hidden units of the judge.
        feedforward: hidden units of the history encoder's layer.
        max_looks: maximum number of looks at a photo.
        end_at: the search ends when a candidate is the described instance with this probability.
        look_at_least: frames whose probability is lower are not worth a look.
    """

    hidden: int = 32
    feedforward: int = 64
    max_looks: int = 13
    end_at: float = 0.9
    look_at_least: float = 0.02


class PolicyOutput(NamedTuple):
    """Logits of the two kinds of probability.

    Attributes:
        found: (N,) that the candidate is the described instance.
        contains: (N, L) that the frame around it on a level contains the described instance.
    """

    found: Tensor
    contains: Tensor


@dataclass(frozen=True)
class Candidates:
    """The candidates of a look, as the policy reads them.

    Attributes:
        features: (N, F).
        paths: (N, T, 4) boxes from the whole photo to the candidate, padded with zeros.
        valid: (N, T) bool, False in the padding.
        frames: (N, L, 4) the frame around the candidate on each level of the grid.
    """

    features: FloatArray
    paths: FloatArray
    valid: np.ndarray
    frames: FloatArray


def candidates_of(
    look: Look, scores_N: FloatArray, path: tuple[Box, ...], grid: FrameGrid
) -> Candidates:
    """Return the candidates of a look.

    Args:
        look: at the last frame of the path.
        scores_N: inner products of the look's vectors with that of the expression.
        path: the frames from the whole photo to the look's own.
        grid: of the photo.
    """
    num, length = len(scores_N), len(path)
    paths = np.zeros((num, MAX_BOXES, 4), dtype=np.float32)
    paths[:, :length] = np.array(path, dtype=np.float32)
    paths[:, length] = look.boxes
    valid = np.zeros((num, MAX_BOXES), dtype=np.bool_)
    valid[:, : length + 1] = True
    centers = look.boxes.reshape(-1, 2, 2).mean(1)
    # A small photo has fewer levels. The frames of the missing ones stay empty, so that no
    # candidate lies in them.
    frames = np.zeros((num, NUM_LEVELS, 4), dtype=np.float32)
    for level in range(len(grid.sides_px)):
        frames[:, level] = grid.around(level, centers)
    inside = [_inside(centers, frames[:, level]) for level in range(NUM_LEVELS)]
    return Candidates(_features(look, scores_N, inside, grid), paths, valid, frames)


def closer_levels(frame: FloatArray, grid: FrameGrid) -> list[int]:
    """Return the levels of the grid whose frames are smaller than a frame of the photo."""
    side_px = max((frame[2:] - frame[:2]) * (grid.width_px, grid.height_px))
    # Compared in whole pixels, because the frame was rounded.
    return [level for level, each in enumerate(grid.sides_px) if each < round(float(side_px))]


def _inside(centers_N2: FloatArray, frames_N4: FloatArray) -> np.ndarray:
    """(N, N) whether the candidate of a column lies in the frame around that of a row."""
    frame = frames_N4[:, None]
    return np.asarray(((centers_N2 >= frame[..., :2]) & (centers_N2 <= frame[..., 2:])).all(-1))


def _features(
    look: Look, scores_N: FloatArray, inside: Sequence[np.ndarray], grid: FrameGrid
) -> FloatArray:
    """(N, F) features of the candidates of a look; `inside` is as above, for each level."""
    num = len(scores_N)
    # A look may show no candidates, so `best` is read by slices and sums instead of by index.
    best = np.sort(scores_N)[::-1]
    # The second sort turns the order of the candidates into the place of each one.
    rank = np.argsort(np.argsort(-scores_N, kind="stable"), kind="stable")
    width_px, height_px = (look.frame[2:] - look.frame[:2]) * (grid.width_px, grid.height_px)
    of_look = (
        np.log1p(num) / 3,
        area(look.frame) > WHOLE_AREA,
        SCORE_SCALE * best[:1].sum(),
        SCORE_SCALE * best[:TOP].sum() / max(len(best[:TOP]), 1),
        np.log2(max(width_px, height_px) / REFERENCE_PX),
    )
    columns = [
        SCORE_SCALE * scores_N,
        SCORE_SCALE * (scores_N - best[:1]),
        rank / 10,
        look.objectness,
        np.log(np.maximum(area(look.boxes), 1e-8) / area(look.frame)) / 2,
        *(np.full(num, value) for value in of_look),
    ]
    for each in inside:
        count = each.sum(1)
        columns.append(SCORE_SCALE * (each * scores_N).sum(1) / np.maximum(count, 1))
        columns.append(count / 10)
    return np.stack(columns, axis=1).astype(np.float32)


class ZoomPolicy(nn.Module):
    """The history encoder of PIZA, and a judge of the candidates of a look."""

    def __init__(self, config: ZoomPolicyConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ZoomPolicyConfig()
        shape = HistoryConfig(feedforward=config.feedforward, dropout=0.0)
        self.history = HistoryEncoder(shape)
        self.judge = nn.Sequential(
            nn.Linear(NUM_FEATURES + shape.out + 1, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, 1 + NUM_LEVELS),
        )

    def forward(self, features_NF: Tensor, paths_NT4: Tensor, valid_NT: Tensor) -> PolicyOutput:
        """Judge the candidates of looks; see `Candidates`."""
        past = self.history(paths_NT4, valid_NT)
        read = torch.cat([features_NF, past.summary, past.progress[:, None]], dim=1)
        logits = self.judge(read)
        return PolicyOutput(logits[:, 0] + past.end_logits, logits[:, 1:])

    @torch.inference_mode()
    def search(self, photo: PhotoLooks, expression_D: FloatArray) -> ZoomSearch:
        """Search a photo for the (D,) vector of an expression."""
        search = _Search(self, photo, expression_D)
        search.look(_Option(1.0, as_box(WHOLE), ()))
        while (option := search.next_option()) is not None:
            search.look(option)
        return search.answer()


@dataclass(frozen=True, order=True)
class _Option:
    """A frame to look at: the probability that it is right, and the frames that lead to it."""

    probability: float
    frame: Box
    parents: tuple[Box, ...]


@dataclass
class _Search:
    """A search in progress; `found` is the probability that an instance so far is the right one."""

    policy: ZoomPolicy
    photo: PhotoLooks
    expression: FloatArray
    steps: list[ZoomStep] = field(default_factory=list)
    options: dict[Box, _Option] = field(default_factory=dict)
    found: float = 0.0

    def look(self, option: _Option) -> None:
        """Look at a frame, and note what it shows and where one could look next."""
        look = self.photo.at(np.array(option.frame, dtype=np.float32))
        scores = look.vectors @ self.expression
        path = (*option.parents, option.frame)
        best, score = option.frame, 0.0
        if len(scores):
            read = candidates_of(look, scores, path, self.photo.grid)
            out = self.policy(*map(torch.from_numpy, (read.features, read.paths, read.valid)))
            number = int(scores.argmax())
            best, score = as_box(look.boxes[number]), float(scores[number])
            self.found = max(self.found, float(out.found.sigmoid().max()))
            self._note_options(out.contains.sigmoid().numpy(), read.frames, path)
        self.steps.append(ZoomStep(frame=option.frame, box=best, score=score, end=self.found))

    def _note_options(
        self, contains_NL: FloatArray, frames_NL4: FloatArray, path: tuple[Box, ...]
    ) -> None:
        """Note the frames on closer levels than that of the look."""
        for level in closer_levels(np.array(path[-1]), self.photo.grid):
            for probability, frame in zip(
                contains_NL[:, level].tolist(), frames_NL4[:, level], strict=True
            ):
                option = _Option(probability, as_box(frame), path)
                known = self.options.get(option.frame)
                if known is None or known.probability < probability:
                    self.options[option.frame] = option

    def next_option(self) -> _Option | None:
        """Return the frame to look at next; None if the search is over."""
        config = self.policy.config
        if len(self.steps) >= config.max_looks or self.steps[-1].end >= config.end_at:
            return None
        seen = {step.frame for step in self.steps}
        left = [each for each in self.options.values() if each.frame not in seen]
        # Options of equal probability are ordered by frame, so a search can be repeated exactly.
        best = max(left, default=None)
        return best if best and best.probability >= config.look_at_least else None

    def answer(self) -> ZoomSearch:
        """Return the search, with the instance of the best score."""
        # Not the most probable one: the score is as good a judge of all looks together, and it can
        # be compared between photos.
        best = max(self.steps, key=lambda step: step.rank)
        return ZoomSearch(steps=tuple(self.steps), box=best.box, score=best.score)
