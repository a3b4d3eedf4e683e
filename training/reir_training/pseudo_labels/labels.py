"""Gives the sentences of a data set their boxes, and counts those that get none."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from reir.datasets.dataset import Expression, ReferringDataset, ReferringImage, ReferringInstance
from reir.errors import ImageError
from reir.images.decode import read_image
from reir.records import Box
from reir_training.pseudo_labels.agreement import AgreementFilter, FoundLabel, Refusal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PseudoLabels:
    """A data set whose sentences all have boxes, and how it came about.

    Attributes:
        dataset: all photos, and the sentences with a box; those that a model found have a score.
        num_sentences: number of sentences before.
        num_drawn: number of sentences that had a box already, and kept it.
        refused: why sentences were left out -> how many.
    """

    dataset: ReferringDataset
    num_sentences: int
    num_drawn: int
    refused: Mapping[Refusal, int]

    @property
    def num_kept(self) -> int:
        """Number of sentences with a box."""
        return len(self.dataset.expressions)

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values."""
        return {
            "sentences": self.num_sentences,
            "kept": self.num_kept,
            "drawn": self.num_drawn,
            "refused": {str(reason): self.refused.get(reason, 0) for reason in Refusal},
        }


def label_sentences(
    dataset: ReferringDataset,
    images_dir: Path,
    agreement: AgreementFilter,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> PseudoLabels:
    """Find the box of every sentence that has none.

    A photo that cannot be decoded is logged, and its sentences are left out.

    Args:
        dataset: photos and sentences.
        images_dir: folder of the photos.
        agreement: finds the boxes.
        on_progress: called with the number of finished photos and of all photos.
    """
    instances = {each.instance_id: each for each in dataset.instances}
    expressions: dict[str, Expression] = {
        each.expression_id: each for each in dataset.with_targets().expressions
    }
    num_drawn = len(expressions)
    refused: Counter[Refusal] = Counter()
    waiting: dict[str, list[Expression]] = defaultdict(list)
    for text in dataset.expressions:
        if text.instance_id is None:
            waiting[text.image_id].append(text)
    for done, image in enumerate(dataset.images, start=1):
        texts = waiting[image.image_id]
        found = _labels_of(images_dir / image.file_name, texts, agreement)
        for text, label in zip(texts, found, strict=True):
            if isinstance(label, Refusal):
                refused[label] += 1
                continue
            # An instance for each sentence, since nothing says which sentences mean the same one.
            instance = _instance(image, text, label)
            instances[instance.instance_id] = instance
            expressions[text.expression_id] = replace(text, instance_id=instance.instance_id)
        on_progress(done, len(dataset.images))
    ordered = (each.expression_id for each in dataset.expressions)
    return PseudoLabels(
        dataset=replace(
            dataset,
            instances=tuple(instances.values()),
            expressions=tuple(expressions[each] for each in ordered if each in expressions),
        ),
        num_sentences=len(dataset.expressions),
        num_drawn=num_drawn,
        refused=refused,
    )


def _labels_of(
    path: Path, texts: list[Expression], agreement: AgreementFilter
) -> list[FoundLabel | Refusal]:
    if not texts:
        return []
    try:
        photo = read_image(path)
    except ImageError as error:
        logger.warning("%s: cannot be decoded (%s); its sentences are left out", path, error)
        return [Refusal.UNREADABLE] * len(texts)
    return agreement.labels(photo, [text.text for text in texts])


def _instance(image: ReferringImage, text: Expression, label: FoundLabel) -> ReferringInstance:
    return ReferringInstance(
        instance_id=f"found-{text.expression_id}",
        image_id=image.image_id,
        box_xyxy_px=_in_pixels(label.box, image),
        score=label.score,
    )


def _in_pixels(box: Box, image: ReferringImage) -> tuple[float, float, float, float]:
    """Return a box in [0, 1] in pixels of the annotated size of a photo."""
    width, height = image.width_px, image.height_px
    x1, y1, x2, y2 = box
    return x1 * width, y1 * height, x2 * width, y2 * height
