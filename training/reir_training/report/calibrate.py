"""Calibrates a checkpoint on annotated photos, and stores the calibration beside its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reir.checkpoint import load_color_reader
from reir.datasets.dataset import Expression, ReferringDataset
from reir.evaluate import Encoding, encode_gallery
from reir.models.interfaces import InstanceEncoder
from reir.query.presence import Calibration, load_background, save_calibration
from reir_training.report.calibration import (
    SEED,
    ScoreTable,
    draw_galleries,
    draw_photos,
    fit_calibration,
)
from reir_training.report.calibration_colors import read_colors
from reir_training.report.calibration_queries import calibration_queries


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
    queries = calibration_queries(encoder, dataset, expressions)
    gallery = encode_gallery(encoder, dataset, images_dir, how=how).arrays
    background = load_background(checkpoint, encoder.digest)
    scored = ScoreTable(gallery, queries, background)
    if (reader := load_color_reader(checkpoint, encoder)) is not None:
        scored.readings = read_colors(
            scored,
            reader,
            dataset,
            images_dir,
            searches=(
                (expression, photos) for expression, _, photos in draw_galleries(scored, SEED)
            ),
            photos=draw_photos(scored, SEED),
        )
    calibration = fit_calibration(scored, background, encoder.digest, about)
    save_calibration(checkpoint, calibration)
    return calibration
