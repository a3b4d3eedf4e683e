"""Every command takes its settings from the file, the environment and the command line.

In this order: each counts more than the one before. The commands run as a user types them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from reir.cli import main
from reir_testing import FakeEncoder
from reir_testing.ingestion import write_scenes
from reir_testing.serving import free_port

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REIR_HOME", str(tmp_path))
    monkeypatch.delenv("REIR_STORE", raising=False)
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _: FakeEncoder())
    return tmp_path


@pytest.fixture
def set_file(home: Path) -> Callable[..., None]:
    def write(**sections: Any) -> None:
        (home / "config.yaml").write_text(json.dumps(sections))

    return write


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "photos", 8)
    return tmp_path / "photos"


def batch_sizes(events: Path) -> set[int]:
    records = [json.loads(line) for line in events.read_text().splitlines()]
    return {each["images"] for each in records if each["event"] == "batch"}


def test_index(
    photos: Path, home: Path, set_file: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_file(store=str(home / "mine"), index={"batch_size": 4, "events": str(home / "file")})
    assert main.run(["index", str(photos), "--gallery", "a"]) == 0
    assert batch_sizes(home / "file") == {4}
    assert (home / "mine").is_dir(), "the file names the store, too"
    monkeypatch.setenv("REIR_INDEX__BATCH_SIZE", "2")
    monkeypatch.setenv("REIR_INDEX__EVENTS", str(home / "environment"))
    assert main.run(["index", str(photos), "--gallery", "b"]) == 0
    assert batch_sizes(home / "environment") == {2}
    options = ["--batch-size", "8", "--events", str(home / "option")]
    assert main.run(["index", str(photos), "--gallery", "c", *options]) == 0
    assert batch_sizes(home / "option") == {8}


def test_reindex(
    photos: Path, home: Path, set_file: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main.run(["index", str(photos), "--gallery", "a"]) == 0
    set_file(index={"events": str(home / "file")})
    assert main.run(["reindex", "a"]) == 0
    assert sum(batch_sizes(home / "file")) == 8
    monkeypatch.setenv("REIR_INDEX__EVENTS", str(home / "environment"))
    assert main.run(["reindex", "a"]) == 0
    assert sum(batch_sizes(home / "environment")) == 8
    assert main.run(["reindex", "a", "--events", str(home / "option")]) == 0
    assert sum(batch_sizes(home / "option")) == 8


def test_monitor(
    photos: Path,
    set_file: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    for name in ("a", "b", "c"):
        assert main.run(["index", str(photos), "--gallery", name]) == 0

    def monitored(*options: str) -> set[str]:
        capsys.readouterr()
        assert main.run(["monitor", "--once", "--json", *options]) == 0
        samples = json.loads(capsys.readouterr().out)
        return {each["labels"].get("gallery", "") for each in samples} - {""}

    assert monitored() == {"a", "b", "c"}
    set_file(monitor={"galleries": ["a"]})
    assert monitored() == {"a"}
    monkeypatch.setenv("REIR_MONITOR__GALLERIES", "[b]")
    assert monitored() == {"b"}
    assert monitored("--gallery", "c") == {"c"}


def test_schedule(
    home: Path, set_file: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def listed(*options: str) -> list[str]:
        capsys.readouterr()
        assert main.run(["schedule", "list", "--json", *options]) == 0
        shown = capsys.readouterr().out
        return [each["name"] for each in json.loads(shown)["schedules"]] if shown else []

    add = ["--cron", "0 3 * * *"]
    set_file(schedule={"file": str(home / "file.yaml")})
    assert main.run(["schedule", "add", "file", *add, "--", "doctor"]) == 0
    assert listed() == ["file"]
    monkeypatch.setenv("REIR_SCHEDULE__FILE", str(home / "environment.yaml"))
    assert main.run(["schedule", "add", "environment", *add, "--", "doctor"]) == 0
    assert listed() == ["environment"]
    option = ["--file", str(home / "option.yaml")]
    assert main.run(["schedule", "add", "option", *add, *option, "--", "doctor"]) == 0
    assert listed(*option) == ["option"]


def test_serve(home: Path, set_file: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*options: str) -> tuple[int, int, int, int]:
        assert main.run(["serve", "--build", str(home / "built.yaml"), *options]) == 0
        built = yaml.safe_load((home / "built.yaml").read_text())
        values = built["applications"][0]["args"]
        return (
            built["http_options"]["port"],
            values["limits"]["burst"],
            values["live"]["k"],
            values.get("ingress", {}).get("max_replicas", 1),
        )

    set_file(serve={"port": 1, "limits": {"burst": 1}, "live": {"k": 1}})
    assert built() == (1, 1, 1, 1)
    (home / "extra.yaml").write_text("{port: 2, limits: {burst: 2}, ingress: {max_replicas: 2}}")
    extra = ["--config", str(home / "extra.yaml")]
    assert built(*extra) == (2, 2, 1, 2)
    monkeypatch.setenv("REIR_SERVE__PORT", "3")
    assert built(*extra) == (3, 2, 1, 2)
    assert built(*extra, "--port", "4", "--max-replicas", "4") == (4, 2, 1, 4)


def test_config_show_names_the_origin_of_every_layer(
    home: Path, set_file: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    set_file(serve={"port": 1, "live": {"k": 1}})
    (home / "extra.yaml").write_text("port: 2")
    monkeypatch.setenv("REIR_SERVE__LIVE__K", "3")
    extra = ["--config", str(home / "extra.yaml")]
    assert main.run(["config", "show", "serve", "--changed", "--json", *extra]) == 0
    rows = json.loads(capsys.readouterr().out)["settings"]
    assert {each["key"]: (each["value"], each["origin"]) for each in rows} == {
        "serve.port": (2, f"file {home / 'extra.yaml'}"),
        "serve.live.k": (3, "environment REIR_SERVE__LIVE__K"),
    }


@pytest.mark.parametrize(
    ("section", "command"),
    [
        ("index", ["index", "nowhere"]),
        ("index", ["reindex", "a"]),
        ("monitor", ["monitor", "--once"]),
        ("schedule", ["schedule", "list"]),
        ("serve", ["serve", "--port", str(free_port())]),
        ("tracing", ["index", "photos"]),
    ],
)
def test_a_mistake_names_its_file_or_variable(
    section: str,
    command: list[str],
    photos: Path,
    home: Path,
    set_file: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(home)
    set_file(**{section: {"wrong": 1}})
    assert main.run(command) == 2
    assert f"(file {home / 'config.yaml'})" in capsys.readouterr().err
    set_file()
    variable = f"REIR_{section.upper()}__WRONG"
    monkeypatch.setenv(variable, "1")
    assert main.run(command) == 2
    shown = capsys.readouterr().err
    assert "unknown key 'wrong'" in shown
    assert f"(environment {variable})" in shown
