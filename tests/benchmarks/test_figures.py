"""The README, the model card and `benchmarks/results` agree on the figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = (ROOT / "platform/reir/checkpoints/clare-nano/README.md").read_text(encoding="utf-8")


def kept(name: str) -> dict[str, float]:
    """Return the figures of one benchmark, without its name as a prefix of the keys."""
    text = (ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8")
    figures: dict[str, float] = json.loads(text)["figures"]
    return {key.removeprefix(f"{name}."): value for key, value in figures.items()}


def rows(text: str, columns: int) -> dict[str, list[float]]:
    """Return the numbers in the rows of tables with `columns` columns, by the figure's name."""
    row = re.compile(r"^\| (\w+)" + r" \| ([^|]+)" * (columns - 1) + r" \|$", re.MULTILINE)
    return {
        name: [float(each) for each in re.findall(r"[-+]?\d+\.\d+", " ".join(cells))]
        for name, *cells in row.findall(text)
        if name.startswith(("br", "rec"))
    }


def value_of(figure: str) -> str:
    """Return the second cell of the row in the README whose first cell starts with `figure`."""
    (found,) = [line for line in README.splitlines() if line.startswith(f"| {figure}")]
    return found.split(" | ")[1].strip()


def test_the_model_card_agrees_with_the_readme() -> None:
    card = {name: value for name, (value,) in rows(CARD, 2).items()}
    assert set(card) == {"br1_50", "br5_50", "br10_50", "rec_long", "rec_short"}
    assert card == {name: kept("quality")[name] for name in card}
    brs = " / ".join(f"{card[name]:.2f}" for name in ("br1_50", "br5_50", "br10_50"))
    assert value_of("BR@1 / 5 / 10, IoU .5, `val` photos") == brs
    within = value_of("P@.5 within the photo: long; short")
    assert within.split("; ")[:2] == [f"{card['rec_long']:.2f}", f"{card['rec_short']:.2f}"]


def test_the_model_card_has_the_figures_of_the_reranker_benchmark() -> None:
    card, measured = rows(CARD, 4), kept("rerank")
    assert set(card) == {"br1", "br5", "br10", "rec", "rec_short"}
    for name, values in card.items():
        ends = ("_without", "", "_gain", "_gain_low", "_gain_high")
        assert values == [measured[name + end] for end in ends]
    gains = [card[name][2] for name in ("br1", "br5", "br10")] + card["br1"][3:]
    shown = re.findall(r"-?\d+\.\d+", value_of("re-ranker on `val`"))
    assert [float(each) for each in shown] == pytest.approx(gains, abs=0.0501)  # to a tenth


def test_the_model_card_names_the_sources_of_photos_and_texts() -> None:
    sources = ("COCO val2017", "COCO train2017", "BY-NC-ND", "CC BY 4.0", "SugarCrepe")
    assert [each for each in sources if each not in CARD] == []
    assert "vision-language model" in CARD
