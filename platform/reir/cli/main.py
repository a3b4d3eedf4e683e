"""`reir`: the command line.

The platform's own commands are in `reir.cli`. Each app adds commands through the entry-point group
`reir.commands`, whose entries are functions `register(app: typer.Typer) -> None`. Commands import
heavy packages only when they run, so that `reir --help` is fast.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

import reir
from reir.cli import (
    backup,
    canary,
    config,
    doctor,
    duplicates,
    erase,
    evaluate,
    feedback,
    galleries,
    localize,
    monitor,
    schedule,
    search,
)
from reir.cli.common import messages, printable_lines
from reir.errors import ConfigError, QueryError, ReirError
from reir.settings import command_defaults

APPS = "reir.commands"
FAILED, INVALID_USE, INTERRUPTED = 1, 2, 130
SECTION_OF_COMMAND = {
    "index": "index",
    "reindex": "index",
    "monitor": "monitor",
    "schedule": "schedule",
}
"""Sections of the settings whose keys are options of a command."""

EPILOG = (
    "[bold]Start here[/bold]\n\n"
    "reir index ~/Pictures --gallery photos\n\n"
    'reir search "the red mug left of the laptop" --gallery photos'
)


def main() -> None:
    """Run the command line; exit with 0, 1 (failed), 2 (invalid arguments) or 130 (Ctrl-C)."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; a `ReirError` is printed in red."""
    try:
        return _invoke(build_app(), _debug_first(arguments))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has closed the pipe. The interpreter flushes stdout once more at exit, which
        # would raise the error again, so stdout is redirected to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    # Any other exception is a bug, and keeps its traceback.
    except (ReirError, OSError, ModuleNotFoundError) as error:
        if logging.getLogger("reir").isEnabledFor(logging.DEBUG):
            raise
        messages().print(
            Text.assemble(("error: ", "bold red"), (printable_lines(_message_of(error)), "red")),
            soft_wrap=True,
        )
        return INVALID_USE if isinstance(error, ConfigError | QueryError) else FAILED


def build_app() -> typer.Typer:
    """Return the application: the platform's commands, then those of the installed apps."""
    app = typer.Typer(
        name="reir",
        help="Find the one object that a sentence describes, among millions of photos.",
        epilog=EPILOG,
        rich_markup_mode="rich",
        no_args_is_help=True,
        pretty_exceptions_enable=False,  # `run` prints errors
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for command in (
        search,
        localize,
        evaluate,
        doctor,
        galleries,
        duplicates,
        backup,
        canary,
        feedback,
        erase,
        monitor,
        schedule,
        config,
    ):
        command.register(app)
    for entry in sorted(entry_points(group=APPS), key=lambda entry: entry.name):
        _register(app, entry)
    return app


def _invoke(app: typer.Typer, arguments: Sequence[str]) -> int:
    try:
        app(arguments, prog_name="reir", default_map=_defaults(app, arguments))
    except SystemExit as stop:
        sys.stdout.flush()  # raises BrokenPipeError here, where `run` handles it
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _defaults(app: typer.Typer, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the defaults of the options of the command, as click takes them, from the settings.

    `reir serve` is not among these commands: most of its settings are no options.
    """
    words = [each for each in arguments if not each.startswith("-")]
    section = SECTION_OF_COMMAND.get(words[0]) if words else None
    # Help must appear even if the settings have an error.
    if section is None or not {"-h", "--help"}.isdisjoint(arguments):
        return {}
    values = command_defaults(section)
    if any(group.name == words[0] for group in app.registered_groups):
        # The commands of a group, such as `reir schedule start`, are one level deeper.
        values = {subcommand: values for subcommand in words[1:2]}
    return {words[0]: values}


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"reir {reir.__version__}{_cpu_arithmetic()}")
        raise typer.Exit


def _cpu_arithmetic() -> str:
    """Describe the arithmetic of models on this CPU; empty if torch does not import."""
    try:
        from reir.models.nano.encoder import cpu_path
    except (ImportError, OSError):
        return ""
    return f", models compute in {cpu_path()} on this CPU"


def _options(
    version: Annotated[  # noqa: ARG001, its callback does the work
        bool,
        typer.Option(
            "--version",
            help="Print the version, and the arithmetic that models use on this CPU.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", envvar="REIR_DEBUG", help="Show debug logs, and tracebacks of errors."
        ),
    ] = False,
) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    # On the handlers, because a filter of the root logger would not see records of its children.
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_ours_or_warning)
    logging.getLogger().setLevel(logging.DEBUG if debug else logging.WARNING)


def _is_ours_or_warning(record: logging.LogRecord) -> bool:
    """Whether to show a log record: libraries may log warnings and errors only."""
    return record.name.startswith("reir") or record.levelno >= logging.WARNING


def _debug_first(arguments: Sequence[str]) -> list[str]:
    """Accept `--debug` anywhere: move it in front of the command, where Typer expects it."""
    # What follows `--` belongs to the command, such as the arguments of a scheduled one.
    end = arguments.index("--") if "--" in arguments else len(arguments)
    rest = [each for each in arguments[:end] if each != "--debug"]
    return ["--debug"] * (len(rest) < end) + rest + list(arguments[end:])


def _register(app: typer.Typer, entry: EntryPoint) -> None:
    """Add the commands of an app, or one command that says why the app cannot be used."""
    # Apps are optional, and a broken one must not make the other commands unusable.
    try:
        register: Callable[[typer.Typer], None] = entry.load()
    except (ImportError, AttributeError) as error:
        _register_unavailable(app, entry, error)
    else:
        register(app)


def _register_unavailable(app: typer.Typer, entry: EntryPoint, error: Exception) -> None:
    problem = f"`reir {entry.name}` cannot run: {error}{_install_hint(entry.module)}"

    def unavailable() -> None:
        raise ReirError(problem)

    # The user should read the reason, and not that an option is unknown.
    anything = {"allow_extra_args": True, "ignore_unknown_options": True}
    help_text = escape(f"Not installed{_install_hint(entry.module)}")
    app.command(entry.name, help=help_text, context_settings=anything)(unavailable)


def _message_of(error: Exception) -> str:
    """Return the message of an error, with the package to install if a module is missing."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error}{_install_hint(_last_app(error.__traceback__))}"
    return str(error)


def _last_app(traceback: TracebackType | None) -> str:
    """Return the innermost module of an app in a traceback, or "reir".

    The extra of that app is the one to install.
    """
    module = "reir"
    while traceback is not None:
        name = str(traceback.tb_frame.f_globals.get("__name__", ""))
        module = name if name.startswith("reir_") else module
        traceback = traceback.tb_next
    return module


def _install_hint(module: str) -> str:
    """Return the command that installs what one of our modules needs; empty for other modules."""
    package = module.partition(".")[0]
    if package == "reir":
        return "; pip install --force-reinstall reir-platform"
    if package.startswith("reir_"):
        return f"; pip install 'reir-platform[{package.removeprefix('reir_')}]'"
    return ""
