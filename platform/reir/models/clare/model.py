"""`clare-base`, `clare-large`: the published CLARE model (docs/clare.md, section 3).

The visual stream does not depend on queries. It consists of a SigLIP vision tower, a pyramid of
four feature maps, a deformable encoder that proposes boxes, and a decoder that turns the best
proposals into instance vectors and boxes. The text stream consists of a SigLIP text tower and, for
each decoder layer, a mixture of relation experts. The two streams meet only in `Clare.scores`.

With `paper_parity`, the model behaves like the released code; docs/clare.md, section 9.1, lists the
differences.
"""

# Shapes: B photos, H x W pixels of the padded batch, h x w cells of a map, C tower width,
#         T tokens of all maps, N queries, Q denoising queries, D dimension, M texts, J tokens per
#         text, K decoder layers

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipTextModel, SiglipVisionModel

from reir.models.clare.config import ClareConfig
from reir.models.clare.deformable import (
    DeformableDecoder,
    DeformableEncoder,
    EncoderMemory,
    LayerShape,
    ProposalHead,
    TokenGrid,
    to_xyxy,
)
from reir.models.clare.masks import MaskBranch, MaskInputs
from reir.models.clare.towers import text_config, vision_config
from reir.models.clare.vision import NUM_LEVELS, Pyramid, encode_patches
from reir.models.relation_experts import MixtureOfRelationExperts

if TYPE_CHECKING:
    from reir.models.clare.denoising import DenoisingQueries

# Initial probability of every proposal and, without `paper_parity`, of every pair of an instance
# and an expression: nearly all of them are negatives.
PRIOR = 0.01
SCORE_SCALE, MAX_SCALE = 20.0, 100.0
# That of the released code, whose inner products have no other bound (docs/clare.md, section 3.7).
SCORE_LIMIT = 50_000.0


# ------------------------------------------------------------------------------------ whole model


class ClareOutput(NamedTuple):
    """The output of the visual stream for B photos.

    It is a tuple, since ZeRO-3 finds the output tensors of a module in tuples, but not in
    dataclasses. Boxes are xyxy, normalized to the upright photo without padding, and not clipped.

    Attributes:
        objects: (K, B, N, D) instance vectors of all decoder layers; of unit length, but raw with
            `paper_parity`.
        boxes: (K, B, N, 4) boxes of these instances.
        proposal_logits: (B, N) class-agnostic objectness of each query's proposal, best first.
        proposal_boxes: (B, N, 4) boxes of these proposals.
        token_logits: (B, T) objectness of all tokens of the encoder.
        token_boxes: (B, T, 4) boxes that the tokens propose.
        token_valid: (B, T) bool, tokens that may propose a box.
        denoising_objects: (K, B, Q, D) vectors of the denoising queries; None if there are none.
        denoising_boxes: (K, B, Q, 4) boxes of the denoising queries; None if there are none.
        masks: inputs for masks; None if the model has no mask branch.
    """

    objects: Tensor
    boxes: Tensor
    proposal_logits: Tensor
    proposal_boxes: Tensor
    token_logits: Tensor
    token_boxes: Tensor
    token_valid: Tensor
    denoising_objects: Tensor | None = None
    denoising_boxes: Tensor | None = None
    masks: MaskInputs | None = None


class Clare(nn.Module):
    """Both streams, and for each decoder layer the learned scale and bias of the scores."""

    def __init__(self, config: ClareConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = SiglipVisionModel(vision_config(config))
        self.language = SiglipTextModel(text_config(config))
        shape = LayerShape(
            dim=config.dim,
            num_heads=config.num_heads,
            num_levels=NUM_LEVELS,
            num_points=config.num_points,
            ffn=config.ffn,
        )
        self.pyramid = Pyramid(config.vision_width, config.dim)
        self.encoder = DeformableEncoder(shape, config.encoder_layers)
        self.proposals = ProposalHead(config.dim, prior=PRIOR)
        self.queries = nn.Embedding(config.num_queries, config.dim)
        self.decoder = DeformableDecoder(shape, config.decoder_layers)
        if config.masks:
            self.masks = MaskBranch(config.dim)
        layers = config.decoder_layers
        self.experts = nn.ModuleList(
            MixtureOfRelationExperts(
                config.text_width,
                config.dim,
                num_experts=config.num_experts,
                top_k=config.top_k_experts,
                mix=config.expert_mix,
            )
            for _ in range(layers)
        )
        self.clia_log_scale = nn.Parameter(torch.full((layers,), math.log(config.clia_scale)))
        self.clia_bias = nn.Parameter(torch.full((layers,), config.first_clia_bias))
        if not config.paper_parity:
            self.score_log_scale = nn.Parameter(torch.full((layers,), math.log(SCORE_SCALE)))
            self.score_bias = nn.Parameter(torch.full((layers,), math.log(PRIOR / (1 - PRIOR))))

    def forward(
        self, pixels_B3HW: Tensor, mask_BHW: Tensor, denoising: DenoisingQueries | None = None
    ) -> ClareOutput:
        """Find the instances of B photos, without any expression.

        Args:
            pixels_B3HW: normalized photos, each in the top left corner, 0 in the padding.
            mask_BHW: bool, True in the padding (right and bottom).
            denoising: queries whose targets are known, which come before the others; only in
                training.

        Raises:
            ValueError: H or W is not a multiple of 32, or the denoising queries were made for
                another number of queries.
        """
        memory = self.encode(pixels_B3HW, mask_BHW)
        token_logits, token_boxes, token_valid = self.proposals(memory.tokens, memory.grid)
        num_queries = min(self.config.num_queries, token_logits.shape[1])  # a batch may be tiny
        proposal_logits, best = token_logits.topk(num_queries, dim=1)
        first = token_boxes.gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
        # Called instead of reading `weight`, for ZeRO-3 as in `encode_patches`.
        content = self.queries(torch.arange(num_queries, device=best.device))
        content = content.expand(len(best), -1, -1)
        # The encoder learns its boxes from losses of its own. In the released code, gradients of
        # the decoder reach them as well.
        boxes = first if self.config.paper_parity else first.detach()
        num_known = 0
        if denoising is not None:
            num_known = denoising.content.shape[1]
            content = torch.cat([denoising.content.to(content.dtype), content], dim=1)
            boxes = torch.cat([denoising.boxes_cxcywh.to(boxes.dtype), boxes], dim=1)
        seen = token_valid.gather(1, best) & self.config.neighbors
        allowed = allowed_pairs(seen, denoising)
        states, boxes = self.decoder(content, boxes, allowed, memory)
        objects, boxes = self._in_space(states), to_xyxy(boxes)
        states = states[:, :, num_known:]
        return ClareOutput(
            objects=objects[:, :, num_known:],
            boxes=boxes[:, :, num_known:],
            proposal_logits=proposal_logits,
            proposal_boxes=to_xyxy(first),
            token_logits=token_logits,
            token_boxes=to_xyxy(token_boxes.sigmoid()),
            token_valid=token_valid,
            denoising_objects=objects[:, :, :num_known] if denoising is not None else None,
            denoising_boxes=boxes[:, :, :num_known] if denoising is not None else None,
            masks=self.masks.inputs(memory, states) if self.config.masks else None,
        )

    def encode(self, pixels_B3HW: Tensor, mask_BHW: Tensor) -> EncoderMemory:
        """Return the encoded tokens with their positions; arguments and errors as in `forward`."""
        height, width = pixels_B3HW.shape[2:]
        unit = self.config.side_multiple_px
        if height % unit or width % unit or mask_BHW.shape != pixels_B3HW[:, 0].shape:
            raise ValueError(
                f"pixels must be (B, 3, H, W) with H and W multiples of {unit}, and the mask "
                f"(B, H, W), got {tuple(pixels_B3HW.shape)} and {tuple(mask_BHW.shape)}; pad them"
            )
        strides = self.config.strides
        sides = [(-(-height // stride), -(-width // stride)) for stride in strides]
        sizes_B2 = photo_sizes(mask_BHW)
        grid = TokenGrid.build(sizes_B2, sides, strides)
        if self.config.paper_parity:
            # The released code resamples positions to the padded batch, and masks nothing.
            cells_B2 = sizes_B2.new_tensor(sides[1][::-1]).expand_as(sizes_B2)
            patches = encode_patches(self.vision, pixels_B3HW, cells_B2, None)
            maps = self.pyramid(patches, None)
        else:
            valid = grid.valid_maps()
            # The last patches of a photo may contain padding, which must be the same in any batch.
            pixels = pixels_B3HW.masked_fill(mask_BHW[:, None], 0.0)
            cells_B2 = (sizes_B2 / self.config.patch_px).ceil()
            patches = encode_patches(self.vision, pixels, cells_B2, valid[1])
            maps = self.pyramid(patches, valid)
        tokens_BTD = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        return EncoderMemory(self.encoder(tokens_BTD, grid), grid)

    def text_features(self, ids_MJ: Tensor) -> Tensor:
        """Return the (M, C) output of the text tower for token ids of `max_tokens` each.

        Raises:
            ValueError: J is not `max_tokens`; the tower reads its output from the last position.
        """
        if ids_MJ.ndim != 2 or ids_MJ.shape[1] != self.config.max_tokens:
            raise ValueError(
                f"token ids must be (M, {self.config.max_tokens}), got {tuple(ids_MJ.shape)}; "
                f"pad with {self.config.pad_token}"
            )
        if not len(ids_MJ):  # the tower cannot reshape an empty tensor
            return self.queries.weight.new_zeros(0, self.config.text_width)
        return torch.as_tensor(self.language(ids_MJ).pooler_output)

    def expressions(self, features_MC: Tensor) -> Tensor:
        """Return the (K, M, D) expression vectors; unit length, but raw with `paper_parity`."""
        return self._in_space(torch.stack([more(features_MC) for more in self.experts]))

    def text(self, ids_MJ: Tensor) -> Tensor:
        """Return the (K, M, D) expression vectors of token ids; errors as in `text_features`."""
        return self.expressions(self.text_features(ids_MJ))

    def scores(self, objects: Tensor, texts: Tensor) -> Tensor:
        """Return the alignment logits of instances and expressions in every layer.

        Args:
            objects: (K, B, N, D) instance vectors, as in `ClareOutput`.
            texts: (K, M, D) expression vectors, which are compared with the instances of all
                photos; or (K, B, M, D), where each photo has M expressions of its own.

        Returns:
            (K, B, N, M): the scaled cosine plus a bias, or the inner product with `paper_parity`.
        """
        if self.config.paper_parity:
            return products(objects, texts).clamp(-SCORE_LIMIT, SCORE_LIMIT)
        return scaled(products(objects, texts), self.score_log_scale, self.score_bias)

    def clia_logits(self, objects: Tensor, texts: Tensor) -> Tensor:
        """Return the (K, B, N, M) logits of CLIA: see `scores` and docs/clare.md, section 4.4."""
        logits = scaled(products(objects, texts), self.clia_log_scale, self.clia_bias)
        return logits.clamp(-SCORE_LIMIT, SCORE_LIMIT)

    def _in_space(self, vectors: Tensor) -> Tensor:
        """Normalize vectors of either stream, unless `paper_parity` is set; float32."""
        return vectors.float() if self.config.paper_parity else F.normalize(vectors.float(), dim=-1)

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Save memory in training: the backward pass recomputes the activations of layers."""
        self.encoder.checkpointing = self.decoder.checkpointing = enabled
        for tower in (self.vision, self.language):
            if enabled:
                tower.activation_checkpointing_enable({"use_reentrant": False})
            else:
                tower.activation_checkpointing_disable()

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Clare:
        """Build from the `model_config` section of a checkpoint's config.json."""
        return Clare(ClareConfig(**values))


def photo_sizes(mask_BHW: Tensor) -> Tensor:
    """(B, 2) float32 width and height in pixels of the photos in a padded batch."""
    # From the first row and column, since every photo is in the top left corner.
    inside = ~mask_BHW
    return torch.stack([inside[:, 0].sum(dim=1), inside[:, :, 0].sum(dim=1)], dim=1).float()


def allowed_pairs(seen_BN: Tensor, denoising: DenoisingQueries | None) -> Tensor:
    """(B, 1, Q + N, Q + N) bool, which queries (rows) may attend to which others (columns).

    Queries that are False in `seen_BN` are attended to by nobody but themselves. Among them are the
    queries without a proposal, in photos with fewer tokens than queries.
    """
    if denoising is not None:
        seen_BN = F.pad(seen_BN, (denoising.content.shape[1], 0), value=True)
    num = seen_BN.shape[1]
    allowed = seen_BN[:, None].expand(-1, num, -1)
    if denoising is not None:
        if denoising.attention_mask.shape != (num, num):
            raise ValueError(
                f"the mask of {denoising.content.shape[1]} denoising queries must be "
                f"({num}, {num}), got {tuple(denoising.attention_mask.shape)}; "
                f"make it for the model's number of queries"
            )
        allowed = allowed & ~denoising.attention_mask
    # Each query may attend to itself, because the softmax of a row without any entry is NaN.
    return (allowed | torch.eye(num, dtype=torch.bool, device=seen_BN.device))[:, None]


def products(objects: Tensor, texts: Tensor) -> Tensor:
    """Return (K, B, N, M) inner products in float32, also within autocast."""
    texts = texts if texts.ndim == objects.ndim else texts[:, None]
    with torch.autocast(objects.device.type, enabled=False):
        return objects.float() @ texts.float().mT


def scaled(products_KBNM: Tensor, log_scale_K: Tensor, bias_K: Tensor) -> Tensor:
    """Return (K, B, N, M) logits from cosines; the scale is limited to 100."""
    # The logarithm is learned, so that the scale stays positive.
    scale_K = log_scale_K.exp().clamp(max=MAX_SCALE)
    return scale_K[:, None, None, None] * products_KBNM + bias_K[:, None, None, None]
