"""`reir`: the command line.

The core's commands are in `reir.cli_*`; every app adds its own through the entry-point group
`reir.commands`, whose entries are functions `register(app: typer.Typer) -> None`. Commands import
what is heavy when they run, so that `reir --help` is instant.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from types import TracebackType
from typing import Annotated

import typer
from rich.markup import escape
from rich.text import Text

import reir
from reir import cli_doctor, cli_duplicates, cli_galleries, cli_search, eval_cli
from reir.cli_common import messages, printable
from reir.errors import ConfigError, QueryError, ReirError

APPS = "reir.commands"
FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130
EPILOG = (
    "[bold]Start here[/bold]\n\n"
    "reir index ~/Pictures --gallery photos\n\n"
    'reir search "the red mug left of the laptop" --gallery photos'
)


def main() -> None:
    """Run the command line and exit: 0, 1 (failed), 2 (wrong use), 130 (Ctrl-C)."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; errors of the platform become one red line."""
    try:
        return _invoke(build_app(), _debug_first(arguments))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has gone; what the interpreter still flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ReirError, OSError, ModuleNotFoundError) as error:
        if logging.getLogger("reir").isEnabledFor(logging.DEBUG):
            raise
        messages().print(
            Text.assemble(("error: ", "bold red"), (printable(_told(error)), "red")), soft_wrap=True
        )
        return WRONG_USE if isinstance(error, ConfigError | QueryError) else FAILED


def build_app() -> typer.Typer:
    """Return the application: the core's commands, then those of the installed apps."""
    app = typer.Typer(
        name="reir",
        help="Find the one object that a sentence describes, among millions of photos.",
        epilog=EPILOG,
        rich_markup_mode="rich",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for core in (cli_search, eval_cli, cli_doctor, cli_galleries, cli_duplicates):
        core.register(app)
    for entry in sorted(entry_points(group=APPS), key=lambda entry: entry.name):
        _register(app, entry)
    return app


def _invoke(app: typer.Typer, arguments: Sequence[str]) -> int:
    try:
        app(arguments, prog_name="reir")
    except SystemExit as done:
        sys.stdout.flush()  # a closed pipe is noticed here, not at the interpreter's end
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"reir {reir.__version__}{_on_this_cpu()}")
        raise typer.Exit


def _on_this_cpu() -> str:
    """Describe how models compute here; empty if torch is not usable, which `doctor` explains."""
    try:
        from reir.models.nano_encoder import cpu_path
    except (ImportError, OSError):
        return ""
    return f", models compute in {cpu_path()} on this CPU"


def _options(
    version: Annotated[  # noqa: ARG001, its callback does the work
        bool,
        typer.Option(
            "--version",
            help="Print the version and how models compute here.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="REIR_DEBUG", help="Show log lines and tracebacks.")
    ] = False,
) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_ours_or_grave)
    logging.getLogger().setLevel(logging.DEBUG if debug else logging.WARNING)


def _is_ours_or_grave(record: logging.LogRecord) -> bool:
    """Whether a log line is for the user: libraries are heard from warnings on."""
    return record.name.startswith("reir") or record.levelno >= logging.WARNING


def _debug_first(arguments: Sequence[str]) -> list[str]:
    """Let `--debug` stand anywhere: move it in front of the command, where it belongs."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    rest = [each for each in arguments[:end] if each != "--debug"]
    return ["--debug"] * (len(rest) < end) + rest + list(arguments[end:])


def _register(app: typer.Typer, entry: EntryPoint) -> None:
    """Add the commands of an app, or one that says why the app cannot be used."""
    try:
        register: Callable[[typer.Typer], None] = entry.load()
    except (ImportError, AttributeError) as error:
        _register_unavailable(app, entry, error)
    else:
        register(app)


def _register_unavailable(app: typer.Typer, entry: EntryPoint, error: Exception) -> None:
    problem = f"`reir {entry.name}` cannot run: {error}{_remedy(entry.module)}"

    def unavailable() -> None:
        raise ReirError(problem)

    anything = {"allow_extra_args": True, "ignore_unknown_options": True}
    help_text = escape(f"Not installed{_remedy(entry.module)}")
    app.command(entry.name, help=help_text, context_settings=anything)(unavailable)


def _told(error: Exception) -> str:
    """Return what a person is told of an error."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error}{_remedy(_last_app(error.__traceback__))}"
    return str(error)


def _last_app(traceback: TracebackType | None) -> str:
    """Return the module of the app that ran last, or the core's."""
    module = "reir"
    while traceback is not None:
        name = str(traceback.tb_frame.f_globals.get("__name__", ""))
        module = name if name.startswith("reir_") else module
        traceback = traceback.tb_next
    return module


def _remedy(module: str) -> str:
    """Return what to install so that a module of ours works; empty for others."""
    package = module.partition(".")[0]
    if package == "reir":
        return "; pip install --force-reinstall reir-platform"
    if package.startswith("reir_"):
        return f"; pip install 'reir-platform[{package.removeprefix('reir_')}]'"
    return ""
