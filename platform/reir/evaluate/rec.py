"""Evaluation of referring expression comprehension (REC): find the described box in a given photo.

Two answers are measured:

* *Query-free*: the best of the instances that an index stores for the photo. These were chosen
  without any expression.
* *By expression*: the best of all candidates of the encoder, which is how published models answer
  (docs/clare.md, section 6). Since the photo is given with the expression, this is no leak, but it
  needs the photo at query time. Non-maximum suppression does not change this answer, because it
  never removes the best instance.

A localizer has only the second answer.
"""

# Shapes: M expressions, P photos

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reir.datasets import Expression, ReferringDataset
from reir.errors import DataError
from reir.evaluate.encoded_gallery import (
    Encoding,
    Targets,
    choosing_expressions,
    encode_gallery,
    queries_of,
)
from reir.evaluate.localized_expressions import localize_expressions
from reir.evaluate.published import PublishedTable, rec_split, rec_table, weak_rec_table
from reir.evaluate.reports import (
    NO_CHOICE,
    EvaluationInfo,
    Figures,
    cell,
    comparison,
    evaluation_info,
    figure_table,
    intervals,
    localizer_info,
    means,
    percent,
    ranges,
    with_notes,
)
from reir.metrics import Gallery, Queries, rec_hits, top_instances
from reir.metrics.reir import Floats
from reir.models.interfaces import ExpressionLocalizer, InstanceEncoder

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

IOU_THRESHOLDS = (0.5, 0.7, 0.9)
# Figures on photos that models are trained on would be meaningless.
TRAIN = "train"
NO_SPLIT = "no evaluated split is a whole published split"
CHOICES = {
    "Query-free: candidates chosen without the expression, as in an index": "query_free",
    "By expression: candidates chosen with the expression, which an index cannot do": (
        "by_expression"
    ),
}
"""Title of a table -> name of its figures."""
HEADERS = {"p50": "P@.5", "p70": "P@.7", "p90": "P@.9", "mean_iou": "mean IoU"}


@dataclass(frozen=True, kw_only=True)
class RecSplit:
    """The figures of one split, in percent, with 95 % bootstrap intervals.

    Attributes:
        name: name of the split, followed by the kind of expressions if the split has several.
        published_as: name of the split in published tables; empty if it is not published.
        num_photos: number of photos with expressions.
        num_expressions: number of expressions that describe an instance.
        query_free: `p50`, `p70`, `p90`, `mean_iou` of the best instance that an index stores; None
            for a localizer.
        by_expression: the same figures for the best of all candidates; None if the model is an
            encoder that is no `ExpressionChooser`.
    """

    name: str
    published_as: str
    num_photos: int
    num_expressions: int
    query_free: Figures | None
    by_expression: Figures | None


@dataclass(frozen=True, kw_only=True)
class RecReport:
    """The figures of one evaluation.

    Attributes:
        splits: the evaluated splits, in the order of the data set or of the request.
        published: published figures of other systems on these splits; None if there are none.
        published_weak: the same, of systems that were trained without boxes.
        info: the data, model and settings of the evaluation.
    """

    splits: tuple[RecSplit, ...]
    published: PublishedTable | None
    published_weak: PublishedTable | None
    info: EvaluationInfo

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        weak = self.published_weak
        return {
            "splits": {split.name: _split_dict(split) for split in self.splits},
            "published": self.published.to_dict() if self.published else None,
            "published_weak": weak.to_dict() if weak else None,
            **self.info.to_dict(),
        }

    def table(self) -> RenderableType:
        """Return the figures as tables for the terminal."""
        parts: list[RenderableType] = []
        for title, choice in CHOICES.items():
            if all(getattr(split, choice) for split in self.splits):
                parts += [*([""] if parts else []), self._table(title, choice)]
        for published in (self.published, self.published_weak):
            if published:
                parts += ["", *comparison(published, _headers(published), self._rows())]
        return with_notes(parts, self.info.notes())

    def _table(self, title: str, choice: str) -> Table:
        table = figure_table(title, ["queries", *HEADERS.values()])
        for split in self.splits:
            figures: Figures = getattr(split, choice)
            cells = (cell(figures[name]) for name in HEADERS)
            table.add_row(split.name, f"{split.num_expressions:,}", *cells)
        return table

    def _rows(self) -> dict[str, dict[str, float]]:
        rows: dict[str, dict[str, float]] = {"query-free": {}, "by expression": {}}
        for split in self.splits:
            if split.published_as:
                if split.query_free:
                    rows["query-free"][split.published_as] = split.query_free["p50"].mean
                if split.by_expression:
                    rows["by expression"][split.published_as] = split.by_expression["p50"].mean
        return {name: figures for name, figures in rows.items() if figures}


def evaluate_rec(  # noqa: PLR0913, all but the three parts are by name
    encoder: InstanceEncoder,
    dataset: ReferringDataset,
    images_dir: str | Path,
    *,
    splits: Sequence[str] = (),
    max_photos: int | None = None,
    how: Encoding | None = None,
) -> RecReport:
    """Encode the photos of some splits once, and find each expression's box in its photo.

    Every expression that describes an instance is a query. If there are several kinds of them
    ("long", "short"), each kind is reported separately.

    Args:
        encoder: the model; figures by expression need an `ExpressionChooser`.
        dataset: data set with or without splits.
        images_dir: folder of the photos.
        splits: names of the splits to evaluate; empty for all but "train", or for a data set
            without splits.
        max_photos: use only so many photos of each split; None for all.
        how: how the photos are encoded.

    Raises:
        DataError: there is no such split, none is given and there is only "train", a split has no
            expression about an instance, or photos are missing from `images_dir`.
    """
    groups = _groups(dataset, splits, max_photos)
    # Group after group: `_splits` tells the rows of a group by their position alone.
    expressions = [text for texts in groups.values() for text in texts]
    # Photos without expressions are not asked about, so they need not be encoded.
    photos = dataset.of_images({text.image_id for text in expressions})
    queries = queries_of(encoder, photos, expressions)
    targets = Targets(queries.images, queries.boxes_px)
    # Only the best instance of a photo matters here, so each expression keeps a single one.
    choosers = choosing_expressions(
        encoder, queries, [text.text for text in expressions], num_kept=1
    )
    gallery = encode_gallery(encoder, photos, images_dir, choosers=choosers, how=how)
    boxes_px = _top_boxes_px(queries, gallery.arrays)
    own_boxes_px = None
    if choosers:
        own_boxes_px = np.full_like(boxes_px, np.nan)
        # In other turns, the photo shows what another of its expressions chose.
        for of_turn, shown in gallery.turns():
            own_boxes_px[of_turn] = _top_boxes_px(queries[of_turn], shown)
    found = _splits(groups, targets, boxes_px, own_boxes_px)
    info = evaluation_info(
        encoder,
        gallery,
        counts={"expressions": len(queries)},
        settings={},
        left_out={
            **({} if choosers else {"choice by expression": NO_CHOICE}),
            **_without_published(found),
        },
    )
    return _report(found, info)


def evaluate_rec_localizer(  # noqa: PLR0913, all but the three parts are by name
    localizer: ExpressionLocalizer,
    dataset: ReferringDataset,
    images_dir: str | Path,
    *,
    splits: Sequence[str] = (),
    max_photos: int | None = None,
    how: Encoding | None = None,
) -> RecReport:
    """Let a localizer find each expression's box in its photo; see `evaluate_rec`.

    Args:
        localizer: the model.
        dataset, images_dir, splits, max_photos: as for `evaluate_rec`.
        how: see `localize_expressions`.

    Raises:
        DataError: as `evaluate_rec`.
    """
    groups = _groups(dataset, splits, max_photos)
    expressions = [text for texts in groups.values() for text in texts]
    found = localize_expressions(localizer, dataset, images_dir, expressions, num_boxes=1, how=how)
    measured = _splits(groups, found.targets, None, found.boxes_px[:, 0])
    return _report(measured, localizer_info(localizer, found, _without_published(measured)))


def _report(splits: tuple[RecSplit, ...], info: EvaluationInfo) -> RecReport:
    """Add what is published on these splits."""
    names = [split.published_as for split in splits]
    return RecReport(
        splits=splits,
        published=rec_table(names),
        published_weak=weak_rec_table(names),
        info=info,
    )


def _without_published(splits: Sequence[RecSplit]) -> dict[str, str]:
    """Return why there are no published figures; empty if there are some."""
    is_published = any(split.published_as for split in splits)
    return {} if is_published else {"published figures": NO_SPLIT}


def _groups(
    dataset: ReferringDataset, splits: Sequence[str], max_photos: int | None
) -> dict[str, list[Expression]]:
    """Map the name of each split (and of the kind, if there are several) to its expressions."""
    names = splits or [name for name in dataset.splits if name != TRAIN]
    if dataset.splits and not names:
        raise DataError(
            f"{dataset.source} has no other split than {TRAIN!r}, on which models may have been "
            f"trained; give {TRAIN!r} as the split to evaluate it all the same"
        )
    parts = {name: dataset.split(name) for name in names}
    groups: dict[str, list[Expression]] = defaultdict(list)
    for name, part in (parts or {Path(dataset.source).stem: dataset}).items():
        texts = part.first_images(max_photos).with_targets().expressions
        if not texts:
            raise DataError(
                f"{part.source}: none of {len(part.expressions)} expressions describes an instance"
            )
        kinds = {text.kind for text in texts}
        for text in texts:
            groups[f"{name} {text.kind}" if len(kinds) > 1 else name].append(text)
    return dict(groups)


def _top_boxes_px(queries: Queries, gallery: Gallery) -> Floats:
    """Return the (M, 4) boxes of the best instance in each query's photo; NaN if it has none."""
    top = top_instances(queries, gallery)
    boxes_px = np.full((len(queries), 4), np.nan)
    boxes_px[top >= 0] = gallery.boxes_px[top[top >= 0]]
    return boxes_px


def _splits(
    groups: Mapping[str, Sequence[Expression]],
    targets: Targets,
    query_free_px: Floats | None,
    by_expression_px: Floats | None,
) -> tuple[RecSplit, ...]:
    """Measure the (M, 4) boxes of the expressions of all groups, one group after the other."""
    found: list[RecSplit] = []
    for name, texts in groups.items():
        first = sum(split.num_expressions for split in found)
        rows = slice(first, first + len(texts))
        num_photos = len(np.unique(targets[rows].images))
        query_free, by_expression = (
            None if boxes_px is None else _figures(targets[rows], boxes_px[rows])
            for boxes_px in (query_free_px, by_expression_px)
        )
        found.append(
            RecSplit(
                name=name,
                published_as=rec_split(num_photos, len(texts)),
                num_photos=num_photos,
                num_expressions=len(texts),
                query_free=query_free,
                by_expression=by_expression,
            )
        )
    return tuple(found)


def _figures(targets: Targets, boxes_px: Floats) -> Figures:
    found = rec_hits(boxes_px, targets.boxes_px, IOU_THRESHOLDS)
    columns = {f"p{percent(iou)}": found.hits[:, at] for at, iou in enumerate(IOU_THRESHOLDS)}
    return intervals({**columns, "mean_iou": found.iou}, targets.images)


def _split_dict(split: RecSplit) -> dict[str, Any]:
    choices = {"query_free": split.query_free, "by_expression": split.by_expression}
    return {
        "photos": split.num_photos,
        "expressions": split.num_expressions,
        "published_as": split.published_as,
        **{name: means(figures) if figures else None for name, figures in choices.items()},
        "intervals": {name: ranges(figures) for name, figures in choices.items() if figures},
    }


def _headers(published: PublishedTable) -> list[str]:
    """Return the names of published splits on two lines each, so that eight fit in a terminal."""
    return [name.replace(" ", "\n") for name in published.columns]
