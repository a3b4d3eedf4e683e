"""Blends the weights of a model before and after a fine-tune, so that it keeps what it knew.

Between the two lies a straight line of models, of which many find the new photos as well as the
tuned model does, and the old ones as well as the original (WiSE-FT, Wortsman et al. 2022, "Robust
fine-tuning of zero-shot models", section 3). The share of the tuned weights is chosen on training
photos that the tuned model was not trained on, up to a limit: new photos cannot tell what has been
forgotten of old ones. The paper recommends a share of 0.5 where nothing else is known.
"""

# Shapes: M sentences

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reir_training.finetune.measure import Ranks

STEPS, MAX_SHARE = 5, 0.5
"""Number of shares to choose from, and the largest of them by default."""

StateDict = Mapping[str, Tensor]


def blended(old: StateDict, new: StateDict, share: float) -> dict[str, Tensor]:
    """Return `old + share * (new - old)` of every weight.

    Weights that are equal stay as they are, to the last bit, and so do whole numbers of `new`. So
    frozen parts still fit what was trained on them.

    Args:
        old, new: weights of the same names and shapes.
        share: 0 for the old weights, 1 for the new ones.
    """
    return {
        name: value
        if not value.is_floating_point() or torch.equal(value, old[name])
        else torch.lerp(old[name].float(), value.float(), share).to(value.dtype)
        for name, value in new.items()
    }


@dataclass(frozen=True)
class ShareChoice:
    """The share of the new weights, and why.

    Attributes:
        share: the chosen one.
        figures: share -> percentage of sentences whose right photo is first; 0 for the old weights.
    """

    share: float
    figures: Mapping[float, float]


def shares_up_to(most: float) -> tuple[float, ...]:
    """Return `STEPS` shares in ascending order, of which `most` is the largest."""
    # Rounded, because the report shows these numbers, and 0.4 * 3 / 5 is 0.24000000000000005.
    return tuple(round(most * step / STEPS, 4) for step in range(1, STEPS + 1))


def choose_share(measure: Callable[[float], Ranks], shares: Sequence[float]) -> ShareChoice:
    """Return the smallest share that is not clearly worse than the best one.

    "Not clearly" means by no more than the standard error of the difference (the one-standard-error
    rule of Breiman et al. 1984, "Classification and Regression Trees", section 3.4.3). A smaller
    share keeps more of what the model knew.

    Args:
        measure: ranks the right answers to the same sentences with a share of the new weights.
        shares: to choose from, in ascending order; the old weights are measured too.
    """
    hits = {share: measure(share) for share in (0.0, *shares)}
    first = {share: ranks.hits()["photo_p1"] for share, ranks in hits.items()}
    photos = hits[0.0].photos
    best = max(shares, key=lambda share: float(first[share].mean()))
    # There is always such a share, since the best one is not worse than itself.
    chosen = next(
        share for share in shares if not _is_clearly_worse(first[share], first[best], photos)
    )
    return ShareChoice(chosen, {each: hits[each].figures()["photo_p1"] for each in hits})


def _is_clearly_worse(one: np.ndarray, best: np.ndarray, photos: np.ndarray) -> bool:
    """Whether the mean of (M,) values is lower by more than the standard error of the difference.

    The sentences about a photo are not independent, so the error is that of sums over photos.
    """
    steps = best - one
    _, rows = np.unique(photos, return_inverse=True)
    sums = np.bincount(rows, weights=steps - steps.mean())
    error = float(np.sqrt((sums**2).sum())) / len(steps)
    return float(steps.mean()) > error
