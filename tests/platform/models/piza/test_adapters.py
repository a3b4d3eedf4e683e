"""What the single adapters compute, and how they start."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from reir.models.piza.adapters import Adapter, Lora, Prompts, StepEmbedding


def test_step_embedding_is_that_of_ddpm() -> None:
    embedding = StepEmbedding()
    progress = 0.35
    frequencies = [10_000 ** (-rank / 127) for rank in range(128)]
    angles = [progress * each for each in frequencies]
    waves = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
    expected = embedding.mlp(waves[None])
    torch.testing.assert_close(embedding(torch.tensor([progress])), expected)


def test_progress_is_rounded_before_it_is_embedded() -> None:
    found = StepEmbedding()(torch.tensor([0.33, 0.37, 0.38]))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[1], found[2])


def test_adapter_computes_the_published_formula() -> None:
    adapter = Adapter(6, 4, inserted=3)
    for weight in adapter.parameters():
        nn.init.normal_(weight)
    tokens, told = torch.randn(2, 5, 6), torch.randn(2, 3)
    weights = {name: value.detach().numpy() for name, value in adapter.named_parameters()}
    down = tokens.numpy() @ weights["down.weight"].T + weights["down.bias"]
    gelu = 0.5 * down * (1 + np.vectorize(math.erf)(down / math.sqrt(2)))
    up = gelu @ weights["up.weight"].T + weights["up.bias"]
    swish = told.numpy() / (1 + np.exp(-told.numpy()))
    inserted = swish @ weights["insert.weight"].T + weights["insert.bias"]
    expected = tokens.numpy() + weights["scale"] * up + inserted[:, None]
    np.testing.assert_allclose(adapter(tokens, told).detach().numpy(), expected, atol=1e-4)


def test_adapter_starts_with_small_weights() -> None:
    torch.manual_seed(0)
    adapter = Adapter(256, 256, inserted=256)
    assert torch.equal(adapter.scale, torch.ones(256))
    for layer in (adapter.down, adapter.up, adapter.insert):
        assert isinstance(layer, nn.Linear)
        assert layer.weight.abs().max() <= 0.02
        # A normal distribution that is cut off at two standard deviations has .88 of its own.
        assert layer.weight.std().item() == pytest.approx(0.0088, rel=0.02)
        assert not layer.bias.any()


def test_lora_inserts_into_its_bottleneck() -> None:
    lora = Lora(6, 7, 4, inserted=3)
    nn.init.normal_(lora.up.weight)
    tokens, told = torch.randn(2, 5, 6), torch.randn(2, 3)
    assert lora.insert is not None
    a, b, c = lora.down.weight, lora.up.weight, lora.insert.weight
    expected = tokens @ a.T @ b.T + (told @ c.T @ b.T)[:, None]
    torch.testing.assert_close(lora(tokens, told), expected)


def test_prompts_come_after_the_first_word() -> None:
    prompts = Prompts(3, 6, inserted=2)
    words = torch.randn(2, 9, 6)
    found = prompts(words, torch.randn(2, 2))
    assert prompts.count == 4
    assert torch.equal(found[:, 0], words[:, 0])
    assert torch.equal(found[:, 1:4], prompts.vectors.expand(2, -1, -1))
    assert not torch.allclose(found[0, 4], found[1, 4])
    assert torch.equal(found[:, 5:], words[:, 5:])


@pytest.mark.parametrize("adapter", [Adapter(6, 4, 3), Lora(6, 6, 4, 3), Prompts(2, 6, 3)])
def test_missing_history_is_named(adapter: nn.Module) -> None:
    with pytest.raises(ValueError, match="needs the history of the search, but none was given"):
        adapter(torch.randn(1, 5, 6), None)
