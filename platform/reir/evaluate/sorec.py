"""Evaluation on SOREC: find the described small instance in its own large photo.

Each expression ranks the instances that an index stores for its photo, which were chosen without
any expression. With a `ViewsEncoder`, these include the instances of parts of the photo. A
localizer reads photo and expression together.
"""

# Shapes: M expressions, N ranked instances

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reir.datasets import ReferringDataset
from reir.evaluate.encoded_gallery import Encoding, Targets, encode_gallery, queries_of
from reir.evaluate.localized_expressions import localize_expressions
from reir.evaluate.published import SOREC_SPLITS, PublishedTable, sorec_table
from reir.evaluate.reports import (
    EvaluationInfo,
    Figures,
    cell,
    comparison,
    evaluation_info,
    figure_table,
    intervals,
    localizer_info,
    percent,
    report_values,
    with_notes,
)
from reir.images.large_photos import views_of
from reir.metrics import Gallery, Queries, SorecScores, ranked_instances, sorec_scores
from reir.metrics.reir import Floats
from reir.metrics.sorec import IOU_THRESHOLDS, TOP_KS
from reir.models.interfaces import ExpressionLocalizer, InstanceEncoder

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

HEADERS = {"macc": "mAcc", "acc50": "Acc50", "acc75": "Acc75"}
NO_SPLIT = (
    f"these are not all expressions of one of SOREC's splits {', '.join(SOREC_SPLITS.values())}"
)


@dataclass(frozen=True, kw_only=True)
class SorecReport:
    """The figures of one evaluation, in percent, with 95 % bootstrap intervals.

    Attributes:
        accuracy: `macc`, `acc50`, `acc75` of the best instance.
        top_k: the table of the release: `top1_05` to `top10_95`, the share of expressions one of
            whose first 1, 5 or 10 instances reaches an IoU of .05 to .95; and `mean_precision`.
        published: published figures on the same split; None if there are none.
        info: the data, model and settings of the evaluation.
    """

    accuracy: Figures
    top_k: Figures
    published: PublishedTable | None
    info: EvaluationInfo

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        named = {"accuracy": self.accuracy, "top_k": self.top_k}
        return report_values(named, self.published, self.info)

    def table(self) -> RenderableType:
        """Return the figures as tables for the terminal."""
        title = f"{self.info.counts['expressions']:,} expressions"
        table = figure_table(title, list(HEADERS.values()))
        table.add_row("best instance of the photo", *(cell(self.accuracy[n]) for n in HEADERS))
        parts: list[RenderableType] = [table, "", self._top_k_table()]
        if self.published:
            ours = {f"this {self.info.model}": {name: self.accuracy[name].mean for name in HEADERS}}
            parts += ["", *comparison(self.published, list(HEADERS.values()), ours)]
        parts_of_photos = [self._parts()] if self.info.model == "encoder" else []
        return with_notes(parts, [*parts_of_photos, *self.info.notes()])

    def _top_k_table(self) -> Table:
        title = "One of the first K instances reaches the IoU"
        table = figure_table(title, [f"K = {k}" for k in TOP_KS])
        for iou in IOU_THRESHOLDS:
            table.add_row(f"IoU {iou:.2f}", *(cell(self.top_k[_name(k, iou)]) for k in TOP_KS))
        table.add_row("mean over K at IoU 0.50", cell(self.top_k["mean_precision"]))
        return table

    def _parts(self) -> str:
        views = views_of(self.info.settings)
        if views is None:
            return (
                "Photos were encoded as a whole; --large-photos zoom also encodes parts of large "
                "photos."
            )
        return f"Photos with a longer side above {views.above_px:,} px were also encoded in parts."


def evaluate_sorec(
    encoder: InstanceEncoder,
    dataset: ReferringDataset,
    images_dir: str | Path,
    *,
    how: Encoding | None = None,
) -> SorecReport:
    """Encode photos, rank the instances of each expression's photo, and measure.

    The result is deterministic.

    Args:
        encoder: the model; a `ViewsEncoder` to encode large photos in parts, too.
        dataset: every expression that describes an instance is a query.
        images_dir: folder of the photos.
        how: how the photos are encoded.

    Raises:
        DataError: no expression describes an instance, or photos are missing from `images_dir`.
    """
    queries = queries_of(encoder, dataset, dataset.with_targets().expressions)
    gallery = encode_gallery(encoder, dataset, images_dir, how=how)
    published = sorec_table(len(queries))
    info = evaluation_info(
        encoder,
        gallery,
        counts={"expressions": len(queries)},
        settings={},
        left_out={} if published else {"published figures": NO_SPLIT},
    )
    ranked_boxes_px = _ranked_boxes_px(queries, gallery.arrays)
    return _report(ranked_boxes_px, Targets(queries.images, queries.boxes_px), published, info)


def evaluate_sorec_localizer(
    localizer: ExpressionLocalizer,
    dataset: ReferringDataset,
    images_dir: str | Path,
    *,
    how: Encoding | None = None,
) -> SorecReport:
    """Let a localizer find each expression in its photo, and measure.

    Args:
        localizer: the model.
        dataset: every expression that describes an instance is a query.
        images_dir: folder of the photos.
        how: see `localize_expressions`.

    Raises:
        DataError: no expression describes an instance, or photos are missing from `images_dir`.
    """
    expressions = dataset.with_targets().expressions
    found = localize_expressions(
        localizer, dataset, images_dir, expressions, num_boxes=max(TOP_KS), how=how
    )
    published = sorec_table(len(expressions))
    left_out = {} if published else {"published figures": NO_SPLIT}
    info = localizer_info(localizer, found, left_out)
    return _report(found.boxes_px, found.targets, published, info)


def _report(
    ranked_boxes_px: Floats,
    targets: Targets,
    published: PublishedTable | None,
    info: EvaluationInfo,
) -> SorecReport:
    """Measure the (M, N, 4) boxes of each expression, best first."""
    scores = sorec_scores(ranked_boxes_px, targets.boxes_px)
    return SorecReport(
        accuracy=intervals(
            {
                "macc": scores.mean_accuracy,
                "acc50": scores.hits(1, 0.5),
                "acc75": scores.hits(1, 0.75),
            },
            targets.images,
        ),
        top_k=intervals(_top_k_columns(scores), targets.images),
        published=published,
        info=info,
    )


def _ranked_boxes_px(queries: Queries, gallery: Gallery) -> Floats:
    """Return the (M, N, 4) boxes of the best instances of each query's photo; NaN for none."""
    ranked = ranked_instances(queries, gallery, max(TOP_KS))
    boxes_px = np.full((*ranked.shape, 4), np.nan)
    boxes_px[ranked >= 0] = gallery.boxes_px[ranked[ranked >= 0]]
    return boxes_px


def _top_k_columns(scores: SorecScores) -> dict[str, Floats]:
    columns = {
        _name(k, iou): scores.hits(k, iou).astype(np.float64)
        for k in TOP_KS
        for iou in IOU_THRESHOLDS
    }
    return {**columns, "mean_precision": scores.mean_precision}


def _name(k: int, iou_threshold: float) -> str:
    return f"top{k}_{percent(iou_threshold):02}"
