"""The relation re-ranker: an expression and all instances of a photo -> corrected scores.

It sees what the index holds of a photo (vectors, boxes, objectness) and no pixels. Every instance
reads the words of the expression, then looks at the other instances of its photo, two times over.
Which neighbours count is decided by what they are (their state) and by where they lie as seen from
the instance: the words choose, for each head, the weights of a fixed list of pairwise features, so
that "left of" turns into a preference for neighbours on one side. Next to the weighted mean a head
passes on how many neighbours it found, which is what "second from the right" needs.

What comes out is a correction, added to the score of the dual stream; before training it is 0.
Knows torch, no store, no training loop and no device.
"""

# Shapes: E expressions, L tokens, C channels of the text tower, D dimension, P photos (each asked
#         one expression), N instances a photo, W width, H heads, R heads of all layers, F features

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reir.models.seams import EncodedExpression
from reir.records import FloatArray

INSTANCE_FEATURES = 17
PAIR_FEATURES = 18
NOT_PLACES, NOT_PAIRS = 2, 3
"""The last features of either kind, which are scores and no geometry."""

MATCH_POOLS = 4
MAX_LOGIT = 30.0
SCORE_SCALE = 5.0
"""Brings inner products of the dual stream, and their differences, to the size of the others."""


@dataclass(frozen=True, kw_only=True)
class RerankerConfig:
    """Every number that shapes the model.

    Attributes:
        dim: D, of instance and expression vectors.
        text_width: C, of the text tower's token states.
        width: W.
        num_layers, num_heads: of the layers in which instances read words and look at each other.
        dropout: in training.
        words, match, geometry, neighbours: what the model may use; False takes it away, for
            ablations: reading words, how well they fit, all geometry, all other instances.
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
    neighbours: bool = True

    def __post_init__(self) -> None:
        """Check that the heads can share the width.

        Raises:
            ValueError: `width` is no multiple of `num_heads`.
        """
        if self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width={self.width}, got {self.num_heads}")


@dataclass(frozen=True)
class PhotoInstances:
    """All instances of one photo, as the index holds them.

    Attributes:
        vectors: (N, D) unit length.
        boxes: (N, 4) xyxy in [0, 1].
        objectness: (N,) in [0, 1].
    """

    vectors: FloatArray
    boxes: FloatArray
    objectness: FloatArray


@dataclass(frozen=True)
class Reranked:
    """What the re-ranker says of one photo for one expression.

    Attributes:
        scores: (N,) dual-stream score plus correction; what candidates are ordered by.
        attention: (N, N) share of its attention that each instance (row) pays to each (column),
            mean over layers and heads; a row may sum to less than 1. None unless asked for.
    """

    scores: FloatArray
    attention: FloatArray | None = None


@dataclass
class RerankInputs:
    """P photos, each asked one of E expressions; padded, `valid` and `mask` say what is real.

    Attributes:
        vectors: (P, N, D).
        boxes: (P, N, 4).
        objectness: (P, N).
        valid: (P, N) bool.
        states: (E, L, C) token states.
        mask: (E, L) bool.
        queries: (E, D) what the dual stream scores instances with.
        asked: (P,) the expression of each photo.
    """

    vectors: Tensor
    boxes: Tensor
    objectness: Tensor
    valid: Tensor
    states: Tensor
    mask: Tensor
    queries: Tensor
    asked: Tensor

    def to(self, device: torch.device | str) -> RerankInputs:
        """Return the inputs on a device."""
        return RerankInputs(**{name: value.to(device) for name, value in vars(self).items()})


class RerankOutput(NamedTuple):
    """What the model says of P photos.

    Attributes:
        dual: (P, N) inner product of vector and query.
        correction: (P, N), 0 on padding.
        attention: (P, N, N) mean over layers and heads; None unless asked for.
    """

    dual: Tensor
    correction: Tensor
    attention: Tensor | None


def ranks(values: Tensor, valid_PN: Tensor) -> Tensor:
    """(P, V, N) share of the photo's other instances with a smaller value; of equals, none."""
    others = values.masked_fill(~valid_PN[:, None], torch.inf)
    smaller = (others[..., None, :] < values[..., :, None]).float()
    return sums(smaller) / (valid_PN.sum(-1) - 1).clamp(min=1)[:, None, None]


def sums(values: Tensor) -> Tensor:
    """(.., N) -> (..) sums; a product, since torch's sum is ten times slower on rows this short."""
    return values @ values.new_ones(values.shape[-1])


def centres(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and y of the centres, width and height, each (P, N)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1).clamp(min=1e-3), (y2 - y1).clamp(min=1e-3)


def order_features(inputs: RerankInputs, dual_PN: Tensor) -> Tensor:
    """(P, 4, N) order from left, from above, by area and by score, in [0, 1]."""
    cx, cy, w, h = centres(inputs.boxes)
    return ranks(torch.stack([cx, cy, w * h, dual_PN], dim=1), inputs.valid)


def instance_features(inputs: RerankInputs, dual_PN: Tensor, order_P4N: Tensor) -> Tensor:
    """(P, N, 17) place, size, order within the photo, and dual-stream score of each instance."""
    cx, cy, w, h = centres(inputs.boxes)
    best = dual_PN.masked_fill(~inputs.valid, -1.0).amax(-1, keepdim=True)
    scores = [dual_PN * SCORE_SCALE, (dual_PN - best) * SCORE_SCALE]
    shape = [(w * h).sqrt(), (w * h).log() / 4, (w / h).log()]
    places = [*inputs.boxes.unbind(-1), cx, cy, w, *shape]
    return torch.stack([*places, inputs.objectness, *order_P4N.unbind(1), *scores], dim=-1)


def pair_features(boxes: Tensor, dual_PN: Tensor, order_P4N: Tensor) -> Tensor:
    """(P, 18, N, N) how each instance (last but one axis) sees each other (last)."""
    cx, cy, w, h = centres(boxes)
    values = [cx, cy, w.log() / 2, h.log() / 2, *order_P4N[:, :2].unbind(1), dual_PN * SCORE_SCALE]
    stacked = torch.stack(values, dim=1)
    between = stacked[..., None, :] - stacked[..., :, None]
    shift = between[:, :2]
    low, high = boxes[..., :2].mT, boxes[..., 2:].mT
    common = torch.minimum(high[..., None, :], high[..., :, None])
    common = common - torch.maximum(low[..., None, :], low[..., :, None])  # below 0: a gap
    both, apart = common.clamp(min=0), (-common).clamp(min=0)
    shared, gaps = both[:, 0] * both[:, 1], apart[:, 0] + apart[:, 1]
    own, other = (w * h)[:, :, None].expand_as(shared), (w * h)[:, None, :].expand_as(shared)
    covers = shared[:, None] / torch.stack([own + other - shared, other, own], dim=1)
    distance = (shift[:, 0].square() + shift[:, 1].square() + 1e-6).sqrt()
    itself = torch.eye(boxes.shape[1], device=boxes.device).expand_as(gaps)
    sides = [shift, (12 * shift).tanh(), shift.abs(), distance[:, None], gaps[:, None]]
    others = [torch.ones_like(gaps)[:, None], itself[:, None], between[:, 6:]]
    return torch.cat([*sides, covers, between[:, 2:6], *others], dim=1)


def split_heads(x: Tensor, num_parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(.., S, parts * W) -> for each part (.., H, S, W / H)."""
    parts = x.reshape(*x.shape[:-1], num_parts, num_heads, -1)
    return parts.transpose(-4, -2).unbind(-3)


def exp_of(logits: Tensor) -> Tensor:
    """Exponentials that can be summed in float32; torch's softmax is slow on rows this short."""
    return logits.clamp(-MAX_LOGIT, MAX_LOGIT).exp()


class ReadWords(nn.Module):
    """Instances attend to the words of their expression."""

    def __init__(self, config: RerankerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x_PNW: Tensor, words_ELW: Tensor, mask_EL: Tensor, asked_P: Tensor) -> Tensor:
        """Return (P, N, W) what was read."""
        (query,) = split_heads(self.query(self.norm(x_PNW)), 1, self.num_heads)
        key, value = split_heads(self.key_value(words_ELW), 2, self.num_heads)
        key = key / query.shape[-1] ** 0.5
        likes = exp_of(query @ key[asked_P].mT) * mask_EL[asked_P].float()[:, None, None]
        seen = likes @ value[asked_P] / sums(likes)[..., None]
        return torch.as_tensor(self.out(seen.transpose(1, 2).flatten(2)))


class Looked(NamedTuple):
    """Attention to neighbours before it is shared out.

    Attributes:
        likes: (P, H, N, N), 0 for padding.
        total: (P, H, N, 1) their sum and that of nobody.
    """

    likes: Tensor
    total: Tensor


class SeeNeighbours(nn.Module):
    """Instances look at the instances of their photo, or at none of them."""

    def __init__(self, config: RerankerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width + config.num_heads, config.width)

    def forward(self, x_PNW: Tensor, bias_PHNN: Tensor, valid_PN: Tensor) -> tuple[Tensor, Looked]:
        """Return (P, N, W) what was seen, and of whom how much.

        Looking at nobody has the logit 0, which is the 1 in the sum.
        """
        query, key, value = split_heads(self.qkv(self.norm(x_PNW)), 3, self.num_heads)
        logits = query @ (key / query.shape[-1] ** 0.5).mT + bias_PHNN
        likes = exp_of(logits) * valid_PN.float()[:, None, None]
        total = 1 + sums(likes)[..., None]
        mean = (likes @ value / total).transpose(1, 2).flatten(2)
        found = sums(likes / (1 + likes)).log1p().transpose(1, 2)
        return self.out(torch.cat([mean, found], dim=-1)), Looked(likes, total)


class RerankLayer(nn.Module):
    """Read the words, look around, think."""

    def __init__(self, config: RerankerConfig) -> None:
        super().__init__()
        self.words = ReadWords(config) if config.words else None
        self.neighbours = SeeNeighbours(config) if config.neighbours else None
        self.mlp = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, 2 * config.width),
            nn.GELU(),
            nn.Linear(2 * config.width, config.width),
        )
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, x_PNW: Tensor, words_ELW: Tensor, inputs: RerankInputs, bias_PHNN: Tensor
    ) -> tuple[Tensor, Looked]:
        """Return (P, N, W), and how much each instance looked at each other."""
        if self.words is not None:
            x_PNW = x_PNW + self.drop(self.words(x_PNW, words_ELW, inputs.mask, inputs.asked))
        looked = Looked(torch.zeros_like(bias_PHNN), torch.ones_like(bias_PHNN[..., :1]))
        if self.neighbours is not None:
            seen, looked = self.neighbours(x_PNW, bias_PHNN, inputs.valid)
            x_PNW = x_PNW + self.drop(seen)
        return x_PNW + self.drop(self.mlp(x_PNW)), looked


class RelationBias(nn.Module):
    """The words of an expression -> weights of the pairwise features, for each head."""

    def __init__(self, config: RerankerConfig) -> None:
        super().__init__()
        num = config.num_layers * config.num_heads
        self.weigh = nn.Linear(config.width, num)
        self.to_weights = nn.Parameter(torch.empty(num, config.width, PAIR_FEATURES))
        nn.init.normal_(self.to_weights, std=0.3 * config.width**-0.5)
        self.always = nn.Parameter(torch.zeros(num, PAIR_FEATURES))
        self.num_layers, self.words = config.num_layers, float(config.words)

    def forward(self, pairs: Tensor, words_ELW: Tensor, inputs: RerankInputs) -> tuple[Tensor, ...]:
        """Return one (P, H, N, N) a layer."""
        logits_ELR = self.weigh(words_ELW).masked_fill(~inputs.mask[..., None], -1e4)
        read_ERW = logits_ELR.softmax(1).mT @ words_ELW
        weights_ERF = torch.einsum("erw,rwf->erf", read_ERW, self.to_weights) * self.words
        weights_ERF = weights_ERF + self.always
        bias_PRX = weights_ERF[inputs.asked] @ pairs.flatten(2)
        return bias_PRX.reshape(len(pairs), -1, *pairs.shape[2:]).chunk(self.num_layers, dim=1)


class Match(nn.Module):
    """How well words fit an instance, and the best instance of its photo (late interaction).

    A sentence names other things than its instance. A few learned weightings of the words say which
    of them are looked for where: in the instance, or anywhere in the photo.
    """

    def __init__(self, config: RerankerConfig) -> None:
        super().__init__()
        self.weigh = nn.Linear(config.width, MATCH_POOLS)

    def forward(self, x_PNW: Tensor, words_ELW: Tensor, inputs: RerankInputs) -> Tensor:
        """Return (P, N, 12): own fit, best fit in the photo, sum of each word's best fit."""
        fits_PNL = x_PNW @ words_ELW[inputs.asked].mT
        logits_ELQ = self.weigh(words_ELW).masked_fill(~inputs.mask[..., None], -1e4)
        shares_PLQ = logits_ELQ.softmax(1)[inputs.asked]
        # added, since torch fills by a mask that is broadcast four times slower
        never_PN1 = (~inputs.valid[..., None]).float() * -1e4
        own_PNQ = fits_PNL @ shares_PLQ
        best_PQ = (own_PNQ + never_PN1).amax(1)
        each_PL = (fits_PNL + never_PN1).amax(1)
        cover_PQ = (each_PL[:, None] @ shares_PLQ)[:, 0]
        photo = torch.cat([best_PQ, cover_PQ], dim=-1)[:, None].expand(-1, own_PNQ.shape[1], -1)
        return torch.cat([own_PNQ, photo], dim=-1)


class Reranker(nn.Module):
    """Corrects dual-stream scores by what stands around each instance."""

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
        nn.init.normal_(self.appearance.weight, std=1.0)  # vectors have unit length
        nn.init.normal_(self.text.weight, std=1.0)  # and so have states, as they come in
        nn.init.zeros_(self.correct.weight)
        nn.init.zeros_(self.correct.bias)

    def forward(self, inputs: RerankInputs, *, explain: bool = False) -> RerankOutput:
        """Score the instances of P photos."""
        dual = torch.einsum("pnd,pd->pn", inputs.vectors, inputs.queries[inputs.asked])
        words = self.text(self.drop(F.normalize(inputs.states, dim=-1)))
        looks = self.appearance(self.drop(inputs.vectors))
        order = order_features(inputs, dual)
        places = instance_features(inputs, dual, order)
        pairs = pair_features(inputs.boxes, dual, order)
        if not self.config.geometry:
            places[..., :-NOT_PLACES], pairs[:, :-NOT_PAIRS] = 0, 0
        x = looks + self.geometry(places)
        read, looks_at = self.norm_words(words), []
        for layer, bias in zip(self.layers, self.relation(pairs, read, inputs), strict=True):
            x, looked = layer(x, read, inputs, bias)
            looks_at.append(looked)
        x = self.norm(x)
        if self.match is not None:
            x = torch.cat([x, self.match(looks, words, inputs)], dim=-1)
        correction = self.correct(x)[..., 0].masked_fill(~inputs.valid, 0.0)
        attention = None
        if explain:
            shares = torch.stack([likes / total for likes, total in looks_at])
            attention = shares.mean((0, 2))
        return RerankOutput(dual, correction, attention)

    @torch.no_grad()
    def start_from(self, weight_DC: Tensor, bias_D: Tensor) -> None:
        """Start with words and instances in one space, in which the dual stream compares them.

        Args:
            weight_DC, bias_D: of the last layer of its text stream. What matters most of it is
                shared out between the two projections.
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
    ) -> list[list[Reranked]]:
        """Score all instances of some photos for each expression.

        Args:
            expressions: E of them; `vector` is what the dual stream searched with.
            photos: for each expression its photos; a photo may have no instance.
            explain: give the attention too.

        Returns:
            For each expression one entry a photo, in the order given. What is said of a photo
            depends on that photo and the expression alone.
        """
        flat = [photo for of_one in photos for photo in of_one]
        if not flat:
            return [[] for _ in photos]
        asked = np.repeat(np.arange(len(photos)), [len(of_one) for of_one in photos])
        with torch.inference_mode():
            out = self(pad_inputs(expressions, flat, asked.tolist()), explain=explain)
        scores = (out.dual + out.correction).numpy()
        attention = None if out.attention is None else out.attention.numpy()
        found = iter(
            Reranked(scores[i, :n], None if attention is None else attention[i, :n, :n])
            for i, n in enumerate(len(photo.boxes) for photo in flat)
        )
        return [[next(found) for _ in of_one] for of_one in photos]


def pad_inputs(
    expressions: Sequence[EncodedExpression], photos: Sequence[PhotoInstances], asked: Sequence[int]
) -> RerankInputs:
    """Bring expressions and photos to common lengths; at least one instance and one token long."""
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
        asked=torch.tensor(asked, dtype=torch.long),
    )
