"""Feedback: a user says that a hit is right or wrong, or that the object is not in the gallery."""

from __future__ import annotations

import asyncio
from typing import Any, Self

from fastapi import APIRouter
from pydantic import ConfigDict, Field, model_validator
from starlette.responses import Response

from reir.operations.search_log import Event, SearchLog, Verdict, feedback_event
from reir.store.contract import InstanceRow
from reir.text import validate_expression
from reir_serving.http.endpoint_context import Context, EndpointContext
from reir_serving.http.openapi import PROBLEM_RESPONSES
from reir_serving.http.problems import FEEDBACK_DISABLED, ProblemError, instance_not_found
from reir_serving.http.schemas import (
    ApiAnswer,
    ApiRequest,
    Expression,
    GalleryName,
    InstanceId,
    json_response,
)

router = APIRouter(prefix="/v1/feedback", tags=["feedback"])

ABSENT: Verdict = "absent"
WRITE_TIMEOUT_S = 5.0
"""How long a request waits until its verdict is written. It takes longer only while somebody
removes events from a large file of the log; the verdict is then written afterwards."""

_INSTANCE_UNLESS_ABSENT: dict[str, Any] = {
    "oneOf": [
        {
            "properties": {
                "verdict": {"enum": ["right", "wrong"]},
                "instance_id": {"type": "string"},
            },
            "required": ["instance_id"],
        },
        {"properties": {"verdict": {"const": ABSENT}, "instance_id": {"type": "null"}}},
    ]
}
_DISABLED: dict[int | str, dict[str, Any]] = {
    501: {**PROBLEM_RESPONSES["5XX"], "description": "The server records no feedback."}
}


class FeedbackRequest(ApiRequest):
    """`POST /v1/feedback`."""

    model_config = ConfigDict(
        json_schema_extra={
            **_INSTANCE_UNLESS_ABSENT,
            "examples": [
                {
                    "gallery": "photos",
                    "expression": "the red mug left of the laptop",
                    "verdict": "right",
                    "instance_id": "0123456789abcdef0123#4",
                },
                {"gallery": "photos", "expression": "a giraffe", "verdict": "absent"},
            ],
        }
    )

    gallery: GalleryName
    expression: Expression = Field(description="What was searched for.")
    verdict: Verdict = Field(
        description="Whether the instance is the object that the expression describes, or 'absent' "
        "if that object is not in the gallery."
    )
    instance_id: InstanceId | None = Field(
        None, description="The hit that is right or wrong; not allowed with 'absent'."
    )

    @model_validator(mode="after")
    def _instance_unless_absent(self) -> Self:
        if self.verdict == ABSENT and self.instance_id is not None:
            raise ValueError(
                f"instance_id is not allowed with the verdict 'absent', got {self.instance_id!r}; "
                f"leave it out"
            )
        if self.verdict != ABSENT and self.instance_id is None:
            raise ValueError(
                f"instance_id is missing; the verdict {self.verdict!r} needs the hit it is about"
            )
        return self


class FeedbackAnswer(ApiAnswer):
    """The answer to feedback.

    Attributes:
        recorded: False if the server could not write its search log, for example because a disk
            is full.
    """

    recorded: bool


@router.post("", response_model=FeedbackAnswer, responses=_DISABLED)
async def feedback(body: FeedbackRequest, context: Context) -> Response:
    """Record that a hit is right or wrong, or that the object is not in the gallery.

    The newest verdict about a hit counts. Operators make canaries from the verdicts.
    """
    log = context.search_log
    if log is None:
        raise ProblemError(
            FEEDBACK_DISABLED,
            "this server keeps no search log, so it records no feedback; its operator can turn it "
            "on with `reir serve --search-log FOLDER`",
        )
    gallery = context.readable(body.gallery)
    validate_expression(body.expression)
    version = await context.backend.version(gallery)
    event = feedback_event(
        body.verdict,
        body.expression,
        None if body.instance_id is None else await _instance(context, gallery, body.instance_id),
        request_id=context.request_id,
        version=version,
        tenant=context.caller.tenant,
    )
    recorded = await _write(log, gallery, event)
    if recorded:
        context.metrics.note_feedback(body.verdict)
    return json_response({"recorded": recorded})


async def _instance(context: EndpointContext, gallery: str, instance_id: str) -> InstanceRow:
    """Return an instance that the caller may see.

    Raises:
        ProblemError: the gallery has no such instance, or the caller may not see its photo.
    """
    image = await context.image(gallery, instance_id.rpartition("#")[0])
    found = [row for row in image.instances if row.instance_id == instance_id]
    if not found:
        raise instance_not_found(image.record.image_id, instance_id)
    return found[0]


async def _write(log: SearchLog, gallery: str, event: Event) -> bool:
    """Write an event, and return whether it is in the log or will be."""
    written = asyncio.wrap_future(log.write(gallery, event))
    # Unlike `wait_for`, this does not take the event back after the timeout.
    done, _ = await asyncio.wait({written}, timeout=WRITE_TIMEOUT_S)
    return written.result() if done else True
