"""Masks in every store: only versions with masks store them, by instance id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from reir.errors import GalleryNotFound
from reir.images.rle import encode
from reir.records import ImageRecord, IndexedImage
from reir.store import InstanceStore, VersionSpec

SPEC = VersionSpec(dim=8, digest="ab" * 32, settings={"num_candidates": 30})
V = "v1"

MakeImage = Callable[..., IndexedImage]


def masked(image: IndexedImage, seed: int = 0) -> IndexedImage:
    """The same image, each instance with a mask of its own."""
    assert image.instances is not None
    rng = np.random.default_rng(seed)
    masks = tuple(encode(rng.random((20, 30)) < 0.5) for _ in range(len(image.instances)))
    return replace(image, instances=replace(image.instances, masks=masks))


@pytest.mark.parametrize("keeps", [True, False])
def test_masks_are_returned_if_the_version_has_masks(
    store: InstanceStore, gallery: str, make_image: MakeImage, keeps: bool
) -> None:
    spec = replace(SPEC, settings={**SPEC.settings, "masks": True}) if keeps else SPEC
    store.create_version(gallery, V, spec)
    first, second = masked(make_image("a", 3)), masked(make_image("b", 2), seed=1)
    record = ImageRecord(image_id="d", uri="file:///d", status="failed", reason="empty")
    failed = IndexedImage(record, None)
    store.upsert_images(gallery, V, [first, second, make_image("c", 2), failed])
    assert store.versions(gallery)[0].spec.has_masks == keeps
    assert first.instances is not None
    assert first.instances.masks is not None
    wanted = ["b#1", "a#2", "c#0", "d#0", "a#9", "e#0"]
    found = store.get_masks(gallery, V, wanted)
    assert list(found) == (["b#1", "a#2"] if keeps else [])
    if keeps:
        assert found["a#2"] == first.instances.masks[2]
    store.upsert_images(gallery, V, [masked(make_image("a", 1, seed=3), seed=4)])
    store.delete_images(gallery, V, ["b"])
    again = store.get_masks(gallery, V, ["a#0", "a#2", "b#1"])
    assert list(again) == (["a#0"] if keeps else [])
    assert again.get("a#0") != first.instances.masks[0]
    assert len(store.search(gallery, V, np.ones((1, 8), np.float32), 9)[0]) == 3
    assert len(store.get_instances(gallery, V, ["a", "c"])["c"]) == 2
    assert store.get_masks(gallery, V, []) == {}
    with pytest.raises(GalleryNotFound):
        store.get_masks(gallery, "v2", ["a#0"])
