"""`paper_parity` behaves as the released code: one test per line of docs/clare.md, section 9.1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reir.models.clare.encoder import model_input
from reir.models.clare.model import Clare, ClareOutput
from reir.models.clare.vision import encode_patches
from reir_testing.tiny_clare import tiny_clare, tiny_clare_config, tiny_photos

both = pytest.mark.parametrize("paper_parity", [False, True], ids=["mended", "parity"])


def ids(num: int) -> Tensor:
    return torch.randint(0, 64, (num, 8), generator=torch.Generator().manual_seed(0))


def twins() -> tuple[Clare, Clare]:
    """The mended model and the one in parity, with the same weights."""
    mended, parity = tiny_clare(), tiny_clare(paper_parity=True)
    known = {k: v for k, v in mended.state_dict().items() if not k.startswith("score_")}
    parity.load_state_dict(known | {"clia_bias": parity.clia_bias.detach()})
    return mended, parity


@both
def test_pixels_are_normalized_like_siglip_or_like_imagenet_in_parity(paper_parity: bool) -> None:
    config = tiny_clare_config(paper_parity=paper_parity)
    photo = torch.tensor((255, 0, 51), dtype=torch.uint8)[:, None, None].expand(1, 3, 64, 64)
    got = model_input(photo, torch.tensor([[64, 64]]), config)[0][0, :, 5, 7]
    want = [(1 - 0.5) / 0.5, (0 - 0.5) / 0.5, (0.2 - 0.5) / 0.5]
    if paper_parity:
        want = [(255 - 123.675) / 58.395, (0 - 116.28) / 57.12, (51 - 103.53) / 57.375]
    torch.testing.assert_close(got, torch.tensor(want))


@both
def test_first_boxes_pass_gradients_to_the_encoder_in_parity_only(paper_parity: bool) -> None:
    model = tiny_clare(paper_parity=paper_parity)
    output = model(*tiny_photos([(64, 96)]))
    (gradient,) = torch.autograd.grad(
        output.boxes[0].sum(), model.proposals.box.move.bias, allow_unused=True
    )
    assert (gradient is not None and bool(gradient.abs().max() > 0)) is paper_parity


@both
def test_boxes_of_the_proposals_always_have_gradients(paper_parity: bool) -> None:
    model = tiny_clare(paper_parity=paper_parity)
    output = model(*tiny_photos([(64, 96)]))
    (gradient,) = torch.autograd.grad(
        output.proposal_boxes.sum(), model.proposals.box.move.bias, allow_unused=True
    )
    assert gradient.abs().max() > 0


def test_the_score_in_parity_is_the_inner_product() -> None:
    mended, parity = twins()
    photos = tiny_photos([(64, 128)])  # no padding, so that the streams agree
    with torch.no_grad():
        raw, unit = parity(*photos).objects, mended(*photos).objects
        torch.testing.assert_close(F.normalize(raw, dim=-1), unit, rtol=1e-3, atol=1e-4)
        assert (raw.norm(dim=-1) > 2).all()
        raw_texts, texts = parity.text(ids(3)), mended.text(ids(3))
        torch.testing.assert_close(F.normalize(raw_texts, dim=-1), texts)
        for k in range(3):
            want = raw[k, 0] @ raw_texts[k].T
            torch.testing.assert_close(parity.scores(raw, raw_texts)[k, 0], want)


def test_the_score_in_parity_is_clamped() -> None:
    _, parity = twins()
    large = torch.full((3, 1, 1, 32), 1e4)
    signs = torch.stack([torch.ones(32), -torch.ones(32)]).expand(3, 2, 32) * 1e4
    with torch.no_grad():
        assert parity.scores(large, signs)[0, 0, 0].tolist() == [50_000.0, -50_000.0]
        assert parity.clia_logits(large, signs)[0, 0, 0].tolist() == [50_000.0, -50_000.0]


@both
def test_orthogonal_vectors_start_at_the_prior_or_at_one_half_in_parity(paper_parity: bool) -> None:
    model = tiny_clare(paper_parity=paper_parity)
    objects, texts = torch.eye(32)[None, None, :1], torch.eye(32)[None, 1:2]
    with torch.no_grad():
        score = model.scores(objects.expand(3, -1, -1, -1), texts.expand(3, -1, -1))
    torch.testing.assert_close(
        score.sigmoid().flatten(), torch.full((3,), 0.5 if paper_parity else 0.01)
    )
    names = {name for name, _ in model.named_parameters()}
    assert ("score_bias" in names) is not paper_parity


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, -10.0),
        ({"paper_parity": True}, 0.0),
        ({"paper_parity": True, "clia_bias": -10.0}, -10.0),
        ({"clia_bias": -5.0}, -5.0),
    ],
    ids=["mended", "parity", "parity with the intended bias", "chosen"],
)
def test_clia_starts_with_the_configured_bias(changes: dict[str, Any], first: float) -> None:
    model = tiny_clare(**changes)
    assert model.clia_bias.tolist() == [first] * 3
    torch.testing.assert_close(model.clia_log_scale.detach().exp(), torch.full((3,), 10.0))


def seen_alone_and_padded(model: Clare) -> tuple[ClareOutput, ClareOutput]:
    with torch.no_grad():
        return model(*tiny_photos([(64, 96)])), model(*tiny_photos([(64, 96), (96, 128)]))


@both
def test_padding_changes_the_photo_in_parity_only(paper_parity: bool) -> None:
    alone, padded = seen_alone_and_padded(tiny_clare(paper_parity=paper_parity))
    same = torch.allclose(alone.proposal_logits[0], padded.proposal_logits[0], atol=1e-4)
    assert same is not paper_parity


@both
def test_pixels_in_the_padding_reach_the_photo_in_parity_only(paper_parity: bool) -> None:
    model, (pixels, mask) = tiny_clare(paper_parity=paper_parity), tiny_photos([(50, 70)])
    other = torch.where(mask[:, None], 7.0, pixels)
    with torch.no_grad():
        before, after = model(pixels, mask), model(other, mask)
    assert torch.equal(before.proposal_logits, after.proposal_logits) is not paper_parity


def test_patches_in_parity_equal_those_of_transformers_despite_padding() -> None:
    """The released tower has no mask, and stretches its positions over the padded batch."""
    model, (pixels, mask) = tiny_clare(paper_parity=True), tiny_photos([(50, 40), (64, 64)])
    seen: list[Tensor] = []
    model.pyramid.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(pixels, mask)
        want = model.vision(pixels).last_hidden_state  # 64 px are the native grid
        torch.testing.assert_close(seen[0].flatten(2).transpose(1, 2), want)
        wide, mask = tiny_photos([(64, 96)])
        model(wide, mask)
        stretched = encode_patches(model.vision, wide, torch.tensor([[6.0, 4.0]]), None)
    torch.testing.assert_close(seen[1], stretched)


def test_the_model_in_parity_equals_the_default_one_without_padding() -> None:
    mended, parity = twins()
    pixels, mask = tiny_photos([(128, 128), (128, 128)])
    with torch.no_grad():
        a, b = mended(pixels, mask), parity(pixels, mask)
    torch.testing.assert_close(a.boxes, b.boxes, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a.proposal_logits, b.proposal_logits, rtol=1e-3, atol=1e-4)
