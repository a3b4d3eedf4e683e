"""Pictures of photos, and localization in an uploaded photo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Form, Query
from starlette.requests import Request
from starlette.responses import Response

from reir.errors import ImageError, ImageUnreachable, QueryError
from reir.images.decode import DEFAULT_MAX_PIXELS
from reir.results import Likelihood
from reir.store.contract import InstanceRow
from reir_serving.backend.photos import GalleryImage
from reir_serving.http.endpoint_context import Context, EndpointContext
from reir_serving.http.pictures import Picture, View, etag, render
from reir_serving.http.problems import (
    IMAGE_NOT_FOUND,
    RETRY_STORE_S,
    UNREACHABLE,
    ProblemError,
    image_not_found,
    instance_not_found,
)
from reir_serving.http.routes.galleries import ImageIdPath, PhotoFile
from reir_serving.http.routes.search_schemas import Side
from reir_serving.http.schemas import (
    ApiAnswer,
    Box,
    Expression,
    GalleryName,
    InstanceId,
    MaskOut,
    json_response,
    mask_json,
    timings_json,
)

router = APIRouter(prefix="/v1", tags=["images"])

MIN_WIDTH_PX, MAX_WIDTH_PX = 16, 4096
MAX_DRAWN = 100
MAX_BOXES = 100
_PICTURES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture.",
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("image/jpeg", "image/png", "image/webp", "image/gif")
        },
    },
    304: {"description": "The picture that the client has is up to date."},
}


class LocalizedBoxOut(ApiAnswer):
    """One box that the expression describes; `likelihood` is its `presence` in words."""

    box: Box
    score: float
    presence: float | None
    likelihood: Likelihood | None
    mask: MaskOut | None = None


class LocalizeAnswer(ApiAnswer):
    """`POST /v1/localize` (multipart: `image`, `expression`, optional `k` and `masks`)."""

    expression: str
    width_px: int
    height_px: int
    present: bool
    presence: float | None
    likelihood: Likelihood | None
    boxes: list[LocalizedBoxOut]
    timings_ms: dict[str, float]
    request_id: str


@router.get("/images/{image_id}", response_class=Response, responses=_PICTURES)
async def picture(  # noqa: PLR0913, every argument is a part of the URL
    request: Request,
    image_id: ImageIdPath,
    context: Context,
    gallery: Annotated[GalleryName, Query(examples=["photos"])],
    width: Annotated[
        int | None, Query(ge=MIN_WIDTH_PX, le=MAX_WIDTH_PX, description="Maximum width in pixels.")
    ] = None,
    boxes: Annotated[bool, Query(description="Draw all instances.")] = False,
    instance: Annotated[
        list[InstanceId] | None,
        Query(max_length=MAX_DRAWN, description="Ids of instances to draw."),
    ] = None,
    frame: Annotated[
        list[Side] | None,
        Query(
            min_length=4,
            max_length=4,
            description="Show only this part of the photo: left, top, right and bottom in [0, 1], "
            "each as a parameter `frame`. Not together with `boxes` or `instance`.",
        ),
    ] = None,
) -> Response:
    """Return the photo or a part of it, on request scaled down to `width` or with boxes drawn."""
    image = await context.image(gallery, image_id)
    part = None if frame is None else _frame(frame)
    if part and (boxes or instance):
        raise QueryError("frame", "cannot be combined with `boxes` or `instance`; leave one out")
    view = replace(_view(image, width, boxes, instance or ()), frame=part)
    tag = etag(image.record, view)
    headers = {
        "ETag": tag,
        # "private" and "Vary", because a shared cache must not give the photo to another key.
        "Cache-Control": "private, max-age=300",
        "Vary": "Authorization, X-API-Key",
    }
    if tag in request.headers.get("if-none-match", ""):  # may be a list of tags
        return Response(status_code=304, headers=headers)
    made = context.pictures.get(tag) or await _render(context, gallery, image, view, tag)
    return Response(made.data, 200, headers, made.media_type)


@router.post("/localize", response_model=LocalizeAnswer)
async def localize(
    context: Context,
    image: PhotoFile,
    expression: Annotated[Expression, Form(examples=["the red mug left of the laptop"])],
    k: Annotated[int, Form(ge=1, le=MAX_BOXES, description="Maximum number of boxes.")] = 5,
    masks: Annotated[
        bool, Form(description="Also return masks, if the checkpoint has them.")
    ] = False,
) -> Response:
    """Find the instances in one photo that an expression describes; the photo is not stored."""
    found = await context.backend.localize(await image.read(), expression, k, masks=masks)
    context.metrics.note_timings(found.timings_ms)
    answer = found.to_dict()
    boxes = [
        {**box, "mask": mask_json(each.mask)}
        for box, each in zip(answer["boxes"], found.boxes, strict=True)
    ]
    answer |= {"boxes": boxes, "timings_ms": timings_json(found.timings_ms)}
    return json_response({**answer, "request_id": context.request_id})


def _frame(sides: Sequence[float]) -> Box:
    """Return a part of a photo.

    Raises:
        QueryError: it has no area.
    """
    left, top, right, bottom = sides
    if left >= right or top >= bottom:
        raise QueryError(
            "frame",
            f"must be left, top, right and bottom with left < right and top < bottom, got "
            f"{', '.join(f'{side:g}' for side in sides)}",
        )
    return left, top, right, bottom


def _view(image: GalleryImage, width: int | None, boxes: bool, wanted: Sequence[str]) -> View:
    """Return what the picture shows.

    Raises:
        ProblemError: the photo has no instance with one of the ids `wanted`.
    """
    instances = {row.instance_id: row for row in image.instances}
    for instance_id in wanted:
        if instance_id not in instances:
            raise instance_not_found(image.record.image_id, instance_id)
    rows = list(instances.values()) if boxes else [instances[i] for i in dict.fromkeys(wanted)]
    return View(width_px=width, boxes=[row.box for row in rows], labels=_labels(rows))


def _labels(rows: Sequence[InstanceRow]) -> list[str]:
    """Return the number of each box; a single box needs none."""
    return [row.instance_id.rpartition("#")[2] if len(rows) > 1 else "" for row in rows]


async def _render(
    context: EndpointContext, gallery: str, image: GalleryImage, view: View, tag: str
) -> Picture:
    record = image.record
    try:
        data = await context.backend.photo(gallery, record.image_id)
        if data is None:
            raise image_not_found(gallery, record.image_id)
        # In a thread, because decoding and encoding a photo would block all other requests.
        # `limits.pixels` is about uploads; `reir index` may have admitted larger photos.
        max_pixels = max(context.config.limits.pixels, DEFAULT_MAX_PIXELS)
        made = await run_sync(render, data, record, view, max_pixels)
    except ImageUnreachable as error:
        detail = "the file of this photo cannot be reached at the moment; try again later"
        raise ProblemError(UNREACHABLE, detail, retry_after_s=RETRY_STORE_S) from error
    except ImageError as error:
        detail = f"image {record.image_id} cannot be shown: {error.reason.value}"
        raise ProblemError(IMAGE_NOT_FOUND, detail) from error
    if not view.is_whole:  # the bytes of a whole photo come from its file as fast as from the cache
        context.pictures.put(tag, made)
    return made
