"""Galleries and their photos: list, add, look up, delete."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Path, Query, UploadFile
from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response

from reir.attributes import MAX_ATTRIBUTES_BYTES, BadRow, validate_attributes
from reir.errors import QueryError
from reir.records import Attributes
from reir.store.contract import VersionInfo
from reir_serving.backend.service import GalleryInfo
from reir_serving.http.endpoint_context import Context, EndpointContext
from reir_serving.http.problems import gallery_not_found, image_not_found
from reir_serving.http.schemas import (
    ApiAnswer,
    Box,
    GalleryName,
    ImageId,
    JsonObject,
    Scalar,
    image_urls,
    json_response,
)
from reir_serving.middleware.access import Caller, is_visible

router = APIRouter(prefix="/v1/galleries", tags=["galleries"])

GalleryPath = Annotated[GalleryName, Path(examples=["photos"])]
PhotoFile = Annotated[
    UploadFile, File(description="The photo.", json_schema_extra={"format": "photo"})
]
ImageIdPath = Annotated[ImageId, Path(examples=["0123456789abcdef0123"])]
MAX_PHOTOS = 100
_JSON_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


class VersionOut(ApiAnswer):
    """One version of a gallery.

    Attributes:
        num_images, num_failed, num_instances: counts over the photos of all tenants; null for a
            key with a tenant.
    """

    name: str
    checkpoint: str
    dim: int
    live: bool
    num_images: int | None
    num_failed: int | None
    num_instances: int | None


class GalleryOut(ApiAnswer):
    """One gallery.

    Attributes:
        searchable: whether this server has the checkpoint of the live version.
        writable: whether the key may add and delete photos.
    """

    name: str
    live: str
    searchable: bool
    writable: bool
    versions: list[VersionOut]


class GalleriesAnswer(ApiAnswer):
    """`GET /v1/galleries`: the galleries that the key may read."""

    galleries: list[GalleryOut]


class InstanceOut(ApiAnswer):
    """One instance of a photo."""

    instance_id: str
    box: Box
    objectness: float
    area: float


class ImageAnswer(ApiAnswer):
    """`GET /v1/galleries/{gallery}/images/{image_id}`: a photo and all its instances."""

    image_id: str
    uri: str
    status: str
    reason: str
    width_px: int
    height_px: int
    attributes: dict[str, Scalar]
    instances: list[InstanceOut]
    image_url: str
    thumbnail_url: str


class PhotoOut(ApiAnswer):
    """One photo of a gallery."""

    image_id: str
    uri: str
    image_url: str
    thumbnail_url: str


class PhotosAnswer(ApiAnswer):
    """`GET /v1/galleries/{gallery}/images`: some photos of a gallery."""

    images: list[PhotoOut]


class AddImageAnswer(ApiAnswer):
    """`POST /v1/galleries/{gallery}/images` (multipart: `image`, optional `attributes` as JSON)."""

    gallery: str
    image_id: str
    uri: str
    num_instances: int


@router.get("", response_model=GalleriesAnswer)
async def galleries(context: Context) -> Response:
    """List the galleries that the key may read."""
    found = [
        _gallery(gallery, context.caller)
        for gallery in await context.backend.galleries()
        if is_visible(gallery.name, context.caller, context.config.galleries)
    ]
    return json_response({"galleries": found})


@router.get("/{gallery}", response_model=GalleryOut)
async def one_gallery(gallery: GalleryPath, context: Context) -> Response:
    """Return the versions of a gallery, and which one is live."""
    name = context.readable(gallery)
    found = [each for each in await context.backend.galleries() if each.name == name]
    if not found:
        raise gallery_not_found(name)
    return json_response(_gallery(found[0], context.caller))


@router.get("/{gallery}/images", response_model=PhotosAnswer)
async def some_images(
    gallery: GalleryPath,
    context: Context,
    limit: Annotated[int, Query(ge=1, le=MAX_PHOTOS, description="Maximum number of photos.")] = 12,
) -> Response:
    """Return some photos that the key may see, to show what the gallery is about."""
    name = context.readable(gallery)
    found = await context.backend.some_images(name, limit, context.caller.can_see)
    return json_response(
        {
            "images": [
                {
                    "image_id": each.image_id,
                    "uri": context.caller.visible_uri(each.uri),
                    **image_urls(name, each.image_id),
                }
                for each in found
            ]
        }
    )


@router.post("/{gallery}/images", status_code=201, response_model=AddImageAnswer)
async def add_image(
    gallery: GalleryPath,
    context: Context,
    image: PhotoFile,
    attributes: Annotated[
        str,
        Form(
            description="JSON object; filters refer to its fields as `attr.NAME`.",
            max_length=MAX_ATTRIBUTES_BYTES,
            examples=['{"camera": "X100"}'],
            json_schema_extra={"format": "attributes"},
        ),
    ] = "{}",
) -> Response:
    """Add a photo; searches find it as soon as the answer is sent."""
    context.writable(gallery)
    own = context.caller.add_tenant(_parse_attributes(attributes))
    # Only the name, because a path from the client must not choose where the photo is stored.
    name = PurePath(image.filename or "").name
    record = await context.backend.add_image(gallery, await image.read(), name, own)
    context.note_write("add", gallery, {"image_id": record.image_id, "bytes": record.size_bytes})
    answer = json_response(
        {
            "gallery": gallery,
            "image_id": record.image_id,
            "uri": context.caller.visible_uri(record.uri),
            "num_instances": record.num_instances,
        },
        status=201,
    )
    answer.headers["Location"] = f"/v1/galleries/{gallery}/images/{record.image_id}"
    return answer


@router.get("/{gallery}/images/{image_id}", response_model=ImageAnswer)
async def one_image(gallery: GalleryPath, image_id: ImageIdPath, context: Context) -> Response:
    """Return a photo's ledger row and all its instances."""
    image = await context.image(gallery, image_id)
    record = image.record
    return json_response(
        {
            "image_id": record.image_id,
            "uri": context.caller.visible_uri(record.uri),
            "status": record.status,
            "reason": record.reason,
            "width_px": record.width_px,
            "height_px": record.height_px,
            "attributes": dict(record.attributes),
            "instances": [
                {
                    "instance_id": row.instance_id,
                    "box": row.box,
                    "objectness": row.objectness,
                    "area": row.area,
                }
                for row in image.instances
            ],
            **image_urls(gallery, record.image_id),
        }
    )


@router.delete("/{gallery}/images/{image_id}", status_code=204)
async def delete_image(gallery: GalleryPath, image_id: ImageIdPath, context: Context) -> Response:
    """Delete a photo; searches no longer find it as soon as the answer is sent."""
    context.writable(gallery)
    await _check_tenant(context, gallery, image_id)
    if not await context.backend.delete_image(gallery, image_id):
        raise image_not_found(gallery, image_id)
    context.note_write("delete", gallery, {"image_id": image_id})
    return Response(status_code=204)


async def _check_tenant(context: EndpointContext, gallery: str, image_id: str) -> None:
    """Answer 404 for a photo of another tenant, so that its existence stays unknown."""
    if context.caller.tenant:
        await context.image(gallery, image_id)


def _parse_attributes(text: str) -> Attributes:
    """Return the attributes of an uploaded photo.

    Raises:
        QueryError: the text is not a JSON object of numbers, strings and booleans.
    """
    try:
        return validate_attributes(_JSON_OBJECT.validate_json(text))
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise QueryError(
            "attributes", f"must be a JSON object, got {text[:80]!a}: {reason}"
        ) from error
    except BadRow as error:
        raise QueryError("attributes", str(error)) from error


def _gallery(gallery: GalleryInfo, caller: Caller) -> JsonObject:
    """Return `GalleryOut`."""
    return {
        "name": gallery.name,
        "live": gallery.live,
        "searchable": gallery.loaded,
        "writable": caller.may_write(gallery.name),
        "versions": [_version(version, caller) for version in gallery.versions],
    }


def _version(version: VersionInfo, caller: Caller) -> JsonObject:
    """Return `VersionOut`; a key with a tenant gets no counts, which cover all tenants."""
    counts = {
        "num_images": version.num_images,
        "num_failed": version.num_failed,
        "num_instances": version.num_instances,
    }
    return {
        "name": version.name,
        "checkpoint": version.spec.digest,
        "dim": version.spec.dim,
        "live": version.live,
        **(dict.fromkeys(counts) if caller.tenant else counts),
    }
