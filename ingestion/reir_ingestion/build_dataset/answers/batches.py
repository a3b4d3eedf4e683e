"""`BatchModel`: collects questions, and answers them together."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import Any, Protocol

from reir_ingestion.build_dataset.answers.budget import Budget, BudgetSpent
from reir_ingestion.build_dataset.answers.failures import AnswerPending, ModelUnavailable
from reir_ingestion.build_dataset.answers.question import Answer, Question

NOT_ANSWERED = "no answer: the batch ended without one"


class BatchEngine(Protocol):
    """Keeps questions, and answers all of them in one run."""

    @property
    def name(self) -> str:
        """The model, for provenance."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Plain JSON values that an answer depends on, besides the question."""
        ...

    def add(self, key: str, question: Question) -> None:
        """Keep a question for the next run, if need be on disk: there may be millions."""
        ...

    def run(self) -> Generator[tuple[str, Answer | str]]:
        """Answer the questions that were added since the last run, in any order.

        Closing the generator ends the run.

        Yields:
            The key of a question, and its answer or the reason why there is none.

        Raises:
            WorkersUnavailable: the run failed as a whole.
        """
        ...


class BatchModel:
    """A model that answers in batches: `ask` notes a question, `answers` answers all of them.

    Args:
        engine: answers the questions.
        budget: each question takes one request.
    """

    def __init__(self, engine: BatchEngine, budget: Budget) -> None:
        self._engine, self._budget = engine, budget
        self._lock = threading.Lock()
        self._waiting: set[str] = set()
        self._failed: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The model, for provenance."""
        return self._engine.name

    @property
    def settings(self) -> Mapping[str, Any]:
        """What an answer depends on, besides the question."""
        return self._engine.settings

    @property
    def num_waiting(self) -> int:
        """The number of questions that wait for the next batch."""
        return len(self._waiting)

    def ask(self, question: Question, key: str) -> Answer:
        """Note a question for the next batch.

        Raises:
            AnswerPending: it is noted.
            ModelUnavailable: an earlier batch has not answered it, or the budget is spent.
        """
        with self._lock:
            # A question that always fails would otherwise start one batch after the other.
            if key in self._failed:
                raise ModelUnavailable(self._failed[key])
            if key not in self._waiting:
                # Set aside in memory only: an interrupted batch counts just what came back.
                self._budget.reserve()
                self._engine.add(key, question)
                self._waiting.add(key)
        raise AnswerPending("the question waits for the next batch")

    def answers(self) -> Iterator[tuple[str, Answer]]:
        """Answer the questions that wait.

        A question without an answer fails until the end of this process. Once the cost is reached,
        the batch ends; questions that are in progress at that moment are lost.

        Yields:
            The key of a question, and its answer.

        Raises:
            WorkersUnavailable: the batch failed as a whole.
        """
        # No lock is needed: `build_outcomes` starts a batch only when no thread asks any more.
        why = NOT_ANSWERED
        with closing(self._engine.run()) as found:
            for key, answer in found:
                self._waiting.remove(key)
                self._budget.count(key)
                if isinstance(answer, str):
                    self._failed[key] = answer
                    continue
                # Whoever takes the answer adds its tokens to the budget, so the cost is checked
                # only after this line.
                yield key, answer
                try:
                    self._budget.check_cost()
                except BudgetSpent as spent:
                    why = str(spent)
                    break
        self._failed |= dict.fromkeys(self._waiting, why)
        self._budget.release(len(self._waiting))
        self._waiting.clear()
