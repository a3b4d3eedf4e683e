"""`reir keys new`, `reir keys list` and `reir keys revoke`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reir.cli_common import AsJson, messages, new_table, output, print_json

File = Annotated[
    Path, typer.Option("--file", metavar="FILE", help="The file that `reir serve --keys` takes.")
]
DEFAULT_FILE = Path("keys.yaml")


def register(app: typer.Typer) -> None:
    """Add the subcommands to the command line."""
    keys = typer.Typer(no_args_is_help=True, help="API keys of `reir serve`.")
    keys.command("new")(new)
    keys.command("list")(list_keys)
    keys.command("revoke")(revoke)
    app.add_typer(keys, name="keys")


def new(
    read: Annotated[
        list[str] | None, typer.Option(help="Gallery that it may search, or '*'; repeat it.")
    ] = None,
    write: Annotated[
        list[str] | None, typer.Option(help="Gallery that it may also change, or '*'; repeat it.")
    ] = None,
    tenant: Annotated[
        str, typer.Option(help="See and add only photos with this attribute `tenant`.")
    ] = "",
    note: Annotated[str, typer.Option(help="For whom it is.")] = "",
    file: File = DEFAULT_FILE,
) -> None:
    """Make a key and print it: this once, since the file keeps only its hash."""
    from reir.errors import ConfigError
    from reir_serving.keys import new_key

    if not read and not write:
        raise ConfigError("a key without a gallery opens nothing; give --read or --write")
    token = new_key(
        file, read=tuple(read or ()), write=tuple(write or ()), tenant=tenant, note=note
    )
    messages().print(f"added to {file}; keep the key, it is not shown again")
    typer.echo(token)


def list_keys(file: File = DEFAULT_FILE, as_json: AsJson = False) -> None:
    """List the keys of a file, without their secrets."""
    from reir.config import load_config
    from reir_serving.keys import KeyFile

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
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="Its id, as `reir keys list` says.")],
    file: File = DEFAULT_FILE,
) -> None:
    """Take a key out of the file; servers that run refuse it a second later."""
    from reir_serving.keys import revoke_key

    revoke_key(file, key_id)
    messages().print(f"revoked {key_id}")
