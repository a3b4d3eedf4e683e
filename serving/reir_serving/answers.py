"""From the records of the platform to the plain values of `schemas.py`.

Built by hand and written by pydantic's JSON writer: an answer of a hundred hits through a validated
model and FastAPI's encoder costs more than the search. Tests hold every answer to its schema.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from pydantic_core import to_json
from starlette.responses import Response

from reir.language import seems_foreign
from reir.outlines import outlines
from reir.records import Evidence, Hit, MaskRle, SearchResult
from reir.store.contract import InstanceRow, VersionInfo
from reir_serving.access import Caller
from reir_serving.backend import GalleryImage, GalleryInfo, Localisation
from reir_serving.problems import JSON

Json = dict[str, Any]

THUMBNAIL_PX = 400
"""Width of the thumbnails that answers name."""


def json_answer(value: Json, status: int = 200) -> Response:
    """Return an answer of plain values; a number that is not finite becomes null."""
    return Response(
        to_json(value, inf_nan_mode="null"),
        status,
        {"Cache-Control": "no-store"},
        JSON,
    )


def search_answer(result: SearchResult, request_id: str, by_image: bool, caller: Caller) -> Json:
    """Return `SearchAnswer`."""
    hits = [_hit(hit, result, caller) for hit in result.hits]
    return {
        "gallery": result.gallery,
        "version": result.version,
        "checkpoint": result.digest,
        "expression": result.expression,
        "english": not seems_foreign(result.expression),
        "hits": hits,
        "images": _by_image(hits) if by_image else None,
        "presence": result.presence,
        "found": result.found,
        "equally_good": result.equally_good,
        "timings_ms": {stage: round(ms, 3) for stage, ms in result.timings_ms.items()},
        "degraded": list(result.degraded),
        "cursor": result.cursor,
        "request_id": request_id,
    }


def localize_answer(found: Localisation, request_id: str) -> Json:
    """Return `LocalizeAnswer`."""
    return {
        "expression": found.expression,
        "width_px": found.width_px,
        "height_px": found.height_px,
        "present": found.present,
        "presence": found.presence,
        "boxes": [
            {
                "box": each.box,
                "score": each.score,
                "presence": each.presence,
                "mask": _mask(each.mask),
            }
            for each in found.boxes
        ],
        "timings_ms": {stage: round(ms, 3) for stage, ms in found.timings_ms.items()},
        "request_id": request_id,
    }


def gallery_answer(gallery: GalleryInfo, caller: Caller) -> Json:
    """Return `GalleryOut`."""
    return {
        "name": gallery.name,
        "live": gallery.live,
        "searchable": gallery.loaded,
        "writable": caller.may_write(gallery.name),
        "versions": [_version(version, caller) for version in gallery.versions],
    }


def image_answer(gallery: str, image: GalleryImage, caller: Caller) -> Json:
    """Return `ImageAnswer`."""
    record = image.record
    return {
        "image_id": record.image_id,
        "uri": caller.shown(record.uri),
        "status": record.status,
        "reason": record.reason,
        "width_px": record.width_px,
        "height_px": record.height_px,
        "attributes": dict(record.attributes),
        "instances": [_instance(row) for row in image.instances],
        **_urls(gallery, record.image_id),
    }


def _hit(hit: Hit, result: SearchResult, caller: Caller) -> Json:
    return {
        "instance_id": hit.instance_id,
        "image_id": hit.image_id,
        "uri": caller.shown(hit.uri),
        "box": hit.box,
        "score": hit.score,
        "presence": hit.presence,
        "objectness": hit.objectness,
        "area": hit.area,
        "attributes": dict(hit.attributes),
        "mask": _mask(hit.mask),
        **_urls(result.gallery, hit.image_id),
        "evidence": None if hit.evidence is None else _evidence(hit.evidence, result),
    }


def _evidence(evidence: Evidence, result: SearchResult) -> Json:
    return {
        "dual_score": evidence.dual_score,
        "rerank_score": evidence.rerank_score,
        "margin": evidence.margin,
        "neighbours": [
            {"instance_id": each.instance_id, "box": each.box, "weight": each.weight}
            for each in evidence.neighbours
        ],
        "version": result.version,
        "checkpoint": result.digest,
    }


def _by_image(hits: list[Json]) -> list[Json]:
    """Group hits by photo, in the order of the best of each."""
    groups: dict[str, Json] = {}
    for hit in hits:
        own = {name: hit[name] for name in ("image_id", "uri", "score", "presence")}
        groups.setdefault(hit["image_id"], {**own, "hits": []})["hits"].append(hit)
    return list(groups.values())


def _mask(mask: MaskRle | None) -> Json | None:
    if mask is None:
        return None
    return {"size": mask.size, "counts": mask.counts, "polygons": outlines(mask)}


def _urls(gallery: str, image_id: str) -> Json:
    """Return where the photo is; a thumbnail is the same address with a width."""
    place = f"/v1/images/{quote(image_id, safe='')}?gallery={quote(gallery, safe='')}"
    return {"image_url": place, "thumbnail_url": f"{place}&width={THUMBNAIL_PX}"}


def _instance(row: InstanceRow) -> Json:
    return {
        "instance_id": row.instance_id,
        "box": row.box,
        "objectness": row.objectness,
        "area": row.area,
    }


def _version(version: VersionInfo, caller: Caller) -> Json:
    """Return `VersionOut`; its counts cover the photos of all tenants, so a tenant gets null."""
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
