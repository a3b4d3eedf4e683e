"""The text tower against the class its weights come from."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel

from reir.models.nano.sentence_tower import SentenceTower, from_bert

LAYERS, MAX_TOKENS = 2, 16


def bert(seed: int) -> BertModel:
    torch.manual_seed(seed)
    shape = BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=32,
        initializer_range=0.2,  # large, so that attention is far from uniform
    )
    return BertModel(shape, add_pooling_layer=False).eval()


def tower_of(model: BertModel) -> SentenceTower:
    tower = SentenceTower(num_layers=LAYERS, max_tokens=MAX_TOKENS).eval()
    tower.load_state_dict(from_bert(model.state_dict(), num_layers=LAYERS, max_tokens=MAX_TOKENS))
    return tower


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 30522, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 4, 1)):
        ids[row, length:], mask[row, length:] = 0, 0
    return ids, mask


def test_states_equal_those_of_bert() -> None:
    model = bert(0)
    ids, mask = texts()
    with torch.inference_mode():
        theirs = model(input_ids=ids, attention_mask=mask).last_hidden_state
        ours = tower_of(model)(ids, mask)
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-4)


def test_padding_does_not_change_the_states() -> None:
    tower = tower_of(bert(1))
    ids, mask = texts()
    with torch.inference_mode():
        together = tower(ids, mask)
        for row, length in enumerate((9, 4, 1)):
            alone = tower(ids[row : row + 1, :length], mask[row : row + 1, :length])
            torch.testing.assert_close(alone[0], together[row, :length], rtol=1e-4, atol=1e-4)


def test_keeping_products_in_bf16_does_not_change_the_states() -> None:
    tower, ids, mask = tower_of(bert(3)), *texts()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        cast_each_time = tower(ids, mask)
        tower.keep_products_in(torch.bfloat16)
        assert tower.state_dict()["layers.0.linear1.weight"].dtype == torch.bfloat16
        assert tower.norm.weight.dtype == torch.float32
        assert torch.equal(tower(ids, mask), cast_each_time)


def test_every_weight_gets_a_finite_gradient() -> None:
    tower = tower_of(bert(2)).train()
    tower(*texts()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())


def test_frozen_layers_have_no_dropout_in_training() -> None:
    torch.manual_seed(0)
    tower = SentenceTower(num_layers=2, max_tokens=8)
    for part in (tower.words, tower.norm, tower.layers[0]):
        part.requires_grad_(False)
    ids, mask = torch.randint(1, 100, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    wanted = tower.eval().layers[0](tower.norm(tower.words(ids) + tower.positions))
    tower.train()
    once, again = (
        tower.layers[0](tower.drop(tower.norm(tower.words(ids) + tower.positions)))
        for _ in range(2)
    )
    assert torch.equal(once, again)
    torch.testing.assert_close(once, wanted)
    assert not torch.equal(tower(ids, mask), tower(ids, mask))  # the trained layer has dropout
