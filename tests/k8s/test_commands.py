"""Every command line in the manifests is one that `reir` accepts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from reir.cli.main import build_app
from reir_k8s.manifests import Manifest, commands, named
from reir_testing.k8s import NEEDS_KUBECTL

pytestmark = NEEDS_KUBECTL

# Typer has a click of its own, and makes few of its classes public.
UsageError = typer.BadParameter.__base__ or Exception

EXPECTED = {
    "RayJob/reir-index": "index",
    "RayJob/reir-train": "train",
    "RayCronJob/reir-refresh": "index",
    "RayCronJob/reir-canary": "canary",
    "RayCronJob/reir-reindex": "reindex",
    "Deployment/reir-monitor": "monitor",
    "CronJob/reir-backup": "backup",
}


def parse(words: Sequence[str]) -> None:
    """Parse a command line without running it.

    Raises:
        UsageError: an argument is unknown, missing or wrong.
        LookupError: a command is unknown.
    """
    command: Any = typer.main.get_command(build_app())
    context, rest = None, list(words)
    while True:
        name = rest.pop(0)
        context = command.make_context(name, rest, parent=context)
        if not isinstance(command, TyperGroup):
            return
        # What a group does not parse itself is its subcommand.
        rest = [*context._protected_args, *context.args]
        found = command.get_command(context, rest[0])
        if found is None:
            raise LookupError(f"{name} has no subcommand {rest[0]}")
        command = found


def test_command_lines_are_accepted(manifests: Sequence[Manifest]) -> None:
    found = commands(manifests)
    assert {owner: words[1] for owner, words in found.items()} == EXPECTED
    for words in found.values():
        assert words[0] == "reir"
        parse(words)


@pytest.mark.parametrize(
    "line",
    [
        "reir index",
        "reir reindex photos --kep 2",
        "reir backup photos s3://bucket --store",
        "reir canary mak photos",
        "reir indx",
        "reir monitor now",
    ],
)
def test_wrong_command_lines_are_found(line: str) -> None:
    with pytest.raises((UsageError, LookupError)):
        parse(shlex.split(line))


def test_entrypoints_are_single_commands(manifests: Sequence[Manifest]) -> None:
    """The shell of the submitting pod would run what follows `;` or `&&`, and expand variables."""
    for kind, name in (each.split("/") for each in EXPECTED):
        if kind.startswith("Ray"):
            spec = named(manifests, kind, name)["spec"]
            line = spec.get("jobTemplate", spec)["entrypoint"]
            assert not set(line) & set(";&|$`<>(){}*?\n"), line


def test_jobs_write_what_others_read(manifests: Sequence[Manifest]) -> None:
    """All jobs work on one gallery, and the scheduled run indexes what the first one did."""
    found = commands(manifests)
    assert found["RayJob/reir-index"] == found["RayCronJob/reir-refresh"]
    gallery = found["RayJob/reir-index"][found["RayJob/reir-index"].index("--gallery") + 1]
    assert found["RayCronJob/reir-reindex"][2] == gallery
    assert found["RayCronJob/reir-canary"][3] == gallery
    assert found["CronJob/reir-backup"][2] == gallery
