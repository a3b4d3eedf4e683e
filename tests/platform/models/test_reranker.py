"""The re-ranker: what it may and may not depend on, and its files in a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reir.checkpoint import (
    RERANKER,
    load_reranker,
    save_checkpoint,
    save_reranker,
    weights_digest,
)
from reir.errors import CheckpointError
from reir.models.interfaces import EncodedExpression, TokenEncoder
from reir.models.nano.encoder import ClareNanoEncoder
from reir.models.reranker import (
    PhotoInstances,
    Reranker,
    RerankerConfig,
    pad_inputs,
    pair_features,
    ranks,
)
from reir_testing.tiny import tiny_model, tiny_tokenizer

DIM, CHANNELS = 12, 10
SMALL: dict[str, Any] = {
    "dim": DIM,
    "text_width": CHANNELS,
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
}


def trained(seed: int = 0, **changes: Any) -> Reranker:
    """A re-ranker whose every weight is off its start, in eval mode."""
    torch.manual_seed(seed)
    model = Reranker(RerankerConfig(**(SMALL | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def photo(num: int, seed: int) -> PhotoInstances:
    rng = np.random.default_rng([num, seed])
    vectors = rng.normal(size=(num, DIM)).astype(np.float32)
    corner, size = rng.random((num, 2)) * 0.6, rng.random((num, 2)) * 0.3 + 0.05
    return PhotoInstances(
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        np.concatenate([corner, corner + size], axis=1).astype(np.float32),
        rng.random(num).astype(np.float32),
    )


def expression(length: int, seed: int) -> EncodedExpression:
    rng = np.random.default_rng([length, seed, 1])
    vector = rng.normal(size=DIM).astype(np.float32)
    states = rng.normal(size=(length, CHANNELS)).astype(np.float32)
    return EncodedExpression(vector / np.linalg.norm(vector), states)


EXPRESSIONS = [expression(4, 0), expression(9, 1), expression(1, 2)]
PHOTOS = [[photo(5, 0), photo(1, 1)], [photo(7, 2)], [photo(3, 3), photo(0, 4), photo(6, 5)]]


def test_an_untrained_reranker_returns_the_scores_of_the_dual_stream() -> None:
    torch.manual_seed(0)
    model = Reranker(RerankerConfig(**SMALL)).eval()
    for asked, found, photos in zip(
        EXPRESSIONS, model.score(EXPRESSIONS, PHOTOS), PHOTOS, strict=True
    ):
        for one, of_photo in zip(found, photos, strict=True):
            np.testing.assert_allclose(one.scores, of_photo.vectors @ asked.vector, atol=1e-6)


def test_a_batch_gives_the_same_scores_as_single_photos() -> None:
    model = trained()
    together = model.score(EXPRESSIONS, PHOTOS, explain=True)
    for asked, found, photos in zip(EXPRESSIONS, together, PHOTOS, strict=True):
        assert [len(one.scores) for one in found] == [len(p.boxes) for p in photos]
        for one, of_photo in zip(found, photos, strict=True):
            ((alone,),) = model.score([asked], [[of_photo]], explain=True)
            np.testing.assert_allclose(one.scores, alone.scores, atol=1e-5)
            assert one.attention is not None
            assert alone.attention is not None
            np.testing.assert_allclose(one.attention, alone.attention, atol=1e-5)


def test_values_in_the_padding_do_not_change_the_scores() -> None:
    model = trained()
    inputs = pad_inputs(EXPRESSIONS, [photo(3, 0), photo(6, 1)], [0, 1])
    other = pad_inputs(EXPRESSIONS, [photo(3, 0), photo(6, 1)], [0, 1])
    other.vectors[0, 3:], other.objectness[0, 3:] = 9.0, 0.7
    other.boxes[0, 3:] = torch.tensor([0.1, 0.2, 0.8, 0.9])
    other.states[0, 4:] = 5.0
    with torch.inference_mode():
        plain, dirty = model(inputs, explain=True), model(other, explain=True)
    torch.testing.assert_close(plain.correction, dirty.correction)
    torch.testing.assert_close(plain.attention[0, :3], dirty.attention[0, :3])
    assert (dirty.correction[0, 3:] == 0).all()
    assert (dirty.attention[0, :, 3:] == 0).all()


def test_the_order_of_instances_does_not_matter() -> None:
    model, one = trained(), photo(8, 3)
    order = np.random.default_rng(0).permutation(8)
    turned = PhotoInstances(one.vectors[order], one.boxes[order], one.objectness[order])
    ((plain, other),) = model.score(EXPRESSIONS[:1], [[one, turned]], explain=True)
    assert np.ptp(plain.scores) > 0.01
    np.testing.assert_allclose(plain.scores[order], other.scores, atol=1e-5)
    assert plain.attention is not None
    assert other.attention is not None
    np.testing.assert_allclose(plain.attention[order][:, order], other.attention, atol=1e-5)


@pytest.mark.parametrize("what", ["words", "geometry", "neighbors"])
def test_parts_that_are_switched_off_do_not_affect_the_scores(what: str) -> None:
    """Each of the three changes the scores unless the model does without it."""
    one, asked = photo(5, 0), EXPRESSIONS[0]
    changed = {
        "words": (one, replace(asked, states=expression(4, 9).states)),
        "geometry": (replace(one, boxes=one.boxes[::-1].copy()), asked),
        "neighbors": (
            replace(one, vectors=np.concatenate([one.vectors[:1], one.vectors[:0:-1]])),
            asked,
        ),
    }[what]
    for used in (True, False):
        model = trained(**{what: used}, match=False)
        ((plain,),) = model.score([asked], [[one]])
        ((other,),) = model.score([changed[1]], [[changed[0]]])
        gap = abs(plain.scores[0] - other.scores[0])
        assert (gap > 1e-4) == used


def test_attention_is_nonnegative_and_sums_to_at_most_one() -> None:
    ((one,),) = trained().score(EXPRESSIONS[:1], [[photo(6, 0)]], explain=True)
    assert one.attention is not None
    assert (one.attention >= 0).all()
    assert (one.attention.sum(1) <= 1 + 1e-5).all()
    ((plain,),) = trained().score(EXPRESSIONS[:1], [[photo(6, 0)]])
    assert plain.attention is None


def test_no_photos_or_instances_give_empty_scores() -> None:
    assert trained().score([], []) == []
    assert trained().score(EXPRESSIONS[:2], [[], []]) == [[], []]
    ((empty,),) = trained().score(EXPRESSIONS[:1], [[photo(0, 0)]])
    assert empty.scores.shape == (0,)


def test_everything_is_computed_on_the_device_of_the_weights() -> None:
    model = trained().to("meta")
    # Tensors of this device have no values, but the scores are asked for on the CPU.
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        model.score(EXPRESSIONS, PHOTOS, explain=True)


def test_pair_features_contain_offsets_and_overlaps() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 0.2, 0.2], [0.8, 0.0, 1.0, 0.2], [0.0, 0.0, 0.1, 0.2]]])
    pairs = pair_features(boxes, torch.zeros(1, 3), torch.zeros(1, 4, 3))[0]
    assert pairs[0, 0, 1] == pytest.approx(0.8)  # dx: the second lies right of the first
    assert pairs[0, 1, 0] == pytest.approx(-0.8)
    assert pairs[1, 0, 1] == 0  # dy
    assert pairs[8, 0, 2] == pytest.approx(0.5)  # IoU
    assert pairs[9, 0, 2] == pytest.approx(1)  # the third lies within the first
    assert pairs[10, 0, 2] == pytest.approx(0.5)  # and covers half of it


def test_ranks_by_hand() -> None:
    values = torch.tensor([[3.0, 1.0, 2.0, 2.0, -5.0], [1.0, 1.0, 0.0, 0.0, 0.0]])
    valid = torch.tensor([[True, True, True, True, False], [True, False, False, False, False]])
    found = ranks(values[:, None], valid)[:, 0]
    torch.testing.assert_close(found[0, :4], torch.tensor([1.0, 0.0, 1 / 3, 1 / 3]))
    assert found[1, 0] == 0


def test_a_width_that_heads_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="num_heads must divide width=10, got 4"):
        RerankerConfig(width=10, num_heads=4)


# ------------------------------------------------------------------------------------------ files


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, tiny_model(), tiny_tokenizer(), {})
    return tmp_path


def test_a_saved_reranker_is_loaded_bit_for_bit(checkpoint: Path) -> None:
    digest, model = weights_digest(checkpoint), trained()
    save_reranker(checkpoint, model, digest, {"steps": 3})
    assert weights_digest(checkpoint) == digest
    loaded = load_reranker(checkpoint)
    assert loaded is not None
    assert loaded.config == model.config
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert json.loads((checkpoint / RERANKER.config_file).read_text())["training"] == {"steps": 3}


def test_a_checkpoint_may_have_no_reranker(checkpoint: Path) -> None:
    assert load_reranker(checkpoint) is None


def test_a_reranker_of_another_checkpoint_is_refused(checkpoint: Path) -> None:
    save_reranker(checkpoint, trained(), "a" * 64, {})
    with pytest.raises(CheckpointError, match=r"checkpoint aaaaaaaaaaaa.*--stage rerank"):
        load_reranker(checkpoint)
    assert load_reranker(checkpoint, "a" * 64) is not None
    with pytest.raises(CheckpointError, match="the checkpoint has bbbbbbbbbbbb"):
        load_reranker(checkpoint, "b" * 64)


@pytest.mark.parametrize("damage", ["config", "weights", "shape"])
def test_damaged_reranker_files_are_refused(checkpoint: Path, damage: str) -> None:
    save_reranker(checkpoint, trained(), weights_digest(checkpoint), {})
    if damage == "config":
        (checkpoint / RERANKER.config_file).unlink()
    elif damage == "weights":
        (checkpoint / RERANKER.weights_file).write_bytes(b"no tensors")
    else:
        path = checkpoint / RERANKER.config_file
        config = json.loads(path.read_text())
        config["model_config"]["width"] = 32
        path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cannot load the re-ranker"):
        load_reranker(checkpoint)


def test_a_reranker_of_another_format_is_refused(checkpoint: Path) -> None:
    save_reranker(checkpoint, trained(), weights_digest(checkpoint), {})
    path = checkpoint / RERANKER.config_file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(CheckpointError, match=r"has format 2, but this release reads format 1"):
        load_reranker(checkpoint)


@pytest.mark.parametrize("again", [False, True])
def test_half_a_save_is_not_taken_for_a_reranker(checkpoint: Path, again: bool) -> None:
    digest, path = weights_digest(checkpoint), checkpoint / RERANKER.config_file
    if again:
        save_reranker(checkpoint, trained(), digest, {})
        path.unlink()
    path.mkdir()  # the write of the configuration fails
    with pytest.raises(IsADirectoryError):
        save_reranker(checkpoint, trained(), digest, {})
    assert load_reranker(checkpoint) is None


def test_half_a_copy_is_not_taken_for_a_reranker(checkpoint: Path, tmp_path: Path) -> None:
    digest, copy = weights_digest(checkpoint), tmp_path / "copy"
    copy.mkdir()
    for folder in (checkpoint, copy):
        save_reranker(folder, trained(), digest, {})
    RERANKER.copy(checkpoint, checkpoint)
    assert RERANKER.is_in(checkpoint)
    (copy / RERANKER.config_file).unlink()
    (copy / RERANKER.config_file).mkdir()  # the copy of the configuration fails
    with pytest.raises(IsADirectoryError):
        RERANKER.copy(checkpoint, copy)
    assert not RERANKER.is_in(copy)


# ------------------------------------------------------------------------------------------ words


def test_encode_tokens_returns_the_same_vectors_as_encode_expressions() -> None:
    encoder = ClareNanoEncoder(tiny_model(), tiny_tokenizer(), "x")
    assert isinstance(encoder, TokenEncoder)
    texts = ["the red dog left of the car", "a cat", "man"]
    encoded = encoder.encode_tokens(texts)
    np.testing.assert_allclose(
        np.stack([each.vector for each in encoded]), encoder.encode_expressions(texts), atol=1e-6
    )
    assert [len(each.states) for each in encoded] == [9, 4, 3]  # with [CLS] and [SEP]
    (alone,) = encoder.encode_tokens(texts[1:2])
    np.testing.assert_allclose(encoded[1].states, alone.states, atol=1e-5)
    assert encoder.encode_tokens([]) == []
