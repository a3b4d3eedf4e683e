"""README, docs/benchmarks.md, the model card and `benchmarks/results` agree on the figures."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
CARD = (ROOT / "platform/reir/checkpoints/clare-nano/README.md").read_text(encoding="utf-8")


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tables")


def kept(name: str) -> dict[str, float]:
    """Return the figures of one benchmark, without its name as a prefix of the keys."""
    text = (BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8")
    figures: dict[str, float] = json.loads(text)["figures"]
    return {key.removeprefix(f"{name}."): value for key, value in figures.items()}


def rows(text: str, columns: int) -> dict[str, list[float]]:
    """Return the numbers in the rows of tables with `columns` columns, by the figure's name."""
    row = re.compile(r"^\| (\w+)" + r" \| ([^|]+)" * (columns - 1) + r" \|$", re.MULTILINE)
    return {
        name: [float(each) for each in re.findall(r"[-+]?\d+\.\d+", " ".join(cells))]
        for name, *cells in row.findall(text)
        if name.startswith(("br", "rec", "vectors"))
    }


@pytest.mark.parametrize("page", ["docs/benchmarks.md", "README.md"])
def test_pages_have_the_figures_of_the_results(tables: ModuleType, page: str) -> None:
    rendered = tables.readme() if page == "README.md" else tables.benchmarks_page()
    written = (ROOT / page).read_text(encoding="utf-8")
    assert written == rendered, f"{page} is out of date; run `python benchmarks/tables.py`"


def test_unknown_figures_and_malformed_placeholders_are_refused(tables: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"results/quality\.json has no figure 'quality\.none'"):
        tables.render("{{quality quality.none .1f}}")
    with pytest.raises(ValueError, match=r"write \{\{NAME KEY FORMAT\}\}"):
        tables.render("{{quality}}")


def test_every_result_names_a_script_that_exists() -> None:
    missing = {}
    for path in sorted((BENCHMARKS / "results").glob("*.json")):
        command = json.loads(path.read_text(encoding="utf-8"))["command"]
        if not (ROOT / command.split()[1]).is_file():
            missing[path.name] = command
    assert missing == {}, "correct the commands in these results, or delete the results"


def test_the_model_card_has_the_figures_of_the_quality_benchmark() -> None:
    card = rows(CARD, 2)
    rec = {"vectors_rec_long", "vectors_rec_short", "rec_long", "rec_short"}
    assert set(card) == {"br1_50", "br5_50", "br10_50", *rec}
    measured = kept("quality")
    assert card == {name: [measured[name]] for name in card}


def test_the_model_card_has_the_figures_of_the_reranker_benchmark() -> None:
    card, measured = rows(CARD, 4), kept("rerank")
    assert set(card) == {"br1", "br5", "br10", "rec", "rec_short"}
    for name, values in card.items():
        ends = ("_without", "", "_gain", "_gain_low", "_gain_high")
        assert values == [measured[name + end] for end in ends]


def test_the_model_card_names_the_sources_of_photos_and_texts() -> None:
    sources = ("COCO val2017", "COCO train2017", "BY-NC-ND", "CC BY 4.0", "SugarCrepe")
    assert [each for each in sources if each not in CARD] == []
    assert "vision-language model" in CARD
