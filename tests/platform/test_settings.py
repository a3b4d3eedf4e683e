"""Settings: what counts more than what, and where a value is said to be from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import Field

from reir.cli import main
from reir.config import StrictConfig
from reir.errors import ConfigError
from reir.settings import command_defaults, load_settings, sections, settings_file
from reir.store import default_location


class Limits(StrictConfig):
    low: int = 1
    high: int = Field(9, ge=0)


class Tool(StrictConfig):
    name: str = "x"
    sizes: tuple[int, ...] = ()
    limits: Limits = Limits()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REIR_HOME", str(tmp_path))
    monkeypatch.delenv("REIR_STORE", raising=False)
    return tmp_path


@pytest.fixture
def known_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A section "tool", as if an app had declared it."""

    class Entry:
        name = "tool"

        def load(self) -> type[Tool]:
            return Tool

    monkeypatch.setattr("reir.settings.entry_points", lambda **_: [Entry()])


def write(home: Path, text: str) -> Path:
    path = home / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.usefixtures("known_sections")
def test_each_layer_counts_more_than_the_one_below(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(home, "tool: {name: file, sizes: [1], limits: {low: 2, high: 20}}")
    extra = home / "extra.yaml"
    extra.write_text("sizes: [2]\nlimits: {low: 3}")
    monkeypatch.setenv("REIR_TOOL__LIMITS__LOW", "4")
    monkeypatch.setenv("REIR_TOOL__NAME", "environment")
    found = load_settings("tool", Tool, {"name": "option"}, extra)
    assert found.values == Tool(name="option", sizes=(2,), limits=Limits(low=4, high=20))
    assert list(found.rows()) == [
        ("name", "option", "command line"),
        ("sizes", [2], f"file {extra}"),
        ("limits.low", 4, "environment REIR_TOOL__LIMITS__LOW"),
        ("limits.high", 20, f"file {path}"),
    ]


@pytest.mark.usefixtures("known_sections")
def test_without_a_file_everything_is_the_default() -> None:
    found = load_settings("tool", Tool)
    assert found.values == Tool()
    assert {origin for _, _, origin in found.rows()} == {"default"}
    assert command_defaults("tool") == {}


@pytest.mark.usefixtures("known_sections")
def test_only_values_that_were_given_become_defaults_of_options(home: Path) -> None:
    write(home, "tool: {limits: {low: 2}}")
    assert command_defaults("tool") == {"limits": {"low": 2, "high": 9}}


@pytest.mark.usefixtures("known_sections")
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tool: {nam: x}", r"unknown key 'nam'; did you mean 'name'\? .*\(file .*config.yaml\)"),
        ("tool: {limits: {high: -1}}", r"'limits.high': got -1; .* \(file .*config.yaml\)"),
        ("tols: {}", r"unknown section 'tols' in .*config.yaml; did you mean 'tool'"),
        ("tool: [1]", "section 'tool' of .* must contain 'key: value' lines"),
        ("[1]", "must contain 'key: value' lines, got a list"),
        ("tool: {", "is not YAML"),
    ],
)
def test_mistakes_in_the_file_are_named(home: Path, text: str, problem: str) -> None:
    write(home, text)
    with pytest.raises(ConfigError, match=problem):
        load_settings("tool", Tool)


@pytest.mark.usefixtures("known_sections")
@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("REIR_TOOL__NAM", "x", r"unknown key 'nam'.*\(environment REIR_TOOL__NAM\)"),
        ("REIR_TOOL__LIMITS__HIGH", "abc", r"got 'abc'.*\(environment REIR_TOOL__LIMITS__HIGH\)"),
        ("REIR_TOOL__LIMITS__HIGH", "[", "REIR_TOOL__LIMITS__HIGH='\\[' is not YAML"),
        ("REIR_TOOL__NAME", "2026-02-30", "REIR_TOOL__NAME='2026-02-30' is not YAML: day is out"),
    ],
)
def test_mistakes_in_the_environment_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=problem):
        load_settings("tool", Tool)


def test_another_file_can_be_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = home / "other.yaml"
    monkeypatch.setenv("REIR_CONFIG", str(other))
    assert settings_file() == other
    with pytest.raises(ConfigError, match=r"REIR_CONFIG names .*other.yaml, which does not exist"):
        load_settings("tool", Tool)


def test_the_store_of_the_file_is_the_default(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_location() == str(home / "store")
    write(home, "store: http://milvus:19530")
    assert default_location() == "http://milvus:19530"
    monkeypatch.setenv("REIR_STORE", "memory:")
    assert default_location() == "memory:"


def test_the_apps_declare_their_sections() -> None:
    assert list(sections()) == ["index", "monitor", "schedule", "serve", "tracing"]


# ---------------------------------------------------------------------------------- the commands


def test_settings_are_shown_with_their_origin(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(home, "store: /data/store\nindex: {batch_size: 8}\n")
    monkeypatch.setenv("REIR_SERVE__LIMITS__PIXELS", "1000")
    assert main.run(["config", "show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["file"], shown["file_exists"]) == (str(path), True)
    origins = {row["key"]: (row["value"], row["origin"]) for row in shown["settings"]}
    assert origins["store"] == ("/data/store", f"file {path}")
    assert origins["index.batch_size"] == (8, f"file {path}")
    assert origins["serve.limits.pixels"] == (1000, "environment REIR_SERVE__LIMITS__PIXELS")
    assert origins["monitor.port"] == (9464, "default")
    assert main.run(["config", "show", "index", "--changed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["setting", "index.batch_size", "Settings"]
    assert main.run(["config", "show", "indx"]) == 2
    assert "did you mean 'index'" in capsys.readouterr().err


def test_a_variable_of_an_unknown_section_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REIR_SERV__PORT", "9000")
    for command in (["config", "show"], ["schedule", "list"]):
        assert main.run(command) == 2
        shown = capsys.readouterr().err
        assert "unknown section 'serv' in environment REIR_SERV__PORT" in shown
        assert "did you mean 'serve'?" in shown


def test_wrong_settings_stop_a_command_but_not_its_help(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(home, "monitor: {prt: 1}")
    assert main.run(["monitor", "--once"]) == 2
    assert "unknown key 'prt'; did you mean 'port'?" in capsys.readouterr().err
    for option in ("--help", "-h"):
        assert main.run(["monitor", option]) == 0
