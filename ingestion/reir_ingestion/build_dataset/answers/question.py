"""A question to a vision-language model, its answer, and the interface of such models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

MAX_ANSWER_CHARS = 100_000
"""Length limit of an answer; a longer one is refused."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about one picture.

    Attributes:
        instructions: what the model shall do; the same for all photos.
        text: what is known about the photo, as JSON.
        picture: the photo with numbered boxes, as JPEG.
        schema: JSON schema that the answer must follow.
    """

    instructions: str
    text: str
    picture: bytes
    schema: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of a model.

    Attributes:
        text: untrusted text, at most `MAX_ANSWER_CHARS` long.
        tokens_in, tokens_out: tokens of the question and of the answer.
        refused: why the answer cannot be used; empty if it can.
    """

    text: str
    tokens_in: int
    tokens_out: int
    refused: str = ""


class VisionLanguageModel(Protocol):
    """A model that answers questions about pictures; many threads may ask it."""

    @property
    def name(self) -> str:
        """The model, for provenance."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Plain JSON values that an answer depends on, besides the question."""
        ...

    def ask(self, question: Question, key: str) -> Answer:
        """Answer a question.

        Args:
            question: the question.
            key: identifies the question; the same for each repetition.

        Raises:
            ModelUnavailable: there is no answer.
        """
        ...


def key_of(model: VisionLanguageModel, question: Question) -> str:
    """Return a hash of everything that the answer depends on."""
    settings = {"model": model.name, "settings": dict(model.settings)}
    asked = {
        "instructions": question.instructions,
        "text": question.text,
        "picture": hashlib.sha256(question.picture).hexdigest(),
        "schema": dict(question.schema),
    }
    return hashlib.sha256(json.dumps([settings, asked], sort_keys=True).encode()).hexdigest()
