"""Probes of understanding: which words they replace, and what a model must prefer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from reir.datasets import ReferringDataset
from reir.datasets.wrong_words import KINDS, wrong_sentences
from reir.errors import DataError
from reir.evaluate import evaluate_probes
from reir.evaluate.probes import find_probes
from reir.records import FloatArray
from reir_testing import FakeEncoder
from reir_testing.photo_sets import Scene, draw_photo_set

LEFT, RIGHT = (10, 40, 50, 80), (110, 40, 150, 80)


def with_classes(data: ReferringDataset, *classes: str) -> ReferringDataset:
    """Name the classes of the instances, in order."""
    pairs = zip(data.instances, classes, strict=True)
    return replace(data, instances=tuple(replace(i, category=name) for i, name in pairs))


def altered(tmp_path: Path, text: str, category: str = "dog") -> dict[str, str]:
    scenes: list[Scene] = [[("red", LEFT, text)], [("blue", LEFT, "")]]
    data = with_classes(draw_photo_set(tmp_path, scenes), category, "cat")
    return {probe.name: probe.altered for probe in find_probes(data)}


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("the Red car", "color", "the blue car"),
        ("the leftmost chair", "side", "the rightmost chair"),
        ("a large bowl", "size", "a small bowl"),
        ("the two birds", "number", "the five birds"),
        ("the man in front of the car", "relation", "the man behind the car"),
        ("the woman on top of it", "relation", "the woman under it"),
        ("the boy sitting down", "action", "the boy standing down"),
        ("a dog and its owner", "absent", "a cat and its owner"),
    ],
)
def test_a_probe_replaces_one_word(tmp_path: Path, text: str, name: str, expected: str) -> None:
    assert altered(tmp_path, text)[name] == expected


def test_whole_words_only_and_no_probe_without_its_words(tmp_path: Path) -> None:
    assert altered(tmp_path, "the redwood bench near brightness") == {}
    # Only the first of several colors is replaced, so one word is wrong.
    assert altered(tmp_path, "red shirt, white hat") == {"color": "blue shirt, white hat"}


def test_a_person_goes_by_many_words(tmp_path: Path) -> None:
    assert altered(tmp_path, "the woman with a bag", "person") == {"absent": "the cat with a bag"}


def test_classes_may_have_capital_letters() -> None:
    found = wrong_sentences("the Dog left", "Dog", ["Dog"], ["Dog", "Cat"])
    assert dict(found)["absent"] == "the Cat left"
    assert dict(wrong_sentences("a \u017fmall dog", "", [], [])) == {"size": "a large dog"}


def test_a_model_that_understands_a_word_passes_its_probe(tmp_path: Path) -> None:
    data = draw_photo_set(
        tmp_path,
        [
            [("red", LEFT, "the red one on the left"), ("blue", RIGHT, "the blue one sitting")],
            [("red", LEFT, "the blue one")],  # the annotation is wrong, so the probe fails
        ],
    )
    report = evaluate_probes(FakeEncoder(), data, tmp_path)
    figures = report.to_dict()
    assert figures["accuracy"]["side"] == 100
    assert figures["accuracy"]["color"] == pytest.approx(200 / 3, abs=1e-3)
    # The fake encoder ignores the word, and equal scores do not count as preferred.
    assert figures["accuracy"]["action"] == 0
    assert figures["probes"] == {"color": 3, "side": 1, "action": 1}
    assert set(figures["left_out"]) == {
        f"probe of {name}" for name in KINDS if name not in figures["probes"]
    }
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table())
    assert "color" in capture.get()
    assert "passes 50 %" in capture.get()


def test_instances_that_were_not_kept_are_counted(tmp_path: Path) -> None:
    data = draw_photo_set(
        tmp_path, [[("red", LEFT, "the red one"), ("blue", (60, 0, 160, 120), "the blue one")]]
    )
    counts = evaluate_probes(FakeEncoder(num_candidates=1), data, tmp_path).to_dict()["counts"]
    assert counts["probes"] == counts["instances not kept"] == 1


def test_a_probe_whose_instances_were_not_kept_says_so(tmp_path: Path) -> None:
    scene: Scene = [("red", LEFT, "the one on the left"), ("blue", (60, 0, 160, 120), "the blue")]
    data = draw_photo_set(tmp_path, [scene])
    figures = evaluate_probes(FakeEncoder(num_candidates=1), data, tmp_path).to_dict()
    assert figures["probes"] == {"color": 1}
    assert figures["left_out"]["probe of side"] == "the encoder kept none of its instances"
    absent = "no expression has a word that it replaces"
    assert figures["left_out"]["probe of size"] == absent


class ConstantEncoder(FakeEncoder):
    """Gives every expression the same vector."""

    def encode_expressions(self, expressions: Sequence[str]) -> FloatArray:
        return np.full((len(expressions), self.dim), self.dim**-0.5, dtype=np.float32)


def test_a_model_that_ignores_the_sentence_passes_nothing(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, [[("red", LEFT, "the red one on the left")]])
    accuracy = evaluate_probes(ConstantEncoder(), data, tmp_path).to_dict()["accuracy"]
    assert accuracy == {"color": 0, "side": 0}


def test_nothing_to_probe(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, [[("red", LEFT, "that one")]])
    with pytest.raises(DataError, match="drawn: no expression has a word that a probe replaces"):
        evaluate_probes(FakeEncoder(), data, tmp_path)
