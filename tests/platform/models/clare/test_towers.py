"""Loading the tokenizer of the public SigLIP towers that CLARE starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from reir.checkpoint import read_tokenizer
from reir.errors import CheckpointError
from reir.models.clare.encoder import clean_expression
from reir.models.clare.towers import load_tokenizer
from reir_testing.pretrained import save_siglip_towers, save_tiny_siglip
from reir_testing.tiny_clare import tiny_clare_config

SAID = (
    "the red mug left of the laptop",
    "a man with a dog and a cat",
    "the big truck that is parked behind the house",
    "two children running on the grass next to a fence",
)
ODD = (
    "",
    " ",
    "  The   RED mug ",
    "blue_shirt (left) & hat",
    "don't, stop: 100%!",
    "caf\u00e9 \u2014 \u00c5ngstr\u00f6m 1/2 \ufb01re \u221e",
    "\u65e5\u672c\u8a9e \u306e dog",
    "tab\there\nand there",
    "\u2581 marked",
    "truck " * 80,
)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_siglip_towers(
        tmp_path_factory.mktemp("towers"), tiny_clare_config(vocabulary=40), SAID * 20
    )


def test_the_converted_tokenizer_gives_the_same_tokens(towers: Path, tmp_path: Path) -> None:
    assert not (towers / "tokenizer.json").exists()
    public = AutoTokenizer.from_pretrained(towers)
    load_tokenizer(str(towers)).save(str(tmp_path / "tokenizer.json"))
    converted = read_tokenizer(tmp_path / "tokenizer.json")
    assert converted.get_vocab_size() == 40
    for text in (*SAID, *ODD):
        for each in (text, clean_expression(text)):
            want = public(each)["input_ids"]
            assert converted.encode(each).ids == want, each
    assert len(converted.encode(ODD[-1]).ids) > 64  # only `tokenize` truncates, keeping the end


def test_a_fast_tokenizer_is_used_unchanged(tmp_path: Path) -> None:
    folder = save_tiny_siglip(tmp_path)
    public = AutoTokenizer.from_pretrained(folder)
    assert load_tokenizer(str(folder)).encode("a red cup").ids == public("a red cup")["input_ids"]


def test_towers_without_a_tokenizer_are_refused(towers: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((towers / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="has no usable tokenizer"):
        load_tokenizer(str(tmp_path))
