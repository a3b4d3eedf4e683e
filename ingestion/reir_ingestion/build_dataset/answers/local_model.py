"""A local image-text-to-text model of `transformers`, by hub name or directory."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from typing import Any

from PIL import Image

from reir.errors import CheckpointError
from reir_ingestion.build_dataset.answers.failures import ModelUnavailable
from reir_ingestion.build_dataset.answers.question import Answer, Question, checked_answer

MAX_NEW_TOKENS = 2048


class LocalModel:
    """Answers questions on this machine, one at a time; a GPU is used if there is one.

    Args:
        source: hub name, or directory that `save_pretrained` wrote.
        max_tokens: maximum length of an answer.

    Raises:
        CheckpointError: the model does not exist, is incomplete or takes no pictures.
    """

    def __init__(self, source: str, *, max_tokens: int = MAX_NEW_TOKENS) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from reir.models.pretrained import fetch, no_progress_bars

        self._source, self._max_tokens = source, max_tokens
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = fetch(source)
        try:
            with no_progress_bars():
                # Code that comes with a model from the hub is never run.
                self._processor: Any = AutoProcessor.from_pretrained(
                    folder, trust_remote_code=False
                )
                model: Any = AutoModelForImageTextToText.from_pretrained(
                    folder, trust_remote_code=False, use_safetensors=True, dtype="auto"
                )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{source} is not an image-text-to-text model of transformers: {error}"
            ) from error
        self._model = model.to(self._device).eval()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The model, for provenance."""
        return f"transformers:{self._source}"

    @property
    def settings(self) -> Mapping[str, Any]:
        """What an answer depends on, besides the question."""
        return {"max_tokens": self._max_tokens}

    def ask(self, question: Question, key: str) -> Answer:  # noqa: ARG002, part of the interface
        """Answer a question.

        Raises:
            ModelUnavailable: there is not enough memory for it.
        """
        import torch

        content = [
            {"type": "image", "image": Image.open(io.BytesIO(question.picture)).convert("RGB")},
            {"type": "text", "text": f"{question.instructions}\n{question.text}"},
        ]
        try:
            with self._lock, torch.inference_mode():
                inputs = self._processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                ).to(self._device)
                # No sampling: an answer must not depend on a seed, which the cache's key lacks.
                ids = self._model.generate(
                    **inputs, max_new_tokens=self._max_tokens, do_sample=False
                )
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ModelUnavailable("no answer: not enough memory for the model") from error
        # `generate` returns the tokens of the question, followed by those of the answer.
        num_asked = inputs["input_ids"].shape[1]
        text = self._processor.decode(ids[0, num_asked:], skip_special_tokens=True)
        num_answered = ids.shape[1] - num_asked
        return checked_answer(
            text,
            tokens_in=num_asked,
            tokens_out=num_answered,
            cut_off=num_answered >= self._max_tokens,
        )
