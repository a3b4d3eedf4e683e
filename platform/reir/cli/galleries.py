"""`reir galleries`, `versions`, `promote`, `rollback`, `rm`, `failures`: manage galleries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from reir.cli.common import (
    AsJson,
    Gallery,
    Store,
    connect,
    messages,
    new_table,
    output,
    photo_text,
    plural,
    print_json,
    printable,
)
from reir.errors import ConfigError, GalleryNotFound, StoreDamaged, nearest_name

if TYPE_CHECKING:
    from reir.records import ImageRecord
    from reir.store.contract import InstanceStore, VersionInfo

PANEL = "Galleries"

Version = Annotated[
    str | None,
    typer.Option(help="Version, as listed by `reir versions`. Default: the live version."),
]


def register(app: typer.Typer) -> None:
    """Add the subcommands to the command line."""
    app.command("galleries", rich_help_panel=PANEL)(galleries)
    app.command("versions", rich_help_panel=PANEL, epilog=_example("versions photos"))(versions)
    app.command("promote", rich_help_panel=PANEL, epilog=_example("promote photos 4f1d22c09a7e"))(
        promote
    )
    app.command("rollback", rich_help_panel=PANEL, epilog=_example("rollback photos"))(rollback)
    app.command(
        "rm",
        rich_help_panel=PANEL,
        epilog=_example("rm photos --version 4f1d22c09a7e", "rm photos"),
    )(remove)
    app.command(
        "failures",
        rich_help_panel=PANEL,
        epilog=_example("failures photos", "failures photos --json"),
    )(failures)


def _example(*commands: str) -> str:
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"reir {each}" for each in commands)


def galleries(as_json: AsJson = False, store: Store = None) -> None:
    """List the galleries of the store, with the size of their live versions."""
    with connect(store) as opened:
        found = {name: opened.versions(name) for name in opened.galleries()}
    if as_json:
        print_json([_gallery_values(name, of_gallery) for name, of_gallery in found.items()])
        return
    if not found:
        messages().print("No galleries yet. Create one with `reir index SOURCE --gallery NAME`.")
        return
    counts = ("photos", "failed", "instances", "versions")
    table = new_table("gallery", "live version", *counts, right=counts)
    for name, of_gallery in found.items():
        values = _gallery_values(name, of_gallery)
        table.add_row(name, values["live"] or "none", *(_number(values[each]) for each in counts))
    output().print(table)


def _gallery_values(name: str, of_gallery: Sequence[VersionInfo]) -> dict[str, Any]:
    live = next((each for each in of_gallery if each.live), None)
    return {
        "gallery": name,
        "live": live.name if live else None,
        "photos": live.num_images if live else 0,
        "failed": live.num_failed if live else 0,
        "instances": live.num_instances if live else 0,
        "versions": len(of_gallery),
    }


def versions(gallery: Gallery, as_json: AsJson = False, store: Store = None) -> None:
    """List the versions of a gallery, oldest first."""
    with connect(store) as opened:
        found = _versions(opened, gallery)
    if as_json:
        print_json([asdict(each) for each in found])
        return
    counts = ("photos", "failed", "instances")
    table = new_table("version", "", *counts, "checkpoint", "settings", right=counts)
    for each in found:
        sizes = (each.num_images, each.num_failed, each.num_instances)
        table.add_row(
            each.name,
            Text("live", style="bold green") if each.live else "",
            *map(_number, sizes),
            each.spec.digest[:12],
            ", ".join(f"{name} {value}" for name, value in each.spec.settings.items()),
        )
    output().print(table)


def promote(
    gallery: Gallery,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="The version to make live.")],
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """Make a version the live one, which searches use.

    Running servers and open galleries use it from their next search on.
    """
    from reir.operations.live_history import make_live

    with connect(store) as opened:
        _check_version(opened, gallery, version)
        before = make_live(opened, gallery, version, by="reir promote")
    if as_json:
        print_json({"gallery": gallery, "live": version, "was": before or None})
    elif before in ("", version):
        output().print(f"Version {version} of gallery {gallery} is live.")
    else:
        output().print(
            f"Version {version} of gallery {gallery} is live; go back with: reir rollback {gallery}"
        )


def rollback(gallery: Gallery, as_json: AsJson = False, store: Store = None) -> None:
    """Make the version live that was live before the current one.

    Running servers and open galleries use it from their next search on. Photos that were indexed
    after the switch are missing from it until `reir index` runs again.
    """
    from reir.operations.live_history import roll_back

    with connect(store) as opened:
        try:
            before, live = roll_back(opened, gallery)
        except GalleryNotFound:
            _versions(opened, gallery)  # its message names the galleries that exist
            raise
    if as_json:
        print_json({"gallery": gallery, "live": live, "was": before})
    else:
        output().print(
            f"Version {live} of gallery {gallery} is live again, instead of {before}; "
            f"to undo this:  reir promote {gallery} {before}"
        )


def remove(
    gallery: Gallery,
    version: Annotated[
        str | None, typer.Option(help="Delete only this version, which must not be live.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """Delete a gallery, or one version of it.

    The photo files themselves are not deleted.
    """
    from reir.operations.documents import delete_gallery

    if as_json and not yes:
        raise ConfigError("`reir rm --json` cannot ask for confirmation; add --yes")
    with connect(store) as opened:
        deleted, size = _versions_to_delete(opened, gallery, version)
        what = (
            f"gallery {gallery}" if version is None else f"version {version} of gallery {gallery}"
        )
        if not yes:  # asks on standard error, because standard output is for the result
            typer.confirm(f"Delete {what} ({size})?", abort=True, err=True)
        if version is None:
            delete_gallery(opened, gallery)
        else:
            opened.drop_version(gallery, version)
    if as_json:
        print_json({"gallery": gallery, "removed": deleted})
    else:
        output().print(f"Deleted {what} ({size}).")


def _versions_to_delete(
    store: InstanceStore, gallery: str, version: str | None
) -> tuple[list[str], str]:
    """Return the versions to delete, and their size in words.

    A damaged gallery can be deleted too, although its versions cannot be read.
    """
    try:
        found = _versions(store, gallery)
        if version is not None:
            _check_version(store, gallery, version)
    except StoreDamaged:
        return ([] if version is None else [version]), "damaged"
    found = [each for each in found if version in (None, each.name)]
    num_photos = sum(each.num_images for each in found)
    num_instances = sum(each.num_instances for each in found)
    size = f"{plural(num_photos, 'photo')}, {plural(num_instances, 'instance')}"
    return [each.name for each in found], size


def failures(
    gallery: Gallery,
    version: Version = None,
    limit: Annotated[
        int, typer.Option(min=0, help="Maximum number of photos to list; 0 lists all.")
    ] = 50,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """List the photos that could not be indexed, and why.

    The last line counts them by reason. `reir index` tries a failed photo again once its file
    changes, or with --retry-failed.
    """
    with connect(store) as opened:
        version = version_or_live(opened, gallery, version)
        failed = list(opened.iter_images(gallery, version, status="failed"))
    reasons = dict(Counter(record.reason for record in failed).most_common())
    if as_json:
        listed = [asdict(record) for record in failed]
        print_json({"gallery": gallery, "version": version, "reasons": reasons, "failures": listed})
    elif not failed:
        output().print(f"No failures in version {version} of gallery {gallery}.")
    else:
        _print_failures(failed, reasons, limit or len(failed))


def _print_failures(failed: Sequence[ImageRecord], reasons: dict[str, int], limit: int) -> None:
    table = new_table("photo", "reason", "detail")
    for record in islice(failed, limit):
        table.add_row(photo_text(record.uri), record.reason, printable(record.detail))
    screen = output()
    screen.print(table)
    if len(failed) > limit:
        more = f"... and {_number(len(failed) - limit)} more; use --limit 0 to list all"
        screen.print(more, style="dim")
    summary = ", ".join(f"{reason} {_number(num)}" for reason, num in reasons.items())
    screen.print(f"\n{_number(len(failed))} failed: {summary}", style="bold")


def _versions(store: InstanceStore, gallery: str) -> list[VersionInfo]:
    """Return the versions of a gallery.

    Raises:
        GalleryNotFound: there is no such gallery; the message names the others.
    """
    from reir.query.search import check_gallery

    check_gallery(store, gallery)
    return store.versions(gallery)


def version_or_live(store: InstanceStore, gallery: str, version: str | None) -> str:
    """Return the version that an option names; without the option, the live version.

    Raises:
        GalleryNotFound: there is no such gallery or version; the message names the others.
    """
    if version is None:
        _versions(store, gallery)
        return store.live_version(gallery)
    _check_version(store, gallery, version)
    return version


def _check_version(store: InstanceStore, gallery: str, version: str) -> None:
    """Raise `GalleryNotFound` if the gallery has no such version."""
    known = [each.name for each in _versions(store, gallery)]
    if version not in known:
        raise GalleryNotFound(
            f"gallery '{gallery}' has no version '{version}': it has {', '.join(known)}"
            f"{nearest_name(version, known)}"
        )


def _number(value: int) -> str:
    return f"{value:,}"
