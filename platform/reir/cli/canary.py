"""`reir canary`: the expressions with known answers, by which versions of a gallery are judged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

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
from reir.errors import ConfigError

if TYPE_CHECKING:
    from reir.operations.canary import Canary
    from reir.operations.canary_make import MadeCanaries

KINDS = {"present": "in the gallery", "absent": "not in the gallery", "query": "not known"}


def register(app: typer.Typer) -> None:
    """Add the subcommands to the command line."""
    canary = typer.Typer(
        no_args_is_help=True,
        help="Expressions with known answers, by which `reir reindex` and `reir monitor` judge a "
        "gallery.",
    )
    canary.command("add")(add)
    canary.command("make")(make)
    canary.command("list")(list_canaries)
    canary.command("rm")(remove)
    app.add_typer(canary, name="canary", rich_help_panel="Galleries")


def add(
    gallery: Gallery,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help='JSON lines such as {"expression": "the red mug", "photo": "desk.jpg", "box": '
            '[0.1, 0.2, 0.4, 0.6]} or {"expression": "a giraffe", "absent": true}. A box is x1, '
            "y1, x2, y2 in [0, 1], and can be left out.",
        ),
    ],
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """Add canaries from a file to those of a gallery."""
    from reir.operations.canary import add_canaries, canaries_of, read_canaries, resolve_canaries
    from reir.query.search import check_gallery

    found = read_canaries(file)
    with connect(store) as opened:
        check_gallery(opened, gallery)
        # Nothing is added if one is wrong, so that the corrected file can be added as a whole.
        _, lost = resolve_canaries(opened, gallery, opened.live_version(gallery), found)
        if lost:
            raise ConfigError(
                f"gallery '{gallery}' does not have {plural(len(lost), 'photo')} of {file}, such "
                f"as {lost[0].uri}; index them first, or take these lines out"
            )
        added = add_canaries(opened, gallery, found)
        total = len(canaries_of(opened, gallery))
    if as_json:
        print_json({"gallery": gallery, "added": added, "total": total})
    else:
        output().print(f"Canaries added to gallery {gallery}: {added}. It has {total} now.")


def make(  # noqa: PLR0913, every argument is an option of the command
    gallery: Gallery,
    search_log: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of `reir serve --search-log`. Default: $REIR_HOME/searches.",
        ),
    ] = None,
    size: Annotated[
        int, typer.Option(min=0, help="Maximum number of canaries with a known answer.")
    ] = 200,
    queries: Annotated[
        int,
        typer.Option(
            min=0, help="Maximum number of searches without feedback, whose answer is not known."
        ),
    ] = 50,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the canaries to this file, as `reir canary add` reads it, instead of "
            "adding them.",
        ),
    ] = None,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """Make canaries from what users said about their searches; the newest are taken."""
    from reir.operations.canary import canaries_of, to_line
    from reir.operations.canary_make import add_made_canaries, make_canaries
    from reir.operations.search_log import default_folder
    from reir.query.search import check_gallery

    with connect(store) as opened:
        check_gallery(opened, gallery)
        made = make_canaries(
            opened, gallery, search_log or default_folder(), size=size, queries=queries
        )
        added = 0 if out else add_made_canaries(opened, gallery, made)
        total = len(canaries_of(opened, gallery))
    if out:
        out.write_text("".join(f"{to_line(each)}\n" for each in made), encoding="utf-8")
    if as_json:
        print_json(_made_values(gallery, made, added, total, out))
    else:
        _show_made(gallery, made, added, total, out)


def _made_values(
    gallery: str, made: MadeCanaries, added: int, total: int, out: Path | None
) -> dict[str, Any]:
    return {
        "gallery": gallery,
        "present": len(made.present),
        "absent": len(made.absent),
        "queries": len(made.queries),
        "lost_photos": made.num_lost,
        "left_out_of_tenants": made.num_of_tenants,
        "added": added,
        "total": total,
        "file": str(out) if out else None,
    }


def _show_made(gallery: str, made: MadeCanaries, added: int, total: int, out: Path | None) -> None:
    console = output()
    console.print(
        f"From the search log: {plural(len(made.present), 'object')} in the gallery, "
        f"{len(made.absent)} not in it, {len(made.queries)} without a known answer."
    )
    if made.num_lost:
        console.print(f"Left out: {plural(made.num_lost, 'photo')} no longer in the gallery.")
    if made.num_of_tenants:
        console.print(
            f"Left out: {plural(made.num_of_tenants, 'verdict')} 'absent' of keys with a tenant, "
            f"which see only a part of the gallery."
        )
    if out:
        console.print(f"Written to {out}; `reir canary add {gallery} {out}` adds them.")
    else:
        console.print(f"Canaries added to gallery {gallery}: {added}. It has {total} now.")


def list_canaries(
    gallery: Gallery,
    lines: Annotated[
        bool, typer.Option("--lines", help="Print the lines that `reir canary add` reads.")
    ] = False,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """List the canaries of a gallery."""
    from reir.operations.canary import canaries_of, to_line
    from reir.query.search import check_gallery

    with connect(store) as opened:
        check_gallery(opened, gallery)
        found = canaries_of(opened, gallery)
    if lines:
        for each in found:
            # Not by the console, which would wrap long lines, and read brackets as markup.
            typer.echo(to_line(each))
        return
    if as_json:
        print_json(
            [
                {"expression": c.expression, "kind": _kind(c), "uri": c.uri, "box": c.box}
                for c in found
            ]
        )
        return
    table = new_table("expression", "object is", "photo")
    for each in found:
        photo = photo_text(each.uri) if each.uri else ""
        table.add_row(Text(each.expression), KINDS[_kind(each)], photo)
    output().print(table)


def remove(
    gallery: Gallery,
    expression: Annotated[
        list[str] | None,
        typer.Option(help="Remove the canaries with this expression; repeatable."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all canaries.")] = False,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """Remove canaries from a gallery."""
    from reir.operations.canary import canaries_of, remove_canaries
    from reir.query.search import check_gallery

    if not expression and not everything:
        raise ConfigError("name the canaries to remove with --expression, or use --all")
    with connect(store) as opened:
        check_gallery(opened, gallery)
        found = canaries_of(opened, gallery)
        known = {each.expression for each in found}
        if unknown := [each for each in expression or () if each not in known]:
            raise ConfigError(
                f"gallery '{gallery}' has no canary {unknown[0]!r}; `reir canary list {gallery}` "
                f"lists them"
            )
        wanted = [each for each in found if everything or each.expression in (expression or ())]
        remove_canaries(opened, gallery, wanted)
    if as_json:
        print_json({"gallery": gallery, "removed": len(wanted)})
    else:
        output().print(f"Removed {len(wanted)} of {len(found)} canaries.")


def _kind(canary: Canary) -> str:
    if canary.is_present:
        return "present"
    return "absent" if canary.absent else "query"
