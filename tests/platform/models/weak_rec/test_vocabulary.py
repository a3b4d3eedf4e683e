"""Words, ids and word vectors of the published model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reir.errors import CheckpointError, DataError
from reir.models.weak_rec.vocabulary import (
    CLS,
    PAD,
    UNK,
    Vocabulary,
    build_vocabulary,
    load_glove,
    split_words,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Man's  hat!", ["the", "mans", "hat"]),
        ("left-most/top", ["left", "most", "top"]),
        ("a.b,c'd!e?f\"g(h)i*j#k:l;m", ["abcdefghijklm"]),
        ("3 & 4 @ $5", ["3", "&", "4", "@", "$5"]),
        ("  \t\n", []),
        ("?!.", []),
        ("- / -", []),
    ],
)
def test_sentences_are_split_as_published(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_ids_follow_the_first_occurrence() -> None:
    vocabulary = build_vocabulary(["the red mug", "Red cup, the PAD"])
    assert vocabulary.words == ("PAD", "UNK", "CLS", "the", "red", "mug", "cup", "pad")
    assert (PAD, UNK, CLS) == (0, 1, 2)
    assert len(vocabulary) == 8


def test_encode_by_hand() -> None:
    vocabulary = build_vocabulary(["the red mug"])
    ids, mask = vocabulary.encode(["Mug the blue", "the red mug, the mug", "?!", ""], 4)
    assert ids.tolist() == [[5, 3, 1, 0], [3, 4, 5, 3], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert mask.tolist() == (ids != 0).tolist()
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


def test_fifteen_words_are_kept() -> None:
    ids, mask = build_vocabulary(["a"]).encode(["a " * 30])
    assert ids.shape == (1, 15)
    assert mask.all()
    none, _ = build_vocabulary([]).encode([])
    assert none.shape == (0, 15)


@given(st.lists(st.text(), max_size=5))
def test_known_sentences_have_no_unknown_words(sentences: list[str]) -> None:
    vocabulary = build_vocabulary(sentences)
    ids, mask = vocabulary.encode(sentences, 50)
    for sentence, row, kept in zip(sentences, ids, mask, strict=True):
        words = split_words(sentence)[:50] or ["UNK"]
        assert [vocabulary.words[i] for i in row[kept].tolist()] == words
    assert Vocabulary(vocabulary.words) == vocabulary


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "must begin with PAD, UNK, CLS, got no words"),
        (("a", "b"), "must begin with PAD, UNK, CLS, got 'a', 'b'"),
        (("PAD", "UNK", "CLS", "a", "b", "a"), "'a' occurs twice"),
    ],
)
def test_other_words_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Vocabulary(words)


# ------------------------------------------------------------------------------------ word vectors


def glove(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "glove.txt"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_vectors_of_the_words(tmp_path: Path) -> None:
    path = glove(
        tmp_path, "the 1 2 3", "unused x", "mug -1 .5 2e-1", "the 7 7 7", "PAD 9 9 9", "UNK 9 9 9"
    )
    vectors = load_glove(path, build_vocabulary(["the red mug"]), 3)
    want = [[0, 0, 0]] * 3 + [[1, 2, 3], [0, 0, 0], [-1, 0.5, 0.2]]
    torch.testing.assert_close(vectors, torch.tensor(want))
    assert vectors.dtype == torch.float32


def test_words_with_spaces_are_not_taken_for_their_first_word(tmp_path: Path) -> None:
    path = glove(tmp_path, "at name 4 4", ". . 5 5", "at\u2028 6 6", "at 1 2")
    assert load_glove(path, build_vocabulary(["at"]), 2)[-1].tolist() == [1, 2]


def test_a_vocabulary_without_words_needs_no_vectors(tmp_path: Path) -> None:
    assert not load_glove(glove(tmp_path), build_vocabulary([]), 2).any()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mug 1 2", "line 2: found 2 numbers, expected are 3"),
        ("mug", "line 2: found 0 numbers, expected are 3"),
        ("mug 1 x 3", "line 2: could not convert string to float: 'x'"),
        ("mug 1 nan 3", "line 2: found 3 numbers, expected are 3 finite"),
        ("mug 1 2 3 4", "none of the 1 words"),
        ("cup 1 2 3", "none of the 1 words of the vocabulary"),
    ],
)
def test_unusable_vectors_are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_glove(glove(tmp_path, "a 1 2 3", line), build_vocabulary(["mug"]), 3)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    vocabulary = build_vocabulary(["mug"])
    with pytest.raises(CheckpointError, match=r"absent.*No such file"):
        load_glove(tmp_path / "absent", vocabulary)
    with pytest.raises(CheckpointError, match="Is a directory"):
        load_glove(tmp_path, vocabulary)
    archive = tmp_path / "glove.zip"
    archive.write_bytes(b"PK\x03\x04\xff\xfe\n" * 9)
    with pytest.raises(CheckpointError, match="not a text file of GloVe"):
        load_glove(archive, vocabulary)
