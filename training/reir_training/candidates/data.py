"""The expressions of a run with the candidates of their photos, as a candidate head sees them."""

# Shapes: M expressions of a step, K candidates of a photo, C classes, S width of the text tower,
#         P features of a place

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from reir.checkpoint import load_model, weights_digest
from reir.models.nano.candidate_head import places_of
from reir.models.nano.encoder import ClareNanoEncoder
from reir.text import swap_left_right
from reir_training.data.examples import VAL, TrainPhoto
from reir_training.nano.batches import MATCH_IOU, match_photo
from reir_training.nano.cache import FrozenCache
from reir_training.rerank.data import TextTable

GENERATED = "generated"


@dataclass(frozen=True)
class CandidateExample:
    """An expression that describes a candidate of a photo.

    Attributes:
        text: of the expression.
        photo: row of the photo.
        kind: "long", "short" or "generated".
        right: (K,) whether each candidate is what the expression describes.
        category: class of the described instance; -1 if it is not one of COCO's.
    """

    text: str
    photo: int
    kind: str
    right: Tensor
    category: int


@dataclass
class CandidateExampleBatch:
    """The input of one step.

    Attributes:
        texts: (M, S) means over the token states of the expressions.
        classes: (M, K, C) class scores of the candidates.
        places: (M, K, P), see `places_of`.
        valid: (M, K) False for padding.
        right: (M, K) whether each candidate is what the expression describes.
        categories: (M,) see `CandidateExample`.
    """

    texts: Tensor
    classes: Tensor
    places: Tensor
    valid: Tensor
    right: Tensor
    categories: Tensor

    def __len__(self) -> int:
        """Return M."""
        return len(self.texts)

    def to(self, device: torch.device | str) -> CandidateExampleBatch:
        """Return the batch on a device."""
        return CandidateExampleBatch(**{k: v.to(device) for k, v in vars(self).items()})


class CandidateExamples:
    """All expressions of some photos that describe a candidate.

    Args:
        photos: in the order of `cache`.
        cache: output of the frozen part for these photos.
        init: checkpoint directory of the model.
        root: folder for the encoded texts; what is missing is computed.
        generated_per_photo: maximum number of generated expressions of a training photo.
        seed: chooses them.

    Attributes:
        examples: one for each expression.
    """

    def __init__(  # noqa: PLR0913 - two of them are settings
        self,
        photos: Sequence[TrainPhoto],
        cache: FrozenCache,
        init: Path,
        root: Path,
        *,
        generated_per_photo: int,
        seed: int,
    ) -> None:
        self.examples = [
            example
            for row, photo in enumerate(photos)
            # Held-out photos get no generated ones: `validate` counts written expressions only.
            for example in _examples(
                photo, cache, row, 0 if photo.split == VAL else generated_per_photo, seed
            )
        ]
        texts = [each.text for each in self.examples]
        swapped = [swap_left_right(each) for each in texts]
        table = {text: row for row, text in enumerate(dict.fromkeys([*texts, *swapped]))}
        digest = weights_digest(init)
        # The order of the texts counts, too, because `TextTable` knows them by their rows only.
        name = hashlib.sha256("\n".join([digest, *table]).encode()).hexdigest()[:16]
        folder = root / f"candidate-texts-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        encoder = ClareNanoEncoder(*load_model(init), digest)
        self._table = TextTable(folder, encoder, list(table))
        self._rows = [(table[a], table[b]) for a, b in zip(texts, swapped, strict=True)]
        self._photos = {each.photo: _candidates(cache, each.photo) for each in self.examples}

    def rows(self, photos: Sequence[TrainPhoto], *, held_out: bool) -> list[int]:
        """Return the examples of the held-out photos, or those of all others."""
        return [
            row
            for row, each in enumerate(self.examples)
            if (photos[each.photo].split == VAL) == held_out
        ]

    def batch(
        self, rows: Sequence[int], rng: np.random.Generator | None = None
    ) -> CandidateExampleBatch:
        """Return some examples; with `rng`, half of them with mirrored photos."""
        mirrored = np.zeros(len(rows), bool) if rng is None else rng.random(len(rows)) < 0.5
        examples = [self.examples[row] for row in rows]
        seen = [self._photos[each.photo] for each in examples]
        places = [
            each.mirrored if flip else each.places
            for each, flip in zip(seen, mirrored, strict=True)
        ]
        texts = [
            self._table[self._rows[row][int(flip)]].states.mean(axis=0)
            for row, flip in zip(rows, mirrored, strict=True)
        ]
        return CandidateExampleBatch(
            texts=torch.from_numpy(np.stack(texts)),
            classes=_padded([each.classes for each in seen]),
            places=_padded(places),
            valid=_padded([torch.ones(len(each.classes), dtype=torch.bool) for each in seen]),
            right=_padded([each.right for each in examples]),
            categories=torch.tensor([each.category for each in examples]),
        )


@dataclass(frozen=True)
class _PhotoCandidates:
    """(K, C) class scores of the candidates of a photo, and (K, P) places, also mirrored."""

    classes: Tensor
    places: Tensor
    mirrored: Tensor


def _candidates(cache: FrozenCache, row: int) -> _PhotoCandidates:
    boxes, classes = (torch.from_numpy(each) for each in (cache.boxes(row), cache.classes(row)))
    x1, y1, x2, y2 = boxes.unbind(1)
    flipped = torch.stack([1 - x2, y1, 1 - x1, y2], dim=1)
    return _PhotoCandidates(classes, places_of(boxes, classes), places_of(flipped, classes))


def _examples(
    photo: TrainPhoto, cache: FrozenCache, row: int, num_generated: int, seed: int
) -> list[CandidateExample]:
    """Return the expressions of a photo that describe a candidate, and some generated ones."""
    # `PhotoTargets` has no kinds, but with this weight, only long expressions have the weight 1.
    found = match_photo(photo, cache, row, short_weight=0.0)
    texts = [(text, box, "long" if weight else "short") for text, box, weight in found.written]
    # Every worker makes this list itself, and all of them must choose the same expressions.
    order = np.random.default_rng([seed, row]).permutation(len(found.generated))
    texts += [(*found.generated[i], GENERATED) for i in order[:num_generated]]
    return [
        CandidateExample(
            text=text,
            photo=row,
            kind=kind,
            right=torch.from_numpy(found.overlap[:, box] >= MATCH_IOU),
            category=int(photo.categories[box]),
        )
        for text, box, kind in texts
    ]


def _padded(parts: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
