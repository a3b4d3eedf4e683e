"""`reir.datasets.json_entries`: each accessor names file, place, expectation and value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reir.datasets.json_entries import Entry, read_list, read_object
from reir.errors import DataError


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (lambda e: e.text("k"), "  ", "a text that is not blank, got '  '"),
        (lambda e: e.text("k"), 3, "a text that is not blank, got 3"),
        (lambda e: e.texts("k"), "one", "a list of texts, got 'one'"),
        (lambda e: e.texts("k"), ["a", ""], r"a list of texts that are not blank, got \['a', ''\]"),
        (lambda e: e.identifier("k"), True, "an id .*, got True"),
        (lambda e: e.identifier("k"), 1.5, "an id .*, got 1.5"),
        (lambda e: e.identifiers("k"), 7, "a list of ids, got 7"),
        (lambda e: e.identifiers("k"), [1, None], r"f\.json: images\[3\]\.k\.1: expected an id"),
        (lambda e: e.pixels("k"), 0, "whole number of pixels, at least 1, got 0"),
        (lambda e: e.pixels("k"), 3.5, "whole number of pixels, at least 1, got 3.5"),
        (lambda e: e.flag("k"), 2, "0, 1, false or true, got 2"),
        (lambda e: e.box("k"), [1, 2, 3], r"four finite numbers .*, got \[1, 2, 3\]"),
        (lambda e: e.box("k"), [1, 2, 3, float("nan")], "four finite numbers"),
        (lambda e: e.box("k"), [1, 2, 3, True], "four finite numbers"),
        (lambda e: e.box("k"), [1, 2, -3, 4], "a width and height of at least 0"),
        (lambda e: e.object("k"), [1], r"expected an object, got \[1\]"),
        (lambda e: e.entries("k"), {"a": 1}, "expected a list, got {'a': 1}"),
        (lambda e: e.entries("k"), [{}, 5], r"images\[3\]\.k\[1\]: expected an object, got 5"),
    ],
)
def test_malformed_value_is_named(
    read: Callable[[Entry], object], value: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(Entry("f.json", "images[3]", {"k": value}))
    assert str(caught.value).startswith("f.json: images[3].k")


def test_missing_key_is_named_and_long_values_are_cut() -> None:
    with pytest.raises(DataError, match=r"images\[3\]\.k: expected .*, got nothing"):
        Entry("f.json", "images[3]", {}).text("k")
    with pytest.raises(DataError) as caught:
        Entry("f.json", "images[3]", {"k": list(range(1000))}).box("k")
    assert len(str(caught.value)) < 250


def test_well_formed_values_come_as_they_are() -> None:
    entry = Entry("f", "", {"id": 7, "name": "x", "bbox": [1, 2, 3, 4.5], "w": 3, "crowd": 1})
    assert entry.identifier("id") == "7"
    assert entry.identifier("name") == "x"
    assert entry.box("bbox") == (1.0, 2.0, 4.0, 6.5)
    assert entry.pixels("w") == 3
    assert entry.flag("crowd")
    assert not entry.flag("absent")
    assert entry.texts("absent") == []
    assert not entry.has("absent")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not a JSON file"),
        (b"\xff\xfe\x00", "is not a JSON file"),
        (b"[" * 100_000, "is not a JSON file"),
        (b"[1]", "top level: expected an object"),
    ],
    ids=["cut", "binary", "deep", "list"],
)
def test_file_that_is_no_json_object(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_object(path)
    assert str(path) in str(caught.value)


def test_file_that_is_missing_or_no_list(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*absent\.json: No such file"):
        read_object(tmp_path / "absent.json")
    path = tmp_path / "f.json"
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(DataError, match="top level: expected a list"):
        read_list(path)
