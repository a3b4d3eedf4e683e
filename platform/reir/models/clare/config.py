"""The configuration of CLARE, with the presets `clare-base` and `clare-large`.

docs/clare.md, section 3, describes the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from reir.models.clare.vision import NORM_GROUPS

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class ClareConfig:
    """The hyperparameters of the model; stored in `config.json` of a checkpoint.

    Attributes:
        vision_width, vision_layers, vision_heads, vision_mlp: size of the SigLIP vision tower.
        patch_px: side of its patches in pixels.
        native_grid: side of the grid of position embeddings that it was trained with, in patches.
        text_width, text_layers, text_heads, text_mlp: size of the SigLIP text tower.
        vocabulary: number of tokens of its tokenizer.
        pad_token: id of the token that fills up short expressions.
        max_tokens: number of tokens to which every expression is padded or truncated.
        dim: D, the dimension of instance and expression vectors.
        num_queries: N, the number of decoder queries, which start from the best N proposals.
        neighbors: whether the queries of a photo attend to each other, so that an instance vector
            also depends on the other instances.
        encoder_layers, decoder_layers, num_heads, num_points, ffn: size of the deformable encoder
            and decoder.
        num_experts, top_k_experts, expert_mix: size of MORE; 0 experts switch it off.
        num_candidates: number of instances to keep per photo, by objectness after NMS.
        nms_iou: IoU threshold of that class-agnostic NMS.
        shortest_side_px: length to which the shorter side of a photo is resized.
        longest_side_px: upper limit of the longer side; if it is reached, the shorter side is
            smaller than `shortest_side_px`.
        masks: whether the model has a mask branch (docs/clare.md, section 3.8).
        clia_scale: initial scale of CLIA.
        clia_bias: initial bias of CLIA; None means -10, or 0 with `paper_parity`.
        paper_parity: whether to behave like the released code (docs/clare.md, section 9.1).
    """

    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    vision_mlp: int = 3072
    patch_px: int = 16
    native_grid: int = 24
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_mlp: int = 3072
    vocabulary: int = 32_000
    pad_token: int = 1
    max_tokens: int = 64
    dim: int = 256
    num_queries: int = 900
    neighbors: bool = True
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_heads: int = 8
    num_points: int = 4
    ffn: int = 2048
    num_experts: int = 4
    top_k_experts: int = 2
    expert_mix: float = 0.2
    num_candidates: int = 30
    nms_iou: float = 0.7
    shortest_side_px: int = 800
    longest_side_px: int = 1333
    masks: bool = False
    clia_scale: float = 10.0
    clia_bias: float | None = None
    paper_parity: bool = False

    def __post_init__(self) -> None:
        """Check that the sizes fit together.

        Raises:
            ValueError: a size is not allowed; the message says which sizes are.
        """
        # The finest map has twice the resolution of the patches, and masks have four times theirs.
        for name, value, unit, why in (
            ("dim", self.dim, 2 * self.num_heads, "twice num_heads"),
            ("dim", self.dim, NORM_GROUPS, "the groups of its norms"),
            ("vision_width", self.vision_width, self.vision_heads, "vision_heads"),
            ("vision_width", self.vision_width, 2, "halved at the finest map"),
            ("text_width", self.text_width, self.text_heads, "text_heads"),
            ("patch_px", self.patch_px, 4 if self.masks else 2, "the step to the finest map"),
        ):
            if value < 1 or value % unit:
                raise ValueError(f"{name} must be a multiple of {unit} ({why}), got {value}")
        for name in ("num_queries", "num_candidates", "encoder_layers", "decoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.shortest_side_px <= self.longest_side_px:
            raise ValueError(
                f"shortest_side_px must lie between 1 and longest_side_px="
                f"{self.longest_side_px}, got {self.shortest_side_px}"
            )

    @property
    def side_multiple_px(self) -> int:
        """The sides of a padded batch are multiples of this number of pixels (32)."""
        # Max pooling over 2 x 2 patches makes the map of stride 32, and needs an even number.
        return 2 * self.patch_px

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """The strides of the four feature maps in pixels: 8, 16, 32 and 64."""
        half = self.patch_px // 2
        return half, 2 * half, 4 * half, 8 * half

    @property
    def pixel_mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation that normalize pixels in [0, 1], each for R, G and B."""
        if self.paper_parity:
            return IMAGENET_MEAN, IMAGENET_STD
        return SIGLIP_MEAN, SIGLIP_STD

    @property
    def first_clia_bias(self) -> float:
        """The initial bias of CLIA."""
        if self.clia_bias is not None:
            return float(self.clia_bias)  # YAML reads -10 as an int, which makes an integer tensor
        # At -10, almost every pair starts as a negative, which nearly all are. From 0, the many
        # negatives would dominate the start of training (docs/LOG.md, "the bias is essential").
        return 0.0 if self.paper_parity else -10.0


def clare_base(*, paper_parity: bool = False) -> ClareConfig:
    """Return the preset that is based on SigLIP ViT-B/16 at 384 px."""
    return ClareConfig(paper_parity=paper_parity)


def clare_large(*, paper_parity: bool = False) -> ClareConfig:
    """Return the preset that is based on SigLIP ViT-L/16 at 384 px."""
    return ClareConfig(
        vision_width=1024,
        vision_layers=24,
        vision_heads=16,
        vision_mlp=4096,
        text_width=1024,
        text_layers=24,
        text_heads=16,
        text_mlp=4096,
        paper_parity=paper_parity,
    )
