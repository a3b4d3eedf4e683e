"""The losses of training without boxes, against slow loops of the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reir.losses import anchor_contrast, equivariance, false_negative_suppression

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
few = settings(max_examples=25, deadline=None)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 4))
seeds = st.integers(0, 2**31 - 1)
LOSSES: dict[str, Loss] = {
    "contrast": anchor_contrast,
    "suppression": false_negative_suppression,
    "suppression of a fixed target": partial(false_negative_suppression, detach_target=True),
    "equivariance": equivariance,
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def inputs(num: int, anchors: int, seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Texts, anchors, and a mask in which each photo has at least one anchor."""
    random = torch.Generator().manual_seed(seed)
    texts = torch.randn(num, 3, generator=random, dtype=torch.float64) * scale
    features = torch.randn(num, anchors, 3, generator=random, dtype=torch.float64) * scale
    valid = torch.rand(num, anchors, generator=random) < 0.6
    valid[:, torch.randint(anchors, (1,), generator=random)] = True
    return texts, features, valid


def dot(a: Tensor, b: Tensor) -> float:
    return math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def similarities(
    texts: Tensor, anchors: Tensor, valid: Tensor, text: int, photo: int
) -> list[float]:
    """Similarity of a text to the anchors of a photo, best first."""
    found = [dot(texts[text], a) for a, v in zip(anchors[photo], valid[photo], strict=True) if v]
    return sorted(found, reverse=True)


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


# ---------------------------------------------------------------------------------- anchor contrast


def slow_contrast(
    texts: Tensor, anchors: Tensor, valid: Tensor, same: Tensor | None = None
) -> float:
    num, total = len(texts), 0.0
    for i in range(num):
        logits = []
        for photo in range(num):
            if photo == i or same is None or not same[i, photo]:
                found = similarities(texts, anchors, valid, i, photo)
                logits += found[:1] if photo == i else found[:2]
        own = similarities(texts, anchors, valid, i, i)[0]
        total += math.log(sum(math.exp(x) for x in logits)) - own
    return total / num


@given(size=sizes, seed=seeds)
@few
def test_contrast_equals_the_loop(size: tuple[int, int], seed: int) -> None:
    texts, anchors, valid = inputs(*size, seed)
    got = anchor_contrast(texts, anchors, valid)
    assert got.item() == pytest.approx(slow_contrast(texts, anchors, valid))


@given(size=sizes, seed=seeds)
@few
def test_contrast_of_photos_that_occur_twice(size: tuple[int, int], seed: int) -> None:
    texts, anchors, valid = inputs(*size, seed)
    photos = torch.randint(2, (size[0],), generator=torch.Generator().manual_seed(seed))
    same = photos[:, None] == photos[None, :]
    got = anchor_contrast(texts, anchors, valid, same)
    assert got.item() == pytest.approx(slow_contrast(texts, anchors, valid, same))
    others = same & ~torch.eye(size[0], dtype=torch.bool)
    assert anchor_contrast(texts, anchors, valid, others).item() == got.item()


def test_contrast_by_hand() -> None:
    texts = torch.zeros(3, 2)
    anchors, valid = torch.randn(3, 4, 2), torch.ones(3, 4, dtype=torch.bool)
    # One positive, and two negatives for each of the two other photos.
    assert anchor_contrast(texts, anchors, valid).item() == pytest.approx(math.log(5))
    # With one anchor each, there is one negative for each photo.
    assert anchor_contrast(texts, anchors[:, :1], valid[:, :1]).item() == pytest.approx(math.log(3))
    valid[1, 1:] = False
    want = (2 * math.log(4) + math.log(5)) / 3
    assert anchor_contrast(texts, anchors, valid).item() == pytest.approx(want)


def test_contrast_of_one_photo_alone_is_zero() -> None:
    texts, anchors, valid = inputs(3, 2, 0)
    everywhere = torch.ones(3, 3, dtype=torch.bool)
    assert anchor_contrast(texts, anchors, valid, everywhere).item() == 0


# ---------------------------------------------------------------------- false-negative suppression


def slow_suppression(texts: Tensor, anchors: Tensor, valid: Tensor) -> float:
    num, best = len(texts), []
    for i in range(num):
        found = [(dot(texts[i], a), a) for a, v in zip(anchors[i], valid[i], strict=True) if v]
        best.append(max(found, key=lambda pair: pair[0])[1])
    total = 0.0
    for i in range(num):
        alike = [(dot(best[i], best[j]) + dot(texts[i], texts[j])) / 2 for j in range(num)]
        matches = [dot(best[i], texts[j]) for j in range(num)]
        total += sum(abs(x - y) for x, y in zip(softmax(alike), softmax(matches), strict=True))
    return total / num**2


@given(size=sizes, seed=seeds, detached=st.booleans())
@few
def test_suppression_equals_the_loop(size: tuple[int, int], seed: int, detached: bool) -> None:
    texts, anchors, valid = inputs(*size, seed)
    got = false_negative_suppression(texts, anchors, valid, detach_target=detached)
    assert got.item() == pytest.approx(slow_suppression(texts, anchors, valid), abs=1e-12)


def test_suppression_of_texts_that_equal_their_anchors_is_zero() -> None:
    texts = torch.randn(4, 3)
    valid = torch.ones(4, 1, dtype=torch.bool)
    assert false_negative_suppression(texts, texts[:, None], valid).item() == pytest.approx(0)


def test_a_fixed_target_has_no_gradient() -> None:
    texts, anchors, valid = inputs(4, 3, 1)
    grads = []
    for detached in (False, True):
        leaf = texts.clone().requires_grad_()
        false_negative_suppression(leaf, anchors, valid, detach_target=detached).backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        grads.append(leaf.grad)
    # The target alone: each row of T T' counts with the sign of its difference.
    leaf, fixed = texts.clone().requires_grad_(), texts
    chosen = (anchors @ fixed[..., None])[..., 0].masked_fill(~valid, -torch.inf).argmax(1)
    best = anchors[torch.arange(4), chosen]
    target = ((best @ best.T + leaf @ leaf.T) / 2).softmax(1)
    (target - (best @ fixed.T).softmax(1)).abs().mean().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(grads[0] - grads[1], leaf.grad)


# ------------------------------------------------------------------------------------ equivariance


def slow_equivariance(texts: Tensor, anchors: Tensor, valid: Tensor) -> float:
    num = len(texts)
    p = [
        softmax([similarities(texts, anchors, valid, i, j)[0] for j in range(num)])
        for i in range(num)
    ]
    by_photo, by_text = [0.0], [0.0]
    for i in range(num):
        for j in range(num):
            if i != j:
                by_photo.append(abs((p[i][i] - p[i][j]) - (p[j][j] - p[j][i])))
                by_text.append(abs((p[i][i] - p[j][i]) - (p[j][j] - p[i][j])))
    pairs = max(num * (num - 1), 1)
    return sum(by_photo) / pairs + sum(by_text) / pairs


@given(size=sizes, seed=seeds)
@few
def test_equivariance_equals_the_loop(size: tuple[int, int], seed: int) -> None:
    texts, anchors, valid = inputs(*size, seed)
    got = equivariance(texts, anchors, valid)
    assert got.item() == pytest.approx(slow_equivariance(texts, anchors, valid), abs=1e-12)


def test_equivariance_of_symmetric_similarities_is_zero() -> None:
    texts = torch.eye(4, dtype=torch.float64)
    valid = torch.ones(4, 1, dtype=torch.bool)
    assert equivariance(texts, texts[:, None], valid).item() == pytest.approx(0)


# --------------------------------------------------------------------------------------- all losses


# A fixed target is left out on purpose: its gradient is not that of the whole function.
@pytest.mark.parametrize(
    "loss", [anchor_contrast, false_negative_suppression, equivariance], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(("num", "anchors"), [(1, 1), (1, 3), (2, 1), (4, 3)])
def test_gradients_are_those_of_finite_differences(loss: Loss, num: int, anchors: int) -> None:
    texts, features, valid = inputs(num, anchors, 7)
    assert torch.autograd.gradcheck(
        lambda t, a: loss(t, a, valid), (texts.requires_grad_(), features.requires_grad_())
    )


@each_loss
@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0], ids=["ties", "usual", "saturated"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
def test_gradients_are_finite(loss: Loss, scale: float, half: bool) -> None:
    texts, anchors, valid = (x.float() if x.is_floating_point() else x for x in inputs(4, 3, 3))
    leaves = [(x * scale).requires_grad_() for x in (texts, anchors)]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        value = loss(leaves[0], leaves[1], valid)
    value.backward()  # type: ignore[no-untyped-call]
    assert value.isfinite()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@each_loss
def test_padding_neither_counts_nor_learns(loss: Loss) -> None:
    texts, anchors, _ = inputs(3, 4, 5)
    valid = torch.tensor([[True, True, False, False]] * 3)
    leaf = torch.cat([anchors[:, :2], anchors[:, 2:] * 50], 1).requires_grad_()
    value = loss(texts, leaf, valid)
    torch.testing.assert_close(value, loss(texts, anchors[:, :2], valid[:, :2]))
    value.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert leaf.grad[:, :2].any()
    assert not leaf.grad[:, 2:].any()


@each_loss
def test_photos_without_anchors_are_left_out(loss: Loss) -> None:
    texts, anchors, valid = inputs(4, 3, 6)
    valid[2] = False
    kept = torch.tensor([0, 1, 3])
    torch.testing.assert_close(
        loss(texts, anchors, valid), loss(texts[kept], anchors[kept], valid[kept])
    )


def test_same_photos_of_rows_that_are_left_out() -> None:
    texts, anchors, valid = inputs(4, 3, 6)
    valid[1] = False
    photos = torch.tensor([0, 0, 1, 0])
    same, kept = photos[:, None] == photos[None, :], torch.tensor([0, 2, 3])
    torch.testing.assert_close(
        anchor_contrast(texts, anchors, valid, same),
        anchor_contrast(texts[kept], anchors[kept], valid[kept], same[kept][:, kept]),
    )


@each_loss
@pytest.mark.parametrize("num", [0, 2])
def test_without_anchors_at_all_the_loss_is_zero(loss: Loss, num: int) -> None:
    texts, anchors = torch.randn(num, 3).requires_grad_(), torch.randn(num, 2, 3).requires_grad_()
    value = loss(texts, anchors, torch.zeros(num, 2, dtype=torch.bool))
    value.backward()  # type: ignore[no-untyped-call]
    assert value.item() == 0
    for leaf in (texts, anchors):
        assert leaf.grad is not None
        assert not leaf.grad.any()
