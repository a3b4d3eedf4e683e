"""`AnswerCache`: asks a model, and keeps every answer, so that no question is answered twice."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

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

    @property
    def name(self) -> str:
        """The model, for provenance."""
        return self._model.name

    def ask(self, question: Question) -> str:
        """Return the text of the answer, kept or new.

        Raises:
            AnswerRefused: the answer cannot be used.
            ModelUnavailable: there is no answer.
        """
        key = key_of(self._model, question)
        path = self._folder / key[:2] / f"{key}.json"
        answer = self._kept(path)
        if answer is None:
            answer = self._model.ask(question, key)
            self._budget.spend(answer.tokens_in, answer.tokens_out)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(asdict(answer)))
        if answer.refused:
            raise AnswerRefused(answer.refused)
        return answer.text

    def _kept(self, path: Path) -> Answer | None:
        if not path.exists():
            return None
        try:
            answer = Answer(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s is damaged (%s); the question is asked again", path, error)
            return None
        return None if answer.refused and self._ask_again else answer
