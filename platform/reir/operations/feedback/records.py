"""`Feedback`: one verdict of one user. `Submission`: one attempt to send it."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from reir.errors import QueryError
from reir.records import Box

Verdict = Literal["right", "wrong", "absent", "box"]
"""A hit is right or wrong, the object is not in the gallery, or it is in a box instead."""

MIN_SIDE = 0.001
"""Minimum width and height of a box that a user draws, as a share of the photo."""

DECIMALS = 4
"""Decimal places with which boxes are stored; a ten-thousandth of a photo is less than a pixel."""

_KEY = re.compile(r"[\x20-\x7e]{1,255}")


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What a user said about a search.

    Attributes:
        expression: what the user searched for, as written.
        verdict: "right" or "wrong" about an instance; "absent" about the whole gallery; "box" if
            the described object is in the given box.
        uri, image_id: the photo; empty for "absent".
        instance_id: the instance that is right or wrong; otherwise empty.
        box: xyxy in [0, 1]: of the instance, or given by the user; None for "absent".
        version: version of the gallery that the user searched.
        tenant: tenant of the user's API key; empty if there is none.
        user: `user_of` the API key; empty for a server without keys, and for the command line.
        request_id: id of the request; empty for the command line.
        time: when it was said.

    Raises:
        QueryError: the verdict is unknown, or does not go with the box.
    """

    expression: str
    verdict: Verdict
    uri: str = ""
    image_id: str = ""
    instance_id: str = ""
    box: Box | None = None
    version: str = ""
    tenant: str = ""
    user: str = ""
    request_id: str = ""
    time: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        """Check that the verdict has what it is about, and round the box."""
        if self.verdict not in get_args(Verdict):
            allowed = ", ".join(get_args(Verdict))
            raise QueryError("verdict", f"must be one of {allowed}, got {self.verdict!r}")
        if (self.box is None) != (self.verdict == "absent"):
            raise QueryError("box", f"{self.box} does not go with the verdict {self.verdict!r}")
        if self.box is not None:
            x1, y1, x2, y2 = (round(float(side), DECIMALS) for side in self.box)
            # The class is frozen, and nobody has seen the object yet.
            object.__setattr__(self, "box", (x1, y1, x2, y2))


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One attempt to send feedback; a repeated attempt has the same key and the same content.

    Attributes:
        key: idempotency key; belongs to a user and a gallery.
        content: hash of everything that was sent, by which a reused key is recognized.
    """

    key: str
    content: str


def submission(sent: Mapping[str, Any], key: str) -> Submission:
    """Return the submission of what was sent with a key.

    A key in quotes is the same as without, because the header `Idempotency-Key` is a string of
    RFC 8941, which has quotes, but many clients leave them out
    (draft-ietf-httpapi-idempotency-key-header-07, section 2.1).

    Raises:
        QueryError: see `check_key`.
    """
    bare = key[1:-1] if len(key) > 1 and key[0] == key[-1] == '"' else key
    canonical = json.dumps(sent, sort_keys=True).encode()
    return Submission(key=check_key(bare), content=hashlib.sha256(canonical).hexdigest())


def check_key(key: str) -> str:
    """Return an idempotency key.

    Raises:
        QueryError: it is empty, longer than 255 characters, or not printable ASCII.
    """
    if not _KEY.fullmatch(key):
        raise QueryError(
            "idempotency_key",
            f"must have 1 to 255 printable ASCII characters, got {key[:80]!r}; a UUID is usual",
        )
    return key


def new_key() -> str:
    """Return a random idempotency key."""
    return secrets.token_hex(16)


def user_of(key_id: str) -> str:
    """Return the pseudonym of whoever has an API key; empty for the empty id of no key."""
    # A hash, so that feedback of the same key belongs together, but does not name the key.
    return hashlib.sha256(key_id.encode()).hexdigest()[:16] if key_id else ""


def check_drawn_box(box: Box) -> Box:
    """Return a box that a user gave.

    Raises:
        QueryError: it is not xyxy in [0, 1], or smaller than `MIN_SIDE`.
    """
    x1, y1, x2, y2 = box
    inside = all(0 <= side <= 1 for side in box)
    if not inside or x2 - x1 < MIN_SIDE or y2 - y1 < MIN_SIDE:
        raise QueryError(
            "box",
            f"must be x1, y1, x2, y2 in [0, 1] of the photo, at least {MIN_SIDE} wide and high, "
            f"got {list(box)}",
        )
    return box
