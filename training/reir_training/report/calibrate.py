"""Calibrates a checkpoint on annotated photos, and stores the calibration beside its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reir.checkpoint import load_color_reader
from reir.datasets.dataset import Expression, ReferringDataset
from reir.evaluate import Encoding, encode_gallery
from reir.models.interfaces import InstanceEncoder, candidate_dims
from reir.query.presence import Background, Calibration, load_background, save_calibration
from reir_training.report.calibration import (
    SEED,
    draw_galleries,
    draw_photos,
    fit_calibration,
)
from reir_training.report.calibration_pixels import read_pixels
from reir_training.report.calibration_queries import calibration_queries
from reir_training.report.score_table import ScoreTable

if TYPE_CHECKING:
    from reir.models.nano.color_reader import ColorReader


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

    If the checkpoint has a color head, its calibration also serves searches that verify colors.

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
        CheckpointError: the color head was trained with another model, or cannot be loaded.
    """
    background = load_background(checkpoint, encoder.digest)
    model = (encoder, load_color_reader(checkpoint, encoder), background)
    scored = score_photos(*model, dataset, images_dir, expressions, how=how)
    calibration = fit_calibration(scored, background, encoder.digest, about)
    save_calibration(checkpoint, calibration)
    return calibration


def score_photos(  # noqa: PLR0913 - three parts of a checkpoint, and three of a dataset
    encoder: InstanceEncoder,
    reader: ColorReader | None,
    background: Background,
    dataset: ReferringDataset,
    images_dir: Path,
    expressions: Sequence[Expression],
    *,
    how: Encoding | None = None,
) -> ScoreTable:
    """Score expressions on photos, and open the photos of all trials that `SEED` draws.

    Args:
        encoder, reader, background: of the checkpoint; without a reader, no photo is opened.
        dataset, images_dir, expressions, how: see `calibrate_checkpoint`.
    """
    queries = calibration_queries(encoder, dataset, expressions)
    gallery = encode_gallery(encoder, dataset, images_dir, how=how).arrays
    scored = ScoreTable(gallery, queries, background, candidate_dims(encoder))
    if reader is not None:
        searches = ((expression, photos) for expression, _, photos in draw_galleries(scored, SEED))
        photos = draw_photos(scored, SEED)
        scored.pixels = read_pixels(
            reader, scored, dataset, images_dir, searches=searches, photos=photos
        )
    return scored
