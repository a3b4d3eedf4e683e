"""Records feedback from this machine, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reir.errors import QueryError
from reir.operations.feedback.database import add_feedback
from reir.operations.feedback.records import (
    Feedback,
    Verdict,
    check_drawn_box,
    new_key,
    submission,
)
from reir.records import Box
from reir.store.contract import InstanceStore
from reir.text import validate_expression


def give_feedback(  # noqa: PLR0913, each is a part of the feedback
    store: InstanceStore,
    gallery: str,
    folder: Path,
    expression: str,
    verdict: Verdict,
    *,
    instance_id: str = "",
    image_id: str = "",
    box: Box | None = None,
) -> Feedback:
    """Record a verdict about the live version of a gallery; afterwards it is on disk.

    Args:
        store: store of the gallery.
        gallery: its name.
        folder: folder of the search log, which is created if it is missing.
        expression: what was searched for.
        verdict: see `Verdict`.
        instance_id: the instance that is right or wrong.
        image_id, box: where the object is, for the verdict "box".

    Raises:
        QueryError: the expression is empty or too long, the box is too small, or the gallery has no
            such instance or photo.
        GalleryNotFound: the gallery has no live version.
        DataError: it cannot be written.
    """
    validate_expression(expression)
    version = store.live_version(gallery)
    about: dict[str, Any] = {}
    if verdict in ("right", "wrong"):
        holder = instance_id.rpartition("#")[0]
        rows = store.get_instances(gallery, version, [holder]).get(holder, [])
        found = next((row for row in rows if row.instance_id == instance_id), None)
        if found is None:
            raise _unknown("instance_id", instance_id, gallery)
        about = {
            "instance_id": instance_id,
            "image_id": found.image_id,
            "uri": found.uri,
            "box": found.box,
        }
    elif verdict == "box":
        assert box is not None
        record = store.get_images(gallery, version, [image_id]).get(image_id)
        if record is None:
            raise _unknown("image_id", image_id, gallery)
        about = {"image_id": image_id, "uri": record.uri, "box": check_drawn_box(box)}
    said = Feedback(expression=expression, verdict=verdict, version=version, **about)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    add_feedback(folder, gallery, said, submission({}, new_key()))
    return said


def _unknown(field: str, name: str, gallery: str) -> QueryError:
    return QueryError(
        field,
        f"{name!r} is not in gallery '{gallery}'; `reir search --json` prints the ids of hits",
    )
