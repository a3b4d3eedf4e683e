"""CLARE behind the encoder seam: photos and texts in, instances and vectors out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from reir.images.decode import pad_and_stack
from reir.images.rle import decode
from reir.models.clare.config import clare_base
from reir.models.clare.encoder import (
    ClareEncoder,
    candidates,
    clean_expression,
    instances_of,
    model_input,
    resized,
    scored_by,
    target_size,
    tokenize,
)
from reir.models.clare.model import ClareOutput
from reir.models.interfaces import ExpressionChooser, InstanceEncoder
from reir.records import RgbImage
from reir_testing.boxes import nms
from reir_testing.tiny import tiny_tokenizer
from reir_testing.tiny_clare import tiny_clare, tiny_clare_config

SIZES = [(70, 100), (90, 60), (64, 64), (50, 110), (300, 220)]


def photo(height: int, width: int, seed: int = 0) -> RgbImage:
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def photos() -> list[RgbImage]:
    return [photo(height, width, seed) for seed, (height, width) in enumerate(SIZES)]


def encoder(**options: int | bool) -> ClareEncoder:
    return ClareEncoder(tiny_clare(), tiny_tokenizer(), "d" * 64, **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ candidates


def output_of(boxes: Tensor, logits: Tensor) -> ClareOutput:
    """(B, N, 4) boxes and (B, N) logits, best first, as the model gives them."""
    num = logits.shape[1]
    objects = torch.randn(2, *logits.shape, 5, generator=torch.Generator().manual_seed(0))
    return ClareOutput(
        objects=objects,
        boxes=torch.stack([torch.rand(boxes.shape), boxes]),
        proposal_logits=logits,
        proposal_boxes=boxes,
        token_logits=logits,
        token_boxes=boxes,
        token_valid=torch.ones(len(logits), num, dtype=torch.bool),
    )


def test_candidates_equal_the_slow_reference() -> None:
    random = torch.Generator().manual_seed(1)
    corner = torch.rand(3, 60, 2, generator=random) * 1.1 - 0.1  # some reach beyond the photo
    boxes = torch.cat([corner, corner + torch.rand(3, 60, 2, generator=random) * 0.5 + 0.01], -1)
    logits = torch.randn(3, 60, generator=random).sort(dim=1, descending=True).values
    logits[:, 10:14] = logits[:, 10:11]  # ties keep their order
    boxes[0, 0, 2:] = boxes[0, 0, :2]  # covers nothing
    output = output_of(boxes, logits)
    got = candidates(output, 12, 0.5)
    for b in range(3):
        clipped = boxes[b].clamp(0, 1)
        wide = ((clipped[:, 2:] - clipped[:, :2]) >= 1e-3).all(-1).nonzero()[:, 0]
        kept = wide[torch.from_numpy(nms(clipped[wide].numpy(), logits[b, wide].numpy(), 0.5, 12))]
        count = int(got.counts[b])
        assert count == len(kept)
        torch.testing.assert_close(got.boxes[b, :count], clipped[kept])
        torch.testing.assert_close(got.objectness[b, :count], logits[b, kept].sigmoid())
        torch.testing.assert_close(got.vectors[b, :count], output.objects[-1, b, kept])


def test_tokens_without_a_proposal_are_not_candidates() -> None:
    boxes = torch.tensor([[[0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.9, 0.9]]])
    assert candidates(output_of(boxes, torch.tensor([[0.3, -1e4]])), 5, 0.7).counts.tolist() == [1]
    assert candidates(output_of(boxes, torch.full((1, 2), -1e4)), 5, 0.7).counts.tolist() == [0]


def test_a_number_of_candidates_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        candidates(output_of(torch.rand(1, 2, 4), torch.zeros(1, 2)), 0, 0.7)


def test_the_vector_of_a_photo_is_the_weighted_mean_of_its_instances() -> None:
    boxes, objectness = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2), torch.tensor([0.9, 0.3])
    vectors = torch.eye(4)[:2]
    want = torch.tensor([0.9, 0.3, 0, 0]) / (0.9**2 + 0.3**2) ** 0.5
    found = instances_of(boxes, objectness, vectors)
    torch.testing.assert_close(torch.from_numpy(found.image_vector), want)
    nothing = instances_of(boxes[:0], objectness[:0], vectors[:0])
    assert len(nothing) == 0
    assert not nothing.image_vector.any()


# -------------------------------------------------------------------------------- photos, texts


@pytest.mark.parametrize(
    ("size", "want"),
    [
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((400, 1000), (533, 1333)),
        ((2000, 2000), (800, 800)),
        ((5000, 1), (1333, 1)),
    ],
)
def test_sides_of_a_resized_photo(size: tuple[int, int], want: tuple[int, int]) -> None:
    assert target_size(np.zeros((*size, 3), dtype=np.uint8), clare_base()) == want


def as_input(photos: Sequence[RgbImage]) -> tuple[Tensor, Tensor]:
    pixels, sizes = map(torch.from_numpy, pad_and_stack(photos))
    return model_input(pixels, sizes, tiny_clare_config())


def test_pixels_are_resized_and_normalized() -> None:
    image, config = photo(128, 192), tiny_clare_config()
    pixels, mask = as_input([resized(image, config)])
    assert not mask.any()
    smaller = Image.fromarray(image).resize((96, 64), Image.Resampling.BILINEAR)
    want = np.asarray(smaller, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels[0], torch.from_numpy(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "image",
    [np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)],
    ids=["empty", "grey", "float"],
)
def test_images_that_are_not_rgb_photos_are_refused(image: RgbImage) -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8, not empty"):
        encoder().encode_images([image])


def test_batch_is_padded_on_the_right_and_bottom() -> None:
    white = [np.full((*size, 3), 255, np.uint8) for size in ((40, 64), (33, 20))]
    pixels, mask = as_input(white)
    assert pixels.shape == (2, 3, 64, 64)
    assert torch.equal(pixels[:, 0] == 0, mask)
    assert (~mask).sum(dim=(1, 2)).tolist() == [40 * 64, 33 * 20]
    assert not mask[1, :33, :20].any()


def test_expressions_lose_their_punctuation() -> None:
    text = 'The "Man\'s" left-hand/right (cup), #2: ok; no? yes! *a.b*'
    assert clean_expression(text) == "the mans left hand right cup 2 ok no yes ab"


def test_texts_are_padded_or_truncated_and_keep_the_end_token() -> None:
    tokenizer, config = tiny_tokenizer(), tiny_clare_config()
    short, long = tokenize(tokenizer, ["the red dog", "the " * 30], config).tolist()
    end = tokenizer.token_to_id("[SEP]")
    assert short == [*tokenizer.encode("the red dog").ids, 1, 1, 1]
    assert len(long) == 8
    assert long[-1] == end
    assert end not in long[:-1]
    assert tokenize(tokenizer, [], config).shape == (0, 8)


# -------------------------------------------------------------------------------------- encoder


def test_the_encoder_implements_the_interface() -> None:
    seam: InstanceEncoder = encoder(num_candidates=4)
    assert (seam.dim, seam.digest, seam.num_candidates) == (32, "d" * 64, 4)
    assert encoder().num_candidates == 6


def test_instances_are_ordered_by_objectness_and_have_unit_vectors() -> None:
    found = encoder(batch_size=2).encode_images(photos())
    assert len(found) == len(SIZES)
    for each in found:
        assert 1 <= len(each) <= 6
        assert (np.diff(each.objectness) <= 0).all()
        np.testing.assert_allclose(np.linalg.norm(each.vectors, axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(each.image_vector), 1, rtol=1e-5)
    assert encoder().encode_images([]) == []


def test_a_photo_has_the_same_instances_alone_and_in_a_batch() -> None:
    together = encoder(batch_size=5).encode_images(photos())
    for image, want in zip(photos(), together, strict=True):
        (alone,) = encoder().encode_images([image])
        assert len(alone) == len(want)
        for got, expected in (
            (alone.boxes, want.boxes),
            (alone.objectness, want.objectness),
            (alone.vectors, want.vectors),
            (alone.image_vector, want.image_vector),
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_instances_are_those_of_the_model() -> None:
    model, config = tiny_clare(), tiny_clare_config()
    (found,) = encoder().encode_images([photo(64, 96)])
    with torch.no_grad():
        output = model(*as_input([resized(photo(64, 96), config)]))
    chosen = candidates(output, config.num_candidates, config.nms_iou)
    count = int(chosen.counts[0])
    np.testing.assert_allclose(found.boxes, chosen.boxes[0, :count], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.vectors, chosen.vectors[0, :count], rtol=1e-4, atol=1e-6)


def test_expressions_become_unit_vectors_of_the_last_layer() -> None:
    texts = ["the red dog", "A Red Dog!", "left of the car", "the red dog"]
    got = torch.from_numpy(encoder().encode_expressions(texts))
    model: Tensor = tiny_clare().text(tokenize(tiny_tokenizer(), texts, tiny_clare_config()))
    torch.testing.assert_close(got, model[-1].detach())
    torch.testing.assert_close(got.norm(dim=-1), torch.ones(4))
    assert torch.equal(got[0], got[3])
    assert encoder().encode_expressions([]).shape == (0, 32)


# ------------------------------------------------------------------------ chosen by an expression


def test_candidates_chosen_by_an_expression_equal_the_slow_reference() -> None:
    random = torch.Generator().manual_seed(2)
    corner = torch.rand(3, 60, 2, generator=random) * 0.6
    boxes = torch.cat([corner, corner + torch.rand(3, 60, 2, generator=random) * 0.4 + 0.01], -1)
    output = output_of(boxes, torch.zeros(3, 60))
    text = torch.randn(3, 5, generator=random)
    got = candidates(scored_by(output, text), 12, 0.5)
    for b in range(3):
        scores = output.objects[-1, b] @ text[b]
        kept = torch.from_numpy(nms(boxes[b].numpy(), scores.numpy(), 0.5, 12))
        count = int(got.counts[b])
        assert count == len(kept)
        torch.testing.assert_close(got.vectors[b, :count], output.objects[-1, b, kept])
        torch.testing.assert_close(got.boxes[b, :count], boxes[b, kept])
        torch.testing.assert_close(got.objectness[b, :count], scores[kept].sigmoid())


def test_each_photo_has_the_instances_that_its_expressions_choose() -> None:
    model = encoder(batch_size=2)
    assert isinstance(model, ExpressionChooser)
    texts = model.encode_expressions(["the red dog", "left of the car", "a man"])
    asked = [texts[:2], texts[:0], texts[2:], texts, texts[:1]]
    found = model.encode_images_for(photos(), asked, 3)
    for each, plain in zip(found, model.encode_images(photos()), strict=True):
        np.testing.assert_array_equal(each.query_free.vectors, plain.vectors)
        np.testing.assert_array_equal(each.query_free.boxes, plain.boxes)
    assert [len(each.by_expression) for each in found] == [2, 0, 1, 3, 1]
    every = encoder(num_candidates=20, batch_size=2).encode_images(photos())
    for each, vectors, kept in zip(found, asked, every, strict=True):
        for text, chosen in zip(vectors, each.by_expression, strict=True):
            scores = chosen.vectors @ text
            assert 1 <= len(chosen) <= 3
            assert (np.diff(scores) <= 1e-6).all()
            # the best of all is never suppressed, so nothing that an index could hold is better
            assert scores[0] >= (kept.vectors @ text).max() - 1e-5


def test_half_precision_gives_nearly_the_same_text_vectors_and_finite_instances() -> None:
    exact, half = encoder(), encoder(half=True)
    texts = ["the red dog", "left of the car"]
    a, b = (torch.from_numpy(e.encode_expressions(texts)) for e in (exact, half))
    assert (F.cosine_similarity(a, b) > 0.999).all()
    for each in half.encode_images(photos()):
        assert len(each) >= 1
        np.testing.assert_allclose(np.linalg.norm(each.vectors, axis=1), 1, rtol=1e-3)


def test_paper_parity_keeps_vectors_unnormalized() -> None:
    raw = ClareEncoder(tiny_clare(paper_parity=True), tiny_tokenizer(), "d" * 64)
    (found,) = raw.encode_images([photo(64, 96)])
    assert (np.linalg.norm(found.vectors, axis=1) > 2).all()
    texts = raw.encode_expressions(["the red dog"])
    assert abs(np.linalg.norm(texts) - 1) > 0.01


# ---------------------------------------------------------------------------------------- masks


def masking(**options: int) -> ClareEncoder:
    return ClareEncoder(tiny_clare(masks=True), tiny_tokenizer(), "d" * 64, masks=True, **options)  # type: ignore[arg-type]


def test_masks_have_the_size_of_the_photo_and_stay_in_their_box() -> None:
    some = 0
    for image, found in zip(photos(), masking().encode_images(photos()), strict=True):
        assert found.masks is not None
        assert len(found.masks) == len(found)
        height, width = image.shape[:2]
        for box, rle in zip(found.boxes, found.masks, strict=True):
            mask = decode(rle)
            assert mask.shape == (height, width)
            ys, xs = np.nonzero(mask)
            some += len(xs)
            if len(xs):
                low = np.floor(box[:2] * [width, height])
                high = np.ceil(box[2:] * [width, height])
                assert (low <= [xs.min(), ys.min()]).all()
                assert ([xs.max() + 1, ys.max() + 1] <= high).all()
    assert some > 0


def test_masks_equal_the_logits_of_the_model_above_zero() -> None:
    """At the size that the model sees, a mask says what its logits say, cell by cell."""
    image, model = photo(64, 96), tiny_clare(masks=True)
    (found,) = masking().encode_images([image])
    with torch.no_grad():
        output = model(*as_input([image]))
        assert output.masks is not None
        logits = model.masks(output.masks.maps, output.masks.states[-1], output.boxes[-1])[0]
    queries = candidates(output, 6, 0.7).queries[0]
    assert found.masks is not None
    for box, rle, query in zip(found.boxes, found.masks, queries, strict=False):
        fine = F.interpolate(logits[query][None, None], scale_factor=4, mode="bilinear")[0, 0]
        left, top = np.floor(box[:2] * [96, 64]).astype(int)
        right, bottom = np.ceil(box[2:] * [96, 64]).astype(int)
        got = torch.from_numpy(decode(rle))[top:bottom, left:right]
        want = fine[top:bottom, left:right]
        sure = want.abs() > 1e-3
        assert torch.equal(got[sure], (want > 0)[sure])


def test_a_photo_has_the_same_masks_alone_and_in_a_batch() -> None:
    together = masking(batch_size=5).encode_images(photos())
    for image, want in zip(photos(), together, strict=True):
        (alone,) = masking().encode_images([image])
        assert alone.masks is not None
        assert want.masks is not None
        for one, other in zip(alone.masks, want.masks, strict=True):
            assert (decode(one) != decode(other)).mean() < 0.01


def test_masks_are_returned_only_on_request() -> None:
    quiet = ClareEncoder(tiny_clare(masks=True), tiny_tokenizer(), "d" * 64)
    assert (quiet.masks, masking().masks) == (False, True)
    assert quiet.encode_images([photo(64, 96)])[0].masks is None
    with pytest.raises(ValueError, match="needs a model with the mask branch"):
        encoder(masks=True)


@pytest.mark.parametrize("name", ["num_candidates", "batch_size"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        encoder(**{name: 0})
