"""A question to a vision-language model, its answer, and the interface of such models."""

from __future__ import annotations

import base64
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

    def messages(self) -> list[dict[str, Any]]:
        """Return the question in OpenAI's chat format, with the photo as a data URL."""
        picture = base64.b64encode(self.picture).decode()
        content = [
            {"type": "text", "text": self.text},
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
        ]
        return [
            {"role": "system", "content": self.instructions},
            {"role": "user", "content": content},
        ]


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


def checked_answer(
    text: str, *, tokens_in: int, tokens_out: int, cut_off: bool = False, refused: str = ""
) -> Answer:
    """Return an answer, refused if its text is empty, cut off or too long.

    Args:
        text: untrusted text of any length.
        tokens_in, tokens_out: tokens of the question and of the answer.
        cut_off: whether the model stopped at its limit of tokens.
        refused: another reason to refuse it, which counts first.
    """
    if refused:
        why = refused
    elif not text.strip():
        why = "empty: the answer has no text"
    elif cut_off:
        why = "cut off: the answer is longer than the limit of tokens"
    elif len(text) > MAX_ANSWER_CHARS:
        why = f"too large: the answer has more than {MAX_ANSWER_CHARS} characters"
    else:
        why = ""
    return Answer(text="" if why else text, tokens_in=tokens_in, tokens_out=tokens_out, refused=why)


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
            AnswerPending: the model answers in batches, and this question waits for the next one.
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
    # Sorted, so that the order in which a dictionary was filled does not change the key;
    # otherwise, a rerun might not find its answers.
    return hashlib.sha256(json.dumps([settings, asked], sort_keys=True).encode()).hexdigest()
