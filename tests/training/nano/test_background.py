"""The background of a checkpoint: the vectors of the best instances of training photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reir_testing.tiny import tiny_batch, tiny_model
from reir_training.nano.background import INSTANCES, background_vectors
from reir_training.nano.cache import FrozenCache

PHOTOS, CANDIDATES = 5, 12


@pytest.fixture
def cache(tmp_path: Path) -> FrozenCache:
    """Five photos; the third one has too few candidates."""
    batch = tiny_batch(PHOTOS, CANDIDATES)
    batch.valid[2, INSTANCES - 1 :] = False
    for name, value in batch.tensors().items():
        np.save(tmp_path / f"{name}.npy", value.numpy())
    return FrozenCache(tmp_path)


def test_it_has_the_best_instances_of_photos_that_have_enough(cache: FrozenCache) -> None:
    model = tiny_model().train()
    found = background_vectors(model, cache, [0, 2, 4], half=False)
    assert model.training
    with torch.inference_mode():
        wanted = model.eval().encode_photos(cache.batch([0, 2, 4])).vectors[[0, 2], :INSTANCES]
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)


def test_a_long_list_of_photos_is_sampled_evenly(
    cache: FrozenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reir_training.nano.background.PHOTOS", 2)
    found = background_vectors(tiny_model(), cache, [0, 1, 3, 4], half=False)
    wanted = background_vectors(tiny_model(), cache, [0, 3], half=False)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_no_photo_gives_an_empty_background(cache: FrozenCache) -> None:
    assert background_vectors(tiny_model(), cache, [2], half=False).shape == (0, INSTANCES, 33)
