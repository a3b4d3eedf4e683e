"""`reir duplicates`: photos of a gallery that are the same, or look alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from reir.cli_common import (
    AsJson,
    Gallery,
    Store,
    new_table,
    opened,
    output,
    photo_text,
    print_json,
)
from reir.cli_galleries import PANEL, Version, chosen_version

if TYPE_CHECKING:
    from reir.store.contract import InstanceStore


@dataclass(frozen=True)
class Group:
    """Photos that belong together, by URI; of equal ones the first holds the instances."""

    uris: tuple[str, ...]


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    app.command("duplicates", rich_help_panel=PANEL)(duplicates)


def duplicates(  # noqa: PLR0913, every argument is an option of the command
    gallery: Gallery,
    near: Annotated[
        bool, typer.Option("--near", help="Photos that look alike, instead of equal ones.")
    ] = False,
    version: Version = None,
    limit: Annotated[int, typer.Option(min=0, help="Most groups to list; 0 lists all.")] = 50,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """List the photos that are in the gallery more than once.

    Equal files are indexed once; a search shows the first of a group. Photos that only look alike
    are indexed each, and listed with --near.
    """
    with opened(store) as held:
        version = chosen_version(held, gallery, version)
        find = near_groups if near else equal_groups
        groups = list(find(held, gallery, version))
    if as_json:
        listed = [list(group.uris) for group in groups]
        print_json({"gallery": gallery, "version": version, "near": near, "groups": listed})
        return
    kind = "look alike" if near else "are equal"
    screen = output()
    if groups:
        table = new_table("group", "photo", right=("group",))
        for number, group in enumerate(islice(groups, limit or None), start=1):
            for place, uri in enumerate(group.uris):
                table.add_row("" if place else str(number), photo_text(uri))
        screen.print(table)
    if limit and len(groups) > limit:
        screen.print(f"... and {len(groups) - limit:,} more; --limit 0 lists all", style="dim")
    more = sum(len(group.uris) - 1 for group in groups)
    noun = "group" if len(groups) == 1 else "groups"
    screen.print(f"{len(groups):,} {noun} of photos that {kind}: {more:,} more than one of each")


def equal_groups(store: InstanceStore, gallery: str, version: str) -> Iterator[Group]:
    """Photos of equal content, the one that holds the instances first."""
    copies: dict[str, list[str]] = defaultdict(list)
    for row in store.iter_images(gallery, version, status="indexed"):
        if row.same_as:
            copies[row.same_as].append(row.uri)
    holders = store.get_images(gallery, version, list(copies))
    for key, uris in copies.items():
        first = [holders[key].uri] if key in holders else []
        yield Group((*first, *sorted(uris)))


def near_groups(store: InstanceStore, gallery: str, version: str) -> Iterator[Group]:
    """Photos that look alike by their perceptual hashes."""
    from reir.near_duplicates import LookAlikes

    alike = LookAlikes()
    for row in store.iter_images(gallery, version, status="indexed"):
        alike.add(row)
    groups = alike.groups()
    uris = _uris_of(store, (gallery, version), groups)
    for group in groups:
        found = sorted(uris[number] for number in group if number in uris)
        if len(found) > 1:
            yield Group(tuple(found))


def _uris_of(
    store: InstanceStore, place: tuple[str, str], groups: Sequence[Sequence[int]]
) -> dict[int, str]:
    """URIs of rows by their number in the ledger, read a second time: hashes are small, these not.

    A row that has come or gone in between moves the numbers; the next call is right again.
    """
    wanted = {number for group in groups for number in group}
    if not wanted:
        return {}
    rows = enumerate(store.iter_images(*place, status="indexed"))
    return {number: row.uri for number, row in rows if number in wanted}
