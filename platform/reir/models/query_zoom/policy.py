"""`ZoomPolicy`: chooses which part of a photo to look at next, and knows when to stop.

A look gives candidates: instances with boxes and scores. For each of them, the policy estimates two
kinds of probability: that it is the described instance, and that the frame around it on each closer
level contains the described instance. It reads the scores of the look, and the boxes on the way
from the whole photo to the candidate, which the history encoder of PIZA summarizes.
"""

# Shapes: N candidates of a look, T boxes of a path, F features, L levels

from __future__ import annotations

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
NUM_FEATURES = 11 + 2 * NUM_LEVELS
SCORE_SCALE = 5.0
"""Factor that brings scores and their differences to about one."""
REFERENCE_PX = 416
"""Side of the detector's input, relative to which the side of a frame is measured."""
TOP = 5


@dataclass(frozen=True, kw_only=True)
class ZoomPolicyConfig:
    """Shape and thresholds of a `ZoomPolicy`.

    Attributes:
        hidden: hidden units of the judge.
        feedforward: hidden units of the history encoder's layer.
        max_looks: maximum number of looks at a photo.
        end_at: the search ends when a candidate is the described instance with this probability.
        look_at_least: frames whose probability is lower are not worth a look.
    """

    hidden: int = 32
    feedforward: int = 64
    max_looks: int = 5
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
    look: Look, scores_N: FloatArray, parents: tuple[Box, ...], before: float, grid: FrameGrid
) -> Candidates:
    """Return the candidates of a look.

    Args:
        look: at the frame that the path ends with.
        scores_N: inner products of the look's vectors with that of the expression.
        parents: the frames from the whole photo to the look's own.
        before: score of the candidate that led to this look; 0 for the whole photo.
        grid: of the photo.
    """
    num = len(scores_N)
    path = np.zeros((num, MAX_BOXES, 4), dtype=np.float32)
    path[:, : len(parents)] = np.array(parents, dtype=np.float32)
    path[:, len(parents)] = look.boxes
    valid = np.zeros((num, MAX_BOXES), dtype=np.bool_)
    valid[:, : len(parents) + 1] = True
    centers = (look.boxes[:, :2] + look.boxes[:, 2:]) / 2
    levels = range(len(grid.sides_px))
    frames = np.zeros((num, NUM_LEVELS, 4), dtype=np.float32)
    for level in levels:
        frames[:, level] = grid.around(level, centers)
    return Candidates(_features(look, scores_N, before, grid, frames, centers), path, valid, frames)


def _features(  # noqa: PLR0913 - each is one of the inputs
    look: Look,
    scores_N: FloatArray,
    before: float,
    grid: FrameGrid,
    frames_NL4: FloatArray,
    centers_N2: FloatArray,
) -> FloatArray:
    """(N, F) features of the candidates of a look."""
    num = len(scores_N)
    best = np.sort(scores_N)[::-1]
    rank = np.argsort(np.argsort(-scores_N, kind="stable"), kind="stable")
    share = np.sqrt(np.maximum(area(look.boxes), 1e-8) / area(look.frame))
    width_px, height_px = (look.frame[2:] - look.frame[:2]) * (grid.width_px, grid.height_px)
    whole = np.ones(num)
    columns = [
        SCORE_SCALE * scores_N,
        SCORE_SCALE * (scores_N - best[:1]),
        SCORE_SCALE * (scores_N - before) * (before != 0),
        rank / 10,
        look.objectness,
        np.log(share),
        whole * np.log1p(num) / 3,
        whole * (area(look.frame) > 0.999),
        whole * SCORE_SCALE * best[:1],
        whole * SCORE_SCALE * best[:TOP].mean() if num else whole,
        whole * np.log2(max(width_px, height_px) / REFERENCE_PX),
    ]
    for level in range(NUM_LEVELS):
        frame = frames_NL4[:, None, level]
        inside = ((centers_N2 >= frame[..., :2]) & (centers_N2 <= frame[..., 2:])).all(-1)
        count = inside.sum(1)
        columns.append(SCORE_SCALE * (inside * scores_N).sum(1) / np.maximum(count, 1))
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
        search.look(_Option(1.0, as_box(WHOLE), (), 0.0))
        while (option := search.next_option()) is not None:
            search.look(option)
        return search.answer()


@dataclass(frozen=True, order=True)
class _Option:
    """A frame to look at: its probability, the frames that lead to it, and the score before."""

    probability: float
    frame: Box
    parents: tuple[Box, ...]
    before: float


@dataclass
class _Search:
    """A search in progress."""

    policy: ZoomPolicy
    photo: PhotoLooks
    expression: FloatArray
    steps: list[ZoomStep] = field(default_factory=list)
    options: dict[Box, _Option] = field(default_factory=dict)
    found: list[tuple[float, float, Box]] = field(default_factory=list)

    def look(self, option: _Option) -> None:
        """Look at a frame, and note what it shows and where one could look next."""
        look = self.photo.at(np.array(option.frame, dtype=np.float32))
        scores = look.vectors @ self.expression
        path = (*option.parents, option.frame)
        best, score = option.frame, 0.0
        if len(scores):
            found, contains, frames = self._judge(look, scores, path, option.before)
            number = int(found.argmax())
            best, score = as_box(look.boxes[number]), float(scores[number])
            self.found.append((float(found[number]), score, best))
            self._note_options(contains, frames, scores, path)
        end = max((each[0] for each in self.found), default=0.0)
        self.steps.append(ZoomStep(frame=option.frame, box=best, score=score, end=end))

    def _judge(
        self, look: Look, scores: FloatArray, path: tuple[Box, ...], before: float
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return the probabilities and the frames of the candidates of a look."""
        read = candidates_of(look, scores, path, before, self.photo.grid)
        out = self.policy(*map(torch.from_numpy, (read.features, read.paths, read.valid)))
        return out.found.sigmoid().numpy(), out.contains.sigmoid().numpy(), read.frames

    def _note_options(
        self, contains_NL: FloatArray, frames: FloatArray, scores: FloatArray, path: tuple[Box, ...]
    ) -> None:
        """Note the frames on closer levels than that of the look."""
        sides = self.photo.grid.sides_px
        here = max(np.array(path[-1])[2:] - np.array(path[-1])[:2])
        for level in range(len(sides)):
            side = max(frames[0, level, 2:] - frames[0, level, :2])
            if side > 0.99 * here:
                continue
            for number in np.argsort(-contains_NL[:, level]).tolist():
                option = _Option(
                    float(contains_NL[number, level]),
                    as_box(frames[number, level]),
                    path,
                    float(scores[number]),
                )
                known = self.options.get(option.frame)
                if known is None or known.probability < option.probability:
                    self.options[option.frame] = option

    def next_option(self) -> _Option | None:
        """Return the frame to look at next; None if the search is over."""
        config = self.policy.config
        if len(self.steps) >= config.max_looks or self.steps[-1].end >= config.end_at:
            return None
        seen = {step.frame for step in self.steps}
        left = [each for each in self.options.values() if each.frame not in seen]
        best = max(left, default=None)
        return best if best and best.probability >= config.look_at_least else None

    def answer(self) -> ZoomSearch:
        """Return the search, with the candidate that is most probably the described instance."""
        whole = (0.0, 0.0, as_box(WHOLE))
        _, score, box = max(self.found, default=whole)
        return ZoomSearch(steps=tuple(self.steps), box=box, score=score)
