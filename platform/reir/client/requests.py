"""What the client sends: the JSON of searches, and multipart forms with a photo."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from reir.errors import QueryError
from reir.query.request import Query, SearchOptions, Term


@dataclass(frozen=True)
class Body:
    """The body of a request; empty by default.

    Attributes:
        idempotency_key: by which the server recognizes the request if it is sent again; empty if it
            has no key.
    """

    data: bytes = b""
    media_type: str = ""
    idempotency_key: str = ""


def json_body(value: Any) -> Body:
    """Return plain values as JSON."""
    return Body(json.dumps(value).encode(), "application/json")


def form_body(photo: bytes | Path, fields: Mapping[str, str]) -> Body:
    """Return a multipart form with a photo (RFC 7578)."""
    data, name = (photo, "photo") if isinstance(photo, bytes) else (photo.read_bytes(), photo.name)
    boundary = f"reir-{secrets.token_hex(16)}"  # random, because it must not occur in the photo
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n{value}\r\n'
        for field, value in fields.items()
    ]
    # A quote or a line break in the file name would end the header.
    shown = quote(name, safe=" ()-_.,")
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{shown}"\r\n'
        f"Content-Type: application/octet-stream\r\n\r\n"
    )
    whole = "".join(parts).encode() + data + f"\r\n--{boundary}--\r\n".encode()
    return Body(whole, f"multipart/form-data; boundary={boundary}")


def options_json(options: SearchOptions) -> dict[str, Any]:
    """Return the options as the server's JSON."""
    told: dict[str, Any] = dict(options)
    if "also" in told:
        told["also"] = [_term(term) for term in told["also"]]
    return told


def search_request(query: Query, gallery: str) -> tuple[str, dict[str, Any]]:
    """Return the path and body of the request for a query.

    One term becomes the main one of the request, and the others become `also`. The server takes
    the same expression for `Query.expression` as the library.

    Raises:
        QueryError: no term can be the main one, or another one has a vector.
    """
    # The main term has no weight in a request: its weight is always 1. It also comes first, so of
    # all expressions only the one that stages read can be the main term.
    wanted = [
        term
        for term in query.terms
        if term.weight == 1 and term.vector is None and term.expression in ("", query.expression)
    ]
    leading = next((term for term in wanted if term.expression), next(iter(wanted), None))
    if leading is None:
        raise QueryError(
            "terms",
            f"cannot be sent to a server: the first expression with a positive weight, or an "
            f"instance, must have weight 1; put an expression of weight 1 first, got {query.terms}",
        )
    names = ("k", "per_image", "where", "min_presence", "rerank", "explain", "budget_ms", "cursor")
    told: dict[str, Any] = {name: getattr(query, name) for name in names}
    also = [_term(term) for term in query.terms if term is not leading]
    told |= {"gallery": gallery, "localize": query.localize, "also": also}
    # Servers of earlier releases reject fields that they do not know.
    told |= {name: True for name in ("verify", "zoom") if getattr(query, name)}
    if leading.expression:
        return "/v1/search", {**told, "expression": leading.expression}
    return "/v1/search/similar", {**told, "instance_id": leading.instance_id}


def _term(term: Term) -> dict[str, Any]:
    if term.vector is not None:
        raise QueryError("also", "cannot hold a vector; send the photo with `similar`")
    if term.instance_id:
        return {"instance_id": term.instance_id, "weight": term.weight}
    return {"expression": term.expression, "weight": term.weight}
