"""CLARE on tiny random towers of the real classes: shapes, references, padding, weights."""

# Shapes: B photos, N queries, Q denoising queries, D dimension, M texts, K decoder layers

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import SiglipConfig, SiglipModel, SiglipTextModel

from reir.errors import CheckpointError
from reir.models.clare.config import ClareConfig
from reir.models.clare.deformable import TokenGrid, sine_embedding, to_xyxy
from reir.models.clare.denoising import denoising_queries
from reir.models.clare.model import (
    Clare,
    ClareOutput,
    photo_sizes,
)
from reir.models.clare.towers import load_towers, text_config, vision_config
from reir.models.clare.vision import MaskedGroupNorm, Pyramid, encode_patches, resampling_weights
from reir_testing.tiny_clare import tiny_clare, tiny_clare_config, tiny_photos


def ids(num: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (num, 8), generator=torch.Generator().manual_seed(seed))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(a: ClareOutput, b: ClareOutput, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """What both say of their first photo is the same, layer by layer."""
    for x, y in (
        (a.objects[:, 0], b.objects[:, 0]),
        (a.boxes[:, 0], b.boxes[:, 0]),
        (a.proposal_logits[0], b.proposal_logits[0]),
        (a.proposal_boxes[0], b.proposal_boxes[0]),
    ):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


# ---------------------------------------------------------------------------------- configuration


def test_configurations_can_be_saved_as_json() -> None:
    config = tiny_clare_config(paper_parity=True, clia_bias=-3)
    assert ClareConfig(**json.loads(json.dumps(asdict(config)))) == config
    assert Clare.from_dict(json.loads(json.dumps(asdict(config)))).config == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 40}, "dim must be a multiple of 32"),
        ({"dim": 32, "num_heads": 5}, "dim must be a multiple of 10"),
        ({"vision_width": 33}, "vision_width must be a multiple of 2"),
        ({"text_width": 25}, "text_width must be a multiple of 2"),
        ({"patch_px": 15}, "patch_px must be a multiple of 2"),
        ({"longest_side_px": 50}, "between 1 and longest_side_px=50, got 64"),
        ({"num_queries": 0}, "num_queries must be at least 1"),
        ({"top_k_experts": 5}, "top_k must be between 1 and num_experts=4"),
    ],
)
def test_configurations_that_cannot_be_built_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Clare(tiny_clare_config(**changes))


# ---------------------------------------------------------------------------------- vision stream


@pytest.mark.parametrize("size", [(4, 4), (7, 5), (3, 9), (1, 2), (24, 11)])
def test_resampling_of_positions_equals_torch(size: tuple[int, int]) -> None:
    grid = random(5, 6, 6)
    want = F.interpolate(grid[None], size=size, mode="bicubic", antialias=True)[0]
    down = resampling_weights(torch.tensor([float(size[0])]), size[0], 6)[0]
    across = resampling_weights(torch.tensor([float(size[1])]), size[1], 6)[0]
    torch.testing.assert_close(down @ grid @ across.T, want, rtol=1e-5, atol=1e-5)


def test_resampling_of_a_batch_leaves_the_padding_empty() -> None:
    both = resampling_weights(torch.tensor([3.0, 7.0]), 7, 6)
    assert (both[0, 3:] == 0).all()
    torch.testing.assert_close(both[0, :3], resampling_weights(torch.tensor([3.0]), 3, 6)[0])
    torch.testing.assert_close(both[1].sum(-1), torch.ones(7))


def test_positions_are_unchanged_on_the_native_grid() -> None:
    assert torch.equal(resampling_weights(torch.tensor([4.0]), 4, 4)[0], torch.eye(4))
    model, (pixels, _) = tiny_clare(), tiny_photos([(64, 64)])
    with torch.no_grad():
        got = encode_patches(model.vision, pixels, torch.tensor([[4.0, 4.0]]), None)
        want = model.vision(pixels).last_hidden_state
    torch.testing.assert_close(got.flatten(2).transpose(1, 2), want)


def test_masked_group_norm_equals_the_norm_of_the_valid_cells() -> None:
    norm = MaskedGroupNorm(32, 64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, valid = 3 * random(2, 64, 4, 6) + 1, torch.zeros(2, 4, 6, dtype=torch.bool)
    valid[0, :3, :2] = valid[1] = True
    got = norm(x, valid)
    torch.testing.assert_close(got[:1, :, :3, :2], norm(x[:1, :, :3, :2]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1:], norm(x[1:]), rtol=1e-4, atol=1e-5)


def test_the_pyramid_has_four_maps_and_ignores_padding() -> None:
    pyramid, patches = Pyramid(16, 32), random(1, 16, 6, 10)
    assert [tuple(x.shape[2:]) for x in pyramid(patches, None)] == [
        (12, 20),
        (6, 10),
        (3, 5),
        (2, 3),
    ]
    sides, strides = [(12, 20), (6, 10), (3, 5), (2, 3)], (8, 16, 32, 64)
    grid = TokenGrid.build(torch.tensor([[96.0, 64.0]]), sides, strides)  # 6 x 4 patches
    padded = pyramid(patches, grid.valid_maps())
    for x, alone in zip(padded, pyramid(patches[..., :4, :6], None), strict=True):
        rows, columns = alone.shape[2:]
        torch.testing.assert_close(x[..., :rows, :columns], alone, rtol=1e-4, atol=1e-5)


def test_the_size_of_a_photo_is_computed_from_the_mask() -> None:
    _, mask = tiny_photos([(40, 70), (64, 33)])
    assert photo_sizes(mask).tolist() == [[70.0, 40.0], [33.0, 64.0]]


# -------------------------------------------------------------------------------------- forward


def test_output_has_a_row_for_every_layer_photo_and_query() -> None:
    model, (pixels, mask) = tiny_clare(), tiny_photos([(64, 96), (50, 80)])
    with torch.no_grad():
        output = model(pixels, mask)
    num_tokens = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
    assert output.objects.shape == (3, 2, 20, 32)
    assert output.boxes.shape == (3, 2, 20, 4)
    assert output.proposal_logits.shape == (2, 20)
    assert output.token_boxes.shape == (2, num_tokens, 4)
    assert output.token_logits.shape == output.token_valid.shape == (2, num_tokens)
    assert output.denoising_objects is None
    assert output.denoising_boxes is None
    assert all(x.isfinite().all() for x in (output.objects, output.boxes, output.token_boxes))
    assert (output.proposal_logits.diff(dim=1) <= 0).all()
    torch.testing.assert_close(output.objects.norm(dim=-1), torch.ones(3, 2, 20))


def slow_forward(model: Clare, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Objects and xyxy boxes of one photo that fills its batch and the native grid exactly."""
    side = pixels.shape[-1] // 16
    patches = model.vision(pixels).last_hidden_state.transpose(1, 2).view(1, -1, side, side)
    coarse = F.max_pool2d(patches, 2)
    rows, centers, levels = [], [], []
    for level, x in enumerate((model.pyramid.upsample(patches), patches, coarse, coarse)):
        x = model.pyramid.projections[level](x)
        norm: Any = model.pyramid.norms[level]  # as many groups as channels
        variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        x = (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None]
        x = x + norm.bias[:, None, None]
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                rows.append(x[0, :, i, j])
                centers.append([(j + 0.5) / x.shape[3], (i + 0.5) / x.shape[2]])
                levels.append(level)
    tokens, centers_T2 = torch.stack(rows)[None], torch.tensor(centers)
    grid = model.encode(pixels, torch.zeros(1, *pixels.shape[2:], dtype=torch.bool)).grid
    torch.testing.assert_close(grid.centers[0], centers_T2)
    for layer in model.encoder.layers:
        embedding = model.encoder.level_embedding.weight[levels]
        tokens = layer(tokens, (sine_embedding(centers_T2, 16) + embedding)[None], grid)

    head, found = model.proposals, []
    for token, (x, y), level in zip(tokens[0], centers, levels, strict=True):
        feature = head.norm(head.project(token))
        anchor = torch.tensor([x, y, 0.05 * 2**level, 0.05 * 2**level])
        box = (head.box(feature) + (anchor / (1 - anchor)).log()).sigmoid()
        found.append((float(head.objectness(feature)), box))
    found.sort(key=lambda pair: -pair[0])
    boxes = torch.stack([box for _, box in found[: model.config.num_queries]])[None]

    content = model.queries.weight[None]
    everyone = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    objects, corners = [], []
    for layer, box_head in zip(model.decoder.layers, model.decoder.box_heads, strict=True):
        position = model.decoder.position(sine_embedding(boxes, 16))
        content = layer(
            content, position, boxes, everyone, SimpleNamespace(tokens=tokens, grid=grid)
        )
        boxes = (box_head(content) + (boxes / (1 - boxes)).log()).sigmoid()
        objects.append(content)
        corners.append(to_xyxy(boxes))
    return torch.stack(objects), torch.stack(corners)


def test_logits_and_boxes_equal_the_slow_reference() -> None:
    model, (pixels, mask) = tiny_clare(), tiny_photos([(64, 64)])
    with torch.no_grad():
        output, texts = model(pixels, mask), model.text(ids(5))
        logits = model.scores(output.objects, texts)
        objects, boxes = slow_forward(model, pixels)
        torch.testing.assert_close(output.boxes, boxes, rtol=1e-4, atol=1e-4)
        features = model.language(ids(5)).pooler_output
        for k in range(3):
            raw = model.experts[k](features)
            scale, bias = model.score_log_scale[k].exp(), model.score_bias[k]
            for n in range(0, 20, 3):
                for m in range(5):
                    cosine = F.cosine_similarity(objects[k, 0, n], raw[m], dim=0)
                    torch.testing.assert_close(
                        logits[k, 0, n, m], scale * cosine + bias, rtol=1e-3, atol=1e-3
                    )


def test_pixels_in_the_padding_do_not_change_the_output() -> None:
    model, (pixels, mask) = tiny_clare(), tiny_photos([(50, 70), (96, 128)])
    other = torch.where(mask[:, None], 7.0, pixels)
    with torch.no_grad():
        before, after = model(pixels, mask), model(other, mask)
    assert_same(before, after, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(50, 70), (64, 64), (33, 128), (96, 97)])
def test_a_photo_has_the_same_output_alone_and_in_a_padded_batch(size: tuple[int, int]) -> None:
    model = tiny_clare()
    with torch.no_grad():
        alone = model(*tiny_photos([size]))
        together = model(*tiny_photos([size, (128, 128)]))
    assert_same(alone, together)


def test_a_photo_with_few_tokens_has_the_same_output_in_a_padded_batch() -> None:
    model = tiny_clare(num_queries=100)
    with torch.no_grad():
        alone = model(*tiny_photos([(64, 64)]))  # 64 + 16 + 4 + 1 tokens
        together = model(*tiny_photos([(64, 64), (128, 128)]))
    assert alone.objects.shape[2] == 85
    torch.testing.assert_close(together.objects[:, :1, :85], alone.objects, rtol=1e-4, atol=1e-5)
    assert (together.proposal_logits[0, 85:] == model.proposals.NO_PROPOSAL).all()


def test_batches_of_wrong_shape_are_refused() -> None:
    model, (pixels, mask) = tiny_clare(), tiny_photos([(64, 64)])
    with pytest.raises(ValueError, match="multiples of 32"):
        model(pixels[..., :50], mask[..., :50])
    with pytest.raises(ValueError, match="mask"):
        model(pixels, mask[..., :32])


# ----------------------------------------------------------------------------------------- texts


def test_text_is_pooled_at_the_last_position_without_mask() -> None:
    model, tokens = tiny_clare(), ids(3)
    tokens[0, 3:] = model.config.pad_token
    tower = model.language
    with torch.no_grad():
        states = tower(tokens).last_hidden_state
        want = states[:, -1] @ tower.head.weight.T + tower.head.bias
        torch.testing.assert_close(model.text_features(tokens), want)
        longer = tokens.clone()
        longer[0, 3] = 5
        assert not torch.allclose(model.text_features(longer)[0], want[0])


def test_expressions_have_a_unit_vector_for_every_layer() -> None:
    model = tiny_clare()
    with torch.no_grad():
        texts = model.text(ids(4))
        for k in range(3):
            want = F.normalize(model.experts[k](model.text_features(ids(4))), dim=-1)
            torch.testing.assert_close(texts[k], want)
        assert not torch.allclose(texts[0], texts[1])
        assert model.text(ids(0)).shape == (3, 0, 32)


def test_texts_that_are_not_padded_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(M, 8\), got \(2, 5\); pad with 1"):
        tiny_clare().text(ids(2)[:, :5])


def test_scores_start_at_the_prior_and_scales_have_a_limit() -> None:
    model = tiny_clare()
    objects, texts = torch.eye(32)[None, None, :4].expand(3, 1, -1, -1), torch.eye(32)[None, :6]
    texts = texts.expand(3, -1, -1)
    with torch.no_grad():
        logits = model.scores(objects, texts)
        torch.testing.assert_close(logits[0, 0, 0, 1], torch.tensor(-math.log(99)))
        torch.testing.assert_close(logits[0, 0, 0, 0], torch.tensor(20 - math.log(99)))
        torch.testing.assert_close(
            model.clia_logits(objects, texts)[2, 0, :, :2], 10 * torch.eye(4)[:, :2] - 10
        )
        model.score_log_scale.fill_(9.0)
        assert float(model.scores(objects, texts).max()) == pytest.approx(100 - math.log(99))


def test_texts_of_a_photo_are_scored_against_that_photo_only() -> None:
    model = tiny_clare()
    objects, texts = random(3, 2, 5, 32), random(3, 6, 32, seed=1)
    with torch.no_grad():
        shared = model.scores(objects, texts)
        own = model.scores(objects, texts.view(3, 2, 3, 32))
    torch.testing.assert_close(own[:, 0], shared[:, 0, :, :3])
    torch.testing.assert_close(own[:, 1], shared[:, 1, :, 3:])


# ------------------------------------------------------------------------------------- denoising


def known_queries(model: Clare, num_photos: int) -> Any:
    boxes = torch.tensor([[0.2, 0.2, 0.5, 0.6], [0.4, 0.1, 0.9, 0.7]]).expand(num_photos, -1, -1)
    return denoising_queries(
        random(num_photos, 2, model.config.dim),
        boxes,
        torch.ones(num_photos, 2, dtype=torch.bool),
        num_queries=model.config.num_queries,
        seeds=range(num_photos),
    )


def test_denoising_queries_do_not_change_the_other_outputs() -> None:
    model, (pixels, mask) = tiny_clare(), tiny_photos([(64, 96), (50, 80)])
    known = known_queries(model, 2)
    with torch.no_grad():
        plain, output = model(pixels, mask), model(pixels, mask, known)
    assert output.denoising_objects is not None
    assert output.denoising_boxes is not None
    assert output.denoising_objects.shape == (3, 2, known.content.shape[1], 32)
    assert output.denoising_boxes.shape == (3, 2, known.content.shape[1], 4)
    assert_same(output, plain)


def test_a_denoising_mask_of_wrong_size_is_refused() -> None:
    known = known_queries(tiny_clare(num_queries=30), 1)
    with pytest.raises(ValueError, match=r"must be \(220, 220\), got \(230, 230\)"):
        tiny_clare()(*tiny_photos([(64, 64)]), known)


# --------------------------------------------------------------------------- gradients, weights


def total(model: Clare, photos: tuple[Tensor, Tensor]) -> Tensor:
    """A sum that every part of the model takes part in."""
    output = model(*photos, known_queries(model, len(photos[0])))
    assert output.denoising_boxes is not None
    texts = model.text(ids(4))
    parts = (
        model.scores(output.objects, texts),
        model.clia_logits(output.objects, texts),
        10 * output.boxes,
        output.denoising_boxes,
        output.token_logits.clamp(min=-100),
        output.token_boxes,
    )
    return torch.stack([part.square().mean() for part in parts]).sum()


def test_every_weight_gets_a_finite_gradient_in_bf16() -> None:
    model = tiny_clare().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = total(model, tiny_photos([(64, 96), (50, 80)]))
    torch.autograd.backward(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # a shift of all keys moves no softmax
        if not name.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() > 0, name


def test_activation_checkpointing_does_not_change_the_gradients() -> None:
    model, photos = tiny_clare().train(), tiny_photos([(64, 96), (50, 80)])
    gradients = []
    for enabled in (False, True, False):
        model.checkpoint_activations(enabled)
        assert model.vision.is_activation_checkpointing is enabled
        model.zero_grad()
        torch.autograd.backward(total(model, photos))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed, again in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("paper_parity", [False, True], ids=["mended", "parity"])
def test_saved_weights_give_the_same_output_bit_for_bit(tmp_path: Path, paper_parity: bool) -> None:
    model, photos = tiny_clare(paper_parity=paper_parity), tiny_photos([(64, 96), (50, 80)])
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = tiny_clare(seed=1, paper_parity=paper_parity)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(other(*photos).objects, model(*photos).objects)
        assert torch.equal(other(*photos).boxes, model(*photos).boxes)
        assert torch.equal(other.text(ids(3)), model.text(ids(3)))


# --------------------------------------------------------------------------------------- towers


def siglip(tmp_path: Path, **changes: Any) -> Path:
    """A whole random SigLIP model on disk, with the pooling head that CLARE leaves out."""
    config = tiny_clare_config(**changes)
    vision, text = vision_config(config).to_dict(), text_config(config).to_dict()
    whole = SiglipConfig(vision_config=vision | {"vision_use_head": True}, text_config=text)
    torch.manual_seed(5)
    SiglipModel(whole).save_pretrained(tmp_path / "siglip")
    return tmp_path / "siglip"


def towers() -> tuple[nn.Module, nn.Module]:
    model = tiny_clare()
    return model.vision, model.language


def test_towers_are_loaded_from_a_directory(tmp_path: Path) -> None:
    folder, model = siglip(tmp_path), tiny_clare()
    load_towers(model.vision, model.language, str(folder))
    real = SiglipModel.from_pretrained(folder)
    pixels, _ = tiny_photos([(64, 64)])
    with torch.no_grad():
        want = real.vision_model(pixels).last_hidden_state
        got = encode_patches(model.vision, pixels, torch.tensor([[4.0, 4.0]]), None)
        torch.testing.assert_close(got.flatten(2).transpose(1, 2), want)
        features = real.text_model(ids(3)).pooler_output
        torch.testing.assert_close(model.text_features(ids(3)), features)


def test_towers_of_another_size_are_refused(tmp_path: Path) -> None:
    folder = siglip(tmp_path, vision_width=64)
    with pytest.raises(CheckpointError, match="other shapes than this configuration"):
        load_towers(*towers(), str(folder))


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not load as SiglipVisionModel"):
        load_towers(*towers(), str(tmp_path))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    folder = siglip(tmp_path)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"does not load as SiglipVisionModel \(Safetensor"):
        load_towers(*towers(), str(folder))


def test_weights_of_one_tower_alone_are_refused(tmp_path: Path) -> None:
    SiglipTextModel(text_config(tiny_clare_config())).save_pretrained(tmp_path / "text")
    with pytest.raises(CheckpointError, match="does not load as SiglipVisionModel"):
        load_towers(*towers(), str(tmp_path / "text"))


def test_towers_that_lack_a_weight_are_refused(tmp_path: Path) -> None:
    folder = siglip(tmp_path)
    weights = load_file(folder / "model.safetensors")
    lost = {k: v for k, v in weights.items() if "text_model.head.bias" not in k}
    assert len(lost) == len(weights) - 1
    save_file(lost, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of SiglipTextModel, .*head.bias"):
        load_towers(*towers(), str(folder))


@pytest.mark.parametrize("neighbors", [True, False])
def test_a_query_depends_on_the_others_only_with_neighbors(neighbors: bool) -> None:
    many = tiny_clare(neighbors=neighbors)
    few = Clare(replace(many.config, num_queries=5)).eval()
    weights = many.state_dict()
    few.load_state_dict(weights | {"queries.weight": weights["queries.weight"][:5]})
    photos = tiny_photos([(64, 96)])
    with torch.no_grad():
        among_many, among_few = many(*photos).objects[:, :, :5], few(*photos).objects
    assert torch.allclose(among_many, among_few, atol=1e-5) != neighbors
