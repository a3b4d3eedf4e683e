"""Loads the batches of the weakly supervised model: items, each a photo with its sentences.

An item is what an annotation file says to be one instance: a photo, and the sentences about that
instance. Its box is not read. Loading a step is a pure function of the step, as in the other
recipes.
"""

# Shapes: B items of one worker, S sentences of an item

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reir_training.clare.data import Arrays
from reir_training.data.sampling import Sampler, Step, TaskStream
from reir_training.data.sentence_groups import PhotoSentences

ITEM = "item"
"""The name of the only task."""


class PhotoInputs(Protocol):
    """Loads what the source of anchors needs of photos."""

    def __call__(self, rows: Sequence[int]) -> Mapping[str, Tensor]:
        """Return tensors with one row for each photo, given the rows of the photos."""
        ...


@dataclass
class WeakBatch:
    """One worker's batch of a step.

    Attributes:
        inputs: of the source of anchors, for B photos.
        photos: (B,) row of the photo of each item; items of one photo are no negatives.
        sentences: (S, B, ...) loaded sentences of each item.
    """

    inputs: dict[str, Tensor]
    photos: Tensor
    sentences: Tensor

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> WeakBatch:
        """Build from the result of `WeakData.load`."""
        tensors: dict[str, Tensor] = {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}
        return cls(photos=tensors.pop("photos"), sentences=tensors.pop("sentences"), inputs=tensors)

    def to(self, device: torch.device | str) -> WeakBatch:
        """Return the batch on a device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in self.inputs.items()}
        return replace(
            self,
            inputs=moved,
            photos=self.photos.to(device),
            sentences=self.sentences.to(device),
        )


class WeakData:
    """The items of a set of photos; loads the steps of a run from them.

    Args:
        photos: photos in the order of `inputs`; those of other splits than "train" are not used.
        inputs: loads photos.
        sentences: loaded sentences of all photos, in the order of photos and groups.
        sentences_per_item: S.
        batch_size: items per step, over all workers.
        seed: random seed.

    Raises:
        ConfigError: there are no sentences.
    """

    def __init__(  # noqa: PLR0913 - most are keyword-only
        self,
        photos: Sequence[PhotoSentences],
        inputs: PhotoInputs,
        sentences: Tensor,
        *,
        sentences_per_item: int,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        self._inputs, self._sentences, self._seed = inputs, sentences, seed
        self._per_item = sentences_per_item
        self.items: list[tuple[int, tuple[int, ...]]] = []
        """Row of the photo, and rows of the sentences, of each item."""
        first = 0
        for row, photo in enumerate(photos):
            for group in photo.groups:
                if photo.split == "train":
                    self.items.append((row, tuple(range(first, first + len(group)))))
                first += len(group)
        self.sampler = Sampler(
            [TaskStream(ITEM, np.zeros(len(self.items), bool), batch_size, seed)]
        )

    def load(self, step: Step, rank: int = 0) -> Arrays:
        """Load one worker's batch of a step.

        Args:
            step: step to load.
            rank: rank of the worker.
        """
        first = rank * len(step.rows)
        photos, chosen = [], []
        for place, row in enumerate(step.rows.tolist(), start=first):
            photo, sentences = self.items[row]
            # Seeded by the place in the whole step, so that a step is the same for any number of
            # workers.
            rng = np.random.default_rng([self._seed, step.number, place])
            photos.append(photo)
            chosen.append(draw_sentences(sentences, self._per_item, rng))
        inputs = {name: value.numpy() for name, value in self._inputs(photos).items()}
        return {
            **inputs,
            "photos": np.array(photos),
            "sentences": self._sentences[np.array(chosen).T].numpy(),
        }


def draw_sentences(rows: Sequence[int], num: int, rng: np.random.Generator) -> list[int]:
    """Return `num` sentences of an item: a random one, then the others in order, again and again.

    This is the choice of CMA (docs/weak-rec.md): with one sentence, it comes three times; with two,
    the first drawn comes twice.
    """
    primary = int(rng.integers(len(rows)))
    order = [rows[primary], *(each for i, each in enumerate(rows) if i != primary)]
    return [order[i % len(order)] for i in range(num)]
