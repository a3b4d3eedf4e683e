"""The trained part of `clare-nano`: shapes, padding, neighbors, mirror images, texts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reir.models.nano.encoder import ClareNanoEncoder, tokenize
from reir.models.nano.model import CandidateBatch, ClareNano, VisualOutput, refine_boxes
from reir_testing.tiny import WORDS, tiny_batch, tiny_model, tiny_tokenizer

TOKENS = tiny_tokenizer()
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def model() -> ClareNano:
    return tiny_model()


@pytest.fixture(scope="module")
def encoder() -> ClareNanoEncoder:
    return ClareNanoEncoder(tiny_model(), TOKENS, "digest")


@torch.inference_mode()
def see(model: ClareNano, batch: CandidateBatch) -> VisualOutput:
    output: VisualOutput = model.visual(batch)
    return output


def padded(batch: CandidateBatch, num: int) -> CandidateBatch:
    """The same candidates with rows of zeros behind them."""
    fields = batch.tensors()
    for name, value in fields.items():
        if name not in ("scene", "aspect"):
            more = value.new_zeros(len(value), num - value.shape[1], *value.shape[2:])
            fields[name] = torch.cat([value, more], dim=1)
    return CandidateBatch(**fields)


def photo(batch: CandidateBatch, row: int) -> CandidateBatch:
    return CandidateBatch(**{k: v[row : row + 1] for k, v in batch.tensors().items()})


# ---------------------------------------------------------------------------------- visual stream


def test_outputs_have_the_expected_shapes_and_unit_vectors(model: ClareNano) -> None:
    output = see(model, tiny_batch(num_photos=3, num_candidates=5))
    assert output.vectors.shape == (3, 5, 32)
    assert output.image_vectors.shape == (3, 32)
    assert output.boxes.shape == (3, 5, 4)
    assert output.class_logits.shape == (3, 5, 80)
    close(output.vectors.norm(dim=-1), torch.ones(3, 5))
    close(output.image_vectors.norm(dim=-1), torch.ones(3))


def test_padding_does_not_change_the_instances(model: ClareNano) -> None:
    batch = tiny_batch(num_photos=2, num_candidates=5)
    alone, behind = see(model, batch), see(model, padded(batch, 30))
    close(behind.vectors[:, :5], alone.vectors)
    close(behind.image_vectors, alone.image_vectors)
    close(behind.boxes[:, :5], alone.boxes)
    assert behind.vectors.isfinite().all()


def test_values_in_the_padding_do_not_change_the_instances(model: ClareNano) -> None:
    batch = tiny_batch(num_photos=1, num_candidates=6)
    batch.valid[:, 4:] = False
    other = tiny_batch(num_photos=1, num_candidates=6, seed=9)
    mixed = {
        k: torch.cat([v[:, :4], other.tensors()[k][:, 4:]], dim=1)
        if k not in ("scene", "aspect", "valid")
        else v
        for k, v in batch.tensors().items()
    }
    close(see(model, CandidateBatch(**mixed)).vectors[:, :4], see(model, batch).vectors[:, :4])


def test_other_photos_of_the_batch_do_not_change_a_photo(model: ClareNano) -> None:
    batch = tiny_batch(num_photos=3)
    together = see(model, batch)
    for row in range(3):
        alone = see(model, photo(batch, row))
        close(together.vectors[row : row + 1], alone.vectors)
        close(together.image_vectors[row : row + 1], alone.image_vectors)


def test_the_order_of_candidates_only_reorders_the_vectors(model: ClareNano) -> None:
    batch = tiny_batch(num_photos=2, num_candidates=5)
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = {
        k: v if k in ("scene", "aspect") else v[:, order] for k, v in batch.tensors().items()
    }
    close(see(model, CandidateBatch(**shuffled)).vectors, see(model, batch).vectors[:, order])


@pytest.mark.parametrize(("num_layers", "reached"), [(1, True), (0, False)])
@pytest.mark.parametrize("field", ["boxes", "crops", "class_scores"])
def test_neighbors_change_a_vector_only_through_attention_layers(
    num_layers: int, reached: bool, field: str, model: ClareNano
) -> None:
    model = model if num_layers == 1 else tiny_model(num_layers=0)
    batch = tiny_batch(num_photos=1, num_candidates=4)
    changed = batch.tensors()[field].clone()
    changed[0, 1] = (changed[0, 1] / 2).sqrt()  # no mere scaling, which a norm undoes
    moved = see(model, replace(batch, **{field: changed})).vectors - see(model, batch).vectors
    differs = moved[0].abs().amax(-1) > 1e-5
    assert differs.tolist() == [reached, True, reached, reached]


def test_photos_without_candidates_have_a_finite_image_vector(model: ClareNano) -> None:
    output = see(model, tiny_batch(num_photos=2, num_candidates=0))
    assert output.vectors.shape == (2, 0, 32)
    assert output.image_vectors.isfinite().all()


# --------------------------------------------------------------------------- boxes, mirror images


def test_refining_boxes_by_zero_is_the_identity() -> None:
    boxes = tiny_batch(num_photos=4).boxes
    close(refine_boxes(boxes, torch.zeros_like(boxes)), boxes)


def test_an_untrained_model_does_not_change_the_boxes(model: ClareNano) -> None:
    batch = tiny_batch()
    close(see(model, batch).boxes, batch.boxes)


def test_refining_boxes_by_hand() -> None:
    box = torch.tensor([[0.4, 0.4, 0.6, 0.5]])
    delta = torch.tensor([[0.5, -0.1, np.log(1.5), 0.0]], dtype=torch.float32)
    close(refine_boxes(box, delta), torch.tensor([[0.45, 0.39, 0.75, 0.49]]))


def test_refined_boxes_are_valid_and_within_the_photo() -> None:
    random = torch.Generator().manual_seed(3)
    boxes = tiny_batch(num_photos=50, num_candidates=20).boxes
    refined = refine_boxes(boxes, torch.randn(boxes.shape, generator=random) * 100)
    assert refined.min() >= 0
    assert refined.max() <= 1
    assert (refined[..., 2:] >= refined[..., :2]).all()


def test_mirroring_twice_is_the_identity() -> None:
    batch = tiny_batch()
    twice = batch.mirror().mirror().tensors()
    for name, value in batch.tensors().items():
        close(twice[name], value)


def test_mirroring_swaps_left_and_right_and_keeps_the_rest() -> None:
    batch = tiny_batch()
    flipped = batch.mirror()
    x1, y1, x2, y2 = batch.boxes.unbind(-1)
    close(flipped.boxes, torch.stack([1 - x2, y1, 1 - x1, y2], dim=-1))
    assert (flipped.boxes[..., 2] > flipped.boxes[..., 0]).all()
    close(flipped.colors[:, :, :, 0], batch.colors[:, :, :, -1])
    close(flipped.crops, batch.crops)
    close(flipped.scene[:, 0], batch.scene[:, 0])
    left_column, right_column = [1, 4, 7], [3, 6, 9]
    close(flipped.scene[:, left_column], batch.scene[:, right_column])
    close(flipped.objectness, batch.objectness)


# ------------------------------------------------------------------------------------ text stream


def read(model: ClareNano, texts: list[str]) -> Tensor:
    with torch.inference_mode():
        vectors: Tensor = model.text(*tokenize(TOKENS, texts, model.config.max_tokens))
    return vectors


def test_padding_does_not_change_the_vectors_of_texts(model: ClareNano) -> None:
    short, long = "the red dog", "the dog in the car left of the blue cat"
    both = read(model, [short, long])
    close(both[:1], read(model, [short]))
    close(both[1:], read(model, [long]))
    close(both.norm(dim=-1), torch.ones(2))
    assert F.cosine_similarity(both[0], both[1], dim=0) < 0.999


def test_texts_are_tokenized_with_start_end_and_padding() -> None:
    ids, mask = tokenize(TOKENS, ["The  RED dog", "cat"], 16)
    cls, sep = TOKENS.token_to_id("[CLS]"), TOKENS.token_to_id("[SEP]")
    the, red, dog, cat = (TOKENS.token_to_id(w) for w in ("the", "red", "dog", "cat"))
    assert ids.tolist() == [[cls, the, red, dog, sep], [cls, cat, sep, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_long_texts_are_truncated_and_keep_the_end_token(model: ClareNano) -> None:
    words = " ".join(WORDS * 3)
    ids, mask = tokenize(TOKENS, [words], 16)
    assert ids.shape == mask.shape == (1, 16)
    assert ids[0, -1] == TOKENS.token_to_id("[SEP]")
    assert mask.all()
    close(read(model, [words]), read(model, [" ".join((WORDS * 3)[:14])]))


def test_no_texts_give_no_tokens() -> None:
    ids, mask = tokenize(TOKENS, [], 16)
    assert ids.shape == mask.shape == (0, 0)


def test_expressions_do_not_depend_on_their_batch(encoder: ClareNanoEncoder) -> None:
    texts = ["the red dog", "a cat", "the dog in the car left of the blue cat", "man", "a cat"]
    together = encoder.encode_expressions(texts)
    assert together.shape == (5, 33)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    alone = np.concatenate([encoder.encode_expressions([t]) for t in texts])
    np.testing.assert_allclose(together, alone, atol=0.02)  # bf16 where the CPU has it
    backwards = encoder.encode_expressions(texts[::-1])[::-1]
    np.testing.assert_allclose(backwards, together, atol=0.02)
    np.testing.assert_array_equal(together[1], together[4])


def test_more_expressions_than_one_batch_keep_their_order(encoder: ClareNanoEncoder) -> None:
    texts = [" ".join(WORDS[i % 7 : i % 7 + 1 + i % 5]) for i in range(150)]
    vectors = encoder.encode_expressions(texts)
    for i in (0, 64, 149):
        np.testing.assert_allclose(vectors[i], encoder.encode_expressions([texts[i]])[0], atol=0.02)


def test_empty_lists_give_no_vectors(encoder: ClareNanoEncoder) -> None:
    assert encoder.encode_expressions([]).shape == (0, 33)
    assert encoder.encode_images([]) == []


def test_score_scale_and_bias_start_at_those_of_clia() -> None:
    model = tiny_model()
    _, text, scale, bias = model(tiny_batch(), *tokenize(TOKENS, ["a cat"], 16))
    assert text.shape == (1, 32)
    assert scale.item() == pytest.approx(10)
    assert bias.item() == -10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_tokens_gives_the_output_of_the_model_bit_for_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reir.models.nano.encoder.fast_dtype", lambda: dtype)
    model = tiny_model()
    encoder = ClareNanoEncoder(model, TOKENS, "digest")
    batches = [["dog"], ["the red dog", "dog"], ["the dog on the left"] * 5, [*WORDS, ""]]
    for batch in batches:
        texts = sorted(batch, key=len)  # the order in which they are encoded
        ids, mask = tokenize(TOKENS, texts, model.config.max_tokens)
        with torch.inference_mode(), torch.autocast("cpu", dtype, dtype != torch.float32):
            states = model.text.tower(ids, mask)
            vectors = model.encode_texts(states, mask)
        for row, found in enumerate(encoder.encode_tokens(texts)):
            assert torch.equal(torch.from_numpy(found.vector), vectors[row].float())
            length = int(mask[row].sum())
            assert torch.equal(torch.from_numpy(found.states), states[row, :length].float())


def test_class_scores_belong_to_the_instances(encoder: ClareNanoEncoder) -> None:
    photo = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    ((instances, class_scores),) = encoder.encode_with_classes([photo])
    assert class_scores.shape == (len(instances), 80)
    assert len(instances) > 0
    np.testing.assert_array_equal(class_scores.max(axis=1), instances.objectness)
    (alone,) = encoder.encode_images([photo])
    np.testing.assert_array_equal(alone.vectors, instances.vectors)
