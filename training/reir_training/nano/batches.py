"""Builds training batches of `clare-nano`: photos, texts, and which candidates these describe."""

# Shapes: B photos, K candidates, M expressions, C captions

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from reir.datasets.coco_classes import COCO_CLASSES
from reir.datasets.generated_expressions import (
    AnnotatedInstance,
    central_color,
    generate_expressions,
)
from reir.datasets.wrong_words import wrong_sentences
from reir.images.boxes import pairwise_iou
from reir.models.nano.model import CandidateBatch
from reir.text import swap_left_right
from reir_training.config import NanoSchedule
from reir_training.data.examples import TrainPhoto
from reir_training.data.hard_negatives import beside_look_alikes
from reir_training.nano.cache import FrozenCache
from reir_training.run.schedule import check_fills_batch

NO_PHOTO = -1
MATCH_IOU = 0.5
# Stricter than a match: the color is taken from the candidate's crop, not from the annotated box.
COLOR_IOU = 0.6
EXPRESSIONS, CAPTIONS, WRONG_WORDS = 1, 2, 3
"""Parts of a seed that give a photo independent random choices of each kind of text."""


@dataclass(frozen=True)
class PhotoTargets:
    """The possible texts of a photo and their targets, computed once.

    Attributes:
        overlap: (K', N) IoU of its candidates with its annotated boxes.
        written: (text, box, weight across photos) of written expressions whose box overlaps a
            candidate.
        wrong: sentences with one wrong word for each of `written`.
        generated: (text, box) of generated expressions.
    """

    overlap: np.ndarray
    written: tuple[tuple[str, int, float], ...]
    wrong: tuple[tuple[str, ...], ...]
    generated: tuple[tuple[str, int], ...]


@dataclass
class NanoBatch:
    """The input of one step.

    Attributes:
        candidates: candidates of B photos, then of their mirror images.
        texts: M expressions, then C captions, then A sentences with one wrong word.
        owner: (M,) photo of each expression.
        overlap: (M, K) IoU of that photo's candidates with the described box.
        sided: (M,) whether the expression contains "left" or "right", so that it is wrong for the
            mirror image.
        cross_weight: (M,) weight in the losses across photos; 0 for expressions that are used only
            within their photo.
        caption_owner: (C,) photo of each caption; -1 for a near miss, which fits no photo.
        altered: (A,) expression from which each sentence with one wrong word was made.
        matched: (P, 2) photo and candidate index of candidates that match an annotated box.
        matched_boxes: (P, 4) xyxy of that box.
        matched_classes: (P,) class of that box, -1 if it is not one of COCO's.
        mirrored: whether the mirror images come first, and the photos are the second half.
    """

    candidates: CandidateBatch
    texts: list[str]
    owner: Tensor
    overlap: Tensor
    sided: Tensor
    cross_weight: Tensor
    caption_owner: Tensor
    altered: Tensor
    matched: Tensor
    matched_boxes: Tensor
    matched_classes: Tensor
    mirrored: bool = False

    @property
    def num_photos(self) -> int:
        """B, the number of photos without their mirror images."""
        return len(self.candidates.valid) // 2

    def to(self, device: torch.device | str) -> NanoBatch:
        """Return the batch on a device."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, candidates=self.candidates.to(device), **moved)


def match_photo(
    photo: TrainPhoto, cache: FrozenCache, row: int, short_weight: float
) -> PhotoTargets:
    """Match the annotations of a photo to its cached candidates."""
    overlap = pairwise_iou(cache.boxes(row), photo.boxes).astype(np.float32)
    best = overlap.max(axis=0, initial=0.0)
    # An expression that no candidate reaches has no right answer to rank first.
    written = [
        (e.text, e.box, short_weight if e.kind == "short" else 1.0)
        for e in photo.expressions
        if best[e.box] >= MATCH_IOU
    ]
    colors = cache.colors(row)
    annotated = []
    for i, (name, box) in enumerate(zip(photo.names, photo.boxes, strict=True)):
        clear = best[i] >= COLOR_IOU
        color = central_color(colors[overlap[:, i].argmax()]) if clear else ""
        annotated.append(AnnotatedInstance(name, tuple(box.tolist()), color))
    generated = [
        (text, i)
        for i, text in generate_expressions(annotated, photo.crowded)
        if best[i] >= MATCH_IOU and photo.names[i]
    ]
    shown = set(photo.names)
    wrong = tuple(
        tuple(each for _, each in wrong_sentences(text, photo.names[box], shown, COCO_CLASSES))
        for text, box, _ in written
    )
    return PhotoTargets(overlap, tuple(written), wrong, tuple(generated))


class BatchMaker:
    """Builds batches from photos and the cached output of the frozen part.

    Raises:
        ConfigError: there are fewer training photos than photos per batch.
    """

    def __init__(
        self, photos: Sequence[TrainPhoto], cache: FrozenCache, settings: NanoSchedule
    ) -> None:
        self._photos, self._cache, self._settings = photos, cache, settings
        self.targets = [
            match_photo(p, cache, row, settings.short_weight) for row, p in enumerate(photos)
        ]
        self.train_rows = [i for i, p in enumerate(photos) if p.split == "train"]
        check_fills_batch(settings, len(self.train_rows), "training photos")
        row_of = {str(photos[row].path): row for row in self.train_rows}
        self._look_alikes = {
            row: sorted(row_of[path] for path in photos[row].look_alikes if path in row_of)
            for row in self.train_rows
        }

    def epoch(self, epoch: int, rank: int, world_size: int) -> list[list[int]]:
        """Return the rows of this worker's batches in an epoch, which depend only on the seed.

        A photo shares its batch with one of its look-alikes, if it has any.
        """
        # Photos that do not fill a batch are left out; another epoch leaves out other photos.
        rng = np.random.default_rng([self._settings.seed, epoch])
        order = beside_look_alikes(rng.permutation(self.train_rows), self._look_alikes, rng)
        size = max(self._settings.photos_per_batch // world_size, 1)
        whole = len(order) // (size * world_size)
        share = order[: whole * size * world_size].reshape(whole, world_size, size)
        return [part.tolist() for part in share[:, rank]]

    def batch(self, rows: Sequence[int], seed: Sequence[int]) -> NanoBatch:
        """Build a batch of some photos with randomly chosen texts.

        In half of the batches, photos and mirror images are swapped, so that the model is trained
        on both.

        Args:
            rows: rows of the photos.
            seed: seed of the step. The texts of a photo depend only on the seed and the photo, not
                on the photos of other workers.
        """
        # This seed is the same on all workers, so that a step is the same for any number of them.
        mirrored = bool(np.random.default_rng(seed).random() < 0.5)
        candidates = self._cache.batch(rows)
        mirror_images = candidates.mirror()
        num_candidates = candidates.valid.shape[1]
        texts, owner, overlap, weight = self._expressions(rows, seed, num_candidates)
        captions, caption_owner = self._captions(rows, seed)
        wrong, altered = self._wrong_sentences(rows, seed)
        matched, boxes, classes = self._matches(rows)
        if mirrored:
            candidates, mirror_images = mirror_images, candidates
            boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
        texts = texts + captions + wrong
        return NanoBatch(
            candidates=candidates.followed_by(mirror_images),
            texts=[swap_left_right(t) for t in texts] if mirrored else texts,
            owner=torch.tensor(owner, dtype=torch.long),
            overlap=torch.from_numpy(overlap),
            sided=torch.tensor([swap_left_right(t) != t for t in texts[: len(owner)]]).bool(),
            cross_weight=torch.tensor(weight, dtype=torch.float32),
            caption_owner=torch.tensor(caption_owner, dtype=torch.long),
            altered=torch.tensor(altered, dtype=torch.long),
            matched=torch.from_numpy(matched),
            matched_boxes=torch.from_numpy(boxes),
            matched_classes=torch.from_numpy(classes),
            mirrored=mirrored,
        )

    def _expressions(
        self, rows: Sequence[int], seed: Sequence[int], num_candidates: int
    ) -> tuple[list[str], list[int], np.ndarray, list[float]]:
        """Choose the expressions: all written ones of each photo, and some generated ones."""
        texts: list[str] = []
        owner: list[int] = []
        weight: list[float] = []
        columns = []
        for i, row in enumerate(rows):
            found = self.targets[row]
            num = min(self._settings.generated_per_photo, len(found.generated))
            # The random stream depends on the photo, so that the choice is the same on any worker.
            rng = np.random.default_rng([*seed, EXPRESSIONS, row])
            drawn = rng.permutation(len(found.generated))[:num]
            # Generated expressions are unique only within their photo: their weight across photos
            # is 0.
            shown = [*found.written, *((*found.generated[j], 0.0) for j in drawn)]
            for text, box, cross in shown:
                texts.append(text)
                owner.append(i)
                weight.append(cross)
                # `found.overlap` lacks the padding of the batch, whose overlap is 0.
                column = np.zeros(num_candidates, dtype=np.float32)
                column[: len(found.overlap)] = found.overlap[:, box]
                columns.append(column)
        overlap = np.stack(columns) if columns else np.zeros((0, num_candidates), np.float32)
        return texts, owner, overlap, weight

    def _captions(self, rows: Sequence[int], seed: Sequence[int]) -> tuple[list[str], list[int]]:
        """Choose one caption per photo, and for some photos a near miss."""
        texts: list[str] = []
        owner: list[int] = []
        for i, row in enumerate(rows):
            photo, rng = self._photos[row], np.random.default_rng([*seed, CAPTIONS, row])
            if photo.captions:
                texts.append(photo.captions[rng.integers(len(photo.captions))])
                owner.append(i)
            if photo.near_misses and rng.random() < 0.5:
                texts.append(photo.near_misses[rng.integers(len(photo.near_misses))])
                owner.append(NO_PHOTO)
        return texts, owner

    def _wrong_sentences(
        self, rows: Sequence[int], seed: Sequence[int]
    ) -> tuple[list[str], list[int]]:
        """Choose sentences with a wrong word for each written expression that has any."""
        texts: list[str] = []
        altered: list[int] = []
        first = 0
        for row in rows:
            found = self.targets[row]
            rng = np.random.default_rng([*seed, WRONG_WORDS, row])
            for i, sentences in enumerate(found.wrong):
                chosen = rng.permutation(len(sentences))[: self._settings.wrong_per_expression]
                texts += [sentences[j] for j in chosen]
                altered += [first + i] * len(chosen)
            # The generated expressions of a photo follow its written ones.
            drawn = min(self._settings.generated_per_photo, len(found.generated))
            first += len(found.written) + drawn
        return texts, altered

    def _matches(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find the candidates that match an annotated box, with that box and its class."""
        pairs, boxes, classes = [], [], []
        for i, row in enumerate(rows):
            overlap, photo = self.targets[row].overlap, self._photos[row]
            if not overlap.size:
                continue
            best = overlap.argmax(axis=1)
            fits = np.flatnonzero(overlap.max(axis=1) >= MATCH_IOU)
            pairs.append(np.stack([np.full(len(fits), i), fits], axis=1))
            boxes.append(photo.boxes[best[fits]])
            classes.append(photo.categories[best[fits]])
        if not pairs:
            return np.zeros((0, 2), np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        return np.concatenate(pairs), np.concatenate(boxes), np.concatenate(classes)
