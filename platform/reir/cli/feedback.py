"""`reir feedback`: says what is right or wrong about a search, and exports what users said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from reir.cli.common import AsJson, Gallery, Store, connect, output, plural, print_json
from reir.errors import ConfigError, ServerError

if TYPE_CHECKING:
    from reir.operations.feedback import Verdict
    from reir.operations.feedback.export import FeedbackExport

GIVE = "give"

EXAMPLES = """[bold]Examples[/bold]

reir feedback photos "the red mug" --right 0123456789abcdef0123#4

reir feedback photos "the red mug" --box 0123456789abcdef0123 0.2 0.3 0.4 0.6

reir feedback photos "a giraffe" --absent

reir feedback export photos feedback.json"""

REASONS = {
    "replaced": "replaced by a later verdict of the same user",
    "outvoted": "no majority of the users agrees",
    "wrong": "says only that a hit is wrong",
    "absent": "says that the object is not in the gallery",
    "photo gone": "the photo is no longer in the gallery",
    "remote": "the photo is not a file of this machine",
}

Folder = Annotated[
    Path | None,
    typer.Option(
        "--search-log",
        metavar="FOLDER",
        help="Folder of `reir serve --search-log`. Default: $REIR_HOME/searches.",
    ),
]


class _GiveUnlessNamed(TyperGroup):
    """A group of commands in which `give` does not have to be written."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert `give` before the name of a gallery."""
        # A gallery whose name is that of a command can be reached only if `give` is written out.
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = [GIVE, *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Add the subcommands to the command line."""
    feedback = typer.Typer(
        cls=_GiveUnlessNamed,
        no_args_is_help=True,
        epilog=EXAMPLES,
        rich_markup_mode="rich",
        help="Say what is right or wrong about a search, and export what users said.",
    )
    feedback.command(GIVE)(give)
    feedback.command("export")(export)
    app.add_typer(feedback, name="feedback", rich_help_panel="Galleries")


def give(  # noqa: PLR0913, every argument is an option of the command
    gallery: Gallery,
    expression: Annotated[
        str, typer.Argument(metavar="EXPRESSION", help="What was searched for, in quotes.")
    ],
    right: Annotated[
        str | None,
        typer.Option(metavar="INSTANCE", help="Id of the instance that the expression describes."),
    ] = None,
    wrong: Annotated[
        str | None,
        typer.Option(metavar="INSTANCE", help="Id of an instance that it does not describe."),
    ] = None,
    absent: Annotated[
        bool, typer.Option("--absent", help="What it describes is not in the gallery.")
    ] = False,
    box: Annotated[
        tuple[str, float, float, float, float] | None,
        typer.Option(
            metavar="IMAGE X1 Y1 X2 Y2",
            help="What it describes is in this box of the photo with this id; sides in [0, 1].",
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(help="Address of a server that records it, instead of this machine."),
    ] = None,
    search_log: Folder = None,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """Say what is right or wrong about the answer to a search; `give` can be left out."""
    from reir.operations.feedback.local import give_feedback
    from reir.operations.search_log import default_folder

    verdict = _verdict(right, wrong, box, absent=absent)
    image_id, *sides = box or ("", 0.0, 0.0, 0.0, 0.0)
    x1, y1, x2, y2 = map(float, sides)
    about: dict[str, Any] = {
        "instance_id": right or wrong or "",
        "image_id": image_id,
        "box": (x1, y1, x2, y2) if box else None,
    }
    if server is not None:
        from reir.client.http_client import Client

        with Client(server) as client:
            recorded = client.feedback(gallery, expression, verdict, **about)
        if not recorded:
            raise ServerError(f"server {server} cannot write feedback at the moment; try again")
    else:
        with connect(store) as opened:
            folder = search_log or default_folder()
            give_feedback(opened, gallery, folder, expression, verdict, **about)
    if as_json:
        print_json({"gallery": gallery, "verdict": verdict, "recorded": True})
    else:
        output().print(f"Recorded: {verdict}.")


def _verdict(
    right: str | None, wrong: str | None, box: tuple[object, ...] | None, *, absent: bool
) -> Verdict:
    """Return the verdict that one of the options gives.

    Raises:
        ConfigError: none of them or several are given.
    """
    given: dict[Verdict, object] = {"right": right, "wrong": wrong, "absent": absent, "box": box}
    verdicts = [verdict for verdict, value in given.items() if value]
    if len(verdicts) != 1:
        told = " and ".join(f"--{verdict}" for verdict in verdicts) or "none of them"
        raise ConfigError(f"give one of --right, --wrong, --absent and --box, got {told}")
    return verdicts[0]


def export(
    gallery: Gallery,
    out: Annotated[Path, typer.Argument(metavar="OUT.json", help="File to write.")],
    search_log: Folder = None,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """Write what users said as a data set in REIRCOCO's format.

    It has the boxes of right hits and the boxes that users drew. If users contradict each other,
    the majority counts, and of each user the last verdict.
    """
    from reir.operations.feedback.export import export_feedback
    from reir.operations.search_log import default_folder
    from reir.query.search import check_gallery

    with connect(store) as opened:
        check_gallery(opened, gallery)
        found = export_feedback(opened, gallery, search_log or default_folder(), out)
    if as_json:
        print_json({"gallery": gallery, "file": str(out), **found.to_dict()})
    else:
        _show_export(found, out)


def _show_export(found: FeedbackExport, out: Path) -> None:
    console = output()
    console.print(
        f"Written to {out}: {plural(found.num_expressions, 'expression')} of "
        f"{plural(found.num_instances, 'instance')} in {plural(found.num_photos, 'photo')}, from "
        f"{found.num_used} of {plural(found.num_feedback, 'verdict')}."
    )
    console.print(f"The file names are relative to {found.photos}.", markup=False)
    for reason, number in found.left_out.items():
        console.print(f"Left out: {number:,} ({REASONS[reason]}).")
