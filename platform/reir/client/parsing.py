"""Turns the JSON of a server into the records of the library.

The docstrings name the models of the API (`reir_serving.http`) from which each record is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reir.models.color_reading import ColorReading
from reir.models.zoom_steps import ZoomSearch, ZoomStep
from reir.query.every_photo import EveryPhoto, FoundPhoto, ScannedPart
from reir.query.photo_curve import Decision
from reir.records import Box, ImageRecord, MaskRle
from reir.results import (
    Difference,
    Evidence,
    GalleryInfo,
    Hit,
    Localization,
    LocalizedBox,
    Neighbor,
    PhotoReader,
    SearchResult,
)
from reir.store.contract import InstanceRow, VersionInfo, VersionSpec

Json = dict[str, Any]


def result_of(answer: Json, reader: PhotoReader) -> SearchResult:
    """Return the result of a `SearchAnswer`; its hits read their photos with `reader`."""
    return SearchResult(
        expression=answer["expression"],
        gallery=answer["gallery"],
        version=answer["version"],
        hits=tuple(_hit(hit, reader) for hit in answer["hits"]),
        timings_ms=answer["timings_ms"],
        degraded=tuple(answer["degraded"]),
        digest=answer["checkpoint"],
        presence=answer["presence"],
        found=answer["found"],
        equally_good=answer["equally_good"],
        cursor=answer["cursor"],
    )


def photo_search_of(line: Json, others: Iterator[Json]) -> EveryPhoto:
    """Return the answer whose first `EveryPhotoLine` is `line`."""
    told = line["search"]
    names = ("expression", "gallery", "version", "num_photos")
    decision = Decision(**{name: told[name] for name in ("min_presence", "recall", "precision")})
    parts = map(_part, others)
    return EveryPhoto(**{name: told[name] for name in names}, decision=decision, parts=parts)


def _part(line: Json) -> ScannedPart:
    """Return what an `EveryPhotoLine` adds to an answer: a photo, or the numbers at its end."""
    if "end" in line:
        # Servers of earlier versions do not count them.
        return ScannedPart((), num_contradicted=line["end"].get("contradicted", 0))
    told = line["photo"]
    names = ("image_id", "uri", "presence", "instance_id", "score", "attributes")
    return ScannedPart([FoundPhoto(**{name: told[name] for name in names}, box=_box(told))])


def _hit(hit: Json, reader: PhotoReader) -> Hit:
    names = ("instance_id", "image_id", "uri", "score", "objectness", "attributes", "presence")
    told = hit["evidence"]
    return Hit(
        **{name: hit[name] for name in names},
        box=_box(hit),
        mask=_mask(hit["mask"]),
        # Servers of earlier releases do not send these.
        photo_presence=hit.get("photo_presence"),
        differs=tuple(Difference(**each) for each in hit.get("differs", ())),
        zoom=_zoom(hit.get("zoom")),
        reader=reader,
        evidence=None
        if told is None
        else Evidence(
            dual_score=told["dual_score"],
            rerank_score=told["rerank_score"],
            margin=told["margin"],
            neighbors=tuple(
                Neighbor(instance_id=each["instance_id"], box=_box(each), weight=each["weight"])
                for each in told["neighbors"]
            ),
            colors=tuple(ColorReading(**each) for each in told.get("colors", ())),
        ),
    )


def _zoom(told: Json | None) -> ZoomSearch | None:
    if told is None:
        return None
    steps = (
        ZoomStep(frame=_box(each, "frame"), box=_box(each), score=each["score"], end=each["end"])
        for each in told["steps"]
    )
    return ZoomSearch(steps=tuple(steps), box=_box(told), score=told["score"])


def localization_of(answer: Json) -> Localization:
    """Return the localization of a `LocalizeAnswer`."""
    names = ("expression", "width_px", "height_px", "present", "presence", "timings_ms")
    return Localization(
        **{name: answer[name] for name in names},
        boxes=tuple(
            LocalizedBox(
                box=_box(each),
                score=each["score"],
                presence=each["presence"],
                mask=_mask(each["mask"]),
            )
            for each in answer["boxes"]
        ),
    )


def gallery_of(told: Json) -> GalleryInfo:
    """Return the gallery of a `GalleryOut`."""
    names = ("name", "live", "searchable", "writable")
    versions = tuple(map(_version, told["versions"]))
    return GalleryInfo(**{name: told[name] for name in names}, versions=versions)


def _version(told: Json) -> VersionInfo:
    # The API does not return the settings of a version. It returns null instead of the counts to
    # the key of a tenant.
    spec = VersionSpec(dim=told["dim"], digest=told["checkpoint"])
    counts = {name: told[name] or 0 for name in ("num_images", "num_failed", "num_instances")}
    return VersionInfo(name=told["name"], live=told["live"], spec=spec, **counts)


def image_of(told: Json) -> tuple[ImageRecord, list[InstanceRow]]:
    """Return the ledger row and the instances of an `ImageAnswer`."""
    names = ("image_id", "uri", "status", "reason", "width_px", "height_px", "attributes")
    record = ImageRecord(
        **{name: told[name] for name in names}, num_instances=len(told["instances"])
    )
    rows = [
        InstanceRow(
            instance_id=each["instance_id"],
            image_id=record.image_id,
            uri=record.uri,
            box=_box(each),
            objectness=each["objectness"],
            area=each["area"],
            attributes=record.attributes,
        )
        for each in told["instances"]
    ]
    return record, rows


def _box(told: Json, name: str = "box") -> Box:
    x1, y1, x2, y2 = told[name]  # a list: JSON has no tuples
    return x1, y1, x2, y2


def _mask(told: Json | None) -> MaskRle | None:
    if told is None:
        return None
    height, width = told["size"]
    return MaskRle((height, width), told["counts"])
