"""Parameter counts at the published size: Swin-T and BERT base, without any weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MMGroundingDinoConfig, MMGroundingDinoForObjectDetection

from reir.models.piza.config import Inserted, Method, PizaConfig
from reir.models.piza.model import add_adapters
from reir.models.piza.parameters import PUBLISHED_M, ParameterCounts, count_parameters

NORMS = 97_600
HISTORY, UNUSED_HISTORY = 139_986, 137_504
ADAPTER_PLUS = 24 * (2 * 256 * 256 + 3 * 256)
STEP = 2 * (256 * 256 + 256)
LABELS = 256 * 256
"""Embedding of labels for denoising, which only the published training code has."""


def published_base() -> Any:
    """Return the published base on the `meta` device; its layers have heads of their own."""
    config = MMGroundingDinoConfig(decoder_bbox_embed_share=False, decoder_cls_embed_share=False)
    with torch.device("meta"):
        return MMGroundingDinoForObjectDetection(config)


def counts(method: Method, inserted: Inserted | None = None) -> ParameterCounts:
    with torch.device("meta"):
        return count_parameters(
            add_adapters(published_base(), PizaConfig(method=method, inserted=inserted))
        )


def millions(count: int) -> float:
    return round(count / 1e6, 1)


@pytest.mark.parametrize(
    ("method", "inserted", "trained"),
    [
        ("adapter", None, ADAPTER_PLUS + NORMS),
        ("lora", None, 108 * 512 * 16 + 36 * 768 * 16),
        ("coop", None, 144 * 768),
        # The paper inserts the summary of the search.
        ("piza-adapter", "summary", ADAPTER_PLUS + NORMS + 12 * (16 * 256 + 256)),
        ("piza-lora", None, 108 * 512 * 16 + 36 * 768 * 16 + 108 * 16 * 16),
        ("piza-coop", None, 144 * 768 + 16 * 768 + 768 + 768 * 768 + 768),
    ],
)
def test_counts_are_the_published_ones(
    method: Method, inserted: Inserted | None, trained: int
) -> None:
    found = counts(method, inserted)
    assert found.trained == trained
    assert found.total == trained + (HISTORY if method.startswith("piza-") else 0)
    assert millions(found.total) == PUBLISHED_M[method]


def test_released_piza_adapter_is_larger_than_published() -> None:
    found = counts("piza-adapter")
    assert found.trained == ADAPTER_PLUS + NORMS + STEP + 12 * (256 * 256 + 256)
    assert (found.history, found.unused_history) == (HISTORY, UNUSED_HISTORY)
    # With the copy of the transformer layer that the release registers and does not use.
    assert millions(found.total + found.unused_history) == 4.5
    assert PUBLISHED_M["piza-adapter"] == 3.5
    # The published number also fits the release if nothing is inserted into its adapters.
    told_nothing = counts("piza-adapter", "nothing")
    assert millions(told_nothing.total + told_nothing.unused_history) == 3.5


def test_full_fine_tuning_trains_the_base_without_the_labels_of_denoising() -> None:
    found = counts("full")
    assert found.trained == found.base == sum(p.numel() for p in published_base().parameters())
    assert millions(found.trained) == 172.9
    assert millions(found.trained + LABELS) == PUBLISHED_M["full"]


@pytest.mark.parametrize("method", ["piza-adapter", "piza-lora", "piza-coop"])
def test_adapters_take_at_most_20_megabytes(method: Method) -> None:
    # In float32; `test_checkpoint.py` tests that a file contains little else.
    assert 4 * counts(method).total < 19e6
