"""Settings of the adapters."""

from __future__ import annotations

from typing import Any

import pytest

from reir.errors import ConfigError
from reir.models.piza.config import PizaConfig


@pytest.mark.parametrize(
    ("method", "inserts", "bottleneck"),
    [
        ("piza-adapter", "step", 256),
        ("piza-lora", "summary", 16),
        ("piza-coop", "summary", 0),
        ("adapter", "nothing", 256),
        ("full", "nothing", 0),
    ],
)
def test_defaults_of_the_methods(method: Any, inserts: str, bottleneck: int) -> None:
    config = PizaConfig(method=method)
    assert (config.inserts, config.bottleneck) == (inserts, bottleneck)
    assert config.zooms == method.startswith("piza-")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "piza-adaptor"}, "unknown method 'piza-adaptor'; did you mean 'piza-adapter'"),
        ({"rank": -1}, "rank must be 0 .* got -1"),
        ({"prompt_tokens": 0}, "prompt_tokens must be 1 or more, got 0"),
        ({"inserted": "both"}, "unknown value 'both' of inserted; use one of step, summary"),
        (
            {"method": "piza-lora", "inserted": "step"},
            "'piza-lora' cannot take the zoom step as input",
        ),
        ({"method": "coop", "inserted": "summary"}, "use inserted=nothing, or method piza-coop"),
    ],
)
def test_wrong_values_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PizaConfig(**values)
