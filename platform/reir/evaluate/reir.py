"""Evaluation of referring expression instance retrieval (REIR).

Every photo of the gallery is encoded once, without any query; then every expression ranks all
instances of all photos. No store is involved.

For an `ExpressionChooser`, there is a second set of figures. There, each photo's own expression
chooses its candidates, as in the evaluator that was released with CLARE. That is a **leak**, since
an index cannot know which photo an expression is about. These figures can only be compared with
published ones.
"""

# Shapes: M expressions, J instances of the whole gallery, D vector dimension

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reir.datasets import ReferringDataset
from reir.evaluate.encoded_gallery import Encoding, choosing_expressions, encode_gallery, queries_of
from reir.evaluate.published import REIR_COLUMNS, PublishedTable, reir_table
from reir.evaluate.reports import (
    NO_CHOICE,
    Columns,
    EvaluationInfo,
    Figures,
    cell,
    comparison,
    evaluation_info,
    figure_table,
    intervals,
    means,
    percent,
    ranges,
    with_notes,
)
from reir.metrics import Gallery, Interval, Queries, rec_hits, reir_ranks
from reir.metrics.reir import IOU_THRESHOLDS, Ints
from reir.models.interfaces import InstanceEncoder

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

KS = (1, 5, 10)
PARTS = ("definition_b", "definition_a", "image_recall", "rec")
QUERY_FREE_TITLE = "Candidates chosen without any query, as in an index"
LEAKY_TITLE = "LEAKY: candidates chosen by the photo's own expression, which no index can do"


@dataclass(frozen=True, kw_only=True)
class ReirFigures:
    """Figures for one way to choose candidates, in percent, with 95 % bootstrap intervals.

    Attributes:
        definition_b: `br1_50` ... `br10_90`: one of the first K instances is right.
        definition_a: the same names: the best instance of the true photo is right, and is among the
            first K.
        image_recall: `r1`, `r5`, `r10`.
        rec: `p50` ... `p90`, precision of the top box within the true photo.
    """

    definition_b: Figures
    definition_a: Figures
    image_recall: Figures
    rec: Figures

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: definition B at the top level, the other parts by name."""
        named: dict[str, Figures] = {part: getattr(self, part) for part in PARTS[1:]}
        return {
            **means(self.definition_b),
            **{name: means(figures) for name, figures in named.items()},
            "intervals": {
                **ranges(self.definition_b),
                **{name: ranges(figures) for name, figures in named.items()},
            },
        }


@dataclass(frozen=True, kw_only=True)
class ReirReport:
    """The figures of one evaluation.

    Attributes:
        query_free: candidates chosen without any query, as in an index.
        leaky: candidates chosen by each photo's own expression; None if the encoder is no
            `ExpressionChooser`.
        published: published results on the same split; None if there are none.
        info: the data, encoder and settings of the evaluation.
    """

    query_free: ReirFigures
    leaky: ReirFigures | None
    published: PublishedTable | None
    info: EvaluationInfo

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the query-free figures at the top level."""
        return {
            **self.query_free.to_dict(),
            "leaky": self.leaky.to_dict() if self.leaky else None,
            "published": self.published.to_dict() if self.published else None,
            **self.info.to_dict(),
        }

    def table(self) -> RenderableType:
        """Return the figures as tables for the terminal."""
        expressions = self.info.counts["expressions"]
        parts: list[RenderableType] = [f"{expressions:,} expressions"]
        parts.append(_table(QUERY_FREE_TITLE, self.query_free))
        if self.leaky:
            parts += ["", _table(LEAKY_TITLE, self.leaky)]
        if self.published:
            headers = [f".{iou // 10}@{k}" for iou in map(percent, IOU_THRESHOLDS) for k in KS]
            parts += ["", *comparison(self.published, headers, self._rows())]
        return with_notes(parts, self.info.notes())

    def _rows(self) -> dict[str, dict[str, float]]:
        named = {"query-free, B": self.query_free.definition_b}
        named["query-free, A"] = self.query_free.definition_a
        if self.leaky:
            named["leaky, A"] = self.leaky.definition_a
        return {
            name: {column: figures[column].mean for column in REIR_COLUMNS}
            for name, figures in named.items()
        }


def evaluate_reir(
    encoder: InstanceEncoder,
    dataset: ReferringDataset,
    images_dir: str | Path,
    *,
    all_expressions: bool = False,
    how: Encoding | None = None,
) -> ReirReport:
    """Encode a gallery and its expressions, and measure. The result is deterministic.

    Args:
        encoder: the model; the leaky figures need an `ExpressionChooser`.
        dataset: all its photos form the gallery; expressions without an instance are left out.
        images_dir: folder of the photos.
        all_expressions: use every expression of an instance as a query instead of only the first.
        how: how the gallery is encoded.

    Raises:
        DataError: no expression has an instance, or photos are missing from `images_dir`.
    """
    # Photos of left-out expressions stay in the gallery, as wrong answers.
    described = dataset.with_targets()
    chosen = described if all_expressions else described.first_expressions()
    texts = [text.text for text in chosen.expressions]
    queries = queries_of(encoder, dataset, chosen.expressions)
    # As many instances per photo as in the query-free gallery, so that only the choice differs.
    choosers = choosing_expressions(encoder, queries, texts, encoder.num_candidates)
    gallery = encode_gallery(encoder, dataset, images_dir, choosers=choosers, how=how)
    leaky = None
    if choosers:
        leaky = _figures(_leaky_columns(queries, gallery.turns()), queries)
    published = reir_table(len(dataset.images), len(queries))
    return ReirReport(
        query_free=_figures(_columns(queries, gallery.arrays), queries),
        leaky=leaky,
        published=published,
        info=evaluation_info(
            encoder,
            gallery,
            counts={
                "expressions": len(queries),
                "without_target": len(dataset.expressions) - len(described.expressions),
            },
            settings={"all_expressions": all_expressions},
            left_out={
                **({} if leaky else {"leaky choice": NO_CHOICE}),
                **({} if published else {"published figures": "this is not REIRCOCO's val split"}),
            },
        ),
    )


def _columns(queries: Queries, gallery: Gallery) -> Columns:
    """Return the success of each query: `part.figure` -> (M,)."""
    ranks = reir_ranks(queries, gallery)
    # NaN stands for no answer, which counts as a miss.
    top_boxes_px = np.full((len(queries), 4), np.nan)
    answered = ranks.top_instance >= 0
    top_boxes_px[answered] = gallery.boxes_px[ranks.top_instance[answered]]
    rec = rec_hits(top_boxes_px, queries.boxes_px)
    columns = {}
    for iou in IOU_THRESHOLDS:
        for k in KS:
            columns[f"definition_b.br{k}_{percent(iou)}"] = ranks.hits_b(k, iou)
            columns[f"definition_a.br{k}_{percent(iou)}"] = ranks.hits_a(k, iou)
    for k in KS:
        columns[f"image_recall.r{k}"] = ranks.hits_image(k)
    for at, iou in enumerate(rec.iou_thresholds):
        columns[f"rec.p{percent(iou)}"] = rec.hits[:, at]
    return columns


def _leaky_columns(queries: Queries, turns: Iterator[tuple[Ints, Gallery]]) -> Columns:
    """Return the same columns, with each query measured in the gallery of its own turn."""
    columns: dict[str, npt.NDArray[Any]] = {}
    for rows, gallery in turns:
        for name, values in _columns(queries[rows], gallery).items():
            # Each query searches in exactly one turn, so no zero of the new array remains.
            columns.setdefault(name, np.zeros(len(queries), dtype=bool))[rows] = values
    return columns


def _figures(columns: Columns, queries: Queries) -> ReirFigures:
    parts: dict[str, dict[str, Interval]] = {part: {} for part in PARTS}
    for name, interval in intervals(columns, queries.images).items():
        part, _, figure = name.partition(".")
        parts[part][figure] = interval
    return ReirFigures(**parts)


def _table(title: str, figures: ReirFigures) -> Table:
    table = figure_table(title, [f"@{k}" for k in KS])
    for name, values in (("B", figures.definition_b), ("A", figures.definition_a)):
        for iou in map(percent, IOU_THRESHOLDS):
            cells = (cell(values[f"br{k}_{iou}"]) for k in KS)
            table.add_row(f"BR, IoU .{iou // 10}, definition {name}", *cells)
    table.add_row("image recall", *(cell(figures.image_recall[f"r{k}"]) for k in KS))
    for name, interval in figures.rec.items():
        table.add_row(f"top box in its photo, IoU > .{name[1]}", cell(interval), "", "")
    return table
