"""Trains the history encoder of PIZA from generated searches alone, before any adapter.

No photo is needed, since the encoder reads boxes only. The release has no code for this. Every
prefix of a search is one history: its progress is known, and it has ended if its last box is the
target. A model does not find the boxes exactly, so all of them but the whole photo are moved a
little.
"""

# Shapes: N targets, B histories, T boxes of the longest one

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reir.errors import DataError
from reir.models.piza.history import HistoryConfig, HistoryEncoder
from reir.models.piza.zoom import END_PROBABILITY
from reir.records import FloatArray
from reir_training.piza.trajectories import Trajectory, TrajectorySettings, search_trajectory


@dataclass(frozen=True, kw_only=True)
class HistoryTraining:
    """How a history encoder is trained.

    Attributes:
        steps: optimizer steps.
        batch: searches per step; each gives as many histories as it has boxes.
        learning_rate: at the start; it falls to 0 along a cosine.
        box_noise: standard deviation of the error of a coordinate, in sides of the box.
        progress_weight: weight of the L1 loss of the progress beside the cross-entropy of the end.
        searches: how searches are generated.
        seed: of weights, searches and noise.
    """

    steps: int = 800
    batch: int = 32
    learning_rate: float = 5e-3
    box_noise: float = 0.05
    progress_weight: float = 1.0
    searches: TrajectorySettings = field(default_factory=TrajectorySettings)
    seed: int = 0


class HistoryScores(NamedTuple):
    """How well a history encoder judges searches.

    Attributes:
        end_accuracy: share of histories for which the decision to end the search, at the
            probability that a search needs, is right.
        missed_ends: share of the histories with the target that do not end the search.
        early_ends: share of the other histories that end it.
        progress_error: mean absolute error of the progress.
    """

    end_accuracy: float
    missed_ends: float
    early_ends: float
    progress_error: float


class Histories(NamedTuple):
    """Histories with what is true of them.

    Attributes:
        boxes: (B, T, 4) xyxy in [0, 1]; zeros where a shorter history is padded.
        valid: (B, T) bool.
        progress: (B,) from 0 to 1.
        end: (B,) 1 if the last box is the target, else 0.
    """

    boxes: Tensor
    valid: Tensor
    progress: Tensor
    end: Tensor


def train_history(
    targets: FloatArray,
    sizes_px: Sequence[tuple[int, int]],
    config: HistoryConfig | None = None,
    settings: HistoryTraining | None = None,
) -> HistoryEncoder:
    """Train a history encoder, in about a minute on a CPU, and return it in eval mode.

    Args:
        targets: (N, 4) true boxes of the training data, xyxy in [0, 1].
        sizes_px: width and height of the photo of each target.
        config: shape of the encoder.
        settings: how it is trained.

    Raises:
        DataError: there are no targets.
    """
    settings = settings or HistoryTraining()
    # The forked generator leaves the random numbers of the caller as they are.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder = HistoryEncoder(config)
        optimizer = torch.optim.AdamW(encoder.parameters(), settings.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
        batches = _batches(targets, sizes_px, settings)
        for _ in range(settings.steps):
            batch = next(batches)
            output = encoder(batch.boxes, batch.valid)
            loss = F.binary_cross_entropy_with_logits(output.end_logits, batch.end)
            loss = loss + settings.progress_weight * F.l1_loss(output.progress, batch.progress)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def history_scores(
    encoder: HistoryEncoder,
    targets: FloatArray,
    sizes_px: Sequence[tuple[int, int]],
    settings: HistoryTraining | None = None,
) -> HistoryScores:
    """Score an encoder in eval mode on one search for each of some held-out targets.

    Args:
        encoder: from `train_history`.
        targets, sizes_px: as there, but not those that it was trained on.
        settings: how searches are generated and boxes moved, and the seed of both.

    Raises:
        DataError: there are no targets.
    """
    settings = settings or HistoryTraining(seed=1)
    random = _random(targets, settings)
    found = [
        search_trajectory(tuple(target), size_px, random, settings.searches)
        for target, size_px in zip(targets.tolist(), sizes_px, strict=True)
    ]
    truth = _histories(found, random, settings.box_noise)
    output = encoder(truth.boxes, truth.valid)
    ended, end = output.end_logits.sigmoid() >= END_PROBABILITY, truth.end.bool()
    return HistoryScores(
        end_accuracy=_share(ended == end),
        missed_ends=_share(~ended[end]),
        early_ends=_share(ended[~end]),
        progress_error=float((output.progress - truth.progress).abs().mean()),
    )


def _batches(
    targets: FloatArray, sizes_px: Sequence[tuple[int, int]], settings: HistoryTraining
) -> Iterator[Histories]:
    """Yield batches of histories for randomly chosen targets, without end."""
    random, searches = _random(targets, settings), settings.searches
    while True:
        found = [
            search_trajectory(tuple(targets[row].tolist()), sizes_px[row], random, searches)
            for row in random.integers(len(targets), size=settings.batch).tolist()
        ]
        yield _histories(found, random, settings.box_noise)


def _random(targets: FloatArray, settings: HistoryTraining) -> np.random.Generator:
    if not len(targets):
        raise DataError("a history encoder learns from true boxes, but there are none")
    return np.random.default_rng(settings.seed)


def _histories(found: Sequence[Trajectory], random: np.random.Generator, noise: float) -> Histories:
    """Return every prefix of some searches as a history, with moved boxes."""
    longest = max(len(each.boxes) for each in found)
    boxes, valid = [], []
    for each in found:
        # Moved once for all prefixes: the boxes of a real search stay the same from look to look.
        moved = _moved(each.boxes, random, noise)
        for length in range(1, len(moved) + 1):
            padded = np.zeros((longest, 4), dtype=np.float32)
            padded[:length] = moved[:length]
            boxes.append(padded)
            valid.append(np.arange(longest) < length)
    progress = np.concatenate([each.progress for each in found])
    end = np.concatenate([each.end for each in found]).astype(np.float32)
    return Histories(
        *(torch.from_numpy(each) for each in (np.stack(boxes), np.stack(valid), progress, end))
    )


def _moved(boxes: FloatArray, random: np.random.Generator, noise: float) -> FloatArray:
    """Move the edges of every box, except the whole photo, by a random share of its sides."""
    sides = np.tile(boxes[1:, 2:] - boxes[1:, :2], 2)
    # Less than half a side, so that no edge passes the other one.
    shift = np.clip(noise * random.standard_normal(sides.shape), -0.4, 0.4) * sides
    return np.concatenate([boxes[:1], np.clip(boxes[1:] + shift, 0, 1)]).astype(np.float32)


def _share(values: Tensor) -> float:
    """Return the share of true values; 0 if there are none."""
    return float(values.float().mean()) if len(values) else 0.0
