"""PIZA as the zoomer of a search: `reir search --zoomer piza:DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection

from reir.errors import ConfigError
from reir.models.piza.checkpoint import save_piza
from reir.models.piza.config import PizaConfig
from reir.models.piza.history import HistoryConfig
from reir.models.piza.model import add_adapters
from reir.models.query_zoom.zoomer import load_zoomer_spec
from reir.query.search import open_gallery
from reir.store.memory import MemoryStore
from reir_testing import FakeEncoder, draw_scene
from reir_testing.pretrained import save_tiny_grounding_dino
from reir_testing.serving import index_photos


@pytest.fixture(scope="module")
def grounding_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_grounding_dino(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def piza(grounding_dino: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base: Any = AutoModelForZeroShotObjectDetection.from_pretrained(grounding_dino).eval()
    history = HistoryConfig(width=16, num_heads=2, feedforward=32)
    folder = tmp_path_factory.mktemp("piza")
    config = PizaConfig(method="piza-adapter", rank=4, prompt_tokens=3, history=history)
    save_piza(folder, add_adapters(base, config).eval(), {})
    return folder


def test_the_search_of_a_photo_is_that_of_piza(piza: Path, tmp_path: Path) -> None:
    pixels = draw_scene((600, 400), [("red", (100, 100, 160, 160))])
    Image.fromarray(pixels).save(tmp_path / "a.png")
    store = MemoryStore()
    index_photos(store, "photos", [tmp_path / "a.png"])
    zoomer = load_zoomer_spec(f"piza:{piza}")
    with open_gallery("photos", store=store, encoder=FakeEncoder(), zoomer=zoomer) as gallery:
        (hit,) = gallery.search("the red one", zoom=True)
        assert gallery.search("the red one")[0].zoom is None
    assert hit.zoom == zoomer.zoom([pixels], ["the red one"])[0]
    assert hit.box == hit.zoom.box
    assert hit.zoom.frames[0] == (0, 0, 1, 1)
    with open_gallery("photos", store=store, encoder=FakeEncoder(), zoomer=f"piza:{piza}") as named:
        assert named.search("the red one", zoom=True)[0].zoom == hit.zoom


def test_a_localizer_that_does_not_zoom_in_is_refused(grounding_dino: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not zoom in; use piza:DIR"):
        load_zoomer_spec(f"grounding-dino:{grounding_dino}")
    with pytest.raises(ConfigError, match="unknown localizer"):
        load_zoomer_spec("pizza:here")
