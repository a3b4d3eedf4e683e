"""Who asks, and what that lets them see: galleries by key, rows by tenant.

Tenant and galleries come from the key alone; no request can name them. Knows no HTTP.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from reir.errors import ConfigError, FilterError, QueryError
from reir.query import Query, Term
from reir.records import Attributes, ImageRecord
from reir.store.filters import Field, fields_of, parse

EVERY = "*"
TENANT = "tenant"
"""Attribute of the photos of a tenant."""

PLACE = Field("uri")
"""Filter field that tenants may not use, because it would reveal where photos are stored."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Whoever sends requests under one key.

    Attributes:
        key_id: for log and rate limit; empty without keys.
        tenant: sees only photos with this value in their attribute `tenant`; empty sees all.
        read, write: names of galleries, or `EVERY`; who may write may read.
        rate_per_s: of its own; None takes the server's.
    """

    key_id: str = ""
    tenant: str = ""
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    rate_per_s: float | None = None

    def may_read(self, gallery: str) -> bool:
        """Whether the caller may search a gallery."""
        return self.may_write(gallery) or not {EVERY, gallery}.isdisjoint(self.read)

    def may_write(self, gallery: str) -> bool:
        """Whether the caller may add and delete photos."""
        return not {EVERY, gallery}.isdisjoint(self.write)

    def sees(self, record: ImageRecord) -> bool:
        """Whether a photo of a gallery that the caller may read is one of theirs."""
        return not self.tenant or record.attributes.get(TENANT) == self.tenant

    def narrowed(self, where: str | None) -> str | None:
        """Return a filter that only passes what the caller may see.

        Raises:
            FilterError: `where` cannot be parsed. Checked before it is put into another one, so
                that no bracket in it can close ours. Also if a tenant's filter uses `uri`, because
                tenants do not learn where photos are stored (see `shown`).
        """
        if not self.tenant:
            return where
        own = f'attr.{TENANT} == "{self.tenant}"'
        if where is None:
            return own
        if PLACE in fields_of(parse(where)):
            raise FilterError(
                "filter",
                f"{where[:200]!r} uses the field 'uri', which is not available to the key of a "
                f"tenant; filter by image_id or by attributes of your own (attr.NAME) instead",
            )
        return f"{own} and ({where})"

    def shown(self, uri: str) -> str:
        """Return a photo's URI as the caller may see it; a tenant sees only the file name."""
        return uri.rpartition("/")[2] if self.tenant else uri

    def owned(self, attributes: Attributes) -> Attributes:
        """Return the attributes of a photo that the caller adds.

        Raises:
            QueryError: they name a tenant, which only a key can.
        """
        if not self.tenant:
            return attributes
        if TENANT in attributes:
            raise QueryError("attributes", f"must not hold {TENANT!r}: the key says whose it is")
        return {**attributes, TENANT: self.tenant}


NOBODY = Caller()
EVERYBODY = Caller(read=(EVERY,), write=(EVERY,))
"""The caller on a server without keys."""


def named_images(query: Query) -> set[str]:
    """Return the ids of the images whose instances a query names."""
    return {_image_of(term) for term in query.terms if term.instance_id}


def _image_of(term: Term) -> str:
    return term.instance_id.rpartition("#")[0]


def check_bind(host: str, keys_file: Path | None) -> None:
    """Refuse to serve others than this machine without keys.

    Raises:
        ConfigError: the address can be reached from elsewhere and there is no file of keys.
    """
    if keys_file is None and not is_loopback(host):
        raise ConfigError(
            f"host {host!r} can be reached from other machines and there are no API keys; make "
            f"some with `reir keys new --file keys.yaml` and give --keys keys.yaml, or serve on "
            f"127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def served(gallery: str, caller: Caller, galleries: tuple[str, ...] | None) -> bool:
    """Whether a gallery is among those that this server serves and the caller may read."""
    return (galleries is None or gallery in galleries) and caller.may_read(gallery)
