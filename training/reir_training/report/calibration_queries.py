"""The expressions that a calibration is fitted on."""

# Shapes: M expressions

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from reir.datasets.dataset import Expression, ReferringDataset
from reir.evaluate.encoded_gallery import image_positions, queries_of
from reir.metrics import Queries
from reir.models.interfaces import InstanceEncoder

SHORT = "short"
"""Kind of expressions that are unique in their photo only, such as "the left dog"."""


@dataclass(frozen=True)
class CalibrationQueries(Queries):
    """Queries whose presence or absence in other photos is known.

    Attributes:
        texts: M expressions.
        alike: M sets of photos that may show what the expression describes; each has its own photo.
    """

    texts: tuple[str, ...]
    alike: tuple[frozenset[int], ...]


def calibration_queries(
    encoder: InstanceEncoder, dataset: ReferringDataset, expressions: Sequence[Expression]
) -> CalibrationQueries:
    """Encode expressions, and find the photos that each of them may describe as well.

    An expression of the kind `SHORT` may describe an instance of the same class in any photo; every
    other expression is taken to describe one instance of all photos.

    Raises:
        DataError: there are no expressions.
    """
    queries = queries_of(encoder, dataset, expressions)
    photos_with: dict[str | None, set[int]] = defaultdict(set)
    places = image_positions(dataset, [each.image_id for each in dataset.instances])
    for instance, place in zip(dataset.instances, places.tolist(), strict=True):
        photos_with[instance.category].add(place)
    alike = [
        frozenset(photos_with[dataset.instances_by_id[str(each.instance_id)].category] | {own})
        if each.kind == SHORT
        else frozenset({own})
        for each, own in zip(expressions, queries.images.tolist(), strict=True)
    ]
    return CalibrationQueries(
        *(queries.vectors, queries.images, queries.boxes_px),
        texts=tuple(each.text for each in expressions),
        alike=tuple(alike),
    )
