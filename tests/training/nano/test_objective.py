"""The objective of `clare-nano`: it can be learned, and gradients reach the right parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reir.losses import pairwise_iou
from reir_testing.tiny import tiny_batch, tiny_model, tiny_tokenizer
from reir_training.config import NanoLossWeights, NanoModelSettings
from reir_training.nano.batches import NanoBatch
from reir_training.nano.initialization import freeze
from reir_training.nano.objective import LossInputs, NanoObjective

GROUNDING = {"ranking", "discrimination", "wrong_word", "box", "category"}
ACROSS = {"clia", "cross_ranking", "caption"}


def batch_of(*, shift: float = 0.0) -> NanoBatch:
    """Two photos with two expressions and one caption each, and texts that fit neither."""
    candidates = tiny_batch(num_photos=2, num_candidates=4)
    candidates.valid[1, 3] = False
    owner, target = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 1, 2])
    described = candidates.boxes[owner, target][:, None]
    overlap = pairwise_iou(candidates.boxes[owner], described)[..., 0]
    matched = torch.stack([owner, target], dim=1)
    candidates = candidates.followed_by(candidates.mirror())
    return NanoBatch(
        candidates=candidates,
        texts=[
            "the red dog",
            "a blue car",
            "man left of the cat",
            "the right man",
            "a dog in the car",
            "a man of the cat in the red car",
            "the green cat",
            "the blue dog",
            "man right of the cat",
        ],
        owner=owner,
        overlap=overlap,
        sided=torch.tensor([False, False, True, True]),
        cross_weight=torch.tensor([1.0, 0.3, 1.0, 0.0]),
        caption_owner=torch.tensor([0, 1, -1]),
        altered=torch.tensor([0, 2]),
        matched=matched,
        matched_boxes=(described[:, 0] + shift).clamp(0, 1),
        matched_classes=torch.tensor([3, 5, -1, 7]),
    )


def empty_batch() -> NanoBatch:
    """Photos without annotations."""
    none = torch.zeros(0, dtype=torch.long)
    return NanoBatch(
        candidates=tiny_batch(num_photos=4, num_candidates=4),
        texts=[],
        owner=none,
        overlap=torch.zeros(0, 4),
        sided=torch.zeros(0, dtype=torch.bool),
        cross_weight=torch.zeros(0),
        caption_owner=none,
        altered=none,
        matched=torch.zeros(0, 2, dtype=torch.long),
        matched_boxes=torch.zeros(0, 4),
        matched_classes=none,
    )


def make(*, half: bool = False, weights: NanoLossWeights | None = None) -> NanoObjective:
    model = tiny_model()
    freeze(model, NanoModelSettings(frozen_text_layers=0))
    return NanoObjective(model, tiny_tokenizer(), weights or NanoLossWeights(), half=half)


class SecondWorker:
    """The second of two workers that have the same batch."""

    rank = 1

    def gather(self, values: Tensor) -> Tensor:
        """Return them twice."""
        return torch.cat([values, values])


@pytest.fixture(scope="module")
def objective() -> NanoObjective:
    return make()


@pytest.fixture(autouse=True)
def no_gradients(objective: NanoObjective) -> None:
    objective.zero_grad(set_to_none=True)


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def test_each_stage_has_its_loss_terms(objective: NanoObjective) -> None:
    total, parts = objective(batch_of(), "grounding")
    assert set(parts) == GROUNDING
    assert total.isfinite()
    total, parts = objective(batch_of(), "clia")
    assert set(parts) == GROUNDING | ACROSS
    weights = NanoLossWeights().model_dump()
    assert total.item() == pytest.approx(sum(weights[k] * v for k, v in parts.items()), rel=1e-4)


def test_loss_falls_on_a_repeated_batch() -> None:
    objective = make()
    learned = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=2e-3)
    batch, losses = batch_of(shift=0.02), []
    for _ in range(30):
        optimizer.zero_grad()
        loss, _ = objective(batch, "clia")
        backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
def test_gradients_are_finite_and_frozen_parts_have_none(half: bool) -> None:
    objective = make(half=half)
    loss, _ = objective(batch_of(), "clia")
    backward(loss)
    for name, parameter in objective.named_parameters():
        tower = name.removeprefix("model.text.tower.")
        frozen = name.startswith(("model.detector.", "model.crop_network."))
        frozen |= tower.startswith(("words.", "positions", "norm."))
        assert parameter.requires_grad is not frozen, name
        if frozen:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_frozen_text_layers_are_frozen() -> None:
    model = tiny_model(text_layers=2)
    freeze(model, NanoModelSettings(frozen_text_layers=1))
    layers = model.text.tower.layers
    assert not any(p.requires_grad for p in layers[0].parameters())
    assert all(p.requires_grad for p in layers[1].parameters())


def mirror_gap(objective: NanoObjective, batch: NanoBatch) -> Tensor:
    """Return (M,) the cosine of the described candidate minus that of its mirror image."""
    text = objective._encode(batch.texts)[: len(batch.owner)]
    vectors, best = objective.model.visual(batch.candidates).vectors, batch.overlap.argmax(1)
    here = (vectors[batch.owner, best] * text).sum(-1)
    there = (vectors[batch.owner + batch.num_photos, best] * text).sum(-1)
    gap: Tensor = here - there
    return gap


def test_expressions_with_a_side_learn_to_reject_the_mirror_image() -> None:
    objective, batch = make(), batch_of()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        backward(objective(batch, "clia")[0])
        optimizer.step()
    with torch.no_grad():
        gap = mirror_gap(objective, batch)
    assert gap[batch.sided].min() > 0.1
    assert gap[~batch.sided].abs().max() < gap[batch.sided].min()


def test_a_sentence_with_a_wrong_word_learns_to_score_lower() -> None:
    objective, batch = make(), batch_of()

    def margins() -> Tensor:
        with torch.no_grad():
            visual = objective.model.visual(batch.candidates)
            step = LossInputs.of(batch, visual, objective._encode(batch.texts))
        return ((step.right - step.wrong) * step.described).sum(-1)

    before = margins()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        backward(objective(batch, "grounding")[0])
        optimizer.step()
    assert (margins() > before + 0.1).all()


def test_captions_have_no_gradient_in_grounding(objective: NanoObjective) -> None:
    word = tiny_tokenizer().token_to_id("green")  # in one caption only
    embedding = objective.model.text.tower.words.weight
    embedding.requires_grad_(True)
    try:
        for stage, reached in (("grounding", False), ("clia", True)):
            objective.zero_grad(set_to_none=True)
            backward(objective(batch_of(), stage)[0])
            assert embedding.grad is not None
            assert bool(embedding.grad[word].any()) is reached
    finally:
        embedding.requires_grad_(False)
        embedding.grad = None


def test_captions_do_not_change_the_grounding_loss(objective: NanoObjective) -> None:
    batch = batch_of()
    other = replace(batch, texts=[*batch.texts[:4], "a", "the", "in the", *batch.texts[7:]])
    torch.testing.assert_close(objective(batch, "grounding")[0], objective(other, "grounding")[0])


def test_expressions_with_weight_zero_are_not_used_across_photos(objective: NanoObjective) -> None:
    batch = batch_of()
    other = replace(batch, texts=[*batch.texts[:3], "a blue cat", *batch.texts[4:]])
    here, there = objective(batch, "clia")[1], objective(other, "clia")[1]
    for part in ACROSS:
        assert here[part] == pytest.approx(there[part], abs=1e-5)
    assert here["ranking"] != pytest.approx(there["ranking"], abs=1e-4)


def test_text_vectors_keep_the_order_of_the_texts(objective: NanoObjective) -> None:
    texts = batch_of().texts
    with torch.no_grad():
        together = objective._encode(texts)
        alone = torch.cat([objective._encode([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_gathered_photos_keep_their_order_and_texts(
    objective: NanoObjective,
) -> None:
    batch = batch_of()
    mine = LossInputs.of(
        batch, objective.model.visual(batch.candidates), objective._encode(batch.texts)
    )
    whole = mine.gathered(SecondWorker())
    assert whole.num_photos == 2 * mine.num_photos
    here, there = mine.owner + mine.num_photos, mine.owner + 3 * mine.num_photos
    photos, mirror_images = mine.vectors.chunk(2)
    assert torch.equal(whole.vectors, torch.cat([photos, photos, mirror_images, mirror_images]))
    assert torch.equal(whole.vectors[here], photos[mine.owner])
    assert torch.equal(whole.vectors[there], mirror_images[mine.owner])
    assert whole.owner[len(mine.owner) :].tolist() == here.tolist()
    assert whole.caption_owner[len(mine.caption_owner) :].tolist() == [2, 3, -1]
    assert len(whole.boxes) == 2 * len(mine.boxes)
    for name in ("right", "wrong", "described"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(mine, name)] * 2))


@pytest.mark.parametrize("stage", ["grounding", "clia"])
def test_a_batch_without_texts_has_zero_loss(objective: NanoObjective, stage: str) -> None:
    loss, parts = objective(empty_batch(), stage)
    backward(loss)
    assert loss.item() == 0
    assert set(parts.values()) == {0.0}


def test_a_weight_of_zero_turns_a_loss_term_off() -> None:
    only_box = NanoLossWeights(
        ranking=0,
        discrimination=0,
        wrong_word=0,
        clia=0,
        cross_ranking=0,
        caption=0,
        category=0,
    )
    loss, parts = make(weights=only_box)(batch_of(shift=0.02), "clia")
    assert loss.item() == pytest.approx(0.5 * parts["box"], rel=1e-5)
    assert parts["box"] > 0
