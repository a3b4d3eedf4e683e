"""Builds the expressions of one photo: writes, judges, and chooses; and says what became of it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from reir.errors import ImageError
from reir.text import normalize_expression, without_controls
from reir_ingestion.build_dataset.answers.cache import AnswerCache
from reir_ingestion.build_dataset.answers.failures import AnswerRefused, ModelUnavailable
from reir_ingestion.build_dataset.judges.language import language_problem
from reir_ingestion.build_dataset.tasks import (
    GROUNDED,
    IN_GALLERY,
    IN_PHOTO,
    LANGUAGE,
    ExpressionJudge,
    ExpressionWriter,
    Verdict,
    WritingTask,
    Written,
)

NO_INSTANCE = "no instance of the photo is large and clear enough to be described"
ALL_REFUSED = "no expression was left"
DUPLICATE = "another instance of the photo has the same expression"
ENOUGH = "the instance has enough other expressions"
FAILED = {
    LANGUAGE: "bad language",
    GROUNDED: "not grounded",
    IN_PHOTO: "not unique in the photo",
    IN_GALLERY: "not unique in the gallery",
}
"""Check -> the reason if an expression fails it."""


class Status(StrEnum):
    """What became of a photo."""

    WRITTEN = "written"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class JudgedExpression:
    """An expression that was written, and what the judge says about it.

    Attributes:
        number: number of the instance.
        text: the expression, in one line without control characters.
        verdict: of the judge.
        reason: why it is not kept; empty if it is.
    """

    number: int
    text: str
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one photo.

    Attributes:
        task: the photo.
        status: whether at least one expression was kept.
        reason: why none was; empty if one was.
        expressions: everything that was written, kept or not.
        refused: instance numbers, or None, and why the writer wrote nothing about them.
        finished_s: Unix time.
    """

    task: WritingTask
    status: Status
    reason: str = ""
    expressions: tuple[JudgedExpression, ...] = ()
    refused: tuple[tuple[int | None, str], ...] = ()
    finished_s: float = 0.0

    @property
    def kept(self) -> list[JudgedExpression]:
        """The expressions of the dataset."""
        return [each for each in self.expressions if not each.reason]


@dataclass(frozen=True)
class Builder:
    """Builds the expressions of photos, one at a time; many threads may use it.

    Attributes:
        writer: writes them.
        judges: all of them must accept an expression. Its language is checked in any case, since
            it may come from a model.
        per_instance: maximum number of expressions to keep for each instance.
        answers: of the models that the writer and the judges ask.
    """

    writer: ExpressionWriter
    judges: Sequence[ExpressionJudge]
    per_instance: int
    answers: Sequence[AnswerCache] = ()

    def build(self, task: WritingTask) -> Outcome:
        """Return what became of a photo; never raises for a bad photo or answer.

        Raises:
            AnswerPending: a question about the photo waits for the next batch.
        """
        if task.scene.failure:
            return _outcome(task, Status.FAILED, task.scene.failure)
        if not task.numbers:
            return _outcome(task, Status.REFUSED, NO_INSTANCE)
        try:
            writing = self.writer.write(task)
            written = [Written(each.number, clean(each.text)) for each in writing.expressions]
            # The order of the writer stays: of more than `per_instance`, the first ones are kept.
            judged = self._judged(task, list(dict.fromkeys(written)))
        except AnswerRefused as error:
            return _outcome(task, Status.REFUSED, str(error))
        except (ModelUnavailable, ImageError) as error:
            return _outcome(task, Status.FAILED, str(error))
        kept = any(not each.reason for each in judged)
        return Outcome(
            task=task,
            status=Status.WRITTEN if kept else Status.REFUSED,
            reason="" if kept else ALL_REFUSED,
            expressions=tuple(judged),
            refused=writing.refused,
            finished_s=time.time(),
        )

    def _judged(self, task: WritingTask, written: list[Written]) -> list[JudgedExpression]:
        problems: list[dict[str, str]] = [_language(each.text) for each in written]
        for judge in self.judges:
            # Each judge sees only what the earlier ones accept, since its answers may cost money.
            left = [at for at, found in enumerate(problems) if not found]
            verdicts = judge.judge(task, [written[at] for at in left]) if left else []
            for at, verdict in zip(left, verdicts, strict=True):
                problems[at] |= verdict.problems
        # Also of refused expressions: a text that the writer gives to two instances is ambiguous,
        # whichever of the two a judge accepts.
        numbers_of: dict[str, set[int]] = defaultdict(set)
        for each in written:
            numbers_of[normalize_expression(each.text)].add(each.number)
        kept: dict[int, int] = defaultdict(int)
        judged = []
        for each, found in zip(written, problems, strict=True):
            reason = next((f"{FAILED[check]}: {why}" for check, why in found.items()), "")
            if not reason and len(numbers_of[normalize_expression(each.text)]) > 1:
                reason = DUPLICATE
            if not reason and kept[each.number] >= self.per_instance:
                reason = ENOUGH
            kept[each.number] += not reason
            judged.append(
                JudgedExpression(
                    number=each.number,
                    text=each.text,
                    verdict=Verdict(problems=found),
                    reason=reason,
                )
            )
        return judged


def _language(text: str) -> dict[str, str]:
    problem = language_problem(text)
    return {LANGUAGE: problem} if problem else {}


def clean(text: str) -> str:
    """Return text in one line, without control and format characters."""
    return " ".join(without_controls(text).split())


def _outcome(task: WritingTask, status: Status, reason: str) -> Outcome:
    return Outcome(task=task, status=status, reason=reason, finished_s=time.time())
