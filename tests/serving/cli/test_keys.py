"""`reir keys` on the command line, and `reir search` with `REIR_SERVER`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from reir.cli import search
from reir_serving.cli.keys import register
from reir_serving.middleware.keys import KeyRing

runner = CliRunner()


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    register(made)
    search.register(made)
    return made


def test_a_key_can_be_created_listed_and_revoked(app: typer.Typer, tmp_path: Path) -> None:
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


def test_a_key_without_a_gallery_is_not_created(app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    made = runner.invoke(app, ["keys", "new", "--file", str(file)])
    assert "--read" in str(made.exception)
    assert not file.exists()


def test_search_uses_the_server_of_the_environment(
    app: typer.Typer, serve: Any, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "REIR_SERVER", serve(backend))
    found = runner.invoke(
        app, ["search", "the red box", "--gallery", "photos", "-k", "1", "--json"]
    )
    assert found.exit_code == 0, found.output
    (hit,) = json.loads(found.stdout)["hits"]
    assert hit["box"][0] == pytest.approx(10 / 120, abs=0.01)
