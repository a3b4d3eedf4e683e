"""Cross-modality attention against numpy, in the usual and in the released form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reir.models.weak_rec.cross_attention import (
    CrossModalityAttention,
    instance_norm,
    released_attention,
)

ANCHOR, TEXT, WIDTH, HEADS = 6, 5, 8, 2
parity = pytest.mark.parametrize("paper_parity", [False, True], ids=["usual", "released"])


def tiny(*, paper_parity: bool = False, opened: bool = True) -> CrossModalityAttention:
    torch.manual_seed(0)
    block = CrossModalityAttention(
        ANCHOR, TEXT, width=WIDTH, num_heads=HEADS, paper_parity=paper_parity
    )
    if opened:
        for value in block.state_dict().values():
            if value.is_floating_point() and value.ndim < 2:
                value.copy_(torch.rand(value.shape) + 0.3)
    return block.double()


def inputs(batch: int = 3, num: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    anchors = torch.randn(batch, num, ANCHOR, dtype=torch.float64)
    return anchors, torch.randn(batch, TEXT, dtype=torch.float64)


# ------------------------------------------------------------------------------- the whole block


def softmax(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(x - x.max()) / np.exp(x - x.max()).sum())


def slow_heads(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    share, mixed = WIDTH // HEADS, np.zeros_like(q)
    for i in range(len(q)):
        for head in range(HEADS):
            part = slice(head * share, (head + 1) * share)
            mixed[i, part] = softmax(k[:, part] @ q[i, part] / share**0.5) @ v[:, part]
    return mixed


def slow_released(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scale, mixed = (WIDTH // HEADS) ** -0.5, np.zeros_like(q)
    for j in range(len(q)):
        received = sum(softmax(k @ q[i] * scale)[j] for i in range(len(q)))
        mixed[j] = received * v[j]
    return mixed


def slow(
    block: CrossModalityAttention, x: np.ndarray, text: np.ndarray, paper_parity: bool
) -> np.ndarray:
    """Compute the block for one photo in eval mode: x (A, C), text (T,)."""
    w = {name: value.numpy() for name, value in block.state_dict().items()}
    gate = {name: math.tanh(w[name].item()) for name in w if name.endswith("_gate")}

    def layer_norm(name: str, x: np.ndarray) -> np.ndarray:
        deviation = x - x.mean(-1, keepdims=True)
        scaled = deviation / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return np.asarray(scaled * w[f"{name}.weight"] + w[f"{name}.bias"])

    def attend(name: str, queries: np.ndarray, context: np.ndarray) -> np.ndarray:
        q = layer_norm(f"{name}.norm", queries) @ w[f"{name}.query.weight"].T
        k, v = np.split(context @ w[f"{name}.key_value.weight"].T, 2, axis=1)
        mixed = (slow_released if paper_parity else slow_heads)(q, k, v)
        return np.asarray(mixed @ w[f"{name}.merge.weight"].T)

    def feedforward(name: str, x: np.ndarray) -> np.ndarray:
        hidden = layer_norm(f"{name}.0", x) @ w[f"{name}.1.weight"].T
        erf = np.vectorize(math.erf)(hidden / math.sqrt(2))
        return np.asarray(0.5 * hidden * (1 + erf) @ w[f"{name}.3.weight"].T)

    def film(x: np.ndarray) -> np.ndarray:
        read = text
        for linear, norm in ((0, 1), (4, 5)):
            read = w[f"film.read.{linear}.weight"] @ read + w[f"film.read.{linear}.bias"]
            name = f"film.read.{norm}"
            if paper_parity:
                read = read - w[f"{name}.running_mean"]
                read = read / np.sqrt(w[f"{name}.running_var"] + 1e-5)
                read = read * w[f"{name}.weight"] + w[f"{name}.bias"]
            else:
                read = layer_norm(name, read)
            read = np.maximum(read, 0)
        scale = np.tanh(w["film.scale.weight"] @ read + w["film.scale.bias"])
        shift = np.tanh(w["film.shift.weight"] @ read + w["film.shift.bias"])
        axis = None if paper_parity else 0
        normed = (x - x.mean(axis)) / np.sqrt(x.var(axis) + 1e-5)
        return np.asarray(np.maximum(scale * normed + shift, 0))

    x = x @ w["project.weight"].T
    x = x + gate["attention_gate"] * attend("anchors_to_anchors", x, x)
    x = x + gate["feedforward_gate"] * feedforward("feedforward", x)
    told = x + w["film_gate"] * film(x)
    attended = x + gate["film_attention_gate"] * attend("anchors_to_film", x, told)
    return np.asarray(x + gate["film_feedforward_gate"] * feedforward("film_feedforward", attended))


@parity
def test_equals_numpy(paper_parity: bool) -> None:
    block, (anchors, text) = tiny(paper_parity=paper_parity).eval(), inputs()
    got = block(anchors, text).detach().numpy()
    for photo in range(3):
        want = slow(block, anchors[photo].numpy(), text[photo].numpy(), paper_parity)
        np.testing.assert_allclose(got[photo], want, rtol=1e-9)


@parity
def test_starts_as_the_linear_projection(paper_parity: bool) -> None:
    block, (anchors, text) = tiny(paper_parity=paper_parity, opened=False), inputs()
    assert torch.equal(block(anchors, text), anchors @ block.project.weight.T)
    assert block.film_gate.item() == pytest.approx(0.1)


@parity
def test_published_size(paper_parity: bool) -> None:
    with torch.device("meta"):
        block = CrossModalityAttention(paper_parity=paper_parity)
    assert sum(p.numel() for p in block.parameters()) == 7_872_517


@parity
def test_sentences_count_once_both_gates_are_open(paper_parity: bool) -> None:
    block, (anchors, text) = tiny(paper_parity=paper_parity).eval(), inputs()
    assert not torch.allclose(block(anchors, text), block(anchors, text.flip(0)))
    for gate in (block.film_attention_gate, block.film_feedforward_gate):
        before = gate.item()
        torch.nn.init.zeros_(gate)
        assert torch.equal(block(anchors, text), block(anchors, text.flip(0)))
        torch.nn.init.constant_(gate, before)


@parity
def test_padding_has_no_influence(paper_parity: bool) -> None:
    block, (anchors, text) = tiny(paper_parity=paper_parity).eval(), inputs()
    padding = torch.randn(3, 2, ANCHOR, dtype=torch.float64) * 9
    valid = torch.tensor([[True] * 4 + [False] * 2] * 3)
    got = block(torch.cat([anchors, padding], 1), text, valid)
    torch.testing.assert_close(got[:, :4], block(anchors, text))


@parity
def test_photos_without_anchors_are_finite(paper_parity: bool) -> None:
    block, (anchors, text) = tiny(paper_parity=paper_parity), inputs()
    valid = torch.tensor([[True] * 4, [True] + [False] * 3, [False] * 4])
    anchors.requires_grad_()
    out = block(anchors, text, valid)
    out.sum().backward()
    assert out.isfinite().all()
    assert anchors.grad is not None
    assert anchors.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_photos_do_not_depend_on_the_batch_in_training() -> None:
    """Two workers then compute the same as one; batch norm in the released form prevents it."""
    anchors, text = inputs()
    torch.nn.init.normal_(text)
    for paper_parity in (False, True):
        block = tiny(paper_parity=paper_parity)
        for module in block.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        alone = block(anchors[:2], text[:2])
        same = torch.allclose(block(anchors, text)[:2], alone)
        assert same is not paper_parity


@parity
def test_every_weight_is_trained(paper_parity: bool) -> None:
    block, (anchors, text) = tiny(paper_parity=paper_parity), inputs()
    block(anchors, text).square().sum().backward()
    missing = [n for n, p in block.named_parameters() if p.grad is None or not p.grad.any()]
    # Batch norm takes away what the bias before it adds.
    biases = ["film.read.0.bias", "film.read.4.bias"] if paper_parity else []
    assert [n for n in missing if n not in biases] == []


# ----------------------------------------------------------------------------------------- parts


def test_released_attention_does_not_mix_anchors() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    everywhere = torch.ones(2, 5, dtype=torch.bool)
    weights = (query @ key.transpose(1, 2)).softmax(-1)
    # The subscripts of the released code: the sum is over the queries i.
    want = torch.einsum("bij,bjd->bjd", weights, value)
    torch.testing.assert_close(released_attention(query, key, value, everywhere), want)


def test_instance_norm_equals_the_layer_of_torch() -> None:
    torch.manual_seed(0)
    x, everywhere = torch.randn(2, 5, 4, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)
    by_channel = F.instance_norm(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(instance_norm(x, everywhere, (1,)), by_channel)
    # The layer for maps takes an array of three axes for one map of B channels.
    whole = F.instance_norm(x[None])[0]
    torch.testing.assert_close(instance_norm(x, everywhere, (1, 2)), whole)
