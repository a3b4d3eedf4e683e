"""Hooks for schemathesis that add to the OpenAPI document; see `serve_schemathesis.py`.

Some strings have a grammar that JSON Schema cannot express; the document names it with a `format`,
and this module generates valid strings of each format. Rules that the document cannot express at
all, such as relations between two fields or the content of the gallery, are listed in `UNSAID`:
requests that are valid by the document but break one of these rules are not sent. Schemathesis
generates the invalid requests without our help.
"""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import schemathesis
from hypothesis import strategies as st
from PIL import Image
from schemathesis.generation import GenerationMode

from reir.errors import ImageError, QueryError
from reir.images.decode import decode_image
from reir.query.request import MAX_TERMS
from reir.text import DEFAULT_MAX_CHARS, validate_expression
from reir_serving.config import LiveSettings

KNOWN_VARIABLE = "REIR_SCHEMATHESIS"
"""Variable with the path of a file that describes the gallery: its name, and ids of its instances
and photos."""

FILTERS = (
    "area > 0.05",
    'not (cx < 0.5 or attr.camera == "X100")',
    'attr.camera in ["X100", "GR"] and neighbors >= 2',
    'uri startswith "file:///" and y1 != 0.25',
)
with open(os.environ[KNOWN_VARIABLE], encoding="utf-8") as _file:
    KNOWN: Mapping[str, Any] = json.load(_file)


def _is_expression(text: str) -> bool:
    try:
        validate_expression(text)
    except QueryError:
        return False
    return True


def _photo(size: tuple[int, int], color: tuple[int, int, int], kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, kind)
    return out.getvalue()


SIDES, BYTES = st.integers(8, 200), st.integers(0, 255)
PHOTOS = st.builds(
    _photo,
    st.tuples(SIDES, SIDES),
    st.tuples(BYTES, BYTES, BYTES),
    st.sampled_from(["JPEG", "PNG", "WEBP"]),
)
NAMES = st.text("abcdefgh_", min_size=1, max_size=12)
VALUES = st.one_of(st.booleans(), st.integers(-1000, 1000), NAMES)

FORMATS: Mapping[str, st.SearchStrategy[str]] = {
    "expression": st.text(min_size=1, max_size=DEFAULT_MAX_CHARS).filter(_is_expression),
    "filter": st.sampled_from(FILTERS),
    # A cursor comes from an answer and cannot be made up; the empty one asks for the first page.
    "cursor": st.just(""),
    "attributes": st.dictionaries(NAMES, VALUES, max_size=4).map(json.dumps),
    # Mostly the real gallery; otherwise, most requests would only test the answer 404.
    "gallery": st.sampled_from([KNOWN["gallery"]] * 3 + ["nowhere"]),
    "instance-id": st.sampled_from(KNOWN["instances"]),
    "image-id": st.sampled_from([*KNOWN["images"], "0123456789abcdef0123"]),
}
for _name, _strategy in FORMATS.items():
    schemathesis.openapi.format(_name, _strategy)
schemathesis.openapi.format("photo", PHOTOS)


def _asked(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the JSON of a request: the body itself, or the part `request` of a form."""
    request = body.get("request", body)
    return request if isinstance(request, Mapping) else {}


def _has_box(body: Mapping[str, Any]) -> bool:
    return _asked(body).get("box") is not None


def _names_both(body: Mapping[str, Any]) -> bool:
    return "request" in body and _asked(body).get("instance_id") is not None


def _names_unknown(body: Mapping[str, Any]) -> bool:
    also = _asked(body).get("also") or []
    named = [each.get("instance_id") for each in (_asked(body), *also)]
    return not {each for each in named if each is not None} <= set(KNOWN["instances"])


def _has_too_many_terms(body: Mapping[str, Any]) -> bool:
    return len(_asked(body).get("also") or []) >= MAX_TERMS - 1


def _may_cancel(body: Mapping[str, Any]) -> bool:
    terms = [_asked(body), *(_asked(body).get("also") or [])]
    named = [each.get(name) for each in terms for name in ("expression", "instance_id")]
    told = [repr(each) for each in named if each is not None]
    return len(told) > len(set(told)) and any(each.get("weight", 1) < 0 for each in terms)


def _is_too_much(body: Mapping[str, Any]) -> bool:
    live, count = LiveSettings(), len(body.get("expressions") or [])
    most = live.explained_hits if body.get("explain") else live.hits
    k = body.get("k", live.k)
    hits = k * count if isinstance(k, int | float) else 0
    return hits > most or (bool(body.get("localize")) and count > live.localized_queries)


def _has_no_photo(body: Mapping[str, Any]) -> bool:
    data = getattr(body.get("image", b""), "data", body.get("image"))
    if data is None:
        return False
    try:
        decode_image(data if isinstance(data, bytes) else str(data).encode())
    except ImageError:
        return True
    return False


UNSAID: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "a box must contain an object that is recognized in the photo": _has_box,
    "a request must not have both an instance and a photo": _names_both,
    "an instance must be in the gallery": _names_unknown,
    "a term must not cancel out another term": _may_cancel,
    "an uploaded file must be a photo": _has_no_photo,
    "a batch must not exceed the limits in the server's settings": _is_too_much,
    "an instance, an expression and 15 more terms are one term too many": _has_too_many_terms,
}
"""Requests that the document calls valid but the server must refuse. Each reason maps to a function
that tells whether a request body is such a case; the benchmark does not send it."""


def _has_boolean_as_text(body: Mapping[str, Any]) -> bool:
    return "masks" in body and not isinstance(body["masks"], bool)


def _has_no_text(body: Mapping[str, Any]) -> bool:
    attributes = body.get("attributes")
    return attributes == "" or isinstance(attributes, list)


LENIENT: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "a form field is text, so 1, 0, yes and no are also accepted as booleans": _has_boolean_as_text,
    "an empty form field counts as missing, and a list as repeated fields": _has_no_text,
}
"""Requests that the document calls invalid but the server accepts. Each reason maps to a function
that tells whether a request body is such a case; the benchmark does not send it."""


KEPT = "a photo must not be deleted if later requests use its instances"
"""Why some DELETE requests are not sent."""


def _is_named_later(image_id: Any) -> bool:
    return any(each.partition("#")[0] == image_id for each in KNOWN["instances"])


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """Make examples use an instance and a photo of this gallery, and each key only once.

    The example id in the document is not in any gallery, and an id that schemathesis has taken from
    an answer may belong to a photo that has been deleted since. Schemathesis does not call
    `filter_case` for examples.
    """
    if _is_wrong(case) or not isinstance(case.body, dict):
        return
    named = case.body.get("instance_id")
    if isinstance(named, str) and named not in KNOWN["instances"]:
        case.body["instance_id"] = KNOWN["instances"][0]
    if isinstance(case.body.get("image_id"), str):  # others may have been deleted since
        case.body["image_id"] = KNOWN["instances"][0].rpartition("#")[0]
    # The server refuses a key that it has seen with another body.
    if case.headers and "idempotency-key" in case.headers:
        case.headers["idempotency-key"] = secrets.token_hex(16)


def _is_wrong(case: Any) -> bool:
    """Return whether schemathesis expects the server to refuse this request."""
    return case.meta is not None and case.meta.generation.mode is GenerationMode.NEGATIVE


@schemathesis.hook
def filter_case(_context: Any, case: Any) -> bool:
    """Return whether schemathesis should send this request."""
    if case.method == "DELETE" and _is_named_later(case.path_parameters.get("image_id")):
        return False
    body = case.body if isinstance(case.body, Mapping) else {}
    return not any(is_one(body) for is_one in (LENIENT if _is_wrong(case) else UNSAID).values())
