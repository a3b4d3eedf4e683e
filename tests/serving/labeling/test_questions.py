"""Which questions are asked first, and what the replies say."""

from __future__ import annotations

from typing import Any

import pytest

from reir.errors import QueryError
from reir.operations.feedback import Feedback
from reir.results import Hit, SearchResult
from reir_serving.labeling.questions import Question, Questions, Reply

BOX = (0.1, 0.2, 0.3, 0.4)


def result(expression: str, *scores: float) -> SearchResult:
    hits = tuple(
        Hit(
            instance_id=f"{expression}{n}#0",
            image_id=f"{expression}{n}",
            uri=f"file:///{expression}{n}.jpg",
            box=BOX,
            score=score,
            objectness=0.9,
            presence=None,
        )
        for n, score in enumerate(scores)
    )
    return SearchResult(
        expression=expression,
        gallery="photos",
        version="v1",
        hits=hits,
        timings_ms={},
        presence=None,
        found=True,
    )


CLEAR, CLOSE, MIDDLE = (
    result("clear", 0.9, 0.4, -0.2),
    result("close", 0.5, 0.49, 0.3, 0.2),
    result("middle", 0.9, 0.7),
)


def asked(questions: Questions) -> list[tuple[str, list[str]]]:
    """Return the open questions as the sentence and the photos that are shown."""
    return [(each.expression, [hit.image_id for hit in each.hits]) for each in questions.next(100)]


def find(questions: Questions, expression: str) -> Question:
    (found,) = [each for each in questions.next(100) if each.expression == expression]
    return found


def said(feedback: list[Feedback]) -> list[tuple[str, str]]:
    return [(each.verdict, each.image_id) for each in feedback]


def test_close_hits_are_asked_about_first_and_together() -> None:
    questions = Questions([CLEAR, CLOSE, MIDDLE, result("single", 0.4), result("nothing")])
    assert asked(questions) == [
        ("close", ["close0", "close1"]),
        ("middle", ["middle0"]),
        ("clear", ["clear0"]),
        ("single", ["single0"]),
    ]
    assert (questions.num_open, questions.num_answered) == (4, 0)
    assert [each.expression for each in questions.next(2)] == ["close", "middle"]


@pytest.mark.parametrize(
    ("expression", "reply", "feedback", "follows"),
    [
        ("clear", "yes", [("right", "clear0")], None),
        ("clear", "no", [("wrong", "clear0")], ["clear1"]),
        ("clear", "skip", [], None),
        ("close", "first", [("right", "close0"), ("wrong", "close1")], None),
        ("close", "second", [("wrong", "close0"), ("right", "close1")], None),
        ("close", "neither", [("wrong", "close0"), ("wrong", "close1")], ["close2", "close3"]),
        ("close", "skip", [], None),
    ],
)
def test_replies(
    expression: str, reply: Reply, feedback: list[Any], follows: list[str] | None
) -> None:
    questions = Questions([CLEAR, CLOSE, MIDDLE])
    question = find(questions, expression)
    recorded = questions.answer(question.number, reply)
    assert said(recorded) == feedback
    for each in recorded:
        assert (each.expression, each.version, each.box) == (expression, "v1", BOX)
        assert (each.uri, each.instance_id) == (
            f"file:///{each.image_id}.jpg",
            f"{each.image_id}#0",
        )
    next_ones = [photos for text, photos in asked(questions) if text == expression]
    assert next_ones == ([] if follows is None else [follows])
    assert questions.num_answered == 1


def test_a_question_can_be_answered_again() -> None:
    """What followed from the first reply is no longer asked."""
    questions = Questions([CLEAR])
    assert said(questions.answer(0, "no")) == [("wrong", "clear0")]
    assert asked(questions) == [("clear", ["clear1"])]
    assert questions.withdrawn == []
    assert said(questions.answer(0, "yes")) == [("right", "clear0")]
    assert asked(questions) == []
    assert questions.withdrawn == [1]
    assert said(questions.answer(0, "no")) == [("wrong", "clear0")]
    assert asked(questions) == [("clear", ["clear1"])]
    assert questions.num_answered == 1


def test_a_settled_sentence_has_no_open_question() -> None:
    """However many questions followed from the reply that no longer holds."""
    questions = Questions([result("long", 0.9, 0.8, 0.7, 0.6)])
    for number in (0, 1):
        questions.answer(number, "no")
    assert asked(questions) == [("long", ["long2"])]
    questions.answer(0, "yes")
    assert asked(questions) == []
    # the page may still show a question that followed
    for number, verdict in ((1, "wrong"), (2, "wrong")):
        assert said(questions.answer(number, "no")) == [(verdict, f"long{number}")]
        assert asked(questions) == []
    questions.answer(0, "no")
    assert asked(questions) == [("long", ["long3"])]
    assert questions.num_answered == 3


@pytest.mark.parametrize("reply", ["yes", "skip"])
def test_the_same_hits_are_asked_about_once(reply: Reply) -> None:
    questions = Questions([CLEAR])
    questions.answer(0, "no")
    for _ in range(2):
        questions.answer(0, "no")
        assert asked(questions) == [("clear", ["clear1"])]
    questions.answer(1, reply)
    questions.answer(0, "no")
    assert asked(questions) == []
    questions.answer(1, "no")
    assert asked(questions) == [("clear", ["clear2"])]
    assert questions.num_answered == 2


def test_questions_end_when_no_hits_are_left() -> None:
    questions = Questions([MIDDLE])
    for number in (0, 1):
        questions.answer(number, "no")
    assert asked(questions) == []


def test_what_is_known_is_not_asked_again() -> None:
    about: dict[str, Any] = {"uri": "x", "box": BOX}
    known = [
        Feedback(expression="The  Clear", verdict="right", **about),
        Feedback(expression="clear", verdict="absent"),
        Feedback(expression="close", verdict="wrong", instance_id="close0#0", **about),
        Feedback(expression="middle", verdict="wrong", instance_id="other#0", **about),
    ]
    questions = Questions([CLEAR, CLOSE, MIDDLE], known)
    assert [text for text, _ in asked(questions)] == ["close", "middle"]
    (first, *_) = find(questions, "close").hits
    assert first.image_id == "close1"


def test_wrong_replies_are_refused() -> None:
    questions = Questions([CLEAR, CLOSE, MIDDLE])
    with pytest.raises(QueryError, match="there is no question 7"):
        questions.answer(7, "yes")
    with pytest.raises(QueryError, match="must be one of yes, no, skip, got 'neither'"):
        questions.answer(find(questions, "clear").number, "neither")
    with pytest.raises(QueryError, match="must be one of first, second, neither, skip, got 'yes'"):
        questions.answer(find(questions, "close").number, "yes")
    assert questions.num_answered == 0
