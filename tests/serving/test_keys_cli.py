"""`reir keys` as a user runs it, and `reir search --server`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from reir import cli_search
from reir_serving.keys import KeyRing
from reir_serving.keys_cli import register

runner = CliRunner()


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    register(made)
    cli_search.register(made)
    return made


def test_a_key_is_made_listed_and_revoked(app: typer.Typer, tmp_path: Path) -> None:
    file = str(tmp_path / "keys.yaml")
    made = runner.invoke(app, ["keys", "new", "--file", file, "--read", "photos", "--note", "mine"])
    key = made.stdout.strip()
    caller = KeyRing(Path(file)).caller(key)
    assert caller is not None
    assert (caller.may_read("photos"), caller.may_write("photos")) == (True, False)

    listed = runner.invoke(app, ["keys", "list", "--file", file, "--json"])
    (told,) = json.loads(listed.stdout)
    assert (told["id"], told["note"]) == (key.split("_")[1], "mine")
    assert "hash" not in told
    assert told["id"] in runner.invoke(app, ["keys", "list", "--file", file]).stdout

    gone = runner.invoke(app, ["keys", "revoke", told["id"], "--file", file])
    assert gone.exit_code == 0
    assert KeyRing(Path(file)).caller(key) is None


def test_a_key_that_opens_nothing_is_not_made(app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    made = runner.invoke(app, ["keys", "new", "--file", str(file)])
    assert "--read" in str(made.exception)
    assert not file.exists()


def test_search_asks_a_server(
    app: typer.Typer, serve: Any, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "REIR_SERVER", serve(backend))
    found = runner.invoke(
        app, ["search", "the red box", "--gallery", "photos", "-k", "1", "--json"]
    )
    assert found.exit_code == 0, found.output
    (hit,) = json.loads(found.stdout)["hits"]
    assert hit["box"][0] == pytest.approx(10 / 120, abs=0.01)
