"""Deformable encoder and decoder against slow loops over points, queries and layers."""

# Shapes: B images, T tokens of all levels, Q queries, D width, L levels, H heads, P points

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deformable_detr import modeling_deformable_detr

from reir.models.clare.deformable import (
    BoxHead,
    DeformableAttention,
    DeformableDecoder,
    DeformableEncoder,
    EncoderMemory,
    LayerShape,
    ProposalHead,
    SelfAttention,
    TokenGrid,
    logit,
    sine_embedding,
    to_xyxy,
)
from reir.models.clare.level_sampling import sample_levels, sum_cells, sum_samples

SIDES = ((4, 6), (2, 3), (1, 2))
STRIDES = (8, 16, 32)
SHAPE = LayerShape(dim=16, num_heads=4, num_levels=3, num_points=2, ffn=24)
NUM_TOKENS = sum(height * width for height, width in SIDES)
Sampling = Callable[..., Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def stirred(module: Any, seed: int = 0) -> Any:
    """The module with every weight moved off its start, which is often zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def make_grid() -> TokenGrid:
    """Two photos of 48 x 32 and 30 x 20 px (width, height) on a batch of 48 x 32."""
    return TokenGrid.build(torch.tensor([[48.0, 32.0], [30.0, 20.0]]), SIDES, STRIDES)


def slow_sample(cells: Tensor, x: float, y: float) -> Tensor:
    """(E, height, width) read at a share (x, y) of the map: four neighbors, 0 beyond the map."""
    height, width = cells.shape[1:]
    column, row = x * width - 0.5, y * height - 0.5
    total = torch.zeros(len(cells))
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total = total + (1 - abs(row - i)) * (1 - abs(column - j)) * cells[:, i, j]
    return total


def slow_attention(
    attention: DeformableAttention, query: Tensor, places: Tensor, memory: Tensor, grid: TokenGrid
) -> Tensor:
    """One head, level and point of one query of one image at a time."""
    num_heads, num_levels, num_points = attention.shape
    rows = []
    for b in range(len(query)):
        value = attention.value_proj(memory[b]) * grid.valid[b, :, None]
        for q in range(query.shape[1]):
            offsets = attention.sampling_offsets(query[b, q])
            offsets = offsets.view(num_heads, num_levels, num_points, 2)
            weights = attention.attention_weights(query[b, q]).view(num_heads, -1).softmax(-1)
            weights = weights.view(num_heads, num_levels, num_points)
            heads = []
            for h in range(num_heads):
                total, start = torch.zeros(query.shape[-1] // num_heads), 0
                for level, (height, width) in enumerate(grid.sides):
                    part = value[start : start + height * width].chunk(num_heads, dim=-1)[h]
                    start += height * width
                    cells = part.T.reshape(-1, height, width)
                    share = grid.shares[b, level]
                    for p in range(num_points):
                        place, offset = places[b, q], offsets[h, level, p]
                        if len(place) == 2:
                            x, y = place * share + offset / torch.tensor([width, height])
                        else:
                            x, y = (place[:2] + offset / num_points * place[2:] / 2) * share
                        total = total + weights[h, level, p] * slow_sample(
                            cells, float(x), float(y)
                        )
                heads.append(total)
            rows.append(attention.output_proj(torch.cat(heads)))
    return torch.stack(rows).view(*query.shape)


# ------------------------------------------------------------------------------------------ grid


def test_positions_are_relative_to_the_photo_without_padding() -> None:
    grid = make_grid()
    torch.testing.assert_close(grid.centers[0, 0], torch.tensor([4 / 48, 4 / 32]))
    torch.testing.assert_close(grid.centers[1, 0], torch.tensor([4 / 30, 4 / 20]))
    torch.testing.assert_close(grid.centers[1, 24 + 1], torch.tensor([24 / 30, 8 / 20]))
    torch.testing.assert_close(grid.shares[1, 0], torch.tensor([30 / 48, 20 / 32]))
    torch.testing.assert_close(grid.shares[1, 2], torch.tensor([30 / 64, 20 / 32]))
    assert grid.levels.tolist() == [0] * 24 + [1] * 6 + [2] * 2


def test_a_cell_is_valid_if_it_begins_inside_the_photo() -> None:
    grid = make_grid()
    finest, middle, coarsest = grid.valid_maps()
    assert finest[0].all()
    assert finest[1].tolist() == [[True] * 4 + [False] * 2] * 3 + [[False] * 6]
    assert middle[1].tolist() == [[True, True, False]] * 2
    assert coarsest[0].tolist() == [[True, True]]
    assert coarsest[1].tolist() == [[True, False]]


def test_more_padding_does_not_move_the_centers_of_cells() -> None:
    size = torch.tensor([[30.0, 20.0]])
    tight = TokenGrid.build(size, [(3, 4)], [8])
    wide = TokenGrid.build(size, [(9, 8)], [8])
    torch.testing.assert_close(
        wide.centers.view(9, 8, 2)[:3, :4].reshape(-1, 2), tight.centers[0], rtol=0, atol=0
    )
    assert wide.valid_maps()[0][0, :3, :4].all()
    assert int(wide.valid.sum()) == int(tight.valid.sum()) == 12


def test_sine_embedding_matches_reference() -> None:
    places = uniform(3, 2)
    got = sine_embedding(places, 6)
    want = []
    for row in places.tolist():
        for number in row:
            for i in (0, 2, 4):
                angle = 2 * math.pi * number / 10_000 ** (i / 6)
                want += [math.sin(angle), math.cos(angle)]
    torch.testing.assert_close(got.flatten(), torch.tensor(want))
    assert got.shape == (3, 12)


def test_boxes_become_corners_and_logits_are_finite_at_the_border() -> None:
    corners = to_xyxy(torch.tensor([0.5, 0.4, 0.2, 0.6]))
    torch.testing.assert_close(corners, torch.tensor([0.4, 0.1, 0.6, 0.7]))
    assert logit(torch.tensor([0.0, 1.0])).isfinite().all()
    torch.testing.assert_close(logit(torch.tensor([0.3])).sigmoid(), torch.tensor([0.3]))


# ------------------------------------------------------------------------------------- attention


two_ways = pytest.mark.parametrize("sample", [sum_cells, sum_samples])


@two_ways
def test_samples_equal_the_reference_inside_at_and_beyond_the_border(sample: Sampling) -> None:
    value = random(1, NUM_TOKENS, 2, 3)
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.5], [-0.05, 0.3], [1.04, 0.9], [2, -2]])
    places = corners[None, :, None, None, None].expand(1, 6, 2, 3, 1, 2)
    weights = uniform(1, 6, 2, 3, 1)
    got = sample(value, SIDES, places, weights)
    for q, (x, y) in enumerate(corners.tolist()):
        for head in range(2):
            want, start = torch.zeros(3), 0
            for level, (height, width) in enumerate(SIDES):
                cells = value[0, start : start + height * width, head].T.view(3, height, width)
                want = want + weights[0, q, head, level, 0] * slow_sample(cells, x, y)
                start += height * width
            torch.testing.assert_close(got[0, q, 3 * head : 3 * head + 3], want)


@two_ways
def test_samples_equal_those_of_transformers(sample: Sampling) -> None:
    value, places = random(2, NUM_TOKENS, 4, 5), uniform(2, 7, 4, 3, 2, 2) * 1.2 - 0.1
    weights = uniform(2, 7, 4, 3, 2, seed=1)
    library = modeling_deformable_detr.MultiScaleDeformableAttention()
    shapes = torch.tensor(SIDES)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    want = library(value, shapes, list(SIDES), starts, places, weights, 64)
    torch.testing.assert_close(sample(value, SIDES, places, weights), want)


def test_both_ways_of_sampling_have_the_same_gradients() -> None:
    given = (
        random(2, NUM_TOKENS, 4, 5).double().requires_grad_(),
        (uniform(2, 7, 4, 3, 2, 2) * 1.2 - 0.1).double().requires_grad_(),
        uniform(2, 7, 4, 3, 2, seed=1).double().requires_grad_(),
    )
    value, places, weights = given
    back = random(2, 7, 20).double()
    want, got = (
        torch.autograd.grad(sample(value, SIDES, places, weights), given, back)
        for sample in (sum_samples, sum_cells)
    )
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 0.1
        torch.testing.assert_close(a, b)


def test_half_precision_inputs_are_sampled_in_float32() -> None:
    value, places = random(1, NUM_TOKENS, 2, 4), uniform(1, 3, 2, 3, 2, 2)
    weights = uniform(1, 3, 2, 3, 2, seed=1)
    want = sample_levels(value.bfloat16().float(), SIDES, places, weights.bfloat16().float())
    got = sample_levels(value.bfloat16(), SIDES, places, weights.bfloat16())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("columns", [2, 4], ids=["points", "boxes"])
def test_deformable_attention_matches_reference(columns: int) -> None:
    attention = stirred(DeformableAttention(SHAPE))
    query, memory, places = random(2, 5, 16), random(2, NUM_TOKENS, 16), uniform(2, 5, columns)
    grid = make_grid()
    with torch.no_grad():
        want = slow_attention(attention, query, places, memory, grid)
        torch.testing.assert_close(attention(query, places, memory, grid), want)


def test_tokens_in_the_padding_are_not_read() -> None:
    attention = stirred(DeformableAttention(SHAPE))
    query, memory, places = random(2, 5, 16), random(2, NUM_TOKENS, 16), uniform(2, 5, 2)
    grid = make_grid()
    other = memory.masked_fill(~grid.valid[..., None], 99.0)
    with torch.no_grad():
        before, after = (attention(query, places, x, grid) for x in (memory, other))
    assert torch.equal(before, after)


def test_each_head_starts_with_its_own_direction_of_offsets() -> None:
    attention = DeformableAttention(SHAPE)
    first = attention.sampling_offsets.bias.detach().view(4, 3, 2, 2)[:, 0, 0]
    ways = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(first, ways, atol=1e-6, rtol=0)
    second = attention.sampling_offsets.bias.detach().view(4, 3, 2, 2)[:, 0, 1]
    torch.testing.assert_close(second, 2 * ways, atol=1e-6, rtol=0)


def test_self_attention_matches_reference() -> None:
    attention = stirred(SelfAttention(16, 4))
    content, position = random(2, 5, 16), random(2, 5, 16, seed=1)
    allowed = (uniform(2, 1, 5, 5) < 0.6) | torch.eye(5, dtype=torch.bool)
    with torch.no_grad():
        got = attention(content, position, allowed)
        for b in range(2):
            query, key = attention.compare(content[b] + position[b]).chunk(2, dim=-1)
            value = attention.value(content[b])
            for q in range(5):
                seen = allowed[b, 0, q].nonzero()[:, 0]
                heads = []
                for h in range(4):
                    part = slice(4 * h, 4 * h + 4)
                    weights = (key[seen][:, part] @ query[q, part] / 2).softmax(0)
                    heads.append(weights @ value[seen][:, part])
                torch.testing.assert_close(got[b, q], attention.output(torch.cat(heads)))


# ---------------------------------------------------------------------------- encoder, proposals


def test_encoder_equals_its_layers_one_by_one() -> None:
    encoder = stirred(DeformableEncoder(SHAPE, 2))
    tokens, grid = random(2, NUM_TOKENS, 16), make_grid()
    with torch.no_grad():
        got = encoder(tokens, grid)
        position = sine_embedding(grid.centers, 8) + encoder.level_embedding.weight[grid.levels]
        for layer in encoder.layers:
            read = slow_attention(layer.attention, tokens + position, grid.centers, tokens, grid)
            tokens = layer.norm(tokens + read)
            ffn = layer.feed_forward
            tokens = ffn.norm(tokens + ffn.narrow(ffn.widen(tokens).clamp(min=0)))
    torch.testing.assert_close(got, tokens, rtol=1e-4, atol=1e-5)


def test_an_untrained_head_proposes_the_anchors() -> None:
    head, grid = ProposalHead(16), make_grid()
    with torch.no_grad():
        logits, boxes, valid = head(random(2, NUM_TOKENS, 16), grid)
    sides = torch.tensor([0.05, 0.1, 0.2])[grid.levels]
    torch.testing.assert_close(boxes[0].sigmoid()[:, 2], sides)
    torch.testing.assert_close(boxes[0].sigmoid()[valid[0], :2], grid.centers[0, valid[0]])
    assert boxes.isfinite().all()
    assert (logits[~valid] == head.NO_PROPOSAL).all()
    assert (logits[valid] > -10).all()


def test_tokens_in_the_padding_or_at_the_border_give_no_proposals() -> None:
    size = torch.tensor([[64.0, 804.0]])
    grid = TokenGrid.build(size, [(104, 12)], [8])  # the first row is centered at 0.5 % of 804
    _, _, valid = ProposalHead(16)(random(1, 104 * 12, 16), grid)
    rows = valid.view(104, 12)
    assert not rows[0].any()
    assert rows[1:99, :8].all()
    assert not rows[99:].any()
    assert not rows[:, 8:].any()


def test_objectness_starts_at_the_prior() -> None:
    head = ProposalHead(16, prior=0.01)
    torch.testing.assert_close(head.objectness.bias.detach(), torch.tensor([-math.log(99)]))


# --------------------------------------------------------------------------------------- decoder


def decoder_inputs() -> tuple[Tensor, Tensor, Tensor, EncoderMemory]:
    allowed = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    memory = EncoderMemory(random(2, NUM_TOKENS, 16, seed=3), make_grid())
    return random(2, 5, 16), uniform(2, 5, 4) * 0.8 + 0.1, allowed, memory


def test_decoder_equals_its_layers_one_by_one() -> None:
    decoder = stirred(DeformableDecoder(SHAPE, 3))
    content, boxes, allowed, memory = decoder_inputs()
    with torch.no_grad():
        states, refined = decoder(content, boxes, allowed, memory)
        for k, (layer, head) in enumerate(zip(decoder.layers, decoder.box_heads, strict=True)):
            position = decoder.position(sine_embedding(boxes, 8))
            seen = layer.self_attention(content, position, allowed)
            content = layer.self_norm(content + seen)
            read = slow_attention(
                layer.cross_attention, content + position, boxes, memory.tokens, memory.grid
            )
            content = layer.cross_norm(content + read)
            ffn = layer.feed_forward
            content = ffn.norm(content + ffn.narrow(ffn.widen(content).clamp(min=0)))
            hidden = content
            for linear in head.hidden:
                hidden = linear(hidden).clamp(min=0)
            boxes = (head.move(hidden) + (boxes / (1 - boxes)).log()).sigmoid()
            torch.testing.assert_close(states[k], content, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(refined[k], boxes, rtol=1e-4, atol=1e-5)


def test_each_box_gives_gradients_to_its_own_head_and_the_one_before() -> None:
    decoder = stirred(DeformableDecoder(SHAPE, 4))
    _, boxes = decoder(*decoder_inputs())
    for k in range(4):
        weights = [head.move.weight for head in decoder.box_heads]
        gradients = torch.autograd.grad(boxes[k].sum(), weights, retain_graph=True)
        taught = [i for i, gradient in enumerate(gradients) if gradient.abs().max() > 0]
        assert taught == ([k - 1, k] if k else [0])


def test_gradients_reach_the_boxes_that_the_decoder_starts_from() -> None:
    content, first, allowed, memory = decoder_inputs()
    first.requires_grad_()
    _, boxes = stirred(DeformableDecoder(SHAPE, 2))(content, first, allowed, memory)
    (gradient,) = torch.autograd.grad(boxes[0].sum(), first)
    assert (gradient != 0).all()


def test_untrained_box_heads_do_not_move_the_boxes() -> None:
    content, first, allowed, memory = decoder_inputs()
    with torch.no_grad():
        assert torch.equal(BoxHead(16)(content), torch.zeros(2, 5, 4))
        _, boxes = DeformableDecoder(SHAPE, 2)(content, first, allowed, memory)
    torch.testing.assert_close(boxes, first.expand(2, -1, -1, -1))


def test_a_masked_query_does_not_change_the_others() -> None:
    decoder = stirred(DeformableDecoder(SHAPE, 2))
    content, first, allowed, memory = decoder_inputs()
    allowed[..., :4, 4] = False
    other = content.clone()
    other[:, 4] += 1
    with torch.no_grad():
        before, after = (decoder(x, first, allowed, memory)[0] for x in (content, other))
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4], after[:, :, 4])


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_activation_checkpointing_does_not_change_the_gradients(name: str) -> None:
    content, first, allowed, memory = decoder_inputs()
    stack: nn.Module = stirred(
        DeformableEncoder(SHAPE, 2) if name == "encoder" else DeformableDecoder(SHAPE, 2)
    )
    gradients = []
    for checkpointing in (False, True):
        stack.checkpointing = checkpointing  # type: ignore[assignment]
        stack.zero_grad()
        if name == "encoder":
            stack(memory.tokens, memory.grid).square().sum().backward()
        else:
            states, boxes = stack(content, first, allowed, memory)
            (states.square().sum() + boxes.sum()).backward()
        gradients.append([p.grad for p in stack.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
