"""The batched mixture of experts against one text and one expert at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reir.models.relation_experts import MixtureOfRelationExperts


def make(num_experts: int = 4, top_k: int = 2, mix: float = 0.2) -> MixtureOfRelationExperts:
    torch.manual_seed(0)
    return MixtureOfRelationExperts(12, 8, num_experts=num_experts, top_k=top_k, mix=mix).double()


def texts(num: int = 7) -> Tensor:
    return torch.randn(num, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def slow(more: MixtureOfRelationExperts, text: Tensor) -> Tensor:
    """One text: gates of all experts, the best of them taken in turn, gates left as they are."""
    unit = text / text.norm()
    gates = torch.softmax(more.router.weight @ unit + more.router.bias, 0).tolist()
    chosen = sorted(range(len(gates)), key=lambda e: -gates[e])[: more.top_k]
    routed = torch.zeros(more.out_features, dtype=torch.float64)
    for expert in chosen:
        rows = slice(expert * more.out_features, (expert + 1) * more.out_features)
        out = more.experts.weight[rows] @ unit + more.experts.bias[rows]
        routed = routed + gates[expert] * out
    shared = more.shared.weight @ unit + more.shared.bias
    mixed: Tensor = (1 - more.mix) * shared + more.mix * routed
    return mixed


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_batched_experts_equal_the_loop(top_k: int) -> None:
    more = make(top_k=top_k)
    batch = texts()
    want = torch.stack([slow(more, text) for text in batch])
    torch.testing.assert_close(more(batch), want)


def test_gates_are_not_renormalized() -> None:
    more = make(num_experts=4, top_k=1, mix=1.0)
    with torch.no_grad():
        more.router.weight.zero_()
        more.router.bias.zero_()  # every gate is 1/4
        more.experts.weight.zero_()
        more.experts.bias.fill_(1.0)
    torch.testing.assert_close(more(texts()), torch.full((7, 8), 0.25, dtype=torch.float64))


def test_length_of_the_text_feature_does_not_matter() -> None:
    more = make()
    torch.testing.assert_close(more(texts() * 9), more(texts()))


def test_without_experts_the_output_is_that_of_the_shared_expert() -> None:
    more = make(num_experts=0)
    assert set(more.state_dict()) == {"shared.weight", "shared.bias"}
    torch.testing.assert_close(
        more(texts()), more.shared(torch.nn.functional.normalize(texts(), dim=-1))
    )


def test_only_chosen_experts_and_the_router_get_gradients() -> None:
    more = make(top_k=1)
    one = texts(1)
    more(one).sum().backward()
    assert more.experts.bias.grad is not None
    assert more.router.weight.grad is not None
    per_expert = more.experts.bias.grad.reshape(4, -1).abs().sum(1)
    assert (per_expert > 0).sum() == 1
    assert more.router.weight.grad.abs().sum() > 0


def test_an_empty_batch_gives_no_vectors() -> None:
    assert make()(texts(0)).shape == (0, 8)


@pytest.mark.parametrize("top_k", [0, 5, -1])
def test_an_invalid_top_k_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and num_experts=4, got {top_k}"):
        make(top_k=top_k)
