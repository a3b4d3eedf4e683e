"""Sections that later steps add to the model card of a checkpoint."""

from __future__ import annotations

import locale
from collections.abc import Iterator
from pathlib import Path

import pytest

from reir_training.config import ClareTrainConfig
from reir_training.report.model_card import (
    write_candidates_card,
    write_clare_card,
    write_finetune_card,
)

CARD = """# clare-nano

A model.

## Training

Much.

## Relation re-ranker

For old vectors.

## Mask head

Still fits.

## Fine-tune

An earlier one.
"""
ABOUT = {
    "started_from": "abc123",
    "steps": 80,
    "expressions": 700,
    "photos": 190,
    "share_of_new_weights": 0.4,
    "settings": {"optimization": {"photos_per_batch": 24}},
}


def test_the_card_of_a_fine_tune_describes_what_is_in_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "old" / "README.md").write_text(CARD)
    write_finetune_card(tmp_path / "new", tmp_path / "old", ABOUT)
    text = (tmp_path / "new" / "README.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Training", "## Mask head", "## Fine-tune"]
    assert "`abc123`" in text
    assert "80 steps of\n24 photos, with 700\nexpressions about 190 photos" in text
    assert "plus 0.4 of their change" in text
    assert "An earlier one" not in text
    write_finetune_card(tmp_path / "new", tmp_path, ABOUT)  # a checkpoint without a card
    assert (tmp_path / "new" / "README.md").read_text().count("## Fine-tune") == 1


def test_the_card_of_a_candidate_head_describes_what_is_in_the_checkpoint(tmp_path: Path) -> None:
    card = CARD.replace("## Mask head", "## Zoom policy\n\nFor old vectors.\n\n## Mask head")
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "new").mkdir()
    about = {
        "examples": 50,
        "photos": 9,
        "steps": 3,
        "hours": 0.1,
        "metrics": {"long_p50": 40.0},
        "settings": {"optimization": {"photos_per_batch": 16}},
    }
    write_candidates_card(tmp_path / "new", tmp_path, about)
    text = (tmp_path / "new" / "README.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Training", "## Mask head", "## Fine-tune", "## Candidate head"]


@pytest.fixture
def ascii_locale() -> Iterator[None]:
    """A machine whose locale has only ASCII characters."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    yield
    locale.setlocale(locale.LC_CTYPE, before)


@pytest.mark.usefixtures("ascii_locale")
def test_a_card_is_in_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    values = {"data": [{"format": "photos", "path": "a"}]}
    about = {
        "preset": "clare-base",
        "towers": "Türme/größe",
        "stage": "clia",
        "metrics": {},
        "settings": ClareTrainConfig.model_validate(values).model_dump(mode="json"),
        **dict.fromkeys(("photos", "boxes", "expressions", "captions", "held_out_photos"), 1),
        **dict.fromkeys(("hours", "steps"), 1),
    }
    write_clare_card(tmp_path, about)
    assert "| Türme/größe |" in (tmp_path / "README.md").read_text(encoding="utf-8")
