"""Evaluation of ReSeDis: decide for every photo of a gallery whether it has the described instance.

Retrieval and localization are measured together: a photo only counts if the box, or the mask, that
is found in it fits. Files with the same expression are one query. docs/evaluate.md defines the
metrics, and says what the paper leaves open.
"""

# Shapes: M expressions, T targets, A pairs of an expression and one of its true photos,
# J instances, D vector dimension

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reir.datasets import Expression, ReferringDataset
from reir.errors import DataError
from reir.evaluate.encoded_gallery import (
    Encoding,
    encode_expressions,
    encode_gallery,
    image_positions,
)
from reir.evaluate.instance_masks import instance_masks
from reir.evaluate.published import PublishedTable, resedis_table
from reir.evaluate.reports import (
    Columns,
    EvaluationInfo,
    Figures,
    cell,
    comparison,
    evaluation_info,
    figure_table,
    intervals,
    percent,
    report_values,
    with_notes,
)
from reir.images import rle
from reir.images.decode import read_image
from reir.metrics import Gallery
from reir.metrics.corpus_detection import Regions, average_precision
from reir.metrics.reir import Bools, Floats, Ints
from reir.metrics.resedis import (
    IOU_THRESHOLD,
    CorpusSearch,
    Decisions,
    Expressions,
    Targets,
    search_corpus,
    set_f1,
)
from reir.models.interfaces import InstanceEncoder
from reir.query.photo_curve import DEFAULT_MIN_PRESENCE
from reir.query.presence import Calibration, count_words
from reir.records import FloatArray, MaskRle

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

KS = (1, 5, 10)
NUM_DETECTIONS = 100
"""Number of best instances of the gallery that AP scores for each expression."""
PRECISION = 0.9
"""Precision at which false alarms are reported beside those at the threshold of the checkpoint."""
ORACLE = "Oracle: the candidates are the true boxes, which no index knows."
NO_CALIBRATION = (
    "this encoder has no calibration, so that no score says whether an instance is there; "
    "`reir calibrate` fits one for a checkpoint"
)

_SCORE_LIMIT = 2.0  # a presence that needs a higher score is taken for one that no photo reaches
_SCORE_STEP = 1e-7


@dataclass(frozen=True, kw_only=True)
class ResedisReport:
    """The figures of one evaluation, in percent; those that are means have bootstrap intervals.

    Attributes:
        retrieval: `r1`, `r5`, `r10`: image recall.
        shapes: `box` and, if encoder and annotations have any, `mask` -> `joint1`, `joint5`,
            `joint10`, `p50`, `ap`, `ap50`.
        decision: `precision`, `recall`, `f1` of the decisions for all photos and expressions,
            `false_alarms` per expression, `false_alarms_per_100` photos, and the recall and false
            alarms at `PRECISION`; None without a calibration.
        matching: `box`, `mask` -> `precision`, `recall`, `f1` of the instances that are found in
            the true photos; None without a calibration.
        published: published results on the same photos; None if there are none.
        info: the data, encoder and settings of the evaluation.
    """

    retrieval: Figures
    shapes: Mapping[str, Figures]
    decision: Mapping[str, float] | None
    matching: Mapping[str, Mapping[str, float]] | None
    published: PublishedTable | None
    info: EvaluationInfo

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        named = {"retrieval": self.retrieval, **self.shapes}
        more = {"decision": self.decision, "matching": self.matching}
        return report_values(named, self.published, self.info, more)

    def table(self) -> RenderableType:
        """Return the figures as tables for the terminal."""
        counts = self.info.counts
        title = f"{counts['expressions']:,} expressions with {counts['targets']:,} targets"
        table = figure_table(title, [f"@{k}" for k in KS])
        table.add_row("image recall", *(cell(self.retrieval[f"r{k}"]) for k in KS))
        for kind, figures in self.shapes.items():
            cells = (cell(figures[f"joint{k}"]) for k in KS)
            table.add_row(f"right photo and {kind}, IoU >= .5", *cells)
        parts: list[RenderableType] = [table, "", _localization(self.shapes)]
        if self.decision and self.matching:
            parts += ["", _decisions(self.decision, self.matching)]
        if self.published:
            ours = {"this encoder": {"r1": self.retrieval["r1"].mean}}
            parts += ["", *comparison(self.published, ["R@1"], ours)]
        notes = [ORACLE] if self.info.settings["oracle"] else []
        return with_notes(parts, [*notes, *self.info.notes()])


def evaluate_resedis(
    encoder: InstanceEncoder,
    dataset: ReferringDataset,
    images_dir: str | Path,
    *,
    calibration: Calibration | None = None,
    how: Encoding | None = None,
) -> ResedisReport:
    """Encode a gallery, search it for every expression, and measure. The result is deterministic.

    Args:
        encoder: the model.
        dataset: all its photos form the gallery. Expressions with the same `query_id` are one
            query; those without an instance only count for decisions. Mask figures need masks.
        images_dir: folder of the photos.
        calibration: of the encoder, for the decisions; None to report none.
        how: how the gallery is encoded.

    Raises:
        DataError: no expression has an instance, or photos are missing from `images_dir`.
    """
    queries = _Queries(dataset)
    vectors = encode_expressions(encoder, queries.texts)
    encoded = encode_gallery(encoder, dataset, images_dir, how=how)
    thresholds = (
        None
        if calibration is None
        else score_thresholds(calibration, queries.texts, vectors, DEFAULT_MIN_PRESENCE)
    )
    search = search_corpus(
        Expressions(vectors, queries.targets, thresholds),
        encoded.arrays,
        num_images=len(dataset.images),
        num_best=NUM_DETECTIONS,
    )
    without_masks = _why_without_masks(encoder, queries)
    kinds = {"box": _Shapes(queries, search, encoded.arrays, queries.described)}
    if not without_masks:
        shapes = replace(kinds["box"], chosen=queries.masked)
        masks = _found_masks(encoder, dataset, Path(images_dir), shapes)
        kinds["mask"] = replace(shapes, masks=masks)
    published = resedis_table(len(dataset.images))
    return ResedisReport(
        retrieval=queries.intervals({f"r{k}": search.hits_image(k) for k in KS}, queries.described),
        shapes={kind: shapes.figures() for kind, shapes in kinds.items()},
        decision=_decision_figures(search.decisions) if search.decisions else None,
        matching={kind: shapes.matching() for kind, shapes in kinds.items()}
        if search.decisions
        else None,
        published=published,
        info=evaluation_info(
            encoder,
            encoded,
            counts={
                "expressions": len(queries.texts),
                "without_target": int((~queries.described).sum()),
                "targets": len(queries.targets.images),
            },
            settings={
                "detections_per_expression": NUM_DETECTIONS,
                "oracle": how is not None and how.oracle,
            },
            left_out={
                **({"mask figures": without_masks} if without_masks else {}),
                **({} if search.decisions else {"decision figures": NO_CALIBRATION}),
                **({} if published else {"published figures": "these are not ReSeDis' photos"}),
            },
        ),
    )


def score_thresholds(
    calibration: Calibration, texts: Sequence[str], vectors: FloatArray, min_presence: float
) -> Floats:
    """Return the score from which on a photo counts as having what each expression describes.

    It is where the presence in a photo reaches a threshold, within 1e-7. The presence grows with
    the score, so scores can be compared instead.

    Args:
        calibration: of the encoder.
        texts: M expressions.
        vectors: (M, D) their vectors.
        min_presence: the threshold, in [0, 1].

    Returns:
        (M,) scores; infinity if no score is high enough.
    """
    backgrounds = map(calibration.background.score, vectors)
    sentences = zip(backgrounds, map(count_words, texts), strict=True)
    return np.array([_score_threshold(calibration, *each, min_presence) for each in sentences])


def _score_threshold(
    calibration: Calibration, background: float, num_words: int, min_presence: float
) -> float:
    low, high = -_SCORE_LIMIT, _SCORE_LIMIT
    if calibration.of_photo(high, background, num_words) < min_presence:
        return np.inf
    while high - low > _SCORE_STEP:
        middle = (low + high) / 2
        if calibration.of_photo(middle, background, num_words) < min_presence:
            low = middle
        else:
            high = middle
    # Of the two ends, only this one certainly reaches the threshold.
    return high


class _Queries:
    """The expressions of a data set as M queries with T targets.

    Attributes:
        texts: M texts.
        targets: the described instances.
        true_masks: T masks; None where the data set has none.
        described: (M,) whether the expression describes an instance.
        masked: (M,) whether it does, and all its targets have masks.
        images: (M,) the photo that it was written for; the first one, if there are several.

    Raises:
        DataError: no expression describes an instance.
    """

    def __init__(self, dataset: ReferringDataset) -> None:
        found = dataset.with_targets().expressions
        if not found:
            raise DataError(
                f"{dataset.source}: none of {len(dataset.expressions)} expressions describes an "
                f"instance; there is nothing to measure"
            )
        first: dict[str, Expression] = {}
        for text in dataset.expressions:
            first.setdefault(text.query, text)
        row_of = {query: row for row, query in enumerate(first)}
        instances = [dataset.instances_by_id[str(text.instance_id)] for text in found]
        self.texts = [text.text for text in first.values()]
        self.images = image_positions(dataset, [text.image_id for text in first.values()])
        self.targets = Targets(
            len(first),
            np.array([row_of[text.query] for text in found]),
            image_positions(dataset, [each.image_id for each in instances]),
            np.array([each.box_xyxy_px for each in instances], dtype=np.float64),
        )
        self.true_masks = [each.mask for each in instances]
        num_targets = np.bincount(self.targets.expressions, minlength=len(first))
        has_mask = [mask is not None for mask in self.true_masks]
        num_masks = np.bincount(self.targets.expressions, has_mask, minlength=len(first))
        self.described = num_targets > 0
        self.masked = self.described & (num_masks == num_targets)

    def intervals(self, columns: Columns, chosen: Bools) -> Figures:
        """Return the figures of the chosen queries, with intervals over photos."""
        part = {name: values[chosen] for name, values in columns.items()}
        return intervals(part, self.images[chosen])


@dataclass(frozen=True)
class _Shapes:
    """The boxes, or the masks, of a search and of its targets.

    Attributes:
        queries: expressions and targets.
        search: what was found for them.
        gallery: the instances.
        chosen: (M,) the queries that are measured.
        masks: mask of every instance that was found for them; None to compare boxes.
    """

    queries: _Queries
    search: CorpusSearch
    gallery: Gallery
    chosen: Bools
    masks: Mapping[int, MaskRle] | None = None

    def figures(self) -> Figures:
        """Return joint scores, precision in the true photos, and average precision."""
        fits = np.zeros(len(self.search.pairs), dtype=bool)
        for pair in self._pairs():
            if self.search.tops[pair] >= 0:
                fits[pair] = self._iou(pair, self.search.tops[[pair]]).max() >= IOU_THRESHOLD
        precision = np.zeros((len(self.chosen), 2))
        # Average precision is not defined without targets, and queries that are not chosen may have
        # none.
        for row in np.flatnonzero(self.chosen):
            targets = np.flatnonzero(self.queries.targets.expressions == row)
            precision[row] = average_precision(
                self._found(self.search.best[row]),
                self.search.best_scores[row],
                self._true(targets),
            )
        joint = {f"joint{k}": self.search.hits_joint(k, fits) for k in KS}
        shares = {"p50": self.search.share_fitting(fits)}
        shares |= {"ap": precision[:, 0], "ap50": precision[:, 1]}
        return self.queries.intervals({**joint, **shares}, self.chosen)

    def matching(self) -> dict[str, float]:
        """Return precision, recall and F1 of the accepted instances of the true photos."""
        overlaps = [self._iou(pair, self.search.accepted[pair]) for pair in self._pairs()]
        values = dict(zip(("precision", "recall", "f1"), set_f1(overlaps), strict=True))
        return {name: round(100 * value, 4) for name, value in values.items()}

    def rows(self) -> Ints:
        """Return the instances of the gallery that the figures are computed from."""
        parts = [self.search.accepted[pair] for pair in self._pairs()]
        best = self.search.best[self.chosen].ravel()
        tops = self.search.tops[self._pairs()]
        return np.unique(np.concatenate([*parts, best, tops[tops >= 0]]))

    def _pairs(self) -> Ints:
        return np.flatnonzero(self.chosen[self.search.pairs.expressions])

    def _iou(self, pair: int, found: Ints) -> Floats:
        return self._found(found).iou(self._true(self.search.pairs.targets[pair]))

    def _found(self, rows: Ints) -> Regions:
        masks = None if self.masks is None else [self.masks[row] for row in rows.tolist()]
        return Regions(self.gallery.images[rows], self.gallery.boxes_px[rows], masks)

    def _true(self, rows: Ints) -> Regions:
        targets, masks = self.queries.targets, None
        if self.masks is not None:
            own = [self.queries.true_masks[row] for row in rows.tolist()]
            masks = [mask for mask in own if mask is not None]  # `chosen` has no other
        return Regions(targets.images[rows], targets.boxes_px[rows], masks)


def _why_without_masks(encoder: InstanceEncoder, queries: _Queries) -> str:
    """Return why masks cannot be measured; empty if they can."""
    if not encoder.masks:
        return "this encoder gives no masks"
    if not queries.masked.any():
        return "no expression has targets with masks"
    return ""


def _found_masks(
    encoder: InstanceEncoder, dataset: ReferringDataset, images_dir: Path, shapes: _Shapes
) -> dict[int, MaskRle]:
    """Return the masks of the instances that figures need, at the annotated size of their photo."""
    rows, gallery = shapes.rows(), shapes.gallery
    masks: dict[int, MaskRle] = {}
    for image in np.unique(gallery.images[rows]).tolist():
        photo = dataset.images[image]
        own = rows[gallery.images[rows] == image]
        sides_px = np.array([photo.width_px, photo.height_px] * 2)
        # The photo could be read before, because a photo that cannot be decoded has no instances.
        pixels = read_image(images_dir / photo.file_name)
        # The file may have another size than annotated. So boxes go back to [0, 1], and masks are
        # fitted to the annotated size, which the true masks have.
        found = instance_masks(encoder, pixels, gallery.boxes_px[own] / sides_px)
        size_px = photo.height_px, photo.width_px
        masks |= zip(own.tolist(), (rle.fitted(mask, size_px) for mask in found), strict=True)
    return masks


def _decision_figures(decisions: Decisions) -> dict[str, float]:
    recall, false_alarms = decisions.at_precision(PRECISION)
    at = f"_at_precision_{percent(PRECISION)}"
    values = {
        "precision": 100 * decisions.precision,
        "recall": 100 * decisions.recall,
        "f1": 100 * decisions.f1,
        "false_alarms": float(decisions.false_found.mean()),
        "false_alarms_per_100": decisions.false_alarms_per_100,
        f"recall{at}": 100 * recall,
        f"false_alarms_per_100{at}": false_alarms,
    }
    return {name: round(value, 4) for name, value in values.items()}


def _localization(kinds: Mapping[str, Figures]) -> Table:
    table = figure_table("Localization", list(kinds))
    for name, title in {
        "p50": "in the right photo, IoU >= .5",
        "ap": "AP over all photos, IoU .5 to .95",
        "ap50": "AP over all photos, IoU .5",
    }.items():
        table.add_row(title, *(cell(figures[name]) for figures in kinds.values()))
    return table


def _decisions(decision: Mapping[str, float], matching: Mapping[str, Mapping[str, float]]) -> Table:
    at = f"_at_precision_{percent(PRECISION)}"
    table = figure_table("Decisions for every photo", ["precision", "recall", "F1"])
    rows = {"photos": decision} | {f"{k} in the right photos": v for k, v in matching.items()}
    for name, values in rows.items():
        table.add_row(name, *(f"{values[each]:.1f}" for each in ("precision", "recall", "f1")))
    table.add_row(
        f"photos, at precision .{percent(PRECISION)}", "", f"{decision['recall' + at]:.1f}"
    )
    table.add_row("false alarms per expression", f"{decision['false_alarms']:.1f}")
    table.add_row("false alarms per 100 photos", f"{decision['false_alarms_per_100']:.2f}")
    table.add_row(
        f"the same, at precision .{percent(PRECISION)}",
        f"{decision['false_alarms_per_100' + at]:.3f}",
    )
    return table
