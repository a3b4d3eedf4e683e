"""The shape of CLARE: every number of `clare-base` and `clare-large` (docs/clare.md, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from reir.models.clare.vision import NORM_GROUPS

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class ClareConfig:
    """Every number that shapes the model; kept as `config.json` of a checkpoint.

    Attributes:
        vision_width, vision_layers, vision_heads, vision_mlp: SigLIP vision tower.
        patch_px: side of its patches.
        native_grid: side, in patches, of the position grid that it was trained on.
        text_width, text_layers, text_heads, text_mlp: SigLIP text tower.
        vocabulary, pad_token: of its tokenizer.
        max_tokens: every expression is padded or cut to so many.
        dim: D, of instance and expression vectors.
        num_queries: N, the best proposals that are decoded.
        neighbors: queries look at one another, by which a vector knows what is around its
            instance; False leaves each query alone.
        encoder_layers, decoder_layers, num_heads, num_points, ffn: deformable layers.
        num_experts, top_k_experts, expert_mix: MORE (0 experts: off).
        num_candidates, nms_iou: instances kept of a photo by objectness, after NMS.
        shortest_side_px, longest_side_px: photos are resized to the one, never past the other.
        masks: with the mask branch (docs/clare.md, section 3.8).
        clia_scale: first value of the scale of CLIA.
        clia_bias: first value of its bias; None takes -10, or 0 under `paper_parity`.
        paper_parity: behave as the released code does (docs/clare.md, section 9.1).
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
        """Check that widths and heads fit.

        Raises:
            ValueError: naming the value and what is allowed.
        """
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
        """Sides of a padded batch are multiples of this (32)."""
        return 2 * self.patch_px

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Pixels a cell of the four maps: 8, 16, 32, 64."""
        half = self.patch_px // 2
        return half, 2 * half, 4 * half, 8 * half

    @property
    def pixel_mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation that pixels in [0, 1] are normalized by, red, green, blue."""
        if self.paper_parity:
            return IMAGENET_MEAN, IMAGENET_STD
        return SIGLIP_MEAN, SIGLIP_STD

    @property
    def first_clia_bias(self) -> float:
        """What the bias of CLIA starts from."""
        if self.clia_bias is not None:
            return float(self.clia_bias)  # a whole number in YAML is an int
        return 0.0 if self.paper_parity else -10.0


def clare_base(*, paper_parity: bool = False) -> ClareConfig:
    """Return the preset of SigLIP ViT-B/16 at 384 px."""
    return ClareConfig(paper_parity=paper_parity)


def clare_large(*, paper_parity: bool = False) -> ClareConfig:
    """Return the preset of SigLIP ViT-L/16 at 384 px."""
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
