"""Pictures of photos, and localisation in a photo that is sent along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Form, Query
from starlette.requests import Request
from starlette.responses import Response

from reir.errors import ImageError, ImageUnreachable
from reir.store.contract import InstanceRow
from reir_serving.answers import json_answer, localize_answer
from reir_serving.backend import GalleryImage
from reir_serving.context import Asked, Context
from reir_serving.pictures import Picture, View, etag, render
from reir_serving.problems import IMAGE_NOT_FOUND, RETRY_STORE_S, UNREACHABLE, Refused, no_image
from reir_serving.routes.galleries import ImageId, Photograph
from reir_serving.schemas import Expression, GalleryName, InstanceId, LocalizeAnswer

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
    304: {"description": "The picture that the client has is the right one."},
}


@router.get("/images/{image_id}", response_class=Response, responses=_PICTURES)
async def picture(  # noqa: PLR0913, every argument is one of the address
    request: Request,
    image_id: ImageId,
    asked: Asked,
    gallery: Annotated[GalleryName, Query(examples=["photos"])],
    width: Annotated[
        int | None, Query(ge=MIN_WIDTH_PX, le=MAX_WIDTH_PX, description="Maximum width in pixels.")
    ] = None,
    boxes: Annotated[bool, Query(description="Draw all instances.")] = False,
    instance: Annotated[
        list[InstanceId] | None,
        Query(max_length=MAX_DRAWN, description="Ids of instances to draw."),
    ] = None,
) -> Response:
    """Return the photo, on request scaled down to `width` pixels or with boxes drawn."""
    image = await asked.image(gallery, image_id)
    view = _view(image, width, boxes, instance or ())
    tag = etag(image.record, view)
    headers = {
        "ETag": tag,
        "Cache-Control": "private, max-age=300",
        "Vary": "Authorization, X-API-Key",
    }
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    made = asked.site.pictures.get(tag) or await _made(asked, gallery, image, view, tag)
    return Response(made.data, 200, headers, made.media_type)


@router.post("/localize", response_model=LocalizeAnswer)
async def localize(
    asked: Asked,
    image: Photograph,
    expression: Annotated[Expression, Form(examples=["the red mug left of the laptop"])],
    k: Annotated[int, Form(ge=1, le=MAX_BOXES, description="Maximum number of boxes.")] = 5,
    masks: Annotated[
        bool, Form(description="Also return masks, if the checkpoint has them.")
    ] = False,
) -> Response:
    """Find the instances in one photo that an expression describes; the photo is not stored."""
    found = await asked.backend.localise(await image.read(), expression, k, masks=masks)
    asked.site.metrics.note_timings(found.timings_ms)
    return json_answer(localize_answer(found, asked.notes.request_id))


def _view(image: GalleryImage, width: int | None, boxes: bool, wanted: Sequence[str]) -> View:
    """Return what is to be shown.

    Raises:
        Refused: the photo has no such instance.
    """
    held = {row.instance_id: row for row in image.instances}
    for instance_id in wanted:
        if instance_id not in held:
            raise Refused(
                IMAGE_NOT_FOUND,
                f"image {image.record.image_id} has no instance {instance_id[:100]!a}",
            )
    rows = list(held.values()) if boxes else [held[each] for each in dict.fromkeys(wanted)]
    return View(width_px=width, boxes=[row.box for row in rows], labels=_labels(rows))


def _labels(rows: Sequence[InstanceRow]) -> list[str]:
    """Number the boxes, where there is more than one."""
    return [row.instance_id.rpartition("#")[2] if len(rows) > 1 else "" for row in rows]


async def _made(asked: Context, gallery: str, image: GalleryImage, view: View, tag: str) -> Picture:
    record = image.record
    try:
        data = await asked.backend.photo(gallery, record.image_id)
        if data is None:
            raise no_image(gallery, record.image_id)
        made = await run_sync(render, data, record, view, asked.site.config.limits.pixels)
    except ImageUnreachable as error:
        said = "the place of this photo cannot be reached just now"
        raise Refused(UNREACHABLE, said, retry_after_s=RETRY_STORE_S) from error
    except ImageError as error:
        said = f"image {record.image_id} cannot be shown: {error.reason.value}"
        raise Refused(IMAGE_NOT_FOUND, said) from error
    if not view.is_whole:
        asked.site.pictures.put(tag, made)
    return made
