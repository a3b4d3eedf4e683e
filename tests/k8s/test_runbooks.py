"""The run-books: each alert has one, and what it tells to do is possible."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperGroup

from reir.cli.main import build_app
from reir_k8s.monitoring.declared_metrics import names_in, series_names
from reir_k8s.monitoring.rules.files import RUNBOOKS, all_alerts, rule_groups
from reir_testing.repository import ROOT

FOLDER = ROOT / RUNBOOKS
INDEX = FOLDER / "README.md"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path != INDEX)
HEADINGS = ["Symptom", "Queries", "Likely causes", "Remedy"]
_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(reir [^`]+)`")


def blocks(page: Path, language: str) -> list[str]:
    return [body for _, kind, body in _BLOCK.findall(page.read_text()) if kind == language]


def commands(page: Path) -> list[str]:
    """The `reir` commands of a page, in its blocks and in its sentences."""
    lines = [line.strip() for body in blocks(page, "bash") for line in body.splitlines()]
    return [line for line in lines if line.startswith("reir ")] + _INLINE.findall(page.read_text())


@cache
def root() -> Any:
    """The command `reir`."""
    return typer.main.get_command(build_app())


def parse(command: str) -> None:
    """Parse a command without running it; raise an error if it cannot be parsed."""
    parser = root()
    name, *words = shlex.split(command)
    context = None
    while isinstance(parser, TyperGroup) and words:
        context = parser.make_context(name, words, parent=context)
        _, found, words = parser.resolve_command(context, context._protected_args + context.args)
        assert found is not None
        parser, name = found, str(found.name)
    # Sentences name commands and groups alone, without the arguments that they need.
    if words:
        parser.make_context(name, words, parent=context)


def test_each_alert_links_a_page_and_each_page_belongs_to_an_alert() -> None:
    assert {alert.runbook for alert in all_alerts()} == {page.stem for page in PAGES}
    for page in PAGES:
        (line,) = [each for each in page.read_text().splitlines() if each.startswith("Alerts: ")]
        expected = [f"`{alert.name}`" for alert in all_alerts() if alert.runbook == page.stem]
        assert sorted(line.removeprefix("Alerts: ").split(", ")) == sorted(expected)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_page_has_all_parts(page: Path) -> None:
    assert re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE) == HEADINGS
    assert blocks(page, "promql")
    assert blocks(page, "bash")


@pytest.mark.parametrize("page", [INDEX, *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        text = (page.parent / path).read_text()
        titles = [line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("#")]
        assert not anchor or anchor in [title.replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", [INDEX, *PAGES], ids=lambda page: page.stem)
def test_each_reir_command_parses(page: Path) -> None:
    for command in commands(page):
        parse(command)


@pytest.mark.parametrize(
    "wrong",
    ["reir frobnicate", "reir rollback photos --now", "reir promote photos", "reir keys old"],
)
def test_a_command_that_does_not_exist_is_found(wrong: str) -> None:
    with pytest.raises(Exception, match=r"No such|Missing"):
        parse(wrong)


def test_the_queries_are_valid_and_read_only_series_that_exist(
    promtool: Callable[..., None], tmp_path: Path
) -> None:
    queries = [body.strip() for page in PAGES for body in blocks(page, "promql")]
    recorded = {each.record for group in rule_groups().values() for each in group.recordings}
    for query in queries:
        assert names_in(query) <= series_names() | recorded, query
    rules = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "queries.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]})
    )
    promtool("check", "rules", tmp_path / "queries.yaml")
