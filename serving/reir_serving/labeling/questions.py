"""Which questions a user is asked about the hits of sentences, and what the answers say.

The most useful question comes first: that about the sentence whose first two hits have the smallest
difference in score ("margin sampling": B. Settles, Active Learning Literature Survey, 2009, section
3.1). If the difference is below the median, both hits are shown and the user chooses; otherwise the
user only says whether the first one is right. If no hit that was shown is right, the next question
about the sentence is about the hits that follow. Knows neither HTTP nor a model.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from reir.errors import QueryError
from reir.operations.feedback import Feedback, Verdict
from reir.results import Hit, SearchResult
from reir.text import normalize_expression

Reply = Literal["yes", "no", "first", "second", "neither", "skip"]

VERDICTS: dict[Reply, tuple[Verdict, ...]] = {
    "yes": ("right",),
    "no": ("wrong",),
    "first": ("right", "wrong"),
    "second": ("wrong", "right"),
    "neither": ("wrong", "wrong"),
    "skip": (),
}
"""Reply -> its verdict about each hit of the question, in the order of the hits."""

NUM_HITS = 4
"""Number of hits of a sentence that questions can be about."""

NONE_RIGHT: tuple[Reply, ...] = ("no", "neither")
"""Replies after which the hits that follow are asked about."""
REPLIES_TO_ONE: tuple[Reply, ...] = ("yes", "no", "skip")
REPLIES_TO_TWO: tuple[Reply, ...] = ("first", "second", "neither", "skip")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question: is this hit what the sentence describes, or which of two hits is?

    Attributes:
        number: number of the question.
        expression: the sentence.
        hits: one hit or two.
        version: version of the gallery that has the hits.
        rest: hits that follow, for the next question about the sentence.
        margin: difference between the scores of the first two hits; questions with a small one are
            asked first.
    """

    number: int
    expression: str
    hits: tuple[Hit, ...]
    version: str
    rest: tuple[Hit, ...]
    margin: float

    @property
    def replies(self) -> tuple[Reply, ...]:
        """The replies that are possible."""
        return REPLIES_TO_ONE if len(self.hits) == 1 else REPLIES_TO_TWO

    def feedback(self, reply: Reply) -> list[Feedback]:
        """Return what a reply says about each hit.

        Raises:
            QueryError: the reply is not one of `replies`.
        """
        if reply not in self.replies:
            raise QueryError("reply", f"must be one of {', '.join(self.replies)}, got {reply!r}")
        return [
            Feedback(
                expression=self.expression,
                verdict=verdict,
                uri=hit.uri,
                image_id=hit.image_id,
                instance_id=hit.instance_id,
                box=hit.box,
                version=self.version,
            )
            # Not strict, because "skip" has no verdicts, however many hits the question has.
            for hit, verdict in zip(self.hits, VERDICTS[reply], strict=False)
        ]


@dataclass
class Questions:
    """All questions about some sentences, and which of them are open.

    Attributes:
        num_answered: number of questions with a reply, also with "skip".
    """

    results: Sequence[SearchResult]
    known: Iterable[Feedback] = ()
    _open: dict[int, Question] = field(default_factory=dict, init=False)
    _replies: dict[int, Reply] = field(default_factory=dict, init=False)
    # Number of a question -> all questions about its sentence so far. Each is about the hits that
    # follow those of the one before.
    _series: dict[int, list[Question]] = field(default_factory=dict, init=False)
    _close_margin: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        """Ask about the first hits of each sentence about which nothing is known yet."""
        told = _Told(self.known)
        hits = [told.unknown(result) for result in self.results]
        # Sentences with a single hit are left out, because the infinite margins of many of them
        # would make the median infinite, too.
        margins = [_margin(each) for each in hits if len(each) > 1]
        self._close_margin = statistics.median(margins) if margins else 0.0
        for result, unknown in zip(self.results, hits, strict=True):
            self._ask([], result.expression, result.version, unknown)

    @property
    def num_answered(self) -> int:
        """Number of questions with a reply."""
        return len(self._replies)

    @property
    def num_open(self) -> int:
        """The number of questions that are still to be answered."""
        return len(self._open)

    @property
    def withdrawn(self) -> list[int]:
        """The numbers of the questions that are neither open nor answered any more."""
        return [n for n in self._series if n not in self._open and n not in self._replies]

    def next(self, number: int) -> list[Question]:
        """Return the most useful open questions, best first."""
        return sorted(self._open.values(), key=lambda each: (each.margin, each.number))[:number]

    def answer(self, number: int, reply: Reply) -> list[Feedback]:
        """Take a reply to a question, also a second one; return what it says.

        Questions that followed from a reply that no longer holds are withdrawn. Those that were
        answered meanwhile stay so, and the page may still answer one that it has loaded.

        Raises:
            QueryError: there is no such question, or the reply does not belong to it.
        """
        series = self._series.get(number)
        if series is None:
            raise QueryError("question", f"there is no question {number}; reload the page")
        (question,) = (each for each in series if each.number == number)
        # Before any change, because it raises an error for a reply that does not belong to the
        # question.
        said = question.feedback(reply)
        self._replies[number] = reply
        self._open_next(series)
        return said

    def _open_next(self, series: list[Question]) -> None:
        """Leave only the question open to which the replies about a sentence lead, if any."""
        for question in series:
            self._open.pop(question.number, None)
        for question in series:
            reply = self._replies.get(question.number)
            if reply is None:
                self._open[question.number] = question
            if reply not in NONE_RIGHT:
                return
        last = series[-1]
        self._ask(series, last.expression, last.version, last.rest)

    def _ask(
        self, series: list[Question], expression: str, version: str, hits: tuple[Hit, ...]
    ) -> None:
        """Add the next question about a sentence to its series, if there are hits."""
        if not hits:
            return
        number, margin = len(self._series), _margin(hits)
        # The median of the first questions also decides about those that follow.
        shown = 2 if len(hits) > 1 and margin < self._close_margin else 1
        question = Question(
            number=number,
            expression=expression,
            hits=hits[:shown],
            version=version,
            rest=hits[shown:],
            margin=margin,
        )
        series.append(question)
        self._series[number], self._open[number] = series, question


class _Told:
    """What is known about sentences from earlier feedback."""

    def __init__(self, known: Iterable[Feedback]) -> None:
        self._settled: set[str] = set()
        self._wrong: set[tuple[str, str]] = set()
        for said in known:
            # Normalized, because earlier feedback may have the same sentence in other capitals or
            # spacing.
            text = normalize_expression(said.expression)
            if said.verdict == "wrong":
                self._wrong.add((text, said.instance_id))
            else:
                # "right" and "box" say where the object is, and "absent" that it is nowhere, so
                # there is nothing left to ask.
                self._settled.add(text)

    def unknown(self, result: SearchResult) -> tuple[Hit, ...]:
        """Return the hits that a question can be about; none if the answer is known."""
        text = normalize_expression(result.expression)
        if text in self._settled:
            return ()
        return tuple(hit for hit in result.hits if (text, hit.instance_id) not in self._wrong)


def _margin(hits: Sequence[Hit]) -> float:
    """Return the difference between the first two scores; infinite if there is one hit only."""
    return hits[0].score - hits[1].score if len(hits) > 1 else float("inf")
