"""Routes of the label page: the next questions, and answers to them."""

from __future__ import annotations

import asyncio
import secrets
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from reir.operations.feedback import Feedback, add_feedback, withdraw_feedback
from reir.operations.feedback.records import submission
from reir_serving.http.problems import ProblemError, ProblemKind
from reir_serving.http.routes.operation import static_router
from reir_serving.http.schemas import ApiRequest, JsonObject, image_urls, json_response
from reir_serving.labeling.questions import Question, Questions, Reply

PREFIX = "/v1/label"
"""Below `/v1/`, where requests from foreign web pages are rejected."""

PAGE = "/label/"
NOBODY = ""
"""The user of the answers: the page needs no key; see `Feedback.user`."""

EARLIER_RUN = ProblemKind("earlier-run", 409, "The command was started again")

LOOKAHEAD = 8
"""Number of questions that the page loads in advance, so that the next one is there at once."""


class AnswerRequest(ApiRequest):
    """`POST /v1/label/answers`.

    Attributes:
        run: the run whose question this is, as `GET /v1/label/questions` names it.
        question: number of the question.
        reply: see `Question.replies`.
        attempt: how often the user has answered this question before; a request that is sent again
            has the same number.
    """

    run: str
    question: int = Field(ge=0)
    reply: Reply
    attempt: int = Field(0, ge=0)


def label_router(questions: Questions, gallery: str, folder: Path) -> APIRouter:
    """Return the routes that ask questions and record answers as feedback.

    Args:
        questions: the questions.
        gallery: gallery that they are about.
        folder: folder of the search log.
    """
    router = APIRouter(include_in_schema=False)
    # Each run numbers its questions from 0. So the answers name the run, because a page of an
    # earlier one may still be open, and so do their idempotency keys.
    run = secrets.token_hex(8)

    @router.get(f"{PREFIX}/questions")
    async def next_questions() -> Response:
        return json_response(_state(run, questions, gallery))

    @router.post(f"{PREFIX}/answers")
    async def answer(body: AnswerRequest) -> Response:
        """Record a reply; it is on disk before the answer. "skip" takes earlier replies back."""
        if body.run != run:
            detail = "this answer is to a question of an earlier run; reload the page"
            raise ProblemError(EARLIER_RUN, detail)
        # On the event loop, so the questions need no lock. If recording fails, the page sends the
        # reply again, which then counts as a second reply to the same question.
        said = questions.answer(body.question, body.reply)
        prefix = f"label {run} {body.question} "
        if said:
            await asyncio.to_thread(_record, folder, gallery, said, f"{prefix}{body.attempt}")
        else:
            await asyncio.to_thread(withdraw_feedback, folder, gallery, NOBODY, prefix)
        return json_response(_state(run, questions, gallery))

    router.include_router(static_router(files("reir_serving") / "labeling" / "page", PAGE, PAGE))
    return router


def _record(folder: Path, gallery: str, said: list[Feedback], key: str) -> None:
    for number, each in enumerate(said):
        content = {"instance_id": each.instance_id, "verdict": each.verdict}
        add_feedback(folder, gallery, each, submission(content, f"{key} {number}"))


def _state(run: str, questions: Questions, gallery: str) -> JsonObject:
    return {
        "run": run,
        "answered": questions.num_answered,
        "open": questions.num_open,
        "withdrawn": questions.withdrawn,
        "questions": [_question_json(each, gallery) for each in questions.next(LOOKAHEAD)],
    }


def _question_json(question: Question, gallery: str) -> JsonObject:
    return {
        "number": question.number,
        "expression": question.expression,
        "replies": question.replies,
        "hits": [
            {"instance_id": hit.instance_id, "box": hit.box, **image_urls(gallery, hit.image_id)}
            for hit in question.hits
        ],
    }
