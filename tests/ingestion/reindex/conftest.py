"""Fixtures: fake models in place of the real ones, and a folder of photos."""

from __future__ import annotations

from pathlib import Path

import pytest

from reir_testing.fake_models import FAKE_KINDS, save_photos


@pytest.fixture(autouse=True)
def fake_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reir.encoders.KINDS", FAKE_KINDS)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A photo of each color."""
    return save_photos(tmp_path / "photos")
