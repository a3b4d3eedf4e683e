"""Galleries, and single photos of them: what is there, adding one, deleting one."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated

from fastapi import APIRouter, File, Form, Path, UploadFile
from starlette.responses import Response

from reir.attributes import MAX_ATTRIBUTES_BYTES
from reir_serving.access import served
from reir_serving.answers import gallery_answer, image_answer, json_answer
from reir_serving.context import Asked, Context
from reir_serving.forms import attributes_of
from reir_serving.problems import no_gallery, no_image
from reir_serving.schemas import (
    GalleriesAnswer,
    GalleryName,
    GalleryOut,
    ImageAdded,
    ImageAnswer,
)

router = APIRouter(prefix="/v1/galleries", tags=["galleries"])

GalleryPath = Annotated[GalleryName, Path(examples=["photos"])]
Photograph = Annotated[
    UploadFile, File(description="The photo.", json_schema_extra={"format": "photo"})
]
ImageId = Annotated[
    str,
    Path(
        max_length=128,
        examples=["0123456789abcdef0123"],
        json_schema_extra={"format": "image-id"},
    ),
]


@router.get("", response_model=GalleriesAnswer)
async def galleries(asked: Asked) -> Response:
    """List the galleries that the key may read."""
    found = [
        gallery_answer(gallery, asked.caller)
        for gallery in await asked.backend.galleries()
        if served(gallery.name, asked.caller, asked.site.config.galleries)
    ]
    return json_answer({"galleries": found})


@router.get("/{gallery}", response_model=GalleryOut)
async def one_gallery(gallery: GalleryPath, asked: Asked) -> Response:
    """Say which versions a gallery has, and which one is live."""
    name = asked.readable(gallery)
    found = [each for each in await asked.backend.galleries() if each.name == name]
    if not found:
        raise no_gallery(name)
    return json_answer(gallery_answer(found[0], asked.caller))


@router.post("/{gallery}/images", status_code=201, response_model=ImageAdded)
async def add_image(
    gallery: GalleryPath,
    asked: Asked,
    image: Photograph,
    attributes: Annotated[
        str,
        Form(
            description="JSON object; filters read it as `attr.NAME`.",
            max_length=MAX_ATTRIBUTES_BYTES,
            examples=['{"camera": "X100"}'],
            json_schema_extra={"format": "attributes"},
        ),
    ] = "{}",
) -> Response:
    """Add a photo; searches find it as soon as the answer is sent."""
    asked.writable(gallery)
    own = asked.caller.owned(attributes_of(attributes))
    name = PurePath(image.filename or "").name[:120]
    record = await asked.backend.add_image(gallery, await image.read(), name, own)
    asked.note_write("add", gallery, {"image_id": record.image_id, "bytes": record.size_bytes})
    answer = json_answer(
        {
            "gallery": gallery,
            "image_id": record.image_id,
            "uri": asked.caller.shown(record.uri),
            "num_instances": record.num_instances,
        },
        status=201,
    )
    answer.headers["Location"] = f"/v1/galleries/{gallery}/images/{record.image_id}"
    return answer


@router.get("/{gallery}/images/{image_id}", response_model=ImageAnswer)
async def one_image(gallery: GalleryPath, image_id: ImageId, asked: Asked) -> Response:
    """Return a photo's ledger row and all its instances."""
    found = await asked.image(gallery, image_id)
    return json_answer(image_answer(gallery, found, asked.caller))


@router.delete("/{gallery}/images/{image_id}", status_code=204)
async def delete_image(gallery: GalleryPath, image_id: ImageId, asked: Asked) -> Response:
    """Delete a photo; searches no longer find it as soon as the answer is sent."""
    asked.writable(gallery)
    await _check_seen(asked, gallery, image_id)
    if not await asked.backend.delete_image(gallery, image_id):
        raise no_image(gallery, image_id)
    asked.note_write("delete", gallery, {"image_id": image_id})
    return Response(status_code=204)


async def _check_seen(asked: Context, gallery: str, image_id: str) -> None:
    """Refuse to delete a photo of another tenant, as if it were not there."""
    if asked.caller.tenant:
        await asked.image(gallery, image_id)
