"""The figures of README, model card and `benchmarks/results` are the same figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = (ROOT / "platform/reir/checkpoints/clare-nano/README.md").read_text(encoding="utf-8")


def kept(name: str) -> dict[str, float]:
    """The figures of one benchmark, by what follows its name."""
    text = (ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8")
    figures: dict[str, float] = json.loads(text)["figures"]
    return {key.removeprefix(f"{name}."): value for key, value in figures.items()}


def rows(text: str, columns: int) -> dict[str, list[float]]:
    """Numbers of each row of a table of so many columns that begins with the name of a figure."""
    row = re.compile(r"^\| (\w+)" + r" \| ([^|]+)" * (columns - 1) + r" \|$", re.MULTILINE)
    return {
        name: [float(each) for each in re.findall(r"[-+]?\d+\.\d+", " ".join(cells))]
        for name, *cells in row.findall(text)
        if name.startswith(("br", "rec"))
    }


def value_of(figure: str) -> str:
    """The second cell of the row of README's table whose first cell begins so."""
    (found,) = [line for line in README.splitlines() if line.startswith(f"| {figure}")]
    return found.split(" | ")[1].strip()


def test_the_model_card_has_the_figures_of_the_readme() -> None:
    card = {name: value for name, (value,) in rows(CARD, 2).items()}
    assert set(card) == {"br1_50", "br5_50", "br10_50", "rec_long", "rec_short"}
    assert card == {name: kept("quality")[name] for name in card}
    brs = " / ".join(f"{card[name]:.2f}" for name in ("br1_50", "br5_50", "br10_50"))
    assert value_of("BR@1 / 5 / 10, IoU .5, `val` photos") == brs
    within = value_of("P@.5 within the photo: long; short")
    assert within.split("; ")[:2] == [f"{card['rec_long']:.2f}", f"{card['rec_short']:.2f}"]


def test_the_model_card_has_the_figures_of_the_reranker() -> None:
    card, measured = rows(CARD, 4), kept("rerank")
    assert set(card) == {"br1", "br5", "br10", "rec", "rec_short"}
    for name, values in card.items():
        ends = ("_without", "", "_gain", "_gain_low", "_gain_high")
        assert values == [measured[name + end] for end in ends]
    gains = [card[name][2] for name in ("br1", "br5", "br10")] + card["br1"][3:]
    said = re.findall(r"-?\d+\.\d+", value_of("re-ranker on `val`"))
    assert [float(each) for each in said] == pytest.approx(gains, abs=0.0501)  # to a tenth


def test_the_model_card_names_where_the_photos_and_texts_are_from() -> None:
    named = ("COCO val2017", "COCO train2017", "BY-NC-ND", "CC BY 4.0", "SugarCrepe")
    assert [each for each in named if each not in CARD] == []
    assert "vision-language model" in CARD
