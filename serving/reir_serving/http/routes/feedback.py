"""Feedback: a hit is right or wrong, the object is somewhere else, or it is not in the gallery."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Annotated, Any, Self

from fastapi import APIRouter, Header
from pydantic import ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from reir.errors import DataError
from reir.operations.feedback import (
    Feedback,
    KeyReused,
    Submission,
    Verdict,
    add_feedback,
    is_recorded,
)
from reir.operations.feedback.records import check_drawn_box, new_key, submission, user_of
from reir.store.contract import InstanceRow
from reir.text import validate_expression
from reir_serving.http.endpoint_context import Context, EndpointContext
from reir_serving.http.openapi import PROBLEM_RESPONSES
from reir_serving.http.problems import (
    FEEDBACK_DISABLED,
    KEY_REUSED,
    TOO_MANY,
    ProblemError,
    instance_not_found,
)
from reir_serving.http.routes.search_schemas import Side
from reir_serving.http.schemas import (
    ApiAnswer,
    ApiRequest,
    Box,
    Expression,
    GalleryName,
    ImageId,
    InstanceId,
    json_response,
)

router = APIRouter(prefix="/v1/feedback", tags=["feedback"])
logger = logging.getLogger(__name__)

NEEDED: dict[Verdict, tuple[str, ...]] = {
    "right": ("instance_id",),
    "wrong": ("instance_id",),
    "absent": (),
    "box": ("image_id", "box"),
}
"""Fields that a verdict needs; the others are not allowed with it."""

_ABOUT = {"instance_id": "string", "image_id": "string", "box": "array"}
# What `FeedbackRequest._fields_of_the_verdict` checks, once more as a JSON schema: otherwise the
# OpenAPI document would allow requests that the server rejects.
_FIELDS_OF_VERDICT: dict[str, Any] = {
    "oneOf": [
        {
            "properties": {"verdict": {"const": verdict}}
            | {name: {"type": kind if name in needed else "null"} for name, kind in _ABOUT.items()},
            "required": [*needed],
        }
        for verdict, needed in NEEDED.items()
    ]
}
_MORE_RESPONSES: dict[int | str, dict[str, Any]] = {
    429: {**PROBLEM_RESPONSES["4XX"], "description": "Too much feedback; wait for `Retry-After`."},
    501: {**PROBLEM_RESPONSES["5XX"], "description": "The server records no feedback."},
}
IdempotencyKey = Annotated[
    str,
    Header(
        min_length=1,
        max_length=257,  # with quotes
        pattern=r"^[ -~]+$",
        description="Send a new random key with each feedback, and the same key if you send it "
        "again because the answer did not arrive: it is then recorded once.",
    ),
]


class FeedbackRequest(ApiRequest):
    """`POST /v1/feedback`."""

    model_config = ConfigDict(
        json_schema_extra={
            **_FIELDS_OF_VERDICT,
            "examples": [
                {
                    "gallery": "photos",
                    "expression": "the red mug left of the laptop",
                    "verdict": "right",
                    "instance_id": "0123456789abcdef0123#4",
                },
                {
                    "gallery": "photos",
                    "expression": "the red mug left of the laptop",
                    "verdict": "box",
                    "image_id": "0123456789abcdef0123",
                    "box": [0.2, 0.3, 0.4, 0.6],
                },
                {"gallery": "photos", "expression": "a giraffe", "verdict": "absent"},
            ],
        }
    )

    gallery: GalleryName
    expression: Expression = Field(description="What was searched for.")
    verdict: Verdict = Field(
        description="Whether the instance is the object that the expression describes; 'box' if "
        "that object is in the given box instead; 'absent' if it is not in the gallery."
    )
    instance_id: InstanceId | None = Field(
        None, description="The hit that is right or wrong; not allowed with other verdicts."
    )
    image_id: ImageId | None = Field(
        None, description="The photo of the box; only allowed with the verdict 'box'."
    )
    box: list[Side] | None = Field(
        None,
        min_length=4,
        max_length=4,
        description="Where the object is, xyxy in [0, 1]; only allowed with the verdict 'box'.",
    )

    @model_validator(mode="after")
    def _fields_of_the_verdict(self) -> Self:
        needed = NEEDED[self.verdict]
        for name in _ABOUT:
            value = getattr(self, name)
            if value is None and name in needed:
                about = "the hit" if name == "instance_id" else "the photo and the box"
                raise ValueError(
                    f"{name} is missing; the verdict {self.verdict!r} needs {about} it is about"
                )
            if value is not None and name not in needed:
                raise ValueError(
                    f"{name} is not allowed with the verdict {self.verdict!r}, got {value!r}; "
                    f"leave it out"
                )
        return self


class FeedbackAnswer(ApiAnswer):
    """The answer to feedback.

    Attributes:
        recorded: True once it is on disk. False if the server cannot write it at the moment, for
            example because a disk is full; send it again later, with the same key.
    """

    recorded: bool


@router.post("", response_model=FeedbackAnswer, responses=_MORE_RESPONSES)
async def feedback(
    body: FeedbackRequest,
    request: Request,
    context: Context,
    idempotency_key: IdempotencyKey = "",
) -> Response:
    """Record what a user says about the answer to a search.

    The newest verdict of a user about a hit counts. Operators make canaries and training data from
    the verdicts.
    """
    folder = _folder(context)
    gallery = context.readable(body.gallery)
    _limit_rate(context, request)
    validate_expression(body.expression)
    sent = submission(body.model_dump(), idempotency_key or new_key())
    user = user_of(context.caller.key_id)
    try:
        # First of all, because a repeated request gets the same answer even if its photo has been
        # deleted meanwhile.
        recorded = await asyncio.to_thread(is_recorded, folder, gallery, user, sent)
        if not recorded:
            said = await _feedback(context, gallery, body, user)
            await _add(context, folder, gallery, said, sent)
    except KeyReused as error:
        raise _key_reused(error) from error
    except (DataError, OSError) as error:
        context.metrics.note_dropped_event()
        logger.warning("feedback was not recorded: %s", error)
        return json_response({"recorded": False})
    return json_response({"recorded": True})


def _folder(context: EndpointContext) -> Path:
    if context.config.search_log is None:
        raise ProblemError(
            FEEDBACK_DISABLED,
            "this server keeps no search log, so it records no feedback; its operator can turn it "
            "on with `reir serve --search-log FOLDER`",
        )
    return context.config.search_log


def _limit_rate(context: EndpointContext, request: Request) -> None:
    """Apply the limit of the key, or on a server without keys, of the address.

    Raises:
        ProblemError: there was too much feedback.
    """
    address = request.client.host if request.client else ""
    sender = context.caller.key_id or address
    # None, because the rate that a keys file gives a key is meant for all requests, and feedback
    # has a limit of its own.
    wait_s = context.feedback_rate.take(sender, None, time.monotonic())
    if wait_s:
        detail = f"there is too much feedback from one sender; try again in {wait_s:.1f} s"
        raise ProblemError(TOO_MANY, detail, retry_after_s=wait_s)


async def _feedback(
    context: EndpointContext, gallery: str, body: FeedbackRequest, user: str
) -> Feedback:
    """Return what the user says.

    Raises:
        ProblemError: the gallery has no such photo or instance, or the caller may not see it.
        QueryError: the box is too small.
    """
    about: dict[str, Any] = {}
    if body.instance_id is not None:
        row = await _instance(context, gallery, body.instance_id)
        about = {
            "instance_id": row.instance_id,
            "image_id": row.image_id,
            "uri": row.uri,
            "box": row.box,
        }
    elif body.image_id is not None and body.box is not None:
        x1, y1, x2, y2 = body.box
        box: Box = check_drawn_box((x1, y1, x2, y2))
        record = (await context.image(gallery, body.image_id)).record
        about = {"image_id": record.image_id, "uri": record.uri, "box": box}
    return Feedback(
        expression=body.expression,
        verdict=body.verdict,
        version=await context.backend.version(gallery),
        tenant=context.caller.tenant,
        user=user,
        request_id=context.request_id,
        **about,
    )


async def _instance(context: EndpointContext, gallery: str, instance_id: str) -> InstanceRow:
    """Return an instance that the caller may see.

    Raises:
        ProblemError: the gallery has no such instance, or the caller may not see its photo.
    """
    # By way of its photo, because `context.image` also refuses photos of other tenants.
    image = await context.image(gallery, instance_id.rpartition("#")[0])
    found = [row for row in image.instances if row.instance_id == instance_id]
    if not found:
        raise instance_not_found(image.record.image_id, instance_id)
    return found[0]


async def _add(
    context: EndpointContext, folder: Path, gallery: str, said: Feedback, sent: Submission
) -> None:
    # In a thread, because it waits for the disk and for other processes.
    # It is not new if the same request, sent twice at once, was recorded after `is_recorded` ran;
    # then it is not counted again.
    if await asyncio.to_thread(add_feedback, folder, gallery, said, sent):
        context.metrics.note_feedback(said.verdict)


def _key_reused(error: KeyReused) -> ProblemError:
    wrong = {"field": error.field, "detail": error.detail, "kind": KEY_REUSED.name}
    return ProblemError(KEY_REUSED, str(error), errors=[wrong])
