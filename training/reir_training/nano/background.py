"""Computes the `Background` of a checkpoint: instances of training photos."""

# Shapes: P photos, I instances of each, D vector dimension

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from reir.models.nano.model import ClareNano
from reir.records import FloatArray
from reir_training.nano.cache import FrozenCache

PHOTOS, INSTANCES = 1000, 10
"""With fewer photos, presence is predicted less well; with more, hardly better (docs/LOG.md)."""
BATCH = 16


def background_vectors(
    model: ClareNano, cache: FrozenCache, rows: Sequence[int], *, half: bool
) -> FloatArray:
    """Return the (P, I, D) vectors of the best instances of training photos.

    Args:
        model: trained model.
        cache: output of its frozen part.
        rows: training photos; if there are more than `PHOTOS`, a part of them is used, and photos
            with fewer than `INSTANCES` candidates are left out.
        half: run the model under bf16 autocast.
    """
    chosen = rows[:: max(1, len(rows) // PHOTOS)][:PHOTOS]
    was_training, device = model.training, model.log_scale.device
    model.eval()
    parts = [np.zeros((0, INSTANCES, model.config.vector_dim), dtype=np.float32)]
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        for start in range(0, len(chosen), BATCH):
            batch = cache.batch(chosen[start : start + BATCH])
            full = batch.valid.sum(1) >= INSTANCES
            vectors = model.encode_photos(batch.to(device)).vectors
            if full.any():
                parts.append(vectors.cpu()[full, :INSTANCES].float().numpy())
    model.train(was_training)
    return np.concatenate(parts)
