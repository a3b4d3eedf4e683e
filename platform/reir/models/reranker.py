"""The relation re-ranker: corrects the scores of a photo's instances for one expression.

Its inputs are what the index stores for a photo (vectors, boxes, objectness), not pixels. In each
of two layers, every instance attends to the words of the expression, then to the other instances of
its photo. Attention to a neighbor depends on its state and on its position relative to the
instance: for each head, the words choose the weights of a fixed list of pairwise features, so that
"left of" becomes a preference for neighbors on one side. Besides the weighted mean, a head outputs
how many neighbors it attended to, which "second from the right" needs.

The output is a correction that is added to the score of the dual stream. Before training it is 0.
"""

# Shapes: E expressions, L tokens, C channels of the text tower, D dimension, P photos (each with
#         one expression), N instances a photo, W width, H heads, R heads of all layers, F features

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reir.models.interfaces import EncodedExpression
from reir.records import FloatArray

INSTANCE_FEATURES = 17
PAIR_FEATURES = 18
NOT_PLACES, NOT_PAIRS = 2, 3
"""Number of features at the end of each list that are scores, not geometry."""

MATCH_POOLS = 4
MAX_LOGIT = 30.0
SCORE_SCALE = 5.0
"""Scales inner products of the dual stream, which differ little, to the range of other features."""


@dataclass(frozen=True, kw_only=True)
class RerankerConfig:
    """Every number that shapes the model.

    Attributes:
        dim: D, of instance and expression vectors.
        text_width: C, of the text tower's token states.
        width: W.
        num_layers, num_heads: of the attention layers.
        dropout: in training.
        words, match, geometry, neighbors: parts of the model, which ablations switch off:
            attention to words, how well words match, geometry, attention to other instances.
    """

    dim: int = 256
    text_width: int = 384
    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    dropout: float = 0.2
    words: bool = True
    match: bool = True
    geometry: bool = True
    neighbors: bool = True

    def __post_init__(self) -> None:
        """Check that the heads can share the width.

        Raises:
            ValueError: `width` is not a multiple of `num_heads`.
        """
        if self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width={self.width}, got {self.num_heads}")


@dataclass(frozen=True)
class PhotoInstances:
    """All instances of one photo, as the index stores them.

    Attributes:
        vectors: (N, D) unit length.
        boxes: (N, 4) xyxy in [0, 1].
        objectness: (N,) in [0, 1].
    """

    vectors: FloatArray
    boxes: FloatArray
    objectness: FloatArray


@dataclass(frozen=True)
class PhotoScores:
    """The scores of one photo's instances for one expression.

    Attributes:
        scores: (N,) dual-stream score plus correction.
        attention: (N, N) attention of each instance (row) to each other (column), mean over layers
            and heads; a row may sum to less than 1. None unless requested.
    """

    scores: FloatArray
    attention: FloatArray | None = None


@dataclass
class RerankInputs:
    """P photos, each with one of E expressions; `valid` and `mask` are False on padding.

    Attributes:
        vectors: (P, N, D).
        boxes: (P, N, 4).
        objectness: (P, N).
        valid: (P, N) bool.
        states: (E, L, C) token states.
        mask: (E, L) bool.
        queries: (E, D) expression vectors of the dual stream.
        expression_index: (P,) index of the expression of each photo.
    """

    vectors: Tensor
    boxes: Tensor
    objectness: Tensor
    valid: Tensor
    states: Tensor
    mask: Tensor
    queries: Tensor
    expression_index: Tensor

    def to(self, device: torch.device | str) -> RerankInputs:
        """Return the inputs on a device."""
        return RerankInputs(**{name: value.to(device) for name, value in vars(self).items()})


class RerankOutput(NamedTuple):
    """The output of the model for P photos.

    Attributes:
        dual: (P, N) inner product of vector and query.
        correction: (P, N), 0 on padding.
        attention: (P, N, N) mean over layers and heads; None unless requested.
    """

    dual: Tensor
    correction: Tensor
    attention: Tensor | None


def ranks(values: Tensor, valid_PN: Tensor) -> Tensor:
    """(P, V, N) fraction of the photo's other instances with a smaller value."""
    others = values.masked_fill(~valid_PN[:, None], torch.inf)
    smaller = (others[..., None, :] < values[..., :, None]).float()
    return sums(smaller) / (valid_PN.sum(-1) - 1).clamp(min=1)[:, None, None]


def sums(values: Tensor) -> Tensor:
    """(..., N) -> (...) sums, as a product: torch's sum is ten times slower on such short rows."""
    return values @ values.new_ones(values.shape[-1])


def centers(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x and y of the centers, width and height, each (P, N)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1).clamp(min=1e-3), (y2 - y1).clamp(min=1e-3)


def order_features(inputs: RerankInputs, dual_PN: Tensor) -> Tensor:
    """(P, 4, N) rank from the left, from above, by area and by score, in [0, 1]."""
    cx, cy, w, h = centers(inputs.boxes)
    return ranks(torch.stack([cx, cy, w * h, dual_PN], dim=1), inputs.valid)


def instance_features(inputs: RerankInputs, dual_PN: Tensor, order_P4N: Tensor) -> Tensor:
    """(P, N, 17) position, size, ranks in the photo, and dual-stream score of each instance."""
    cx, cy, w, h = centers(inputs.boxes)
    best = dual_PN.masked_fill(~inputs.valid, -1.0).amax(-1, keepdim=True)
    scores = [dual_PN * SCORE_SCALE, (dual_PN - best) * SCORE_SCALE]
    shape = [(w * h).sqrt(), (w * h).log() / 4, (w / h).log()]
    places = [*inputs.boxes.unbind(-1), cx, cy, w, *shape]
    return torch.stack([*places, inputs.objectness, *order_P4N.unbind(1), *scores], dim=-1)


def pair_features(boxes: Tensor, dual_PN: Tensor, order_P4N: Tensor) -> Tensor:
    """(P, 18, N, N) place, size and score of each instance (last axis) relative to each other."""
    cx, cy, w, h = centers(boxes)
    values = [cx, cy, w.log() / 2, h.log() / 2, *order_P4N[:, :2].unbind(1), dual_PN * SCORE_SCALE]
    stacked = torch.stack(values, dim=1)
    between = stacked[..., None, :] - stacked[..., :, None]
    shift = between[:, :2]
    low, high = boxes[..., :2].mT, boxes[..., 2:].mT
    common = torch.minimum(high[..., None, :], high[..., :, None])
    common = common - torch.maximum(
        low[..., None, :], low[..., :, None]
    )  # negative if there is a gap
    both, apart = common.clamp(min=0), (-common).clamp(min=0)
    shared, gaps = both[:, 0] * both[:, 1], apart[:, 0] + apart[:, 1]
    own, other = (w * h)[:, :, None].expand_as(shared), (w * h)[:, None, :].expand_as(shared)
    covers = shared[:, None] / torch.stack([own + other - shared, other, own], dim=1)
    distance = (shift[:, 0].square() + shift[:, 1].square() + 1e-6).sqrt()
    # Without this feature an instance could not tell itself from a neighbor at the same place.
    itself = torch.eye(boxes.shape[1], device=boxes.device).expand_as(gaps)
    sides = [shift, (12 * shift).tanh(), shift.abs(), distance[:, None], gaps[:, None]]
    others = [torch.ones_like(gaps)[:, None], itself[:, None], between[:, 6:]]
    return torch.cat([*sides, covers, between[:, 2:6], *others], dim=1)


def split_heads(x: Tensor, num_parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(..., S, parts * W) -> for each part (..., H, S, W / H)."""
    parts = x.reshape(*x.shape[:-1], num_parts, num_heads, -1)
    return parts.transpose(-4, -2).unbind(-3)


def exp_of(logits: Tensor) -> Tensor:
    """Exponentials that do not overflow when summed; torch's softmax is slow on such short rows."""
    return logits.clamp(-MAX_LOGIT, MAX_LOGIT).exp()


class WordAttention(nn.Module):
    """Instances attend to the words of their expression."""

    def __init__(self, config: RerankerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x_PNW: Tensor, words_ELW: Tensor, mask_EL: Tensor, index_P: Tensor) -> Tensor:
        """Return the (P, N, W) result of the attention."""
        (query,) = split_heads(self.query(self.norm(x_PNW)), 1, self.num_heads)
        # Keys and values are computed once per expression, and only then repeated for its photos.
        key, value = split_heads(self.key_value(words_ELW), 2, self.num_heads)
        key = key / query.shape[-1] ** 0.5
        weights = exp_of(query @ key[index_P].mT) * mask_EL[index_P].float()[:, None, None]
        read = weights @ value[index_P] / sums(weights)[..., None]
        return torch.as_tensor(self.out(read.transpose(1, 2).flatten(2)))


class NeighborWeights(NamedTuple):
    """Attention to neighbors before normalization.

    Attributes:
        weights: (P, H, N, N), 0 for padding.
        total: (P, H, N, 1) their sum, plus 1 for attending to no neighbor.
    """

    weights: Tensor
    total: Tensor


class NeighborAttention(nn.Module):
    """Instances attend to the instances of their photo, or to none of them."""

    def __init__(self, config: RerankerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width + config.num_heads, config.width)

    def forward(
        self, x_PNW: Tensor, bias_PHNN: Tensor, valid_PN: Tensor
    ) -> tuple[Tensor, NeighborWeights]:
        """Return the (P, N, W) result of the attention, and its weights.

        Attending to no neighbor has the logit 0 and so the weight 1: an instance without a
        relevant neighbor does not have to average irrelevant ones.
        """
        query, key, value = split_heads(self.qkv(self.norm(x_PNW)), 3, self.num_heads)
        logits = query @ (key / query.shape[-1] ** 0.5).mT + bias_PHNN
        weights = exp_of(logits) * valid_PN.float()[:, None, None]
        total = 1 + sums(weights)[..., None]
        mean = (weights @ value / total).transpose(1, 2).flatten(2)
        # A mean does not tell how many neighbors there were, so their number is a further feature.
        count = sums(weights / (1 + weights)).log1p().transpose(1, 2)
        return self.out(torch.cat([mean, count], dim=-1)), NeighborWeights(weights, total)


class RerankLayer(nn.Module):
    """Attention to words, attention to neighbors, then a feed-forward network."""

    def __init__(self, config: RerankerConfig) -> None:
        super().__init__()
        self.words = WordAttention(config) if config.words else None
        self.neighbors = NeighborAttention(config) if config.neighbors else None
        self.mlp = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, 2 * config.width),
            nn.GELU(),
            nn.Linear(2 * config.width, config.width),
        )
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, x_PNW: Tensor, words_ELW: Tensor, inputs: RerankInputs, bias_PHNN: Tensor
    ) -> tuple[Tensor, NeighborWeights]:
        """Return the (P, N, W) states, and the attention of instances to each other."""
        if self.words is not None:
            x_PNW = x_PNW + self.drop(
                self.words(x_PNW, words_ELW, inputs.mask, inputs.expression_index)
            )
        attention = NeighborWeights(
            torch.zeros_like(bias_PHNN), torch.ones_like(bias_PHNN[..., :1])
        )
        if self.neighbors is not None:
            read, attention = self.neighbors(x_PNW, bias_PHNN, inputs.valid)
            x_PNW = x_PNW + self.drop(read)
        return x_PNW + self.drop(self.mlp(x_PNW)), attention


class RelationBias(nn.Module):
    """The attention bias of each head: pairwise features, with weights chosen by the words."""

    def __init__(self, config: RerankerConfig) -> None:
        super().__init__()
        num = config.num_layers * config.num_heads
        self.weigh = nn.Linear(config.width, num)
        self.to_weights = nn.Parameter(torch.empty(num, config.width, PAIR_FEATURES))
        nn.init.normal_(self.to_weights, std=0.3 * config.width**-0.5)
        self.always = nn.Parameter(torch.zeros(num, PAIR_FEATURES))
        self.num_layers, self.words = config.num_layers, float(config.words)

    def forward(self, pairs: Tensor, words_ELW: Tensor, inputs: RerankInputs) -> tuple[Tensor, ...]:
        """Return the (P, H, N, N) bias of each layer."""
        logits_ELR = self.weigh(words_ELW).masked_fill(~inputs.mask[..., None], -1e4)
        read_ERW = logits_ELR.softmax(1).mT @ words_ELW
        weights_ERF = torch.einsum("erw,rwf->erf", read_ERW, self.to_weights) * self.words
        weights_ERF = weights_ERF + self.always
        bias_PRX = weights_ERF[inputs.expression_index] @ pairs.flatten(2)
        return bias_PRX.reshape(len(pairs), -1, *pairs.shape[2:]).chunk(self.num_layers, dim=1)


class Match(nn.Module):
    """Late interaction: how well the words match an instance, and the best instance of its photo.

    A sentence also names things other than its instance. Several learned weightings of the words
    separate those that should match the instance from those that may match anywhere in the photo.
    """

    def __init__(self, config: RerankerConfig) -> None:
        super().__init__()
        self.weigh = nn.Linear(config.width, MATCH_POOLS)

    def forward(self, x_PNW: Tensor, words_ELW: Tensor, inputs: RerankInputs) -> Tensor:
        """Return (P, N, 12): own match, best match in the photo, sum of each word's best match."""
        fits_PNL = x_PNW @ words_ELW[inputs.expression_index].mT
        logits_ELQ = self.weigh(words_ELW).masked_fill(~inputs.mask[..., None], -1e4)
        shares_PLQ = logits_ELQ.softmax(1)[inputs.expression_index]
        # An addition, since `masked_fill` with a broadcast mask is four times slower.
        never_PN1 = (~inputs.valid[..., None]).float() * -1e4
        own_PNQ = fits_PNL @ shares_PLQ
        best_PQ = (own_PNQ + never_PN1).amax(1)
        each_PL = (fits_PNL + never_PN1).amax(1)
        cover_PQ = (each_PL[:, None] @ shares_PLQ)[:, 0]
        photo = torch.cat([best_PQ, cover_PQ], dim=-1)[:, None].expand(-1, own_PNQ.shape[1], -1)
        return torch.cat([own_PNQ, photo], dim=-1)


class Reranker(nn.Module):
    """Corrects dual-stream scores with the words and with the instances of the whole photo."""

    def __init__(self, config: RerankerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.drop = nn.Dropout(config.dropout)
        self.appearance = nn.Linear(config.dim, width, bias=False)
        self.geometry = nn.Sequential(
            nn.Linear(INSTANCE_FEATURES, width), nn.GELU(), nn.Linear(width, width)
        )
        self.text = nn.Linear(config.text_width, width)
        self.norm_words = nn.LayerNorm(width)
        self.relation = RelationBias(config)
        self.layers = nn.ModuleList(RerankLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.match = Match(config) if config.match else None
        self.correct = nn.Linear(width + 3 * MATCH_POOLS * config.match, 1)
        # Both inputs have unit length, so the usual small weights would make them vanish.
        nn.init.normal_(self.appearance.weight, std=1.0)
        nn.init.normal_(self.text.weight, std=1.0)
        # Before training, the scores are those of the dual stream.
        nn.init.zeros_(self.correct.weight)
        nn.init.zeros_(self.correct.bias)

    def forward(self, inputs: RerankInputs, *, explain: bool = False) -> RerankOutput:
        """Compute dual-stream scores and corrections of the instances of P photos."""
        dual = torch.einsum("pnd,pd->pn", inputs.vectors, inputs.queries[inputs.expression_index])
        words = self.text(self.drop(F.normalize(inputs.states, dim=-1)))
        looks = self.appearance(self.drop(inputs.vectors))
        order = order_features(inputs, dual)
        places = instance_features(inputs, dual, order)
        pairs = pair_features(inputs.boxes, dual, order)
        # Set to 0 and not left out, so that the layers that read them keep their shapes.
        if not self.config.geometry:
            places[..., :-NOT_PLACES], pairs[:, :-NOT_PAIRS] = 0, 0
        x = looks + self.geometry(places)
        read, weights = self.norm_words(words), []
        for layer, bias in zip(self.layers, self.relation(pairs, read, inputs), strict=True):
            x, of_layer = layer(x, read, inputs, bias)
            weights.append(of_layer)
        x = self.norm(x)
        if self.match is not None:
            x = torch.cat([x, self.match(looks, words, inputs)], dim=-1)
        correction = self.correct(x)[..., 0].masked_fill(~inputs.valid, 0.0)
        attention = None
        if explain:
            shares = torch.stack([each.weights / each.total for each in weights])
            attention = shares.mean((0, 2))
        return RerankOutput(dual, correction, attention)

    @torch.no_grad()
    def start_from(self, weight_DC: Tensor, bias_D: Tensor) -> None:
        """Initialize the two projections so that words and instances are in one space.

        This is the space in which the dual stream compares them: the largest singular values of
        its last text layer are split evenly between the two projections.

        Args:
            weight_DC, bias_D: of the last layer of the dual stream's text stream.
        """
        left, scale, right = torch.linalg.svd(weight_DC, full_matrices=False)
        num = min(self.config.width, len(scale))
        root, left = scale[:num].sqrt(), left[:, :num]
        self.appearance.weight[:num] = root[:, None] * left.T
        self.text.weight[:num] = root[:, None] * right[:num]
        self.text.bias[:num] = left.T @ bias_D / root

    def score(
        self,
        expressions: Sequence[EncodedExpression],
        photos: Sequence[Sequence[PhotoInstances]],
        *,
        explain: bool = False,
    ) -> list[list[PhotoScores]]:
        """Score all instances of some photos for each expression.

        Args:
            expressions: E of them; `vector` is the one that the dual stream searched with.
            photos: the photos of each expression; a photo may have no instance.
            explain: also return the attention.

        Returns:
            For each expression, the scores of its photos in the order given. They depend on the
            photo and the expression alone.
        """
        flat = [photo for group in photos for photo in group]
        if not flat:
            return [[] for _ in photos]
        expression_index = np.repeat(np.arange(len(photos)), [len(group) for group in photos])
        with torch.inference_mode():
            inputs = pad_inputs(expressions, flat, expression_index.tolist())
            out = self(inputs.to(self.correct.weight.device), explain=explain)
        scores = (out.dual + out.correction).cpu().numpy()
        attention = None if out.attention is None else out.attention.cpu().numpy()
        results = iter(
            PhotoScores(scores[i, :n], None if attention is None else attention[i, :n, :n])
            for i, n in enumerate(len(photo.boxes) for photo in flat)
        )
        return [[next(results) for _ in group] for group in photos]


def pad_inputs(
    expressions: Sequence[EncodedExpression],
    photos: Sequence[PhotoInstances],
    expression_index: Sequence[int],
) -> RerankInputs:
    """Pad expressions and photos to common lengths of at least one token and one instance."""
    num = max((len(photo.boxes) for photo in photos), default=0) or 1
    longest = max((len(e.states) for e in expressions), default=0) or 1
    dim, channels = len(expressions[0].vector), expressions[0].states.shape[1]
    vectors = np.zeros((len(photos), num, dim), dtype=np.float32)
    boxes = np.zeros((len(photos), num, 4), dtype=np.float32)
    objectness = np.zeros((len(photos), num), dtype=np.float32)
    valid = np.zeros((len(photos), num), dtype=bool)
    states = np.zeros((len(expressions), longest, channels), dtype=np.float32)
    mask = np.zeros((len(expressions), longest), dtype=bool)
    for i, photo in enumerate(photos):
        n = len(photo.boxes)
        vectors[i, :n], boxes[i, :n], objectness[i, :n] = (
            photo.vectors,
            photo.boxes,
            photo.objectness,
        )
        valid[i, :n] = True
    for i, expression in enumerate(expressions):
        states[i, : len(expression.states)] = expression.states
        mask[i, : len(expression.states)] = True
    queries = np.stack([expression.vector for expression in expressions]).astype(np.float32)
    return RerankInputs(
        vectors=torch.from_numpy(vectors),
        boxes=torch.from_numpy(boxes),
        objectness=torch.from_numpy(objectness),
        valid=torch.from_numpy(valid),
        states=torch.from_numpy(states),
        mask=torch.from_numpy(mask),
        queries=torch.from_numpy(queries),
        expression_index=torch.tensor(expression_index, dtype=torch.long),
    )
