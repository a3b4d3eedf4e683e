"""`clare-base` and `clare-large` at full size, on the meta device: sizes and shapes, no numbers."""

from __future__ import annotations

import pytest
import torch

from reir.models.clare.config import ClareConfig, clare_base, clare_large
from reir.models.clare.model import Clare


@pytest.mark.parametrize(
    ("config", "vision", "text", "rest"),
    [(clare_base(), 86e6, 110e6, 28e6), (clare_large(), 304e6, 336e6, 31e6)],
    ids=["base", "large"],
)
def test_presets_have_the_published_numbers_of_parameters(
    config: ClareConfig, vision: float, text: float, rest: float
) -> None:
    with torch.device("meta"):
        model = Clare(config)
    sizes = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
    }
    assert sizes.pop("vision") == pytest.approx(vision, rel=0.02)
    assert sizes.pop("language") == pytest.approx(text, rel=0.02)
    assert sum(sizes.values()) == pytest.approx(rest, rel=0.05)
    assert config.strides == (8, 16, 32, 64)
    assert config.num_queries == 900
    assert config.vision_layers == config.text_layers


def test_full_size_photos_have_the_published_number_of_tokens() -> None:
    """Tensors of the meta device hold no values, so nothing may be read back on the host."""
    with torch.device("meta"):
        model = Clare(clare_base()).eval()
        pixels, mask = torch.empty(2, 3, 800, 1344), torch.empty(2, 800, 1344, dtype=torch.bool)
        with torch.no_grad():
            output = model(pixels, mask)
            texts = model.text(torch.empty(5, 64, dtype=torch.long))
    assert output.token_logits.shape == (2, 22_323)
    assert output.objects.shape == (6, 2, 900, 256)
    assert output.boxes.shape == (6, 2, 900, 4)
    assert texts.shape == (6, 5, 256)


def test_every_preset_has_a_paper_parity_variant() -> None:
    for preset in (clare_base, clare_large):
        assert preset(paper_parity=True).paper_parity
        assert preset(paper_parity=True).first_clia_bias == 0
        assert not preset().paper_parity
