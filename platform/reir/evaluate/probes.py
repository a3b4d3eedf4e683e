"""Probes of understanding: does the model prefer a sentence to the same one with a wrong word?

For an expression about an instance, a probe replaces one word, so that the sentence becomes wrong:
"the *red* bus" becomes "the *blue* bus". The model passes if the described instance has a higher
score with the right sentence: guessing passes half of the probes, equal scores pass none. The
photos and boxes play no other role, so a probe shows what the two streams understand and not what
the detector finds. The idea is that of SugarCrepe (Hsieh et al. 2023), applied to instances.
"""

# Shapes: N probes, D vector dimension

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reir.datasets import Expression, ReferringDataset
from reir.datasets.wrong_words import KINDS, wrong_sentences
from reir.errors import DataError
from reir.evaluate.encoded_gallery import (
    Encoding,
    encode_expressions,
    encode_gallery,
    queries_of,
)
from reir.evaluate.reports import (
    EvaluationInfo,
    Figures,
    cell,
    evaluation_info,
    figure_table,
    intervals,
    means,
    ranges,
    with_notes,
)
from reir.images.boxes import elementwise_iou
from reir.metrics import Gallery, Queries
from reir.metrics.reir import Ints
from reir.models.interfaces import InstanceEncoder

if TYPE_CHECKING:
    from rich.console import RenderableType

MATCH_IOU = 0.5
"""An instance is the described one if its box overlaps the true box at least so much."""

CHANCE = "Guessing passes 50 %; equal scores for both sentences pass none."


@dataclass(frozen=True)
class Probe:
    """One probe.

    Attributes:
        name: one of `wrong_words.KINDS`.
        expression: the right expression.
        altered: its text with a wrong word.
    """

    name: str
    expression: Expression
    altered: str


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """The figures of one evaluation.

    Attributes:
        accuracy: probe -> share of passed probes in percent, with a 95 % bootstrap interval.
        counts: probe -> number of probes.
        info: the data, encoder and settings of the evaluation.
    """

    accuracy: Figures
    counts: Mapping[str, int]
    info: EvaluationInfo

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "accuracy": means(self.accuracy),
            "intervals": ranges(self.accuracy),
            "probes": dict(self.counts),
            **self.info.to_dict(),
        }

    def table(self) -> RenderableType:
        """Return the figures as a table for the terminal."""
        table = figure_table("Probes of understanding", ["probes", "passed"])
        for name, accuracy in self.accuracy.items():
            table.add_row(name, f"{self.counts[name]:,}", cell(accuracy))
        return with_notes([table], [CHANCE, *self.info.notes()])


def evaluate_probes(
    encoder: InstanceEncoder,
    dataset: ReferringDataset,
    images_dir: str | Path,
    *,
    how: Encoding | None = None,
) -> ProbeReport:
    """Encode photos, and compare each expression with sentences that have one wrong word.

    Expressions whose instance the encoder did not keep are left out, and counted.

    Args:
        encoder: the model.
        dataset: photos, boxes with classes, and expressions.
        images_dir: folder of the photos.
        how: how the photos are encoded.

    Raises:
        DataError: there is no expression with a word that a probe replaces, or photos are missing
            from `images_dir`.
    """
    probes = list(find_probes(dataset))
    if not probes:
        raise DataError(
            f"{dataset.source}: no expression has a word that a probe replaces, such as a color or "
            f"a side"
        )
    # Other photos need not be encoded: a probe compares two sentences on one and the same instance.
    photos = dataset.of_images({each.expression.image_id for each in probes})
    queries = queries_of(encoder, photos, [each.expression for each in probes])
    gallery = encode_gallery(encoder, photos, images_dir, how=how)
    target_N = described_rows(queries, gallery.arrays)
    rows = np.flatnonzero(target_N >= 0)
    altered_ND = encode_expressions(encoder, [probes[row].altered for row in rows])
    instances_ND = gallery.arrays.vectors[target_N[rows]]
    right_N = (queries.vectors[rows] * instances_ND).sum(1)
    # Equal scores are failures, so a model with constant vectors passes nothing.
    passed_N = right_N > (altered_ND * instances_ND).sum(1)
    names_N = np.array([probes[row].name for row in rows])
    images_N = queries.images[rows]
    of_probe = {name: names_N == name for name in KINDS if (names_N == name).any()}
    return ProbeReport(
        accuracy={
            name: intervals({name: passed_N[chosen]}, images_N[chosen])[name]
            for name, chosen in of_probe.items()
        },
        counts={name: int(chosen.sum()) for name, chosen in of_probe.items()},
        info=evaluation_info(
            encoder,
            gallery,
            counts={"probes": len(rows), "instances not kept": len(probes) - len(rows)},
            settings={"match_iou": MATCH_IOU},
            left_out=_left_out({each.name for each in probes}, of_probe.keys()),
        ),
    )


def _left_out(found: Set[str], used: Set[str]) -> dict[str, str]:
    """Return why the probes that were not `used` were left out; `found` are in the data."""
    return {
        f"probe of {name}": "the encoder kept none of its instances"
        if name in found
        else "no expression has a word that it replaces"
        for name in KINDS
        if name not in used
    }


def find_probes(dataset: ReferringDataset) -> Iterator[Probe]:
    """Yield the probes of all expressions; at most one of each name for an expression."""
    # Sorted, because `wrong_sentences` chooses by position, and the order of a set of strings
    # differs between processes.
    classes = sorted({each.category for each in dataset.instances if each.category})
    shown: dict[str, set[str]] = {photo.image_id: set() for photo in dataset.images}
    for instance in dataset.instances:
        if instance.category:
            shown[instance.image_id].add(instance.category)
    for expression in dataset.with_targets().expressions:
        category = dataset.instances_by_id[str(expression.instance_id)].category or ""
        for name, sentence in wrong_sentences(
            expression.text, category, shown[expression.image_id], classes
        ):
            yield Probe(name, expression, sentence)


def described_rows(queries: Queries, gallery: Gallery) -> Ints:
    """Return the (N,) gallery row of each described instance; -1 if it is not in the gallery."""
    rows_of = {image: np.flatnonzero(gallery.images == image) for image in set(queries.images)}
    found = np.full(len(queries), -1, dtype=np.int64)
    for number, (image, box) in enumerate(zip(queries.images, queries.boxes_px, strict=True)):
        rows = rows_of[image]
        overlap = elementwise_iou(gallery.boxes_px[rows], box)
        if len(rows) and overlap.max() >= MATCH_IOU:
            found[number] = rows[overlap.argmax()]
    return found
