"""Calibrates a checkpoint on annotated photos, and stores the calibration beside its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reir.checkpoint import load_candidate_head, load_color_reader
from reir.datasets.dataset import Expression, ReferringDataset
from reir.evaluate import Encoding, encode_gallery
from reir.models.interfaces import InstanceEncoder
from reir.query.presence import Background, Calibration, load_background, save_calibration
from reir_training.report.calibration import (
    SEED,
    draw_galleries,
    draw_photos,
    fit_calibration,
)
from reir_training.report.calibration_pixels import PixelReaders
from reir_training.report.calibration_queries import calibration_queries
from reir_training.report.score_table import ScoreTable


def calibrate_checkpoint(  # noqa: PLR0913 - the last two are by name
    checkpoint: Path,
    encoder: InstanceEncoder,
    dataset: ReferringDataset,
    images_dir: Path,
    expressions: Sequence[Expression],
    *,
    about: Mapping[str, Any],
    how: Encoding | None = None,
) -> Calibration:
    """Fit the calibration of a checkpoint and write it.

    If the checkpoint has a color head, its calibration also serves searches that verify colors, and
    if it has a candidate head, also questions about a single photo that use it.

    Args:
        checkpoint: checkpoint directory.
        encoder: that of the checkpoint.
        dataset: photos that the checkpoint was not trained on.
        images_dir: their folder.
        expressions: of instances in them.
        about: describes the photos; stored in the calibration.
        how: how the photos are encoded.

    Raises:
        DataError: there are too few photos or expressions.
        CheckpointError: a head was trained with another model, or cannot be loaded.
    """
    background = load_background(checkpoint, encoder.digest)
    readers = pixel_readers(checkpoint, encoder)
    scored = score_photos(readers, background, dataset, images_dir, expressions, how=how)
    calibration = fit_calibration(scored, background, encoder.digest, about)
    save_calibration(checkpoint, calibration)
    return calibration


def pixel_readers(checkpoint: Path, encoder: InstanceEncoder) -> PixelReaders:
    """Load the parts of a checkpoint that read photos after a search.

    Raises:
        CheckpointError: a head was trained with another model, or cannot be loaded.
    """
    return PixelReaders(
        encoder, load_color_reader(checkpoint, encoder), load_candidate_head(checkpoint)
    )


def score_photos(  # noqa: PLR0913 - two parts of a checkpoint, and three of a dataset
    readers: PixelReaders,
    background: Background,
    dataset: ReferringDataset,
    images_dir: Path,
    expressions: Sequence[Expression],
    *,
    how: Encoding | None = None,
) -> ScoreTable:
    """Score expressions on photos, and open the photos of all trials that `SEED` draws.

    Args:
        readers, background: of the checkpoint.
        dataset, images_dir, expressions, how: see `calibrate_checkpoint`.
    """
    queries = calibration_queries(readers.encoder, dataset, expressions)
    gallery = encode_gallery(readers.encoder, dataset, images_dir, how=how).arrays
    scored = ScoreTable(gallery, queries, background)
    searches = ((expression, photos) for expression, _, photos in draw_galleries(scored, SEED))
    photos = draw_photos(scored, SEED)
    readers.read(scored, dataset, images_dir, searches=searches, photos=photos)
    return scored
