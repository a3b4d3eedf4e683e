"""Sections that later steps add to the model card of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from reir_training.report.model_card import write_finetune_card

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
