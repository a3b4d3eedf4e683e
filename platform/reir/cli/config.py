"""`reir config`: the settings that commands use, and where each comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from reir.cli.common import AsJson, new_table, output, print_json
from reir.errors import ConfigError, nearest_name


def register(app: typer.Typer) -> None:
    """Add the subcommands to the command line."""
    config = typer.Typer(
        no_args_is_help=True,
        help="Settings of index, reindex, serve, monitor and schedule: from the command line, the "
        "environment, the settings file, or the default, in this order.",
    )
    config.command("show")(show)
    app.add_typer(config, name="config", rich_help_panel="Operation")


def show(
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="Section to show. Default: all.")
    ] = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Show only settings that are not the default.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The file that `reir serve --config` gets, for its section."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show every setting, its value, and where the value comes from.

    Options of a command line count more than what is shown here.
    """
    from reir.settings import DEFAULT, sections, settings_file

    known = sections()
    if section is not None and section not in known:
        raise ConfigError(
            f"there is no section '{section}'{nearest_name(section, known) or ';'} sections: "
            f"{', '.join(known)}"
        )
    # The store is a setting of all commands, and belongs to no section.
    rows = [] if section else [_store()]
    for name, model in known.items():
        if section in (None, name):
            rows += _rows(name, model, config if name == "serve" else None)
    if changed:
        rows = [row for row in rows if row["origin"] != DEFAULT]
    path = settings_file()
    if as_json:
        print_json({"file": str(path), "file_exists": path.exists(), "settings": rows})
        return
    table = new_table("setting", "value", "from")
    for row in rows:
        origin = str(row["origin"])
        table.add_row(
            row["key"],
            Text(json.dumps(row["value"])),
            Text(origin, style="dim" if origin == DEFAULT else "bold"),
        )
    output().print(table)
    output().print(f"Settings file: {path}{'' if path.exists() else ' (does not exist)'}")


def _store() -> dict[str, Any]:
    from reir.settings import DEFAULT, STORE, store_setting
    from reir.store import default_location

    named = store_setting()
    return {
        "key": STORE,
        "value": default_location(),
        "origin": DEFAULT if named is None else named[1],
    }


def _rows(name: str, model: Any, extra_file: Path | None) -> list[dict[str, Any]]:
    from reir.settings import load_settings

    return [
        {"key": f"{name}.{key}", "value": value, "origin": origin}
        for key, value, origin in load_settings(name, model, extra_file=extra_file).rows()
    ]
