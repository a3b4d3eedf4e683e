"""`clare-nano`: the CLARE dual stream at a size that runs on two CPU cores.

Visual stream, query-free: a one-stage detector proposes candidates, and a small network encodes a
crop of each. A small transformer over the candidates of one photo, with pairwise box geometry, adds
neighbors and position to the instance vectors. Text stream: a MiniLM-size tower, whose token states
are pooled by attention and pass through MORE. The two streams meet only in a dot product
(docs/clare.md, section 3; the decoder is lighter than the paper's).

The trained part is an ensemble of members. Each has its own transformer, its own MORE, its own loss
and its own part of every vector. The vector is the concatenation of the parts, so that a dot
product is the mean of the members' scores. `ClareNano.encode_photos` and `encode_texts` add a
dimension of the query bank, and with a candidate head, a part that compares what the detector says.

Detector and crop network are frozen (`reir.models.nano.candidates` runs them); `InstanceStream` and
`TextStream` are trained.
"""

# Shapes: B photos, K candidates a photo, S scene tokens, T = K + S, N texts, L tokens, W width,
#         D dimension of the streams, M members, P = D / M, E dimensions of the candidate head, V of
#         whole vectors

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reir.models.nano.box_geometry import (
    GEOMETRY_FEATURES,
    PAIR_FEATURES,
    box_geometry,
    pair_geometry,
)
from reir.models.nano.candidate_head import CandidateHead, CandidateHeadConfig
from reir.models.nano.crop_network import CHANNELS, CropNetwork, CropNetworkName
from reir.models.nano.query_bank import QueryBank
from reir.models.nano.sentence_tower import SentenceTower
from reir.models.picodet import HEAD_CHANNELS, NUM_CLASSES, PicoDet
from reir.models.relation_experts import MixtureOfRelationExperts

SCENE_GRID = 3
COLOR_GRID = 4
DETECTOR_FEATURES = HEAD_CHANNELS


@dataclass(frozen=True, kw_only=True)
class ClareNanoConfig:
    """The hyperparameters of the model; stored in `config.json` of a checkpoint.

    Attributes:
        dim: D, of instance and expression vectors without the part of the candidate head.
        num_members: M members, each with D / M dimensions.
        width: W of the transformer over the instances of a photo.
        num_layers, num_heads: of that transformer; with 0 layers, neighbors have no effect.
        num_candidates: K instances to keep per photo, by best class score after NMS.
        nms_iou: class-agnostic NMS threshold.
        crop_network: network that encodes crops and whole photos.
        detector_px, crop_px, scene_px: input side of detector, crops and whole photo.
        crop_margin: fraction of the box side added on each side of a crop.
        num_experts, top_k_experts, expert_mix: MORE; 0 experts for none.
        bank_sentences: sentences of the training set that lower the rank of hubs (`QueryBank`).
        text_layers: layers of the text tower.
        max_tokens: longer expressions are truncated.
        dropout: in training.
        candidate_head: adds a part to the vectors; None for none.
    """

    dim: int = 256
    num_members: int = 2
    width: int = 384
    num_layers: int = 2
    num_heads: int = 6
    num_candidates: int = 30
    # With .7, fewer targets have a candidate, and each has more of them (docs/LOG.md).
    nms_iou: float = 0.55
    crop_network: CropNetworkName = "efficientnet_lite2"
    detector_px: int = 416
    crop_px: int = 128
    scene_px: int = 224
    crop_margin: float = 0.1
    num_experts: int = 4
    top_k_experts: int = 2
    expert_mix: float = 0.2
    bank_sentences: int = 2000
    text_layers: int = 6
    max_tokens: int = 64
    dropout: float = 0.3
    candidate_head: CandidateHeadConfig | None = None

    def __post_init__(self) -> None:
        """Check that the members can share the dimension.

        Raises:
            ValueError: `dim` is not a multiple of `num_members`.
        """
        if self.num_members < 1 or self.dim % self.num_members:
            raise ValueError(f"num_members must divide dim={self.dim}, got {self.num_members}")

    @property
    def member_dim(self) -> int:
        """P, the dimension of one member's part of a vector."""
        return self.dim // self.num_members

    @property
    def candidate_dims(self) -> int:
        """E, the dimension of the candidate head's part of a vector; 0 without one."""
        return self.candidate_head.dims if self.candidate_head else 0

    @property
    def vector_dim(self) -> int:
        """V, the dimension of a whole vector: of the streams, the query bank, and the head."""
        return self.dim + 1 + self.candidate_dims


@dataclass
class CandidateBatch:
    """The output of the frozen part for B photos, padded to K; `valid` marks real candidates.

    Attributes:
        boxes: (B, K, 4) xyxy in [0, 1].
        objectness: (B, K) best class score of the detector.
        class_scores: (B, K, 80) of the detector.
        detector: (B, K, 96) features from which the detector computes its class scores.
        colors: (B, K, 4, 4, 3) mean RGB of a grid over the crop, in [0, 1].
        crops: (B, K, 1280) pooled features of the crops.
        scene: (B, S, 1280) pooled features of the whole photo and of a grid over it, row by row.
        aspect: (B,) log(width / height) of the photo.
        valid: (B, K) bool.
    """

    boxes: Tensor
    objectness: Tensor
    class_scores: Tensor
    detector: Tensor
    colors: Tensor
    crops: Tensor
    scene: Tensor
    aspect: Tensor
    valid: Tensor

    def mirror(self) -> CandidateBatch:
        """Return the batch for the photos flipped left to right.

        Pooled features stay as they are: they hardly change, and computing them takes pixels.
        """
        boxes = self.boxes.clone()
        boxes[..., 0], boxes[..., 2] = 1 - self.boxes[..., 2], 1 - self.boxes[..., 0]
        return CandidateBatch(
            boxes=boxes,
            objectness=self.objectness,
            class_scores=self.class_scores,
            detector=self.detector,
            colors=self.colors.flip(-2),
            crops=self.crops,
            scene=mirror_scene(self.scene),
            aspect=self.aspect,
            valid=self.valid,
        )

    def followed_by(self, other: CandidateBatch) -> CandidateBatch:
        """Return one batch of these photos, followed by those of another batch."""
        theirs = other.tensors()
        return CandidateBatch(**{k: torch.cat([v, theirs[k]]) for k, v in self.tensors().items()})

    def to(self, device: torch.device | str) -> CandidateBatch:
        """Return a copy of the batch on a device."""
        return CandidateBatch(**{k: v.to(device) for k, v in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def mirror_scene(scene: Tensor) -> Tensor:
    """Return the (B, S, C) features of whole photos and of grids over them, left to right."""
    grid = torch.arange(SCENE_GRID**2).view(SCENE_GRID, SCENE_GRID).flip(1).flatten()
    return scene[:, [0, *(1 + grid).tolist()]]


class VisualOutput(NamedTuple):
    """Output of the visual stream; a tuple, since ZeRO-3 finds tensors in tuples only.

    Attributes:
        vectors: (B, K, D) of unit length, or (B, K, V) whole vectors, whose lengths differ.
        image_vectors: (B, D) unit length.
        boxes: (B, K, 4) refined, xyxy in [0, 1].
        class_logits: (B, K, 80), for an auxiliary loss in training.
    """

    vectors: Tensor
    image_vectors: Tensor
    boxes: Tensor
    class_logits: Tensor


class RelationLayer(nn.Module):
    """Pre-norm transformer layer whose attention is biased by pairwise box geometry."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Sequential(nn.Linear(PAIR_FEATURES, 32), nn.GELU(), nn.Linear(32, num_heads))
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BTW: Tensor, pairs: Tensor, valid_BT: Tensor) -> Tensor:
        """Return (B, T, W); no token attends to padding."""
        qkv = self.qkv(self.norm_attention(x_BTW)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias_BHTT = self.bias(pairs).permute(0, 3, 1, 2).to(q.dtype)
        bias_BHTT = bias_BHTT.masked_fill(~valid_BT[:, None, None, :], -1e4)
        drop = self.dropout if self.training else 0.0
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BHTT, dropout_p=drop)
        x_BTW = x_BTW + self.drop(self.out(read.transpose(1, 2).flatten(2)))
        out_BTW: Tensor = x_BTW + self.drop(self.mlp(self.norm_mlp(x_BTW)))
        return out_BTW


def scene_boxes(num_photos: int, device: torch.device) -> Tensor:
    """(B, S, 4) boxes of the whole photo and of the cells of a grid over it, row by row."""
    edges = torch.arange(SCENE_GRID, device=device) / SCENE_GRID
    y1, x1 = torch.meshgrid(edges, edges, indexing="ij")
    cells = torch.stack([x1, y1, x1 + 1 / SCENE_GRID, y1 + 1 / SCENE_GRID], -1).flatten(0, 1)
    boxes = torch.cat([torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device), cells])
    return boxes.expand(num_photos, -1, -1)


def join_members(parts: Sequence[Tensor]) -> Tensor:
    """M tensors (..., P) of unit length -> (..., D) of unit length."""
    # With this factor, an inner product of joined vectors is the mean of those of the members.
    return torch.cat([part / len(parts) ** 0.5 for part in parts], dim=-1)


def split_members(vectors: Tensor, num_members: int) -> tuple[Tensor, ...]:
    """Inverse of `join_members`."""
    return tuple(part * num_members**0.5 for part in vectors.chunk(num_members, dim=-1))


class InstanceMember(nn.Module):
    """One member of the ensemble: candidates of a photo -> its part of their vectors."""

    def __init__(self, config: ClareNanoConfig) -> None:
        super().__init__()
        width, drop = config.width, config.dropout
        self.appearance = nn.Sequential(
            nn.LayerNorm(CHANNELS), nn.Dropout(drop), nn.Linear(CHANNELS, width)
        )
        self.detector = nn.Sequential(
            nn.LayerNorm(DETECTOR_FEATURES), nn.Dropout(drop), nn.Linear(DETECTOR_FEATURES, width)
        )
        self.class_names = nn.Linear(NUM_CLASSES, width)
        self.geometry = nn.Sequential(
            nn.Linear(GEOMETRY_FEATURES, 128), nn.GELU(), nn.Linear(128, width)
        )
        # Spelled as in the shipped weights, whose names follow from it.
        self.colour = nn.Sequential(
            nn.Linear(3 * COLOR_GRID**2, 128), nn.GELU(), nn.Dropout(drop), nn.Linear(128, width)
        )
        self.scene = nn.Sequential(
            nn.LayerNorm(CHANNELS), nn.Dropout(drop), nn.Linear(CHANNELS, width)
        )
        self.kind = nn.Parameter(torch.zeros(3, width))
        self.layers = nn.ModuleList(
            RelationLayer(width, config.num_heads, drop) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.to_vector = nn.Linear(width, config.member_dim)
        self.to_image_vector = nn.Linear(width, config.member_dim)
        self.photo_share = nn.Parameter(torch.tensor([0.5]))  # DeepSpeed cannot broadcast scalars
        self.to_class = nn.Linear(width, NUM_CLASSES)
        self.to_box = nn.Sequential(nn.Linear(width, width // 2), nn.GELU())
        self.box_delta = nn.Linear(width // 2, 4)
        # So a new model returns the boxes of the detector.
        nn.init.zeros_(self.box_delta.weight)
        nn.init.zeros_(self.box_delta.bias)

    def candidate_tokens(self, batch: CandidateBatch, geometry_BKG: Tensor) -> Tensor:
        """(B, K, W) embeddings of the candidates, each by itself."""
        return torch.as_tensor(
            self.appearance(batch.crops)
            + self.detector(batch.detector)
            + self.class_names(batch.class_scores.clamp(min=0).sqrt())
            + self.geometry(geometry_BKG)
            + self.colour(batch.colors.flatten(2) * 2 - 1)
            + self.kind[0]
        )

    def scene_tokens(self, batch: CandidateBatch, geometry_BSG: Tensor) -> Tensor:
        """(B, S, W) embeddings of the whole photo and of a grid over it."""
        kinds = torch.cat([self.kind[1:2], self.kind[2:3].expand(SCENE_GRID**2, -1)])
        return torch.as_tensor(self.scene(batch.scene) + self.geometry(geometry_BSG) + kinds)

    def forward(self, batch: CandidateBatch, boxes_BT4: Tensor, pairs: Tensor) -> VisualOutput:
        """Return this member's output, vectors of P dimensions.

        Args:
            batch: B photos.
            boxes_BT4: boxes of candidates and scene tokens.
            pairs: (B, T, T, 8) geometry of those boxes.
        """
        num = batch.valid.shape[1]
        # The photo and its grid cells have no objectness; they count as certain.
        sure_BT = F.pad(batch.objectness, (0, boxes_BT4.shape[1] - num), value=1.0)
        geometry = box_geometry(boxes_BT4, sure_BT, batch.aspect)
        candidates = self.candidate_tokens(batch, geometry[:, :num])
        x = torch.cat([candidates, self.scene_tokens(batch, geometry[:, num:])], dim=1)
        valid = F.pad(batch.valid, (0, boxes_BT4.shape[1] - num), value=True)
        for layer in self.layers:
            x = layer(x, pairs, valid)
        x = self.norm(x)
        here = x[:, :num]
        delta = self.box_delta(self.to_box(here)).float()
        # A part of the photo's vector, which is trained on captions, is added to every instance
        # vector. It shifts the scores of all instances of a photo alike, so it helps to find the
        # photo and hardly changes their order.
        own = F.normalize(self.to_vector(here).float(), dim=-1)
        photo = F.normalize(self.to_image_vector(x[:, num]).float(), dim=-1)
        return VisualOutput(
            vectors=F.normalize(own + self.photo_share * photo[:, None], dim=-1),
            image_vectors=photo,
            boxes=refine_boxes(batch.boxes, delta),
            class_logits=self.to_class(here).float(),
        )


class InstanceStream(nn.Module):
    """The visual stream: candidates of a photo -> vectors that depend on their neighbors, too."""

    def __init__(self, config: ClareNanoConfig) -> None:
        super().__init__()
        self.members = nn.ModuleList(InstanceMember(config) for _ in range(config.num_members))

    def forward(self, batch: CandidateBatch) -> VisualOutput:
        """Return the vectors of candidates and photos; boxes and logits are means over members."""
        cells = scene_boxes(len(batch.boxes), batch.boxes.device)
        boxes = torch.cat([batch.boxes, cells], dim=1)
        pairs = pair_geometry(boxes)
        parts: list[VisualOutput] = [member(batch, boxes, pairs) for member in self.members]
        return VisualOutput(
            vectors=join_members([part.vectors for part in parts]),
            image_vectors=join_members([part.image_vectors for part in parts]),
            boxes=torch.stack([part.boxes for part in parts]).mean(0),
            class_logits=torch.stack([part.class_logits for part in parts]).mean(0),
        )


def refine_boxes(boxes: Tensor, delta: Tensor) -> Tensor:
    """Move the center by `delta[:2]` sides of the box, and scale the sides by `exp(delta[2:])`."""
    # Limited to half a side and a factor of about 2, so that a box stays where the detector saw it.
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-4)
    center = (boxes[..., :2] + boxes[..., 2:]) / 2 + delta[..., :2].clamp(-0.5, 0.5) * size
    half = size * delta[..., 2:].clamp(-0.7, 0.7).exp() / 2
    return torch.cat([center - half, center + half], dim=-1).clamp(0, 1)


class TextStream(nn.Module):
    """The text stream: a MiniLM-size tower, then attention pooling and MORE."""

    def __init__(self, config: ClareNanoConfig) -> None:
        super().__init__()
        self.tower = SentenceTower(num_layers=config.text_layers, max_tokens=config.max_tokens)
        self.weigh = nn.Linear(self.tower.width, config.num_members)
        # With equal weights, the pooling starts as the mean over the tokens.
        nn.init.zeros_(self.weigh.weight)
        self.drop = nn.Dropout(config.dropout)
        self.members = nn.ModuleList(
            MixtureOfRelationExperts(
                self.tower.width,
                config.member_dim,
                num_experts=config.num_experts,
                top_k=config.top_k_experts,
                mix=config.expert_mix,
            )
            for _ in range(config.num_members)
        )

    def forward(self, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """Return (N, D) unit vectors; `mask_NL` is 1 on real tokens."""
        return self.pool(self.tower(ids_NL, mask_NL), mask_NL)

    def pool(self, states_NLC: Tensor, mask_NL: Tensor) -> Tensor:
        """(N, L, C) token states -> (N, D) unit vectors."""
        logits_NLM = self.weigh(states_NLC).masked_fill(mask_NL[..., None] == 0, -1e4)
        pooled_NMC = self.drop(torch.einsum("nlm,nlc->nmc", logits_NLM.softmax(1), states_NLC))
        parts = [
            F.normalize(more(pooled_NMC[:, m]).float(), dim=-1)
            for m, more in enumerate(self.members)
        ]
        return join_members(parts)


class ClareNano(nn.Module):
    """Both streams, and the learned scale and bias of the CLIA loss."""

    def __init__(self, config: ClareNanoConfig, *, clia_bias: float = -10.0) -> None:
        super().__init__()
        self.config = config
        self.detector = PicoDet()
        self.crop_network = CropNetwork(config.crop_network)
        self.visual = InstanceStream(config)
        self.text = TextStream(config)
        # Of shape (1,), since DeepSpeed cannot broadcast scalars.
        self.log_scale = nn.Parameter(torch.tensor([10.0]).log())
        self.bias = nn.Parameter(torch.tensor([clia_bias]))
        self.bank = QueryBank(config.bank_sentences, config.dim)
        self.candidate_head: CandidateHead | None = None
        if config.candidate_head:
            self.add_candidate_head(CandidateHead(config.candidate_head, self.text.tower.width))

    def add_candidate_head(self, head: CandidateHead) -> None:
        """Add a candidate head, or replace the one that the model has.

        The query bank is empty afterwards, because its sentences have no part for the new head.
        """
        self.candidate_head = head
        self.config = replace(self.config, candidate_head=head.config)
        self.bank = QueryBank(self.config.bank_sentences, self.config.dim + head.config.dims)

    def extend_bank(self, vectors_ND: Tensor) -> None:
        """Add the vectors of sentences to the query bank; see `QueryBank.extend`."""
        self.bank.extend(vectors_ND)
        self.config = replace(self.config, bank_sentences=len(self.bank.vectors))

    def frozen_parts(self) -> tuple[nn.Module, ...]:
        """Return the modules that are not trained, so that their output may be cached."""
        return self.detector, self.crop_network

    def forward(
        self, batch: CandidateBatch, ids_NL: Tensor, mask_NL: Tensor
    ) -> tuple[VisualOutput, Tensor, Tensor, Tensor]:
        """Return the visual output, (N, D) expression vectors, scale and bias."""
        visual = self.visual(batch)
        return visual, self.text(ids_NL, mask_NL), self.log_scale.exp(), self.bias

    def encode_photos(self, batch: CandidateBatch) -> VisualOutput:
        """Return the visual output with whole vectors, of V dimensions."""
        out: VisualOutput = self.visual(batch)
        # In float32, because the logarithms of class scores are large.
        with torch.autocast(batch.boxes.device.type, enabled=False):
            own, found = out.vectors.float(), self._describe(batch)
            fit = self.bank(torch.cat([own, found], dim=-1), batch.valid)
        # The vector of a photo describes no candidate.
        return out._replace(
            vectors=torch.cat([own, fit, found], dim=-1),
            image_vectors=F.pad(out.image_vectors, (0, 1 + found.shape[-1])),
        )

    def _describe(self, batch: CandidateBatch) -> Tensor:
        """Return the head's (B, K, E) part of the vectors of candidates."""
        if self.candidate_head is None:
            return batch.boxes.new_zeros((*batch.valid.shape, 0))
        return self.candidate_head.describe(batch.boxes.float(), batch.class_scores.float())

    def encode_texts(self, states_NLC: Tensor, mask_NL: Tensor) -> Tensor:
        """(N, L, C) token states -> (N, V) whole unit vectors."""
        own_ND = self.text.pool(states_NLC, mask_NL)
        parts = [own_ND, self.bank.express(mask_NL)]
        if self.candidate_head is not None:
            shares_NL = mask_NL / mask_NL.sum(1, keepdim=True)
            means_NC = torch.einsum("nl,nlc->nc", shares_NL, states_NLC)
            parts.append(self.candidate_head.express(means_NC).float())
        return F.normalize(torch.cat(parts, dim=-1), dim=-1)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ClareNano:
        """Build from the `model_config` section of a checkpoint's config.json."""
        shape = dict(values)
        if head := shape.get("candidate_head"):
            shape["candidate_head"] = CandidateHeadConfig(**head)
        return ClareNano(ClareNanoConfig(**shape))
