"""Referring expression instance retrieval, measured from photos to figures.

Every photo of the gallery is encoded once and without any query; then every expression ranks all
instances of all photos. Knows encoders and files of photos, no store.
"""

# Shapes: M expressions, J instances of the whole gallery, D vector dimension, S figures

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reir.boxes import to_pixels
from reir.datasets import Expression, ReferringDataset, ReferringImage
from reir.errors import DataError, ImageError
from reir.images import read_image
from reir.metrics import Gallery, Interval, Queries, bootstrap_intervals, rec_hits, reir_ranks
from reir.metrics.reir import IOU_THRESHOLDS
from reir.models.seams import InstanceEncoder, RgbImage
from reir.records import FloatArray

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)

KS = (1, 5, 10)
NUM_RESAMPLES = 2000
_EXPRESSIONS_AT_ONCE = 64
_SHAPE_TOLERANCE = 0.02  # a photo whose aspect ratio is further off is another photo, or turned

Progress = Callable[[int, int], None]
"""Called with the photos done and all photos, after each batch."""
Figures = Mapping[str, Interval]


@dataclass(frozen=True)
class EncodedGallery:
    """A gallery after the visual stream.

    Attributes:
        arrays: instances; their photo is the position in `dataset.images`.
        unreadable: file name -> reason, of photos that could not be decoded: no instances.
        num_misshapen: photos whose aspect ratio is not the annotated one.
    """

    arrays: Gallery
    unreadable: Mapping[str, str]
    num_misshapen: int


@dataclass(frozen=True, kw_only=True)
class ReirReport:
    """The figures of one evaluation, in percent, each with its 95 % bootstrap interval.

    Attributes:
        definition_b: `br1_50` ... `br10_90`: any instance of the first K is right.
        definition_a: the same, the best instance of the true photo is right and among the first K.
        image_recall: `r1`, `r5`, `r10`.
        rec: `p50` ... `p90`, precision of the top box within the true photo.
        counts: photos, unreadable, misshapen, instances, expressions, without_target.
        digest: of the encoder.
        versions: of the software.
        settings: what was asked for.
    """

    definition_b: Figures
    definition_a: Figures
    image_recall: Figures
    rec: Figures
    counts: Mapping[str, int]
    digest: str
    versions: Mapping[str, str]
    settings: Mapping[str, int | float | str | bool]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: definition B at the top level, the rest by name."""
        named = {
            "definition_a": self.definition_a,
            "image_recall": self.image_recall,
            "rec": self.rec,
        }
        return {
            **_means(self.definition_b),
            **{name: _means(figures) for name, figures in named.items()},
            "intervals": {
                **_ranges(self.definition_b),
                **{name: _ranges(figures) for name, figures in named.items()},
            },
            "counts": dict(self.counts),
            "digest": self.digest,
            "versions": dict(self.versions),
            "settings": dict(self.settings),
        }

    def table(self) -> Table:
        """Return the figures as a table for the terminal."""
        from rich.table import Table

        counts = self.counts
        table = Table(
            title=f"{counts['expressions']} expressions, {counts['photos']} photos, "
            f"{counts['instances']} instances",
            caption=f"percent, 95 % intervals; checkpoint {self.digest[:12]}",
        )
        table.add_column("")
        for k in KS:
            table.add_column(f"@{k}", justify="right")
        for name, figures in (("B", self.definition_b), ("A", self.definition_a)):
            for percent in map(_percent, IOU_THRESHOLDS):
                cells = (_cell(figures[f"br{k}_{percent}"]) for k in KS)
                table.add_row(f"BR, IoU .{percent // 10}, definition {name}", *cells)
        table.add_row("image recall", *(_cell(self.image_recall[f"r{k}"]) for k in KS))
        for name, interval in self.rec.items():
            table.add_row(f"top box in its photo, IoU > .{name[1]}", _cell(interval), "", "")
        return table


def evaluate_reir(
    encoder: InstanceEncoder,
    dataset: ReferringDataset,
    images_dir: str | Path,
    *,
    all_expressions: bool = False,
    progress: Progress | None = None,
) -> ReirReport:
    """Encode a gallery and its expressions, and measure. Equal inputs give an equal report.

    Args:
        encoder: the model.
        dataset: all its photos are the gallery; expressions without an instance are left out.
        images_dir: where the photos are.
        all_expressions: every expression of an instance is a query, instead of the first only.
        progress: called after each batch of photos.

    Raises:
        DataError: no expression has an instance, or photos are missing from `images_dir`.
    """
    _targets(dataset, all_expressions)  # before the long part
    gallery = encode_gallery(encoder, dataset, images_dir, progress=progress)
    return evaluate_gallery(encoder, dataset, gallery, all_expressions=all_expressions)


def encode_gallery(
    encoder: InstanceEncoder,
    dataset: ReferringDataset,
    images_dir: str | Path,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> EncodedGallery:
    """Run the visual stream once over each photo of a dataset.

    A photo that cannot be decoded stays in the gallery without instances and is logged and
    counted; one that is not there at all ends the run.

    Raises:
        DataError: photos are missing, or a file name leads out of `images_dir`.
    """
    paths = _photo_paths(dataset, Path(images_dir))
    total = len(paths)
    unreadable: dict[str, str] = {}
    vectors = [np.empty((0, encoder.dim), dtype=np.float32)]
    boxes_px = [np.empty((0, 4), dtype=np.float32)]
    counts = np.zeros(total, dtype=np.int64)
    num_misshapen = 0
    for first in range(0, total, batch_size):
        batch = list(_readable(dataset, paths, range(first, total)[:batch_size], unreadable))
        found = encoder.encode_images([pixels for _, pixels in batch])
        for (at, pixels), instances in zip(batch, found, strict=True):
            photo = dataset.images[at]
            num_misshapen += _is_misshapen(photo, pixels)
            counts[at] = len(instances)
            vectors.append(instances.vectors)
            boxes_px.append(to_pixels(instances.boxes, photo.width_px, photo.height_px))
        if progress is not None:
            progress(min(first + batch_size, total), total)
    if num_misshapen:
        logger.warning(
            "%s: %d of %d photos have another aspect ratio than annotated; their boxes may not fit",
            dataset.source,
            num_misshapen,
            total,
        )
    images = np.repeat(np.arange(total), counts)
    arrays = Gallery(np.concatenate(vectors), images, np.concatenate(boxes_px))
    return EncodedGallery(arrays, unreadable, num_misshapen)


def evaluate_gallery(
    encoder: InstanceEncoder,
    dataset: ReferringDataset,
    gallery: EncodedGallery,
    *,
    all_expressions: bool = False,
) -> ReirReport:
    """Measure the expressions of a dataset against its encoded gallery; see `evaluate_reir`.

    Raises:
        DataError: no expression has an instance.
    """
    expressions = _targets(dataset, all_expressions)
    queries = _queries(dataset, expressions, encode_expressions(encoder, expressions))
    columns = _successes(queries, gallery.arrays)
    intervals = bootstrap_intervals(
        100.0 * np.stack(list(columns.values()), axis=1),
        clusters=queries.images,
        num_resamples=NUM_RESAMPLES,
    )
    figures: dict[str, dict[str, Interval]] = {}
    for (group, name), interval in zip(columns, intervals, strict=True):
        figures.setdefault(group, {})[name] = interval
    without_target = sum(text.instance_id is None for text in dataset.expressions)
    return ReirReport(
        definition_b=figures["definition_b"],
        definition_a=figures["definition_a"],
        image_recall=figures["image_recall"],
        rec=figures["rec"],
        counts={
            "photos": len(dataset.images),
            "unreadable": len(gallery.unreadable),
            "misshapen": gallery.num_misshapen,
            "instances": len(gallery.arrays),
            "expressions": len(expressions),
            "without_target": without_target,
        },
        digest=encoder.digest,
        versions=_versions(),
        settings={
            "all_expressions": all_expressions,
            "num_candidates": encoder.num_candidates,
            "num_resamples": NUM_RESAMPLES,
        },
    )


def encode_expressions(encoder: InstanceEncoder, expressions: Sequence[Expression]) -> FloatArray:
    """(M, D) vectors of the expressions, in batches."""
    vectors = [np.empty((0, encoder.dim), dtype=np.float32)]
    for first in range(0, len(expressions), _EXPRESSIONS_AT_ONCE):
        batch = expressions[first : first + _EXPRESSIONS_AT_ONCE]
        vectors.append(encoder.encode_expressions([expression.text for expression in batch]))
    return np.concatenate(vectors)


def _targets(dataset: ReferringDataset, all_expressions: bool) -> tuple[Expression, ...]:
    chosen = dataset.with_targets()
    expressions = (chosen if all_expressions else chosen.first_expressions()).expressions
    if not expressions:
        raise DataError(
            f"{dataset.source}: expected expressions that describe an instance, got none of "
            f"{len(dataset.expressions)}; nothing can be measured"
        )
    return expressions


def _queries(
    dataset: ReferringDataset, expressions: Sequence[Expression], vectors: FloatArray
) -> Queries:
    position = {photo.image_id: at for at, photo in enumerate(dataset.images)}
    targets = [dataset.instances_by_id[str(text.instance_id)] for text in expressions]
    return Queries(
        vectors,
        np.array([position[target.image_id] for target in targets], dtype=np.int64),
        np.array([target.box_xyxy_px for target in targets], dtype=np.float64),
    )


def _successes(queries: Queries, gallery: Gallery) -> dict[tuple[str, str], npt.NDArray[np.bool_]]:
    """(group, name) -> (M,) successes of every figure of the report."""
    ranks = reir_ranks(queries, gallery)
    top_boxes_px = np.full((len(queries), 4), np.nan)
    answered = ranks.top_instance >= 0
    top_boxes_px[answered] = gallery.boxes_px[ranks.top_instance[answered]]
    rec = rec_hits(top_boxes_px, queries.boxes_px)
    columns: dict[tuple[str, str], npt.NDArray[np.bool_]] = {}
    for iou in IOU_THRESHOLDS:
        for k in KS:
            columns["definition_b", f"br{k}_{_percent(iou)}"] = ranks.found_b(k, iou)
            columns["definition_a", f"br{k}_{_percent(iou)}"] = ranks.found_a(k, iou)
    for k in KS:
        columns["image_recall", f"r{k}"] = ranks.found_image(k)
    for at, iou in enumerate(rec.iou_thresholds):
        columns["rec", f"p{_percent(iou)}"] = rec.hits[:, at]
    return columns


def _readable(
    dataset: ReferringDataset, paths: Sequence[Path], at_once: range, unreadable: dict[str, str]
) -> Iterator[tuple[int, RgbImage]]:
    """Yield position and pixels of the photos that decode; note the others in `unreadable`."""
    for at in at_once:
        try:
            yield at, read_image(paths[at])
        except ImageError as error:
            unreadable[dataset.images[at].file_name] = error.reason.value
            logger.warning("%s: %s; it has no instances", paths[at], error)


def _photo_paths(dataset: ReferringDataset, images_dir: Path) -> list[Path]:
    paths = [_photo_path(dataset, photo, images_dir) for photo in dataset.images]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} photos of {dataset.source} are not in {images_dir}, "
            f"e.g. {missing[0].relative_to(images_dir)}; pass the folder that file_name starts from"
        )
    return paths


def _photo_path(dataset: ReferringDataset, photo: ReferringImage, images_dir: Path) -> Path:
    name = PurePosixPath(photo.file_name)
    if name.is_absolute() or ".." in name.parts or "\0" in photo.file_name:
        raise DataError(
            f"{dataset.source}: image {photo.image_id!r}: expected a file_name within the folder "
            f"of photos, got {photo.file_name!r}"
        )
    return images_dir / name


def _is_misshapen(photo: ReferringImage, pixels: RgbImage) -> bool:
    height, width = pixels.shape[:2]
    ratio: float = (width * photo.height_px) / (height * photo.width_px)
    return abs(ratio - 1) > _SHAPE_TOLERANCE


def _versions() -> dict[str, str]:
    packages = {"reir": "reir-platform", "numpy": "numpy", "torch": "torch"}
    installed = {name: version(package) for name, package in packages.items()}
    return installed | {"python": ".".join(map(str, sys.version_info[:3]))}


def _percent(share: float) -> int:
    return round(100 * share)


def _means(figures: Figures) -> dict[str, float]:
    return {name: round(interval.mean, 4) for name, interval in figures.items()}


def _ranges(figures: Figures) -> dict[str, list[float]]:
    return {name: [round(i.low, 4), round(i.high, 4)] for name, i in figures.items()}


def _cell(interval: Interval) -> str:
    return f"{interval.mean:.1f} [{interval.low:.1f}-{interval.high:.1f}]"
