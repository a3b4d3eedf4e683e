"""The built-in gallery: real photos, and sentences whose answers are known.

`reir demo` searches it, and `reir finetune` measures on it what a model has forgotten. The photos
are free to use (`photos/ATTRIBUTION.md`) and were never used in training. Most sentences describe
one object, whose box is known; the others describe something that no photo shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reir.datasets.dataset import (
    Expression,
    ReferringDataset,
    ReferringImage,
    ReferringInstance,
)
from reir.images.boxes import elementwise_iou
from reir.images.decode import read_bytes, upright_size
from reir.records import Box
from reir.results import Hit, SearchResult

PHOTOS = Path(__file__).parent / "photos"
MIN_IOU = 0.5
"""A hit is right if its box overlaps the true one at least so much."""


@dataclass(frozen=True)
class DemoSentence:
    """A sentence and its answer.

    Attributes:
        text: the sentence.
        photo: file name of the photo that shows the object; None if no photo does.
        box: xyxy in [0, 1] of the object; None if no photo shows it.
    """

    text: str
    photo: str | None = None
    box: Box | None = None

    @property
    def is_absent(self) -> bool:
        """Whether no photo shows what the sentence describes."""
        return self.photo is None

    def is_answer(self, hit: Hit) -> bool:
        """Return whether a hit is the described object."""
        if self.box is None or Path(hit.uri).name != self.photo:
            return False
        return float(elementwise_iou([hit.box], [self.box])[0]) >= MIN_IOU

    def rank_in(self, result: SearchResult) -> int | None:
        """Return the rank of the described object among the hits, from 1; None if it is missing."""
        for rank, hit in enumerate(result, 1):
            if self.is_answer(hit):
                return rank
        return None


def demo_sentences() -> tuple[DemoSentence, ...]:
    """Return all sentences; those about objects that no photo shows come last."""
    found = json.loads((PHOTOS / "sentences.json").read_text(encoding="utf-8"))
    return tuple(
        DemoSentence(each["sentence"], each["photo"], tuple(each["box"]))
        if "photo" in each
        else DemoSentence(each["sentence"])
        for each in found
    )


def demo_dataset() -> ReferringDataset:
    """Return the photos, and the sentences about something present with their boxes."""
    sizes = {path.name: upright_size(read_bytes(path)) for path in sorted(PHOTOS.glob("*.jpg"))}
    images = tuple(
        ReferringImage(image_id=name, file_name=name, width_px=size[0], height_px=size[1])
        for name, size in sizes.items()
    )
    instances, expressions = [], []
    for number, each in enumerate(demo_sentences()):
        if each.photo is None or each.box is None:
            continue
        width, height = sizes[each.photo]
        x1, y1, x2, y2 = each.box
        box_px = (x1 * width, y1 * height, x2 * width, y2 * height)
        key = str(number)
        instances.append(
            ReferringInstance(instance_id=key, image_id=each.photo, box_xyxy_px=box_px)
        )
        expressions.append(
            Expression(expression_id=key, image_id=each.photo, instance_id=key, text=each.text)
        )
    return ReferringDataset(
        source="the built-in gallery",
        images=images,
        instances=tuple(instances),
        expressions=tuple(expressions),
    )


@dataclass(frozen=True)
class DemoScore:
    """How well a gallery answers the sentences.

    Attributes:
        top1, top5: share of the sentences about something present whose first hit, or one of whose
            first five hits, is right.
        absent: share of the sentences about something absent that are recognized as such.
        false_absent: share of the sentences about something present that are taken for absent.
    """

    top1: float
    top5: float
    absent: float
    false_absent: float


def score_demo(sentences: Sequence[DemoSentence], results: Sequence[SearchResult]) -> DemoScore:
    """Score the results of all sentences, each with at least five hits."""
    pairs = list(zip(sentences, results, strict=True))
    present = [(each, result) for each, result in pairs if not each.is_absent]
    absent = [result for each, result in pairs if each.is_absent]
    ranks = [each.rank_in(result) for each, result in present]
    return DemoScore(
        top1=sum(rank == 1 for rank in ranks) / len(present),
        top5=sum(rank is not None and rank <= 5 for rank in ranks) / len(present),
        absent=sum(not result.found for result in absent) / len(absent),
        false_absent=sum(not result.found for _, result in present) / len(present),
    )
