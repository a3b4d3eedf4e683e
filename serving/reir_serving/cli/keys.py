"""The subcommands `reir keys new`, `reir keys list` and `reir keys revoke`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reir.cli.common import AsJson, messages, new_table, output, print_json

File = Annotated[
    Path,
    typer.Option("--file", metavar="FILE", help="File with the keys, for `reir serve --keys`."),
]
DEFAULT_FILE = Path("keys.yaml")


def register(app: typer.Typer) -> None:
    """Add the subcommands to the command line."""
    keys = typer.Typer(
        no_args_is_help=True, help="Create, list and revoke API keys for `reir serve`."
    )
    keys.command("new")(new)
    keys.command("list")(list_keys)
    keys.command("revoke")(revoke)
    app.add_typer(keys, name="keys")


def new(
    read: Annotated[
        list[str] | None,
        typer.Option(help="Gallery that the key may search; repeat it for several; '*' for all."),
    ] = None,
    write: Annotated[
        list[str] | None,
        typer.Option(
            help="Gallery that the key may search and change; repeat it for several; '*' for all."
        ),
    ] = None,
    tenant: Annotated[
        str,
        typer.Option(help="Restrict the key to photos whose attribute `tenant` has this value."),
    ] = "",
    note: Annotated[str, typer.Option(help="Note for you, such as who uses the key.")] = "",
    file: File = DEFAULT_FILE,
) -> None:
    """Create a key and print it. It cannot be printed again: the file contains only its hash."""
    from reir.errors import ConfigError
    from reir_serving.middleware.keys import new_key

    if not read and not write:
        raise ConfigError("a key needs at least one gallery; add --read GALLERY or --write GALLERY")
    token = new_key(
        file, read=tuple(read or ()), write=tuple(write or ()), tenant=tenant, note=note
    )
    messages().print(f"added the key to {file}; save it now, it cannot be shown again")
    typer.echo(token)


def list_keys(file: File = DEFAULT_FILE, as_json: AsJson = False) -> None:
    """List the keys in a file: their ids, galleries and notes, but not the secrets."""
    from reir.config import load_config
    from reir_serving.middleware.keys import KeyFile

    entries = load_config(KeyFile, file).keys
    if as_json:
        print_json([entry.model_dump(mode="json", exclude={"salt", "hash"}) for entry in entries])
        return
    table = new_table("key", "read", "write", "tenant", "created", "note")
    for entry in entries:
        read, write = ", ".join(entry.read), ", ".join(entry.write)
        table.add_row(entry.id, read, write, entry.tenant, entry.created, entry.note)
    output().print(table)


def revoke(
    key_id: Annotated[
        str, typer.Argument(metavar="ID", help="Id of the key; see `reir keys list`.")
    ],
    file: File = DEFAULT_FILE,
) -> None:
    """Remove a key from the file. Running servers reject it within a second."""
    from reir_serving.middleware.keys import revoke_key

    revoke_key(file, key_id)
    messages().print(f"revoked the key {key_id}")
