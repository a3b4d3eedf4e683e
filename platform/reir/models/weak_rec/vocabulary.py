"""The vocabulary of the published model: sentences -> word ids, and word vectors from GloVe.

Sources: the data loader that RefCLIP shares with SimREC (Luo et al. 2022); Pennington et al. 2014,
"GloVe".
"""

# Shapes: N texts, L words, V words of the vocabulary, E width of their vectors

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from reir.errors import CheckpointError, DataError

PAD, UNK, CLS = 0, 1, 2
SPECIAL_WORDS = ("PAD", "UNK", "CLS")
"""Padding, unknown words, and a word that the published model reserves and never uses."""
MAX_TOKENS = 15
"""Words that are kept of a sentence; the authors use `MAX_TOKENS_REFERIT` for ReferIt."""
MAX_TOKENS_REFERIT = 20
VECTOR_WIDTH = 300
_REMOVED = re.compile(r"[.,'!?\"()*#:;]")
_SEPARATORS = re.compile(r"[-/]")


def split_words(text: str) -> list[str]:
    """Split a sentence as published: lower case, without punctuation, "-" and "/" as spaces."""
    return _SEPARATORS.sub(" ", _REMOVED.sub("", text.lower())).split()


@dataclass(frozen=True)
class Vocabulary:
    """The words that have an id, which is their position.

    Attributes:
        words: the special words, then all others.

    Raises:
        DataError: the special words are not first, or a word occurs twice.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the words."""
        if self.words[: len(SPECIAL_WORDS)] != SPECIAL_WORDS:
            raise DataError(
                f"a vocabulary must begin with {', '.join(SPECIAL_WORDS)}, got "
                f"{', '.join(map(repr, self.words[:3])) or 'no words'}; make it with "
                f"`build_vocabulary`"
            )
        if len(self._ids) != len(self.words):
            twice = next(w for i, w in enumerate(self.words) if self._ids[w] != i)
            raise DataError(
                f"the words of a vocabulary must differ, but {twice!r} occurs twice; make it with "
                f"`build_vocabulary`"
            )

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def encode(self, texts: Sequence[str], max_tokens: int = MAX_TOKENS) -> tuple[Tensor, Tensor]:
        """Return the ids (N, L) int64 and the mask (N, L) bool of N texts, L = `max_tokens`.

        Words that are not in the vocabulary become `UNK`, and further words are cut off. The mask
        is False on padding. A text without any word is one unknown word, so that there is something
        to attend to; the released code attends to the padding instead.
        """
        ids = torch.full((len(texts), max_tokens), PAD)
        for row, text in zip(ids, texts, strict=True):
            found = [self._ids.get(word, UNK) for word in split_words(text)] or [UNK]
            row[: len(found)] = torch.tensor(found[:max_tokens])
        return ids, ids != PAD


def build_vocabulary(sentences: Iterable[str]) -> Vocabulary:
    """Return the vocabulary of all words in sentences, in the order in which they first occur.

    The authors take the sentences of all splits; vectors of words that occur only in `val` or
    `test` are of use, as they are not trained.
    """
    words = dict.fromkeys(word for sentence in sentences for word in split_words(sentence))
    return Vocabulary((*SPECIAL_WORDS, *words))


def load_glove(path: Path, vocabulary: Vocabulary, width: int = VECTOR_WIDTH) -> Tensor:
    """Read the vectors of a vocabulary's words from a text file of GloVe.

    Each line has a word and `width` numbers, separated by spaces. The special words, and words that
    the file lacks, get zeros, which is also what the vectors that the authors used have for unknown
    words. If a word occurs twice, its first vector counts.

    Returns:
        (V, E) float32.

    Raises:
        CheckpointError: the file is missing, is not such a text, or has none of the words.
    """
    vectors = torch.zeros(len(vocabulary), width)
    wanted = {word: i for i, word in enumerate(vocabulary.words) if i >= len(SPECIAL_WORDS)}
    num_words = len(wanted)
    try:
        # "\n" alone ends a line: some words of GloVe contain other characters that Python takes for
        # the end of one.
        with Path(path).open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                word, _, rest = line.rstrip("\n").partition(" ")
                # Some words of GloVe contain spaces, so that their lines begin with other words.
                if word in wanted and rest.count(" ") < width:
                    vectors[wanted.pop(word)] = _vector(rest, width, f"{path}, line {number}")
    except OSError as error:
        raise CheckpointError(
            f"cannot read word vectors from {path}: {error.strerror}; give a text file of GloVe, "
            f"such as glove.6B.{width}d.txt"
        ) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not a text file of GloVe: {error}; unpack it if it is an archive"
        ) from error
    if num_words and len(wanted) == num_words:
        raise CheckpointError(
            f"{path} has none of the {num_words} words of the vocabulary with {width} numbers; "
            f"give a text file of GloVe with vectors of that width"
        )
    return vectors


def _vector(text: str, width: int, place: str) -> Tensor:
    try:
        numbers = [float(value) for value in text.split()]
    except ValueError as error:
        raise CheckpointError(f"{place}: {error}; expected a word and {width} numbers") from error
    if len(numbers) != width or not all(map(math.isfinite, numbers)):
        raise CheckpointError(
            f"{place}: found {len(numbers)} numbers, expected are {width} finite ones; give a text "
            f"file of GloVe with vectors of that width"
        )
    return torch.tensor(numbers)
