"""Counts of a finished dataset: photos, refusals, lengths, words, classes and sizes of boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reir.text import normalize_expression
from reir_ingestion.build_dataset.outcomes import Outcome, Status
from reir_ingestion.build_dataset.output import VAL

NUM_WORDS, NUM_CLASSES = 40, 40
# Upper limits and names. No share reaches the last limit, so that every area has a name.
SIZES = ((0.01, "below 1 %"), (0.04, "1 to 4 %"), (0.16, "4 to 16 %"), (9.0, "16 % and more"))


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """The counts of a dataset; mappings are in the order in which they are shown.

    Attributes:
        photos: status -> photos.
        photo_reasons: why photos were refused or failed -> photos.
        val_photos: photos of the split "val" with expressions.
        instances, described: instances to describe, and those with an expression.
        expressions: expressions that were kept.
        not_kept: why expressions were not kept -> expressions.
        writer_refusals: why the writer wrote nothing about an instance -> instances.
        lengths: number of words -> expressions.
        words: the most frequent words -> expressions.
        classes: the most frequent classes -> expressions.
        sizes: area of the box as a share of the photo -> described instances.
    """

    photos: Mapping[str, int]
    photo_reasons: Mapping[str, int]
    val_photos: int
    instances: int
    described: int
    expressions: int
    not_kept: Mapping[str, int]
    writer_refusals: Mapping[str, int]
    lengths: Mapping[str, int]
    words: Mapping[str, int]
    classes: Mapping[str, int]
    sizes: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def statistics_of(outcomes: Sequence[Outcome], splits: Sequence[str]) -> Statistics:
    """Count what became of all photos."""
    statuses = Counter(each.status for each in outcomes)
    kept = [(outcome, each) for outcome in outcomes for each in outcome.kept]
    described = {(o.task.scene.photo.file_name, e.number): o for o, e in kept}
    words = [normalize_expression(each.text).split() for _, each in kept]
    return Statistics(
        photos={status.value: statuses[status] for status in Status},
        photo_reasons=_most(_kind(each.reason) for each in outcomes if each.reason),
        val_photos=sum(
            each.status is Status.WRITTEN and split == VAL
            for each, split in zip(outcomes, splits, strict=True)
        ),
        instances=sum(len(each.task.numbers) for each in outcomes),
        described=len(described),
        expressions=len(kept),
        not_kept=_most(
            _kind(each.reason) for o in outcomes for each in o.expressions if each.reason
        ),
        writer_refusals=_most(_kind(reason) for o in outcomes for _, reason in o.refused),
        lengths={str(n): count for n, count in sorted(Counter(map(len, words)).items())},
        words=_most((word for text in words for word in set(text)), NUM_WORDS),
        classes=_most((o.task.instance(e.number).category for o, e in kept), NUM_CLASSES),
        sizes=_sizes(
            o.task.instance(number).annotated.area for (_, number), o in described.items()
        ),
    )


def _kind(reason: str) -> str:
    """Return the kind of a reason, without its details: what stands before the first colon."""
    return reason.partition(":")[0]


def _most(names: Iterable[str], num: int | None = None) -> dict[str, int]:
    return dict(Counter(names).most_common(num))


def _sizes(areas: Iterable[float]) -> dict[str, int]:
    counts = dict.fromkeys((name for _, name in SIZES), 0)
    for area in areas:
        counts[next(name for limit, name in SIZES if area < limit)] += 1
    return counts
