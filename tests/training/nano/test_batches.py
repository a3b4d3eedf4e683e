"""Batches of `clare-nano`: repeatable, divided among workers, mirrored consistently."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reir.errors import ConfigError
from reir.images.boxes import pairwise_iou
from reir.text import swap_left_right
from reir_testing.tiny import tiny_batch
from reir_training.config import NanoSchedule
from reir_training.data.examples import TrainExpression, TrainPhoto
from reir_training.nano.batches import NO_PHOTO, BatchMaker, NanoBatch
from reir_training.nano.cache import FrozenCache

NUM_PHOTOS, NUM_CANDIDATES = 12, 5
SETTINGS = NanoSchedule(
    photos_per_batch=4, generated_per_photo=1, wrong_per_expression=1, short_weight=0.3
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FrozenCache:
    """Candidates of 12 photos; the last candidate of each is padding."""
    folder = tmp_path_factory.mktemp("cache")
    batch = tiny_batch(NUM_PHOTOS, NUM_CANDIDATES)
    batch.valid[:, -1] = False
    for name, value in batch.tensors().items():
        np.save(folder / f"{name}.npy", value.numpy())
    return FrozenCache(folder)


def photos_of(cache: FrozenCache) -> list[TrainPhoto]:
    """Two annotated boxes per photo on its first two candidates, and one without a candidate."""
    photos = []
    for row in range(NUM_PHOTOS):
        boxes = np.concatenate([cache.boxes(row)[:2], [[0.0, 0.97, 0.02, 1.0]]])
        photos.append(
            TrainPhoto(
                path=Path(f"{row}.jpg"),
                split="val" if row == NUM_PHOTOS - 1 else "train",
                boxes=boxes.astype(np.float32),
                categories=np.array([0, -1, 2]),
                names=("person", "gnome", "car"),
                expressions=(
                    TrainExpression(f"the person left in {row}", 0, "long"),
                    TrainExpression("left one", 1, "short"),
                    TrainExpression("a car that no candidate reaches", 2, "long"),
                ),
                captions=(f"a photo {row} with a left side",),
                near_misses=("a wrong photo",) if row % 2 else (),
            )
        )
    return photos


@pytest.fixture(scope="module")
def maker(cache: FrozenCache) -> BatchMaker:
    return BatchMaker(photos_of(cache), cache, SETTINGS)


def draw(maker: BatchMaker, rows: list[int], *, mirrored: bool) -> NanoBatch:
    """The batch of the first seed that is mirrored, or that is not."""
    seed = next(s for s in range(99) if (np.random.default_rng([s]).random() < 0.5) == mirrored)
    return maker.batch(rows, [seed])


def texts_by_kind(batch: NanoBatch) -> tuple[list[str], list[str], list[str]]:
    """Expressions, captions, and sentences with a wrong word."""
    first, second = len(batch.owner), len(batch.owner) + len(batch.caption_owner)
    return batch.texts[:first], batch.texts[first:second], batch.texts[second:]


def assert_same(a: NanoBatch, b: NanoBatch) -> None:
    assert a.texts == b.texts
    names = ("owner", "overlap", "cross_weight", "caption_owner", "altered", "matched")
    for name in (*names, "matched_boxes"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.candidates.boxes, b.candidates.boxes)


# ----------------------------------------------------------------------------------------- epochs


def test_an_epoch_uses_training_photos_at_most_once(maker: BatchMaker) -> None:
    rows = [row for batch in maker.epoch(0, 0, 1) for row in batch]
    assert len(rows) == len(set(rows)) == 8  # two whole batches of the eleven
    assert NUM_PHOTOS - 1 not in rows


def test_epochs_are_repeatable_and_differ(maker: BatchMaker) -> None:
    assert maker.epoch(3, 0, 1) == maker.epoch(3, 0, 1)
    assert maker.epoch(3, 0, 1) != maker.epoch(4, 0, 1)


def test_the_seed_changes_the_order(cache: FrozenCache) -> None:
    other = BatchMaker(photos_of(cache), cache, SETTINGS.model_copy(update={"seed": 1}))
    same = BatchMaker(photos_of(cache), cache, SETTINGS)
    assert same.epoch(0, 0, 1) != other.epoch(0, 0, 1)


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_partition_the_epoch(maker: BatchMaker, world_size: int) -> None:
    shares = [maker.epoch(1, rank, world_size) for rank in range(world_size)]
    alone = maker.epoch(1, 0, 1)
    assert len({len(share) for share in shares}) == 1
    together = [[row for part in step for row in part] for step in zip(*shares, strict=True)]
    assert together == alone


def test_photos_that_look_alike_follow_each_other(cache: FrozenCache) -> None:
    photos = photos_of(cache)
    pairs = ((0, 7), (2, 9), (3, NUM_PHOTOS - 1))  # the last one is held out
    for one, other in pairs:
        photos[one] = replace(photos[one], look_alikes=frozenset({f"{other}.jpg", "gone.jpg"}))
        photos[other] = replace(photos[other], look_alikes=frozenset({f"{one}.jpg"}))
    maker = BatchMaker(photos, cache, SETTINGS.model_copy(update={"photos_per_batch": 1}))
    for epoch in range(5):
        order = [row for batch in maker.epoch(epoch, 0, 1) for row in batch]
        assert sorted(order) == list(range(NUM_PHOTOS - 1))
        for one, other in pairs[:2]:
            assert abs(order.index(one) - order.index(other)) == 1


def test_too_few_photos_for_one_batch_are_refused(cache: FrozenCache) -> None:
    settings = SETTINGS.model_copy(update={"photos_per_batch": 12})
    with pytest.raises(ConfigError, match=r"photos_per_batch=12 .* 11 training photos"):
        BatchMaker(photos_of(cache), cache, settings)


# ---------------------------------------------------------------------------------------- batches


def test_a_batch_is_repeatable(maker: BatchMaker) -> None:
    rows = maker.epoch(0, 0, 1)[0]
    first, second = (maker.batch(rows, [0, 0, 5]) for _ in range(2))
    assert_same(first, second)


def test_the_texts_of_a_photo_do_not_depend_on_the_rest_of_the_batch(maker: BatchMaker) -> None:
    for seed in range(10):
        whole, parts = maker.batch([4, 5], [seed]), [maker.batch([row], [seed]) for row in (4, 5)]
        assert torch.equal(
            whole.candidates.boxes[:2], torch.cat([part.candidates.boxes[:1] for part in parts])
        )
        for kind in range(3):
            of_parts = [text for part in parts for text in texts_by_kind(part)[kind]]
            assert of_parts == texts_by_kind(whole)[kind]


def test_a_batch_contains_written_and_generated_expressions(
    maker: BatchMaker, cache: FrozenCache
) -> None:
    batch = draw(maker, [4, 5], mirrored=False)
    num = len(batch.owner)
    assert num == 2 * (2 + 1)  # two reachable written ones and a generated one each
    assert batch.texts[:2] == ["the person left in 4", "left one"]
    assert batch.owner.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.cross_weight.tolist() == pytest.approx([1.0, 0.3, 0.0] * 2)
    assert len(batch.texts) == num + len(batch.caption_owner) + len(batch.altered)
    assert "a car that no candidate reaches" not in batch.texts
    for m, box in ((0, 0), (1, 1), (3, 0)):
        row = [4, 5][int(batch.owner[m])]
        boxes = cache.boxes(row)
        want = pairwise_iou(boxes, boxes[box : box + 1])[:, 0]
        np.testing.assert_allclose(batch.overlap[m, :-1].numpy(), want, atol=1e-6)
        assert batch.overlap[m, -1] == 0  # padding


def test_sentences_with_a_wrong_word_follow_their_expression(maker: BatchMaker) -> None:
    for mirrored in (False, True):
        batch = draw(maker, [4, 5], mirrored=mirrored)
        assert batch.altered.tolist() == [0, 1, 3, 4]  # the written ones
        for text, row in zip(texts_by_kind(batch)[2], batch.altered.tolist(), strict=True):
            right, wrong = batch.texts[row].split(), text.split()
            assert sum(a != b for a, b in zip(right, wrong, strict=False)) >= 1
            assert text != batch.texts[row]


def test_captions_have_a_photo_and_near_misses_have_none(maker: BatchMaker) -> None:
    seen = set()
    for seed in range(20):
        batch = maker.batch([4, 5], [seed])
        captions = texts_by_kind(batch)[1]
        for text, owner in zip(captions, batch.caption_owner.tolist(), strict=True):
            seen.add(owner)
            if owner == NO_PHOTO:
                assert text == "a wrong photo"
            else:
                assert text.startswith(f"a photo {[4, 5][owner]} ")
    assert seen == {0, 1, NO_PHOTO}


def test_matched_candidates_overlap_their_box(maker: BatchMaker) -> None:
    for mirrored in (False, True):
        batch = draw(maker, [1, 2, 3], mirrored=mirrored)
        assert len(batch.matched) >= 6
        for (photo, candidate), box, category in zip(
            batch.matched.tolist(),
            batch.matched_boxes.numpy(),
            batch.matched_classes.tolist(),
            strict=True,
        ):
            here = batch.candidates.boxes[photo, candidate].numpy()
            assert pairwise_iou(here[None], box[None])[0, 0] >= 0.5
            assert category in (0, -1)


def test_the_mirrored_batch_swaps_sides_everywhere(maker: BatchMaker) -> None:
    plain, flipped = (draw(maker, [0, 2], mirrored=m) for m in (False, True))
    x1, y1, x2, y2 = plain.candidates.boxes.unbind(-1)
    torch.testing.assert_close(flipped.candidates.boxes, torch.stack([1 - x2, y1, 1 - x1, y2], -1))
    num = plain.num_photos
    torch.testing.assert_close(plain.candidates.boxes[num:], flipped.candidates.boxes[:num])
    written = [i for i, w in enumerate(plain.cross_weight) if w > 0]
    assert written
    assert plain.sided[written].all()
    for i in written:
        assert flipped.texts[i] == swap_left_right(plain.texts[i])
        assert "right" in flipped.texts[i]
    x1, y1, x2, y2 = plain.matched_boxes.unbind(-1)
    want = torch.stack([1 - x2, y1, 1 - x1, y2], -1)
    torch.testing.assert_close(flipped.matched_boxes, want)
    assert torch.equal(flipped.overlap[written], plain.overlap[written])


def test_photos_without_annotation_give_an_empty_batch(cache: FrozenCache) -> None:
    bare = TrainPhoto(
        path=Path("bare.jpg"),
        split="train",
        boxes=np.zeros((0, 4), np.float32),
        categories=np.zeros(0, np.int64),
        names=(),
        expressions=(),
    )
    maker = BatchMaker([bare] * 4, cache, SETTINGS)
    for mirrored in (False, True):
        batch = draw(maker, [0, 1], mirrored=mirrored)
        assert batch.texts == []
        assert batch.overlap.shape == (0, NUM_CANDIDATES)
        assert batch.matched.shape == (0, 2)
        assert batch.matched_boxes.shape == (0, 4)
