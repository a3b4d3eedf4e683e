"""The validation figures of each stage, one of which chooses the best epoch."""

from __future__ import annotations

from collections.abc import Mapping

FIGURES = ("br1_50", "br5_50", "br10_50", "br1_70", "rec_long", "rec_short")
"""Figures of the stages that train a model itself. The first one is the default."""
PART_FIGURES: Mapping[str, tuple[str, ...]] = {
    "rerank": ("br1_50", "br5_50", "br10_50", "rec_long"),
    "masks": ("mask_iou",),
    # Without `score_p50`, which the policy does not change.
    "query-zoom": ("policy_p50",),
    "colors": ("color_accuracy",),
    "candidates": ("long_p50", "short_p50"),
}
"""Figures of the stages that add another part to a `clare-nano`."""
