"""How the command line starts, finds the apps, and ends when things go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import reir
from reir.cli import main
from reir.cli.common import photo_name, printable, printable_lines
from reir.errors import StoreError

START = [sys.executable, "-c", "from reir.cli.main import main; main()"]
HEAVY = ("numpy", "torch", "pymilvus", "ray", "transformers", "faiss", "PIL", "milvus_lite")

APP = """
import typer
from reir.errors import ConfigError, StoreError

def register(app):
    @app.command()
    def raises(kind: str) -> None:
        raise {
            "config": ConfigError("batch is 0"),
            "store": StoreError("no [bold] room\\u202e"),
            "os": PermissionError(13, "Permission denied", "out.png"),
            "interrupt": KeyboardInterrupt(),
            "bug": ZeroDivisionError("ours"),
        }[kind]

    @app.command()
    def imports() -> None:
        import reir_no_such_module

    @app.command()
    def works() -> None:
        typer.echo("worked")

    @app.command()
    def waits() -> None:
        import time
        typer.echo("waiting")
        time.sleep(60)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make modules importable and the entries of the group `reir.commands` found."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("REIR_DEBUG", raising=False)

    def install(module: str, source: str, **entries: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)
        found = [EntryPoint(name, value, main.APPS) for name, value in entries.items()]
        monkeypatch.setattr(main, "entry_points", lambda **_: found)

    return install


def test_import_is_light_and_so_is_help() -> None:
    code = (
        "import sys; from reir.cli import main as cli\n"
        "try: cli.main()\n"
        f"finally: print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "search", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Find the object that a sentence describes" in done.stdout
    assert done.stderr == "[]\n"


def test_help_starts_within_a_second_of_processor_time() -> None:
    code = (
        "import time; from reir.cli import main; main.run(['--help']); print(time.process_time())"
    )
    best = min(
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, check=True
            ).stdout.split()[-1]
        )
        for _ in range(3)
    )
    assert best < 1.0


def test_help_lists_the_commands_of_the_core_and_of_the_apps(
    capsys: pytest.CaptureFixture[str], install: Callable[..., None]
) -> None:
    install("reir_toy", APP, toy="reir_toy:register")
    assert main.run(["--help"]) == 0
    listed = {line.split()[1] for line in capsys.readouterr().out.splitlines() if "│ " in line}
    assert listed >= {"search", "eval", "doctor", "galleries", "versions", "promote", "rm"}
    assert listed >= {"failures", "works", "waits"}


@pytest.mark.parametrize(
    ("bf16", "amx", "path"),
    [
        (False, False, "fp32"),
        (False, True, "fp32"),
        (True, False, "bf16 (AVX-512)"),
        (True, True, "bf16 (AMX)"),
    ],
)
def test_version_says_how_models_compute(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bf16: bool,
    amx: bool,
    path: str,
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    assert main.run(["--version"]) == 0
    said = f"reir {reir.__version__}, models compute in {path} on this CPU\n"
    assert capsys.readouterr().out == said


def test_version_needs_no_torch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "reir.models.nano.encoder", None)
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"reir {reir.__version__}\n"


@pytest.mark.parametrize("arguments", [["serch"], ["search", "--no-such-option"], ["--nothing"]])
def test_wrong_commands_are_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(arguments) == 2
    assert "Usage: reir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("config", 2, "error: batch is 0\n"),
        ("store", 1, "error: no [bold] room\\u202e\n"),
        ("os", 1, "error: [Errno 13] Permission denied: 'out.png'\n"),
        ("interrupt", 130, ""),
    ],
)
def test_errors_end_in_one_line(
    kind: str,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    install: Callable[..., None],
) -> None:
    install("reir_toy", APP, toy="reir_toy:register")
    assert main.run(["raises", kind]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", said)


def test_a_list_of_problems_keeps_its_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.csv").write_text("photo,sentence\na.jpg,\nb.jpg,the \x1b cup\n")
    assert main.run(["eval", "rec", "--annotations", "pairs.csv", "--images", "."]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: pairs.csv has 3 problems, so nothing of it is used:",
        "  row 2: the photo 'a.jpg' is not in .",
        "  row 2: the sentence is empty (''); describe one object, e.g. 'the red mug'",
        "  row 3: the photo 'b.jpg' is not in .",
    ]


def test_a_bug_is_not_hidden(install: Callable[..., None]) -> None:
    install("reir_toy", APP, toy="reir_toy:register")
    with pytest.raises(ZeroDivisionError, match="ours"):
        main.run(["raises", "bug"])


@pytest.mark.parametrize("how", ["first", "last", "environment"])
def test_debug_lets_the_traceback_through(
    how: str, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("reir_toy", APP, toy="reir_toy:register")
    arguments = {
        "first": ["--debug", "raises", "store"],
        "last": ["raises", "store", "--debug"],
        "environment": ["raises", "store"],
    }[how]
    if how == "environment":
        monkeypatch.setenv("REIR_DEBUG", "1")
    with pytest.raises(StoreError, match="room"):
        main.run(arguments)


INDEX = """
import typer

def register(app):
    @app.command()
    def index(source: str, store: str = "default", runner: str = "ray") -> None:
        typer.echo(f"{source} {store} {runner}")
"""


def test_an_argument_named_like_an_option_is_no_subcommand(
    install: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install("reir_toy", INDEX, toy="reir_toy:register")
    (tmp_path / "config.yaml").write_text("index: {runner: local}\nschedule: {file: mine.yaml}\n")
    monkeypatch.setenv("REIR_CONFIG", str(tmp_path / "config.yaml"))
    assert main.run(["index", "store"]) == 0
    assert capsys.readouterr().out == "store default local\n"
    # The commands of a group do get their defaults from the section.
    monkeypatch.chdir(tmp_path)
    assert main.run(["schedule", "add", "night", "--cron", "0 3 * * *", "--", "doctor"]) == 0
    assert (tmp_path / "mine.yaml").exists()


def test_debug_behind_two_dashes_is_an_argument(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install("reir_toy", APP, toy="reir_toy:register")
    assert main.run(["works", "--", "--debug"]) == 2
    assert "--debug" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["import no_such_thing", "def other(app): ..."])
def test_an_app_that_does_not_import_leaves_the_others_alone(
    source: str, install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install("reir_broken", source, build="reir_broken:register")
    assert main.run(["--version"]) == 0
    assert main.run(["build", "x", "--with", "y"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: `reir build` cannot run: ")
    assert said.endswith("; pip install 'reir-platform[broken]'\n")
    assert main.run(["build", "--help"]) == 0
    assert "pip install 'reir-platform[broken]'" in capsys.readouterr().out


def test_a_module_missing_while_a_command_runs_names_the_extra_of_its_app(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install("reir_toy", APP, toy="reir_toy:register")
    assert main.run(["imports"]) == 1
    assert capsys.readouterr().err == (
        "error: No module named 'reir_no_such_module'; pip install 'reir-platform[toy]'\n"
    )


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [*START, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (main.FAILED, "")


def heed_ctrl_c() -> None:
    """A shell starts what runs in its background with Ctrl-C ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_is_clean(tmp_path: Path) -> None:
    (tmp_path / "reir_toy.py").write_text(APP)
    metadata = tmp_path / "toy-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[{main.APPS}]\ntoy = reir_toy:register\n")
    process = subprocess.Popen(
        [*START, "waits"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")


def test_photos_are_shown_as_paths_that_cannot_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert photo_name(f"file://{tmp_path}/a%20b/c.jpg") == "a b/c.jpg"
    assert photo_name("file:///x/%0A%1B%FF.jpg") == "/x/\\n\\x1b\\udcff.jpg"
    assert photo_name("s3://bucket/a%20b.jpg") == "s3://bucket/a%20b.jpg"
    assert printable("größe \u202e\n") == "größe \\u202e\\n"
    assert printable_lines("two\nlines\r\u202e") == "two\nlines\\r\\u202e"
