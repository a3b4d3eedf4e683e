"""`reir duplicates`: photos of a gallery that are the same, or look alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from reir.cli.common import (
    AsJson,
    Gallery,
    Store,
    connect,
    new_table,
    output,
    photo_text,
    plural,
    print_json,
)
from reir.cli.galleries import PANEL, Version, version_or_live

if TYPE_CHECKING:
    from reir.store.contract import InstanceStore


@dataclass(frozen=True)
class DuplicateGroup:
    """URIs of photos that are equal or look alike; of equal photos, only the first is indexed."""

    uris: tuple[str, ...]


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    app.command("duplicates", rich_help_panel=PANEL)(duplicates)


def duplicates(  # noqa: PLR0913, every argument is an option of the command
    gallery: Gallery,
    near: Annotated[
        bool, typer.Option("--near", help="List photos that look alike instead of identical files.")
    ] = False,
    version: Version = None,
    limit: Annotated[
        int, typer.Option(min=0, help="Maximum number of groups to list; 0 lists all.")
    ] = 50,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """List the photos that are in the gallery more than once.

    Of identical files only one is indexed, the first of its group here; searches show that one.
    Photos that merely look alike are all indexed; list them with --near.
    """
    with connect(store) as opened:
        version = version_or_live(opened, gallery, version)
        find = near_groups if near else equal_groups
        groups = list(find(opened, gallery, version))
    if as_json:
        listed = [list(group.uris) for group in groups]
        print_json({"gallery": gallery, "version": version, "near": near, "groups": listed})
        return
    kind = "look alike" if near else "are identical"
    screen = output()
    if groups:
        table = new_table("group", "photo", right=("group",))
        for number, group in enumerate(islice(groups, limit or None), start=1):
            for place, uri in enumerate(group.uris):
                table.add_row("" if place else str(number), photo_text(uri))
        screen.print(table)
    if limit and len(groups) > limit:
        screen.print(
            f"... and {len(groups) - limit:,} more; use --limit 0 to list all", style="dim"
        )
    redundant = sum(len(group.uris) - 1 for group in groups)
    screen.print(
        f"{plural(len(groups), 'group')} of photos that {kind}: {redundant:,} could be removed"
    )


def equal_groups(store: InstanceStore, gallery: str, version: str) -> Iterator[DuplicateGroup]:
    """Yield groups of photos with identical content, the indexed one first."""
    copies: dict[str, list[str]] = defaultdict(list)
    for row in store.iter_images(gallery, version, status="indexed"):
        if row.same_as:
            copies[row.same_as].append(row.uri)
    holders = store.get_images(gallery, version, list(copies))
    for key, uris in copies.items():
        # The photo that holds their instances may have been removed since the rows were read.
        first = [holders[key].uri] if key in holders else []
        yield DuplicateGroup((*first, *sorted(uris)))


def near_groups(store: InstanceStore, gallery: str, version: str) -> Iterator[DuplicateGroup]:
    """Yield groups of photos whose perceptual hashes are close."""
    from reir.images.near_duplicates import NearDuplicates

    alike = NearDuplicates()
    for row in store.iter_images(gallery, version, status="indexed"):
        alike.add(row)
    groups = alike.groups()
    uris = _uris_of(store, (gallery, version), groups)
    for group in groups:
        found = sorted(uris[number] for number in group if number in uris)
        if len(found) > 1:  # photos may have been removed since the first reading
            yield DuplicateGroup(tuple(found))


def _uris_of(
    store: InstanceStore, place: tuple[str, str], groups: Sequence[Sequence[int]]
) -> dict[int, str]:
    """Return the URIs of rows by their position in the ledger.

    The ledger is read a second time, because keeping all URIs along with the hashes would take far
    more memory. A row that is added or removed in between shifts the positions, so that this call
    may return wrong groups; the next call returns the right ones.
    """
    wanted = {number for group in groups for number in group}
    if not wanted:
        return {}
    rows = enumerate(store.iter_images(*place, status="indexed"))
    return {number: row.uri for number, row in rows if number in wanted}
