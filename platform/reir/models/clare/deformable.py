"""Deformable encoder and decoder of a two-stage, DINO-style detector (docs/clare.md, section 3.3).

All coordinates are normalized to the upright photo *without* its padding, so that results do not
depend on how much padding a batch needs. Only `DeformableAttention` converts them to coordinates of
the padded feature maps.
"""

# Shapes: B images, T tokens of all levels, Q queries, D width, L levels, H heads, P points,
#         E = D / H, K layers; `_xy` pairs are (x, y), sides are (height, width)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reir.models.clare.level_sampling import sample_levels

# Boxes are clamped to [eps, 1 - eps] before their logit is taken, which is infinite at 0 and 1.
LOGIT_EPS = 1e-5
TEMPERATURE = 10_000.0


@dataclass(frozen=True)
class TokenGrid:
    """The positions of the tokens of a feature pyramid.

    A token is one cell of one feature map. Tokens are ordered by level, then row by row.

    Attributes:
        sides: L pairs (height, width), the sizes of the padded maps in cells.
        shares: (B, L, 2) fraction of each padded map that the photo covers, along x and y.
        centers: (B, T, 2) centers of the cells, normalized to the photo; above 1 in the padding.
        valid: (B, T) bool, False for cells that begin outside the photo.
        levels: (T,) int64, the level of each token.
    """

    sides: tuple[tuple[int, int], ...]
    shares: Tensor
    centers: Tensor
    valid: Tensor
    levels: Tensor

    @staticmethod
    def build(
        sizes_B2: Tensor, sides: Sequence[tuple[int, int]], strides: Sequence[int]
    ) -> TokenGrid:
        """Compute the positions for a padded batch.

        Args:
            sizes_B2: (width, height) of each photo in pixels, without padding.
            sides: (height, width) of each padded map in cells.
            strides: stride of each map in pixels.
        """
        starts, strides_T1, shares, levels = [], [], [], []
        for level, ((height, width), stride) in enumerate(zip(sides, strides, strict=True)):
            x = torch.arange(width, device=sizes_B2.device, dtype=sizes_B2.dtype)
            y = torch.arange(height, device=sizes_B2.device, dtype=sizes_B2.dtype)
            cells = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
            starts.append(cells * stride)
            strides_T1.append(cells.new_full((len(cells), 1), stride))
            shares.append(sizes_B2 / sizes_B2.new_tensor([width * stride, height * stride]))
            levels.append(torch.full((len(cells),), level, device=sizes_B2.device))
        starts_T2, size_T1 = torch.cat(starts), torch.cat(strides_T1)
        return TokenGrid(
            sides=tuple(sides),
            shares=torch.stack(shares, dim=1),
            centers=(starts_T2 + size_T1 / 2) / sizes_B2[:, None],
            # A cell that begins inside the photo counts even if most of it is padding: otherwise
            # the last pixels of the photo would be in no cell.
            valid=(starts_T2 < sizes_B2[:, None]).all(dim=-1),
            levels=torch.cat(levels),
        )

    def valid_maps(self) -> list[Tensor]:
        """Return `valid` as one (B, height, width) map per level."""
        parts = torch.split(self.valid, [height * width for height, width in self.sides], dim=1)
        return [part.view(-1, *side) for part, side in zip(parts, self.sides, strict=True)]


# ------------------------------------------------------------------------------------- geometry


def sine_embedding(coordinates: Tensor, num_features: int) -> Tensor:
    """(..., C) numbers in [0, 1] -> (..., C * num_features), sine and cosine interleaved."""
    # In float32, since bfloat16 cannot tell neighboring cells apart.
    exponent = torch.arange(0, num_features, 2, device=coordinates.device) / num_features
    angles = (2 * math.pi * coordinates.float())[..., None] / TEMPERATURE**exponent
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


def logit(boxes: Tensor) -> Tensor:
    """Inverse of the sigmoid; finite at 0 and 1."""
    return torch.logit(boxes, eps=LOGIT_EPS)


def to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) cxcywh boxes -> xyxy boxes, not clipped."""
    center, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


# ------------------------------------------------------------------------------------ attention


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The sizes that all layers of the encoder and the decoder have in common.

    Attributes:
        dim: D.
        num_heads: H; divides D.
        num_levels: L.
        num_points: P, the number of sampling points for each head and level.
        ffn: hidden width of the feed-forward network.
    """

    dim: int = 256
    num_heads: int = 8
    num_levels: int = 4
    num_points: int = 4
    ffn: int = 2048


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention: each query samples a few learned points of every level."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        dim = shape.dim
        self.shape = (shape.num_heads, shape.num_levels, shape.num_points)
        num_places = math.prod(self.shape)
        self.sampling_offsets = nn.Linear(dim, 2 * num_places)
        self.attention_weights = nn.Linear(dim, num_places)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights as in Deformable DETR.

        At first, each head samples in a direction of its own, and its points lie at 1, 2, ... P
        units from the reference, whatever the query is.
        """
        num_heads, num_levels, num_points = self.shape
        angle = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
        way = torch.stack([angle.cos(), angle.sin()], dim=-1)
        # Scaled so that the larger offset is 1: the points then lie on the border of a square.
        way = way / way.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, num_points + 1, dtype=torch.float32)
        places = way[:, None, None] * steps[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(places.expand(-1, num_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def locations(self, query_BQD: Tensor, references: Tensor, grid: TokenGrid) -> Tensor:
        """(B, Q, H, L, P, 2) sampling points, normalized to the padded maps.

        The unit of the offsets is one cell if the reference is a point. If it is a box, the unit is
        a fraction 1 / (2 P) of its sides, so that at first all points lie within the box.
        """
        shares_B11L12 = grid.shares[:, None, None, :, None]
        offsets: Tensor = self.sampling_offsets(query_BQD).float()
        offsets = offsets.view(*query_BQD.shape[:2], *self.shape, 2)
        centers = references[:, :, None, None, None, :2] * shares_B11L12
        if references.shape[-1] == 2:
            sides_L12 = offsets.new_tensor([(width, height) for height, width in grid.sides])
            return centers + offsets / sides_L12[:, None]
        reach = references[:, :, None, None, None, 2:] * shares_B11L12 / (2 * self.shape[-1])
        return centers + offsets * reach

    def forward(
        self, query_BQD: Tensor, references: Tensor, memory_BTD: Tensor, grid: TokenGrid
    ) -> Tensor:
        """Return the weighted sums of the sampled tokens, (B, Q, D).

        Args:
            query_BQD: content of the queries, with their position embeddings added.
            references: (B, Q, 2) points or (B, Q, 4) cxcywh boxes, normalized to the photo.
            memory_BTD: the tokens to sample; those in the padding count as 0.
            grid: positions of the tokens.
        """
        # After the projection, whose bias would make the padding nonzero again.
        value_BTD = self.value_proj(memory_BTD).masked_fill(~grid.valid[..., None], 0.0)
        weights = self.attention_weights(query_BQD).unflatten(-1, (self.shape[0], -1))
        weights = weights.float().softmax(dim=-1).unflatten(-1, self.shape[1:])
        read = sample_levels(
            value_BTD.unflatten(-1, (self.shape[0], -1)),
            grid.sides,
            self.locations(query_BQD, references, grid),
            weights,
        )
        return torch.as_tensor(self.output_proj(read))


class SelfAttention(nn.Module):
    """Dense attention among queries; positions are added to query and key, but not to the value."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.compare = nn.Linear(dim, 2 * dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        # Xavier's range depends on the shape, so the weights for query and key are initialized as
        # the two layers that they stand for.
        for part in (*self.compare.weight.chunk(2), self.value.weight, self.output.weight):
            nn.init.xavier_uniform_(part)
        for linear in (self.compare, self.value, self.output):
            nn.init.zeros_(linear.bias)

    def forward(self, content_BQD: Tensor, position_BQD: Tensor, allowed: Tensor) -> Tensor:
        """Return (B, Q, D).

        Args:
            content_BQD: content of the queries.
            position_BQD: position embeddings of the queries.
            allowed: (B, 1, Q, Q) bool, True if the query of the row may attend to that of the
                column.
        """
        query, key = self.compare(content_BQD + position_BQD).chunk(2, dim=-1)
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (query, key, self.value(content_BQD))
        )
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        return torch.as_tensor(self.output(read.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Feed-forward network with ReLU, a residual connection, then LayerNorm (post-norm)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.widen = nn.Linear(dim, hidden)
        self.narrow = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)
        for linear in (self.widen, self.narrow):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return torch.as_tensor(self.norm(x + self.narrow(self.widen(x).relu_())))


# ---------------------------------------------------------------------------- encoder, proposals


class EncoderLayer(nn.Module):
    """Deformable self-attention over the tokens, then a feed-forward network; post-norm."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.attention = DeformableAttention(shape)
        self.norm = nn.LayerNorm(shape.dim)
        self.feed_forward = FeedForward(shape.dim, shape.ffn)

    def forward(self, tokens_BTD: Tensor, position_BTD: Tensor, grid: TokenGrid) -> Tensor:
        """Return the updated tokens, (B, T, D)."""
        read = self.attention(tokens_BTD + position_BTD, grid.centers, tokens_BTD, grid)
        return torch.as_tensor(self.feed_forward(self.norm(tokens_BTD + read)))


class DeformableEncoder(nn.Module):
    """A stack of encoder layers, with sine position embeddings and a learned vector per level.

    Attributes:
        checkpointing: whether to recompute activations in the backward pass instead of keeping
            them, which saves memory.
    """

    def __init__(self, shape: LayerShape, num_layers: int) -> None:
        super().__init__()
        self.level_embedding = nn.Embedding(shape.num_levels, shape.dim)
        self.layers = nn.ModuleList(EncoderLayer(shape) for _ in range(num_layers))
        self.checkpointing = False

    def forward(self, tokens_BTD: Tensor, grid: TokenGrid) -> Tensor:
        """Return the encoded tokens, (B, T, D)."""
        sine_BTD = sine_embedding(grid.centers, tokens_BTD.shape[-1] // 2)
        position_BTD = sine_BTD + self.level_embedding(grid.levels)
        for layer in self.layers:
            tokens_BTD = run_layer(self, layer, tokens_BTD, position_BTD, grid)
        return tokens_BTD


def run_layer(stack: nn.Module, layer: nn.Module, *inputs: object) -> Tensor:
    """Run one layer; with `stack.checkpointing`, the backward pass recomputes its activations."""
    # Not reentrant: the reentrant variant gives no gradients to tensors inside other objects, such
    # as those of `EncoderMemory`.
    if stack.checkpointing and torch.is_grad_enabled():
        return torch.as_tensor(checkpoint(layer, *inputs, use_reentrant=False))
    return torch.as_tensor(layer(*inputs))


class BoxHead(nn.Module):
    """Three linear layers that predict the change of a box in logits; initially 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.move = nn.Linear(dim, 4)
        nn.init.zeros_(self.move.weight)
        nn.init.zeros_(self.move.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., 4) float32 change of cxcywh, in logits."""
        for linear in self.hidden:
            x = linear(x).relu()
        return torch.as_tensor(self.move(x).float())


class ProposalHead(nn.Module):
    """Predicts a class-agnostic objectness and a box for every token of the encoder.

    Boxes are offsets from anchors. The width and height of an anchor are 0.05 of the photo's sides
    at the finest level, and double from each level to the next.

    Tokens in the padding, and tokens centered within 1 % of the border, where logits become very
    large, propose nothing: their objectness logit is `NO_PROPOSAL`.
    """

    # Finite, because minus infinity would make losses NaN; its sigmoid is 0 all the same.
    NO_PROPOSAL = -1e4
    ANCHOR_SIDE = 0.05
    BORDER = 0.01

    def __init__(self, dim: int, *, prior: float = 0.01) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.objectness = nn.Linear(dim, 1)
        self.box = BoxHead(dim)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        # Every token starts at the objectness `prior`: nearly all of them are background, which
        # would otherwise dominate the first steps of training.
        nn.init.constant_(self.objectness.bias, math.log(prior / (1 - prior)))

    def forward(self, memory_BTD: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B, T) objectness logits, (B, T, 4) cxcywh boxes in logits, (B, T) bool valid."""
        centers = grid.centers
        inside_BT = ((centers > self.BORDER) & (centers < 1 - self.BORDER)).all(dim=-1)
        valid_BT = grid.valid & inside_BT
        side_T = self.ANCHOR_SIDE * 2.0**grid.levels
        side_BT2 = side_T[None, :, None].expand_as(centers)
        anchors = logit(torch.cat([centers, side_BT2], dim=-1))
        features = self.norm(self.project(memory_BTD))
        logits_BT = self.objectness(features)[..., 0].float()
        boxes = anchors + self.box(features)
        return logits_BT.masked_fill(~valid_BT, self.NO_PROPOSAL), boxes, valid_BT


# -------------------------------------------------------------------------------------- decoder


class DecoderLayer(nn.Module):
    """Self-attention of queries, deformable cross-attention, feed-forward network; post-norm."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.self_attention = SelfAttention(shape.dim, shape.num_heads)
        self.self_norm = nn.LayerNorm(shape.dim)
        self.cross_attention = DeformableAttention(shape)
        self.cross_norm = nn.LayerNorm(shape.dim)
        self.feed_forward = FeedForward(shape.dim, shape.ffn)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        boxes: Tensor,
        allowed: Tensor,
        memory: EncoderMemory,
    ) -> Tensor:
        """Return the updated content of the queries, (B, Q, D)."""
        content = self.self_norm(content + self.self_attention(content, position, allowed))
        read = self.cross_attention(content + position, boxes, memory.tokens, memory.grid)
        return torch.as_tensor(self.feed_forward(self.cross_norm(content + read)))


@dataclass(frozen=True)
class EncoderMemory:
    """The input of the decoder: (B, T, D) tokens of the encoder, and their positions."""

    tokens: Tensor
    grid: TokenGrid


class DeformableDecoder(nn.Module):
    """A stack of decoder layers, each with a box head that refines the boxes of the queries.

    The reference boxes of a layer are the refined boxes of the previous layer, detached from the
    graph. The boxes that a layer *returns* are refined from the same boxes before they were
    detached. So the loss of a box trains the box head of its own layer and that of the previous one
    ("look forward twice").

    Attributes:
        checkpointing: whether to recompute activations in the backward pass instead of keeping
            them, which saves memory.
    """

    def __init__(self, shape: LayerShape, num_layers: int) -> None:
        super().__init__()
        dim = shape.dim
        self.position = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(num_layers))
        self.box_heads = nn.ModuleList(BoxHead(dim) for _ in range(num_layers))
        self.checkpointing = False

    def forward(
        self, content_BQD: Tensor, boxes_BQ4: Tensor, allowed_B1QQ: Tensor, memory: EncoderMemory
    ) -> tuple[Tensor, Tensor]:
        """Decode every query.

        Args:
            content_BQD: initial content of the queries.
            boxes_BQ4: cxcywh in (0, 1), the first reference boxes.
            allowed_B1QQ: bool, True if the query of the row may attend to that of the column.
            memory: output of the encoder.

        Returns:
            (K, B, Q, D) states and (K, B, Q, 4) cxcywh boxes, float32, of all layers.
        """
        reference, uncut = boxes_BQ4, boxes_BQ4
        states, boxes = [], []
        for layer, head in zip(self.layers, self.box_heads, strict=True):
            position = self.position(sine_embedding(reference, content_BQD.shape[-1] // 2))
            content_BQD = run_layer(
                self, layer, content_BQD, position, reference, allowed_B1QQ, memory
            )
            move = head(content_BQD)
            boxes.append((move + logit(uncut)).sigmoid())
            states.append(content_BQD)
            uncut = (move + logit(reference)).sigmoid()
            reference = uncut.detach()
        return torch.stack(states), torch.stack(boxes)
