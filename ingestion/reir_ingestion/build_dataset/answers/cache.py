"""`AnswerCache`: asks a model, and keeps every answer, so that no question is answered twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from reir_ingestion.build_dataset.answers.batches import BatchModel
from reir_ingestion.build_dataset.answers.budget import Budget
from reir_ingestion.build_dataset.answers.failures import AnswerRefused
from reir_ingestion.build_dataset.answers.question import (
    Answer,
    Question,
    VisionLanguageModel,
    key_of,
)
from reir_ingestion.build_dataset.files import write_text

ANSWERS = "answers"

logger = logging.getLogger(__name__)


class AnswerCache:
    """Asks a model each question once; an answer is on disk before it is used.

    Args:
        model: the model.
        budget: counts the tokens of new answers.
        work: the work folder.
        ask_again: ask again if the kept answer could not be used.
    """

    def __init__(
        self, model: VisionLanguageModel, budget: Budget, work: Path, *, ask_again: bool = False
    ) -> None:
        self._model, self._budget = model, budget
        self._folder, self._ask_again = work / ANSWERS, ask_again
        self._refused_now: set[str] = set()

    @property
    def name(self) -> str:
        """The model, for provenance."""
        return self._model.name

    def ask(self, question: Question) -> str:
        """Return the text of the answer, kept or new.

        Raises:
            AnswerRefused: the answer cannot be used.
            ModelUnavailable: there is no answer.
            AnswerPending: the question waits for `answer_waiting`.
        """
        key = key_of(self._model, question)
        answer = self._kept(key)
        if answer is None:
            answer = self._model.ask(question, key)
            self._keep(key, answer)
        if answer.refused:
            raise AnswerRefused(answer.refused)
        return answer.text

    @property
    def num_waiting(self) -> int:
        """The number of questions that wait for the next batch."""
        return self._model.num_waiting if isinstance(self._model, BatchModel) else 0

    def answer_waiting(self) -> Iterator[None]:
        """Answer the questions that wait, and keep each answer as soon as it arrives.

        Yields:
            None after each answer, for progress.

        Raises:
            WorkersUnavailable: the batch failed as a whole; the answers until then are kept.
        """
        if isinstance(self._model, BatchModel):
            for key, answer in self._model.answers():
                self._keep(key, answer)
                yield

    def _path(self, key: str) -> Path:
        # The answers, of which there may be millions, are spread over 256 folders.
        return self._folder / key[:2] / f"{key}.json"

    def _keep(self, key: str, answer: Answer) -> None:
        # Before the answer is written: if the process is killed in between, the question is asked
        # and paid again, and both times count. In the other order, the tokens would be missing.
        self._budget.spend(answer.tokens_in, answer.tokens_out)
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(answer)))
        if answer.refused:
            self._refused_now.add(key)

    def _kept(self, key: str) -> Answer | None:
        path = self._path(key)
        if not path.exists():
            return None
        try:
            answer = Answer(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s is damaged (%s); the question is asked again", path, error)
            return None
        # An answer of this run is not asked for again, or a batch would follow each batch.
        ask_again = self._ask_again and key not in self._refused_now
        return None if answer.refused and ask_again else answer
