"""Calibrates a checkpoint on annotated photos, and stores the calibration beside its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reir.datasets.dataset import Expression, ReferringDataset
from reir.evaluate import Encoding, encode_gallery
from reir.models.interfaces import InstanceEncoder
from reir.query.presence import Calibration, load_background, save_calibration
from reir_training.report.calibration import fit_calibration
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
    """
    queries = calibration_queries(encoder, dataset, expressions)
    gallery = encode_gallery(encoder, dataset, images_dir, how=how).arrays
    background = load_background(checkpoint, encoder.digest)
    calibration = fit_calibration(gallery, queries, background, encoder.digest, about)
    save_calibration(checkpoint, calibration)
    return calibration
