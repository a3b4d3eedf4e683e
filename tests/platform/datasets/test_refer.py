"""`reir.datasets.refer` and the unpickler that runs nothing."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from reir.datasets import read_refer, read_refer_json
from reir.datasets.plain_pickle import read_plain_pickle
from reir.errors import DataError
from reir_testing import data_dir

DATA = data_dir()
needs_data = pytest.mark.skipif(DATA is None, reason="no REIR_DATA and no ../shared/data")


def ref(number: int, split: str, *sentences: str) -> dict[str, Any]:
    return {
        "ref_id": number,
        "ann_id": 10,
        "image_id": 1,
        "split": split,
        "sentences": [
            {"sent_id": 100 * number + at, "sent": sentence, "raw": sentence.upper()}
            for at, sentence in enumerate(sentences)
        ],
    }


def write_folder(folder: Path, refs: object) -> Path:
    instances = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 64, "height": 48}],
        "annotations": [{"id": 10, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 20]}],
        "categories": [{"id": 3, "name": "cat"}],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    return folder


class Exploit:
    """Unpickling it would create a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_sentences_and_splits(tmp_path: Path) -> None:
    refs = [ref(1, "train", "the cat", "grey cat"), ref(2, "val", "a cat")]
    dataset = read_refer(write_folder(tmp_path, refs), "unc")
    assert [t.text for t in dataset.split("train").expressions] == ["the cat", "grey cat"]
    # The photo is in both splits; its expressions are not.
    assert [t.text for t in dataset.split("val").expressions] == ["a cat"]
    assert dataset.expressions[0].instance_id == "10"


@pytest.mark.parametrize("where", ["list", "dict", "deep"])
def test_pickle_that_would_run_code_is_refused(tmp_path: Path, where: str) -> None:
    mark = tmp_path / "was-run"
    exploit = Exploit(mark)
    content = {"list": [exploit], "dict": {"a": exploit}, "deep": [[{"a": [(1, exploit)]}]]}[where]
    write_folder(tmp_path, content)
    with pytest.raises(DataError, match=r"refs\(unc\)\.p .* refers to \w+\.mkdir") as caught:
        read_refer(tmp_path, "unc")
    assert "run code" in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("stream", "name"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "builtins.eval"),
        (b"c__builtin__\neval\n.", "__builtin__.eval"),
        (b"\x80\x02cbuiltins\ngetattr\n.", "builtins.getattr"),
        (b"(i__main__\nThing\n.", "__main__.Thing"),
        (b"Pabc\n.", "persistent id 'abc'"),
    ],
    ids=["system", "eval-4", "eval-py2", "getattr", "instance", "persistent"],
)
def test_forbidden_global_is_named(tmp_path: Path, stream: bytes, name: str) -> None:
    path = tmp_path / "x.p"
    path.write_bytes(stream)
    with pytest.raises(DataError, match=name):
        read_plain_pickle(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_is_read_at_every_protocol(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.p"
    plain = [{"a": (1, 2.5, None, True)}, {"b"}, frozenset({3}), OrderedDict(c="é"), 10**30]
    path.write_bytes(pickle.dumps(plain, protocol=protocol))
    assert read_plain_pickle(path) == plain


def test_python_2_byte_strings_become_text(tmp_path: Path) -> None:
    path = tmp_path / "x.p"
    path.write_bytes(b"(dp0\nS'sent'\np1\nS'caf\\xe9'\np2\ns.")
    assert read_plain_pickle(path) == {"sent": "café"}


def test_every_truncation_is_a_data_error(tmp_path: Path) -> None:
    whole = pickle.dumps([ref(1, "train", "the cat")], protocol=2)
    path = tmp_path / "x.p"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"x\.p is not a pickle file"):
            read_plain_pickle(path)


def test_missing_pickle_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, [])
    with pytest.raises(DataError, match=r"cannot read .*refs\(umd\)\.p"):
        read_refer(tmp_path, "umd")


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        ({"a": 1}, "refs: expected a list"),
        ([5], r"refs\[0\]: expected an object, got 5"),
        ([ref(1, "", "the cat")], r"refs\[0\]\.split: expected a text"),
        ([ref(1, "train", "the cat", " ")], r"refs\[0\]\.sentences\[1\]\.sent: expected a text"),
        ([ref(1, "train", "a") | {"ann_id": 11}], "expression '100': unknown instance '11'"),
    ],
    ids=["dict", "number", "split", "blank", "instance"],
)
def test_malformed_ref_is_named(tmp_path: Path, refs: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_refer(write_folder(tmp_path, refs), "unc")


def record(**changes: Any) -> dict[str, Any]:
    plain = {
        "img_id": "COCO_train2014_000000000001_4",
        "sents": "the cat",
        "bbox": [1, 2, 10, 20],
        "width": 64,
        "height": 48,
    }
    return plain | changes


def test_json_form(tmp_path: Path) -> None:
    path = tmp_path / "val.json"
    other = record(img_id="COCO_train2014_000000000001_5", sents="the dog", bbox=[3, 4, 5, 6])
    path.write_text(json.dumps([record(), record(sents="grey cat"), other]))
    dataset = read_refer_json(path)
    assert [image.file_name for image in dataset.images] == ["COCO_train2014_000000000001.jpg"]
    assert len(dataset.instances) == 2
    assert [text.text for text in dataset.first_expressions().expressions] == ["the cat", "the dog"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_id": "photo"}, r"\[1\]\.img_id: expected a photo's name, '_' and a number"),
        ({"bbox": [9, 9, 9, 9]}, r"\[1\]\.bbox: expected the box of the earlier entry"),
        ({"sents": ["a", "b"]}, r"\[1\]\.sents: expected a text"),
    ],
    ids=["name", "box", "list"],
)
def test_malformed_json_record_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "val.json"
    path.write_text(json.dumps([record(), record(**changes)]))
    with pytest.raises(DataError, match=message):
        read_refer_json(path)


@needs_data
@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "split_by", "counts"),
    [
        ("refcoco", "unc", {"testA": 12, "testB": 26, "val": 21}),
        ("refcoco+", "unc", {"testA": 11, "testB": 24, "val": 24}),
        ("refcocog", "umd", {"test": 9, "val": 15}),
    ],
)
def test_real_pickles(name: str, split_by: str, counts: dict[str, int]) -> None:
    assert DATA is not None
    dataset = read_refer(DATA / "photos_masks" / "refer_layout" / name, split_by)
    assert {split: len(dataset.split(split).expressions) for split in dataset.splits} == counts
    assert len(dataset.images) == 8


@needs_data
@pytest.mark.data
def test_real_json_files() -> None:
    assert DATA is not None
    counts = {}
    for path in (DATA / "refs_only" / "refcoco").glob("*.json"):
        dataset = read_refer_json(path)
        counts[path.stem] = (
            len(dataset.images),
            len(dataset.instances),
            len(dataset.expressions),
        )
    assert counts == {
        "refcoco+_testA": (750, 1975, 5726),
        "refcoco+_testB": (750, 1798, 4889),
        "refcoco+_val": (1500, 3805, 10758),
        "refcoco_testA": (750, 1975, 5657),
        "refcoco_testB": (750, 1810, 5095),
        "refcoco_val": (1500, 3811, 10834),
        "refcocog_test": (2600, 5023, 9602),
        "refcocog_val": (1300, 2573, 4896),
    }
