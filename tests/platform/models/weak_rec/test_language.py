"""The language encoder against numpy, word by word."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reir.models.weak_rec.language import GruLanguage, UnbiasedLayerNorm

WIDTH, HEADS = 8, 2


def tiny(dropout: float = 0.0) -> GruLanguage:
    torch.manual_seed(0)
    vectors = torch.randn(7, 5).index_fill(0, torch.tensor([0]), 0.0)
    model = GruLanguage(vectors, width=WIDTH, num_blocks=2, num_heads=HEADS, dropout=dropout)
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight)
    return model.double()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(x - x.max()) / np.exp(x - x.max()).sum())


def slow(model: GruLanguage, ids: list[int]) -> np.ndarray:
    """Encode one text without padding."""
    w = {name: value.numpy() for name, value in model.state_dict().items()}
    state, states = np.zeros(WIDTH), []
    for word in ids:
        from_word = w["gru.weight_ih_l0"] @ w["words.weight"][word] + w["gru.bias_ih_l0"]
        from_state = w["gru.weight_hh_l0"] @ state + w["gru.bias_hh_l0"]
        (r1, z1, n1), (r2, z2, n2) = np.split(from_word, 3), np.split(from_state, 3)
        update = sigmoid(z1 + z2)
        state = (1 - update) * np.tanh(n1 + sigmoid(r1 + r2) * n2) + update * state
        states.append(state)
    x = np.stack(states)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return np.asarray(x @ w[f"{name}.weight"].T + w[f"{name}.bias"])

    def normed(name: str, x: np.ndarray) -> np.ndarray:
        deviation = x - x.mean(-1, keepdims=True)
        scaled = deviation / (x.std(-1, ddof=1, keepdims=True) + 1e-6)
        return np.asarray(w[f"{name}.weight"] * scaled + w[f"{name}.bias"])

    for b in range(2):
        q, k, v = (linear(f"blocks.{b}.{name}", x) for name in ("query", "key", "value"))
        mixed, share = np.zeros_like(x), WIDTH // HEADS
        for i in range(len(ids)):
            for head in range(HEADS):
                part = slice(head * share, (head + 1) * share)
                weights = softmax(k[:, part] @ q[i, part] / share**0.5)
                mixed[i, part] = weights @ v[:, part]
        x = normed(f"blocks.{b}.attention_norm", x + linear(f"blocks.{b}.merge", mixed))
        hidden = np.maximum(linear(f"blocks.{b}.feedforward.0", x), 0)
        hidden = linear(f"blocks.{b}.feedforward.3", hidden)
        x = normed(f"blocks.{b}.feedforward_norm", x + hidden)
    logits = linear("pool.weigh.3", np.maximum(linear("pool.weigh.0", x), 0))
    return linear("pool.merge", softmax(logits[:, 0]) @ x)


def padded(texts: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([each + [0] * (length - len(each)) for each in texts])
    return ids, ids != 0


@pytest.mark.parametrize("length", [4, 7])
def test_equals_numpy_however_much_padding_there_is(length: int) -> None:
    model, texts = tiny(), [[1, 2, 3, 4], [6], [5, 5]]
    got = model(*padded(texts, length))
    for row, text in zip(got, texts, strict=True):
        np.testing.assert_allclose(row.detach().numpy(), slow(model, text), rtol=1e-9)


def test_all_but_the_word_vectors_is_trained() -> None:
    model = tiny()
    model(*padded([[1, 2, 3], [4]], 5)).square().sum().backward()
    for name, weight in model.named_parameters():
        if name == "words.weight":
            assert not weight.requires_grad
        # The same number is added to all logits of a softmax.
        elif name not in ("blocks.0.key.bias", "blocks.1.key.bias", "pool.weigh.3.bias"):
            assert weight.grad is not None
            assert weight.grad.any(), name


def test_a_text_of_padding_alone_is_finite() -> None:
    model = tiny()
    ids = torch.zeros(2, 3, dtype=torch.long)
    out = model(ids, ids != 0)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_dropout_only_in_training() -> None:
    model, (ids, mask) = tiny(dropout=0.5), padded([[1, 2, 3]], 3)
    assert not torch.equal(model(ids, mask), model(ids, mask))
    model.eval()
    assert torch.equal(model(ids, mask), model(ids, mask))


def test_layer_norm_of_equal_numbers_is_finite() -> None:
    x = torch.ones(1, 4, requires_grad=True)
    UnbiasedLayerNorm(4)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_published_sizes() -> None:
    with torch.device("meta"):
        model = GruLanguage(torch.zeros(9, 300))
    assert len(model.blocks) == 3
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sizes["gru.weight_ih_l0"] == (3 * 512, 300)
    assert sizes["blocks.2.feedforward.0.weight"] == (2048, 512)
    assert sizes["pool.weigh.0.weight"] == (256, 512)
    assert sizes["pool.merge.weight"] == (512, 512)
