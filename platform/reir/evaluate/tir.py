"""Evaluation of text-to-image retrieval (TIR): find the photo that a text was written for.

Photos are ranked by their best instance (docs/clare.md, section 1.4), or by the vector
of the whole photo. Both are measured, since an index stores both.
"""

# Shapes: M texts, P photos

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reir.datasets import Caption, ReferringDataset
from reir.errors import DataError
from reir.evaluate.encoded_gallery import (
    Encoding,
    encode_expressions,
    encode_gallery,
    image_positions,
)
from reir.evaluate.published import PublishedTable, tir_table
from reir.evaluate.reports import (
    EvaluationInfo,
    Figures,
    cell,
    comparison,
    evaluation_info,
    figure_table,
    intervals,
    report_values,
    with_notes,
)
from reir.metrics import image_ranks
from reir.metrics.reir import Ints
from reir.models.interfaces import InstanceEncoder

if TYPE_CHECKING:
    from rich.console import RenderableType

KS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class TirReport:
    """The figures of one evaluation, in percent, with 95 % bootstrap intervals.

    Attributes:
        best_instance: `r1`, `r5`, `r10` with photos ranked by their best instance.
        photo_vector: the same figures with photos ranked by the vector of the whole photo.
        published: published results on the same split; None if there are none.
        info: the data, encoder and settings of the evaluation.
    """

    best_instance: Figures
    photo_vector: Figures
    published: PublishedTable | None
    info: EvaluationInfo

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        named = {"best_instance": self.best_instance, "photo_vector": self.photo_vector}
        return report_values(named, self.published, self.info)

    def table(self) -> RenderableType:
        """Return the figures as tables for the terminal."""
        rows = {
            "by the best instance": self.best_instance,
            "by the vector of the photo": self.photo_vector,
        }
        table = figure_table(f"{self.info.counts['texts']:,} texts", [f"R@{k}" for k in KS])
        for name, figures in rows.items():
            table.add_row(name, *(cell(figures[f"r{k}"]) for k in KS))
        parts: list[RenderableType] = [table]
        if self.published:
            ours = {name: {"r1": figures["r1"].mean} for name, figures in rows.items()}
            parts += ["", *comparison(self.published, ["R@1"], ours)]
        return with_notes(parts, self.info.notes())


def evaluate_tir(
    encoder: InstanceEncoder,
    dataset: ReferringDataset,
    texts: Sequence[Caption],
    images_dir: str | Path,
    *,
    how: Encoding | None = None,
) -> TirReport:
    """Encode a gallery and texts about its photos, and measure. The result is deterministic.

    Args:
        encoder: the model.
        dataset: all its photos form the gallery.
        texts: texts that were each written for one photo of the gallery.
        images_dir: folder of the photos.
        how: how the gallery is encoded.

    Raises:
        DataError: there are no texts, or photos are missing from `images_dir`.
    """
    if not texts:
        raise DataError(
            f"{dataset.source}: no text is about any of its photos; there is nothing to measure"
        )
    images = image_positions(dataset, [text.image_id for text in texts])
    vectors = encode_expressions(encoder, [text.text for text in texts])
    gallery = encode_gallery(encoder, dataset, images_dir, how=how)
    instances = gallery.arrays
    published = tir_table(len(dataset.images), len(texts))
    return TirReport(
        best_instance=_figures(
            image_ranks(vectors, images, instances.vectors, instances.images), images
        ),
        # Only photos that could be decoded have a vector; the others are unranked.
        photo_vector=_figures(
            image_ranks(vectors, images, gallery.image_vectors, gallery.image_rows), images
        ),
        published=published,
        info=evaluation_info(
            encoder,
            gallery,
            counts={"texts": len(texts)},
            settings={},
            left_out={} if published else {"published figures": "this is not REIRCOCO's val split"},
        ),
    )


def texts_of(dataset: ReferringDataset) -> tuple[Caption, ...]:
    """Return the expressions that describe an instance, as texts about the whole photo."""
    return tuple(
        Caption(caption_id=text.expression_id, image_id=text.image_id, text=text.text)
        for text in dataset.with_targets().expressions
    )


def _figures(ranks: Ints, images: Ints) -> Figures:
    return intervals({f"r{k}": ranks < k for k in KS}, images)
