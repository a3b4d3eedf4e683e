"""Text-to-image retrieval: the photo that a text was written for, among all photos.

A photo is found by its best instance (clare.md 1.4, the released evaluator), or by the one vector
that the encoder gives the whole photo. Both are measured, since an index holds both.
"""

# Shapes: M texts, P photos

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reir.datasets import Caption, ReferringDataset
from reir.errors import DataError
from reir.evaluate.gallery import Encoding, encode_expressions, encode_gallery, image_positions
from reir.evaluate.published import PublishedTable, tir_table
from reir.evaluate.reports import (
    Figures,
    Measured,
    beside,
    cell,
    figure_table,
    intervals,
    means,
    measured,
    ranges,
    stacked,
)
from reir.metrics import image_ranks
from reir.metrics.reir import Ints
from reir.models.seams import InstanceEncoder

if TYPE_CHECKING:
    from rich.console import RenderableType

KS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class TirReport:
    """The figures of one evaluation, in percent, with 95 % bootstrap intervals.

    Attributes:
        best_instance: `r1`, `r5`, `r10` of photos by their best instance.
        photo_vector: the same by the vector of the whole photo.
        published: figures of others on the same split; None on any other.
        measured: on what, and with what.
    """

    best_instance: Figures
    photo_vector: Figures
    published: PublishedTable | None
    measured: Measured

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        named = {"best_instance": self.best_instance, "photo_vector": self.photo_vector}
        return {
            **{name: means(figures) for name, figures in named.items()},
            "intervals": {name: ranges(figures) for name, figures in named.items()},
            "published": self.published.to_dict() if self.published else None,
            **self.measured.to_dict(),
        }

    def table(self) -> RenderableType:
        """Return the figures as tables for the terminal."""
        rows = {
            "by the best instance": self.best_instance,
            "by the vector of the photo": self.photo_vector,
        }
        table = figure_table(f"{self.measured.counts['texts']:,} texts", [f"R@{k}" for k in KS])
        for name, figures in rows.items():
            table.add_row(name, *(cell(figures[f"r{k}"]) for k in KS))
        parts: list[RenderableType] = [table]
        if self.published:
            ours = {name: {"r1": figures["r1"].mean} for name, figures in rows.items()}
            parts += ["", *beside(self.published, ["R@1"], ours)]
        return stacked(parts, self.measured.notes())


def evaluate_tir(
    encoder: InstanceEncoder,
    dataset: ReferringDataset,
    texts: Sequence[Caption],
    images_dir: str | Path,
    *,
    how: Encoding | None = None,
) -> TirReport:
    """Encode a gallery and texts about its photos, and measure. Equal inputs give an equal report.

    Args:
        encoder: the model.
        dataset: all its photos are the gallery.
        texts: each about a photo of the gallery.
        images_dir: where the photos are.
        how: where the gallery is encoded, and what is kept of it.

    Raises:
        DataError: there are no texts, or photos are missing from `images_dir`.
    """
    if not texts:
        raise DataError(f"{dataset.source}: no text is about a photo of it; nothing to measure")
    images = image_positions(dataset, [text.image_id for text in texts])
    vectors = encode_expressions(encoder, [text.text for text in texts])
    gallery = encode_gallery(encoder, dataset, images_dir, how=how)
    instances = gallery.arrays
    published = tir_table(len(dataset.images), len(texts))
    return TirReport(
        best_instance=_figures(
            image_ranks(vectors, images, instances.vectors, instances.images), images
        ),
        photo_vector=_figures(
            image_ranks(vectors, images, gallery.image_vectors, gallery.image_rows), images
        ),
        published=published,
        measured=measured(
            encoder,
            gallery,
            counts={"texts": len(texts)},
            settings={},
            left_out={} if published else {"published figures": "this is not REIRCOCO's val split"},
        ),
    )


def texts_of(dataset: ReferringDataset) -> tuple[Caption, ...]:
    """Return the expressions that describe an instance as texts about its photo."""
    return tuple(
        Caption(caption_id=text.expression_id, image_id=text.image_id, text=text.text)
        for text in dataset.with_targets().expressions
    )


def _figures(ranks: Ints, images: Ints) -> Figures:
    return intervals({f"r{k}": ranks < k for k in KS}, images)
