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

from reir.records import FloatArray
from reir_training.clare.data import Arrays
from reir_training.config import DataConfig
from reir_training.data.examples import TrainPhoto
from reir_training.data.leakage import read_sources
from reir_training.data.sampling import Sampler, Step, TaskStream
from reir_training.data.sentence_groups import PhotoSentences, read_run_sentences

ITEM = "item"
"""The name of the only task."""


@dataclass(frozen=True)
class WeakPhotos:
    """The photos of a run. A row is a place in `files`.

    Attributes:
        train: photos to learn from, without boxes.
        held_out: photos to validate with.
    """

    train: Sequence[PhotoSentences]
    held_out: Sequence[TrainPhoto]

    @property
    def files(self) -> list[PhotoSentences | TrainPhoto]:
        """The training photos, then the held-out photos."""
        # In this order, because items use rows of `train` as rows of this list.
        return [*self.train, *self.held_out]

    @property
    def sentences(self) -> list[str]:
        """The sentences of the training photos."""
        return [text for photo in self.train for group in photo.groups for text in group]

    def known(self) -> list[KnownSentence]:
        """Return the sentences of the held-out photos with what they describe."""
        return [
            KnownSentence(len(self.train) + row, each.text, photo.boxes[each.box], each.kind)
            for row, photo in enumerate(self.held_out)
            for each in photo.expressions
        ]


def read_weak_photos(config: DataConfig) -> WeakPhotos:
    """Read the photos of a run.

    Raises:
        DataError: as `read_run_sentences`.
    """
    return WeakPhotos(*read_run_sentences(config))


def all_sentences(config: DataConfig) -> list[str]:
    """Return the sentences of all splits of the sources of a run, also those that it does not use.

    Raises:
        DataError: a file is malformed or missing.
    """
    whole = {"split": None, "held_out": 0, "test": 0}
    found = read_sources(source.model_copy(update=whole) for source in config.data)
    return [each.text for source in found for each in source.dataset.expressions]


@dataclass(frozen=True)
class KnownSentence:
    """A sentence with what it describes.

    Attributes:
        photo: row of the photo.
        text: the sentence.
        box: (4,) true box, xyxy in [0, 1].
        kind: as in `TrainExpression`.
    """

    photo: int
    text: str
    box: FloatArray
    kind: str


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
        photos: training photos.
        inputs: loads photos, given their rows in `photos`.
        sentences: loaded sentences of the photos, in their order.
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
                self.items.append((row, tuple(range(first, first + len(group)))))
                first += len(group)
        # All items count as equally wide, since photos are read as squares or not read at all.
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

    This is the choice of CMA (docs/weak-rec.md, section 5.1): a single sentence comes three times,
    and of two, the drawn one comes twice.
    """
    primary = int(rng.integers(len(rows)))
    order = [rows[primary], *(each for i, each in enumerate(rows) if i != primary)]
    return [order[i % len(order)] for i in range(num)]
