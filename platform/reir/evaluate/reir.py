"""Referring expression instance retrieval, measured from photos to figures.

Every photo of the gallery is encoded once and without any query; then every expression ranks all
instances of all photos. Knows encoders and files of photos, no store.

Beside it, for encoders that can: the candidate choice of the released evaluator, which lets each
photo's own expression choose what the photo shows. That is a **leak**, since no index knows which
photo an expression is about; its figures compare with published ones alone.
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
from reir.evaluate.gallery import Encoding, asked_by, encode_gallery, queries_of
from reir.evaluate.published import REIR_COLUMNS, PublishedTable, reir_table
from reir.evaluate.reports import (
    NO_CHOICE,
    Columns,
    Figures,
    Measured,
    beside,
    cell,
    figure_table,
    intervals,
    means,
    measured,
    percent,
    ranges,
    stacked,
)
from reir.metrics import Gallery, Interval, Queries, rec_hits, reir_ranks
from reir.metrics.reir import IOU_THRESHOLDS, Ints
from reir.models.seams import InstanceEncoder

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

KS = (1, 5, 10)
PARTS = ("definition_b", "definition_a", "image_recall", "rec")
QUERY_FREE_TITLE = "Candidates chosen without any query: what an index can do"
LEAKY_TITLE = "LEAKY: candidates chosen by the photo's own expression; no index can do this"


@dataclass(frozen=True, kw_only=True)
class ReirFigures:
    """Figures under one choice of candidates, in percent, with 95 % bootstrap intervals.

    Attributes:
        definition_b: `br1_50` ... `br10_90`: any instance of the first K is right.
        definition_a: the same, the best instance of the true photo is right and among the first K.
        image_recall: `r1`, `r5`, `r10`.
        rec: `p50` ... `p90`, precision of the top box within the true photo.
    """

    definition_b: Figures
    definition_a: Figures
    image_recall: Figures
    rec: Figures

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: definition B at the top level, the rest by name."""
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
        query_free: candidates chosen without any query, the figures of an index.
        leaky: candidates chosen by each photo's own expression; None where it cannot be measured.
        published: figures of others on the same split; None on any other.
        measured: on what, and with what.
    """

    query_free: ReirFigures
    leaky: ReirFigures | None
    published: PublishedTable | None
    measured: Measured

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the query-free figures at the top level."""
        return {
            **self.query_free.to_dict(),
            "leaky": self.leaky.to_dict() if self.leaky else None,
            "published": self.published.to_dict() if self.published else None,
            **self.measured.to_dict(),
        }

    def table(self) -> RenderableType:
        """Return the figures as tables for the terminal."""
        expressions = self.measured.counts["expressions"]
        parts: list[RenderableType] = [f"{expressions:,} expressions"]
        parts.append(_table(QUERY_FREE_TITLE, self.query_free))
        if self.leaky:
            parts += ["", _table(LEAKY_TITLE, self.leaky)]
        if self.published:
            headers = [f".{iou // 10}@{k}" for iou in map(percent, IOU_THRESHOLDS) for k in KS]
            parts += ["", *beside(self.published, headers, self._rows())]
        return stacked(parts, self.measured.notes())

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
    """Encode a gallery and its expressions, and measure. Equal inputs give an equal report.

    Args:
        encoder: the model; the leaky choice is measured where it is an `ExpressionChooser`.
        dataset: all its photos are the gallery; expressions without an instance are left out.
        images_dir: where the photos are.
        all_expressions: every expression of an instance is a query, instead of the first only.
        how: how the gallery is encoded.

    Raises:
        DataError: no expression has an instance, or photos are missing from `images_dir`.
    """
    described = dataset.with_targets()
    chosen = described if all_expressions else described.first_expressions()
    texts = [text.text for text in chosen.expressions]
    queries = queries_of(encoder, dataset, chosen.expressions)
    asked = asked_by(encoder, queries, texts, encoder.num_candidates)
    gallery = encode_gallery(encoder, dataset, images_dir, asked=asked, how=how)
    leaky = None
    if asked:
        leaky = _figures(_leaky_columns(queries, gallery.turns()), queries)
    published = reir_table(len(dataset.images), len(queries))
    return ReirReport(
        query_free=_figures(_columns(queries, gallery.arrays), queries),
        leaky=leaky,
        published=published,
        measured=measured(
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
    """`part.figure` -> (M,) successes."""
    ranks = reir_ranks(queries, gallery)
    top_boxes_px = np.full((len(queries), 4), np.nan)
    answered = ranks.top_instance >= 0
    top_boxes_px[answered] = gallery.boxes_px[ranks.top_instance[answered]]
    rec = rec_hits(top_boxes_px, queries.boxes_px)
    columns = {}
    for iou in IOU_THRESHOLDS:
        for k in KS:
            columns[f"definition_b.br{k}_{percent(iou)}"] = ranks.found_b(k, iou)
            columns[f"definition_a.br{k}_{percent(iou)}"] = ranks.found_a(k, iou)
    for k in KS:
        columns[f"image_recall.r{k}"] = ranks.found_image(k)
    for at, iou in enumerate(rec.iou_thresholds):
        columns[f"rec.p{percent(iou)}"] = rec.hits[:, at]
    return columns


def _leaky_columns(queries: Queries, turns: Iterator[tuple[Ints, Gallery]]) -> Columns:
    """Return the successes of all turns, each query in its own, in the order of the queries."""
    columns: dict[str, npt.NDArray[Any]] = {}
    for rows, gallery in turns:
        for name, values in _columns(queries[rows], gallery).items():
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
