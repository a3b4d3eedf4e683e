"""What a caller may see: the galleries that the key names, and in them the photos of its tenant.

Both come from the key alone, never from a request. This module does not depend on HTTP.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from reir.attributes import TENANT
from reir.errors import ConfigError, FilterError, QueryError
from reir.query.request import Query
from reir.records import Attributes, ImageRecord
from reir.store.filters import Field, fields_of, parse

ALL_GALLERIES = "*"

URI_FIELD = Field("uri")
"""Filter field that tenants may not use, because it would reveal where photos are stored."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Whoever sends requests with one key.

    Attributes:
        key_id: id of the key, for the log and the rate limit; empty on a server without keys.
        tenant: if set, the caller sees only photos whose attribute `tenant` has this value.
        read, write: names of galleries, or `ALL_GALLERIES`; write access includes read access.
        rate_per_s: rate limit of this key; None applies the server's.
    """

    key_id: str = ""
    tenant: str = ""
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    rate_per_s: float | None = None

    def may_read(self, gallery: str) -> bool:
        """Return whether the caller may search a gallery."""
        return self.may_write(gallery) or not {ALL_GALLERIES, gallery}.isdisjoint(self.read)

    def may_write(self, gallery: str) -> bool:
        """Return whether the caller may add and delete photos of a gallery."""
        return not {ALL_GALLERIES, gallery}.isdisjoint(self.write)

    def can_see(self, record: ImageRecord) -> bool:
        """Return whether the caller can see a photo of a gallery that they may read."""
        return not self.tenant or record.attributes.get(TENANT) == self.tenant

    def restrict_filter(self, where: str | None) -> str | None:
        """Return a filter for instances that match `where` and belong to the caller's tenant.

        Raises:
            FilterError: `where` cannot be parsed, or a tenant's filter uses `uri`, because tenants
                do not learn where photos are stored (see `visible_uri`).
        """
        own = f'attr.{TENANT} == "{self.tenant}"'  # `KeyEntry` allows no quotes in the name
        if where is None:
            return own if self.tenant else None
        # The filter is first parsed by itself. Otherwise "area > 0) or (area > 0" would close our
        # parenthesis and so escape from the condition on the tenant. Its limits are the same with
        # and without a tenant.
        tree = parse(where)
        if not self.tenant:
            return where
        if URI_FIELD in fields_of(tree):
            raise FilterError(
                "filter",
                f"{where[:200]!r} uses the field 'uri', which is not available to the key of a "
                f"tenant; filter by image_id or by attributes of your own (attr.NAME) instead",
            )
        return f"{own} and ({where})"

    def visible_uri(self, uri: str) -> str:
        """Return a photo's URI as the caller may see it; a tenant sees only the file name."""
        return uri.rpartition("/")[2] if self.tenant else uri

    def add_tenant(self, attributes: Attributes) -> Attributes:
        """Return the attributes of a photo that the caller adds, with the caller's tenant.

        Raises:
            QueryError: a tenant names a tenant in the attributes; only the key may do that.
        """
        if not self.tenant:
            return attributes
        if TENANT in attributes:
            raise QueryError(
                "attributes", f"must not contain {TENANT!r}, because the key sets it; leave it out"
            )
        return {**attributes, TENANT: self.tenant}


NO_ACCESS = Caller()
FULL_ACCESS = Caller(read=(ALL_GALLERIES,), write=(ALL_GALLERIES,))
"""The caller on a server without keys."""


def image_ids_of_terms(query: Query) -> set[str]:
    """Return the ids of the images whose instances are terms of a query."""
    return {term.instance_id.rpartition("#")[0] for term in query.terms if term.instance_id}


def check_bind(host: str, keys_file: Path | None) -> None:
    """Check that a server without keys is reachable from this machine only.

    Raises:
        ConfigError: other machines can reach the address, and there is no keys file.
    """
    if keys_file is None and not is_loopback(host):
        raise ConfigError(
            f"host {host!r} can be reached from other machines, but there are no API keys; create "
            f"some with `reir keys new --file keys.yaml` and pass --keys keys.yaml, or serve on "
            f"127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Return whether a name or address means this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_visible(gallery: str, caller: Caller, galleries: tuple[str, ...] | None) -> bool:
    """Return whether the server serves a gallery (None: all) and the caller may read it."""
    return (galleries is None or gallery in galleries) and caller.may_read(gallery)
