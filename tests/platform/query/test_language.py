"""Sentences in other languages are detected, and English ones are not mistaken for them."""

from __future__ import annotations

import json

import pytest

from reir.query.language import seems_foreign
from reir_testing import data_dir


@pytest.mark.parametrize(
    "text",
    [
        "der rote Becher links vom Laptop",
        "Mann mit Regenschirm",
        "la tasse rouge à gauche de l'ordinateur",
        "un chien sur le canapé",
        "el coche pequeño detrás del autobús",
        "la donna con il cappello verde",
        "o gato preto perto da janela",
        "de vrouw met de groene hoed",
        "czarny kot obok drzewa",
        "den svarta katten som sover",
        "красная кружка слева от ноутбука",
        "笔记本电脑左边的红色杯子",
        "الكوب الأحمر",
    ],
)
def test_other_languages_are_noticed(text: str) -> None:
    assert seems_foreign(text)
    assert seems_foreign(text.upper())


@pytest.mark.parametrize(
    "text",
    [
        "the red mug left of the laptop",
        "red mug",
        "a die on the table",
        "the naïve façade of the café",
        "man in an under shirt",
        "the guy with the los angeles cap",
        "bus number 42 🚌",
        "42",
        "",
    ],
)
def test_english_is_left_alone(text: str) -> None:
    assert not seems_foreign(text)


def test_expressions_written_by_people_are_english() -> None:
    data = data_dir()
    if data is None:
        pytest.skip("REIR_DATA is not there")
    content = json.loads((data / "photos" / "expressions.json").read_text(encoding="utf-8"))
    texts = {each["expression"] for each in content["expressions"]}
    alarms = [text for text in texts if seems_foreign(text)]
    assert len(texts) > 10_000
    assert len(alarms) <= 1e-3 * len(texts), alarms
