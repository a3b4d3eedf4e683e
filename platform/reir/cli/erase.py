"""`reir erase`: delete photos for good, with a receipt."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reir.cli.common import AsJson, Store, connect, messages, output, plural, print_json
from reir.errors import ConfigError

if TYPE_CHECKING:
    from reir.operations.erase.places import ErasePlaces
    from reir.operations.erase.receipts import Receipt
    from reir.store.contract import InstanceStore

EXAMPLES = """[bold]Examples[/bold]

reir erase photos --photo ~/Pictures/party.jpg

reir erase photos --tenant acme --yes --receipt acme.json

reir erase photos --where 'attr.person == "J. Doe"'

reir erase --verify acme.json"""

REMAINS = 1

Uploads = Annotated[
    Path | None,
    typer.Option(help="Folder of uploaded photos. Default: that of the settings of serve."),
]
SearchLog = Annotated[
    Path | None,
    typer.Option(help="Folder of the search log. Default: that of the settings of serve."),
]


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    app.command("erase", epilog=EXAMPLES, rich_help_panel="Galleries")(erase)


def erase(  # noqa: PLR0913, every argument is an option of the command
    gallery: Annotated[
        str | None, typer.Argument(metavar="GALLERY", help="Name of the gallery.")
    ] = None,
    photo: Annotated[
        list[str] | None,
        typer.Option(help="Path, URI or image id of a photo to erase; repeatable."),
    ] = None,
    tenant: Annotated[str, typer.Option(help="Erase all photos of this tenant.")] = "",
    where: Annotated[
        str,
        typer.Option(
            help="Erase all photos whose attributes fit, such as 'attr.person == \"J. Doe\"'."
        ),
    ] = "",
    receipt: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="New file for the receipt. Default: in $REIR_HOME/receipts."
        ),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Erase nothing; check that nothing is left of what this receipt says.",
        ),
    ] = None,
    uploads: Uploads = None,
    search_log: SearchLog = None,
    log: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Log file to clean, besides the access log of the settings of serve; repeatable.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Erase without asking.")] = False,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """Erase photos from all versions, uploads, logs and canaries, and write a receipt.

    Photos with the same content and tenant are erased, too. `reir index` leaves out what was
    erased, even if the source still contains it. The files in the source itself are not deleted,
    and backups made earlier still contain the photos.
    """
    from reir.operations.erase.erase import is_interrupted
    from reir.operations.erase.places import default_places

    found = default_places()
    places = replace(
        found,
        uploads=uploads or found.uploads,
        search_log=search_log or found.search_log,
        logs=(*found.logs, *(log or ())),
    )
    with connect(store) as opened:
        if verify is not None:
            _verify(opened, verify, places, as_json=as_json)
            return
        scope_options = (tuple(photo or ()), tenant, where)
        if as_json and not yes:
            raise ConfigError("`reir erase --json` cannot ask for confirmation; add --yes")
        if gallery is None:
            raise ConfigError("name the gallery: `reir erase GALLERY --photo PATH`")
        files = _ReceiptFiles(receipt, is_interrupted=is_interrupted(opened, gallery))
        made = _erase(opened, gallery, scope_options, places, files.write, ask=not yes)
    _show(made, files.written, as_json=as_json)


class _ReceiptFiles:
    """Writes receipts to files: more than one if an interrupted erasure is finished, too.

    Attributes:
        written: the files.
    """

    def __init__(self, named: Path | None, *, is_interrupted: bool) -> None:
        """Check that a file can be written to `named`, or to the folder of receipts.

        Args:
            named: value of `--receipt`.
            is_interrupted: whether an interrupted erasure is to be finished.
        """
        from reir.operations.erase.receipts import check_receipt_file

        self._named, self.written = named, list[Path]()
        # The store does not keep all hashes of a large erasure, so they would be lost. The number
        # of the receipt is not known yet, and so its default name neither.
        path = named or _receipts_folder() / f".check-{os.getpid()}"
        check_receipt_file(path, is_interrupted=is_interrupted)

    def write(self, receipt: Receipt) -> None:
        """Write a receipt."""
        from reir.operations.erase.receipts import write_receipt

        name = f"{receipt.gallery}-{receipt.number:08d}.json"
        self.written.append(write_receipt(self._named or _receipts_folder() / name, receipt))


def _erase(  # noqa: PLR0913, nearly every argument is an option of the command
    store: InstanceStore,
    gallery: str,
    scope_options: tuple[tuple[str, ...], str, str],
    places: ErasePlaces,
    on_receipt: Callable[[Receipt], None],
    *,
    ask: bool,
) -> Receipt:
    from reir.operations.erase.erase import erase as run
    from reir.operations.erase.erase import is_interrupted
    from reir.operations.erase.selection import EraseScope, select_photos
    from reir.query.search import check_gallery

    photos, tenant, where = scope_options
    scope = EraseScope(photos=photos, tenant=tenant, where=where)
    check_gallery(store, gallery)
    if ask:
        if is_interrupted(store, gallery):
            messages().print("An erasure of this gallery was interrupted; it is finished, too.")
        # A photo counts once, even if several versions have it.
        meant = {key for rows in select_photos(store, gallery, scope).values() for key in rows}
        typer.confirm(
            f"Erase {plural(len(meant), 'photo')} of gallery {gallery} for good?",
            abort=True,
            err=True,
        )
    return run(store, gallery, scope, places, on_step=_show_step, on_receipt=on_receipt)


def _show_step(step: str) -> None:
    messages().print(f"Erasing: {step}")


def _receipts_folder() -> Path:
    from reir.config import reir_home

    return reir_home() / "receipts"


def _show(receipt: Receipt, written: list[Path], *, as_json: bool) -> None:
    *earlier, path = written
    for other in earlier:
        messages().print(
            f"Receipt of the erasure that was interrupted: {other}", soft_wrap=True, markup=False
        )
    if as_json:
        print_json({"receipt": str(path), **asdict(receipt)})
        return
    screen = output()
    for version, number in receipt.photos.items():
        instances = receipt.instances[version]
        screen.print(
            f"version {version}: {plural(number, 'photo')} with {plural(instances, 'instance')}"
        )
    counts = {
        "uploaded file": receipt.uploads,
        "logged search": receipt.search_events,
        "log line": receipt.log_lines,
        "source": receipt.sources,
        "report": receipt.reports,
    }
    others = [plural(number, what) for what, number in counts.items() if number]
    if receipt.canaries:
        others.append(f"canaries: {receipt.canaries}")
    if others:
        screen.print(f"besides: {', '.join(others)}")
    if not receipt.is_gone_from_disk:
        screen.print("The Milvus server deletes its old files when it collects garbage.")
    screen.print(f"Receipt: {path}", soft_wrap=True)
    screen.print(f"To check it:  reir erase --verify {path}", soft_wrap=True)
    screen.print(
        f"Backups written before still contain what was erased; `reir backup {receipt.gallery} "
        f"--list` shows the last ones.",
        soft_wrap=True,
    )


def _verify(store: InstanceStore, file: Path, places: ErasePlaces, *, as_json: bool) -> None:
    from reir.operations.erase.receipts import read_receipt
    from reir.operations.erase.verify import verify_receipt

    receipt = read_receipt(file)
    found = list(verify_receipt(store, receipt, places))
    if as_json:
        print_json({"is_clean": not found, "findings": [asdict(each) for each in found]})
    elif not found:
        output().print(
            f"Nothing is left of what receipt {receipt.number} of gallery {receipt.gallery} says "
            f"was erased."
        )
    else:
        for each in found:
            output().print(f"{each.what}\n  -> {each.advice}", markup=False, soft_wrap=True)
    if found:
        raise typer.Exit(REMAINS)
