"""Runs `reir build-dataset` with a fake encoder, in a process that can be killed.

python -m reir_testing.data_engine.command PHOTOS OUT --writer endpoint ...
"""

from __future__ import annotations

import sys

import typer

import reir.checkpoint
from reir_ingestion.build_dataset.cli import register
from reir_testing import FakeEncoder


def main() -> None:
    """Run the command."""
    reir.checkpoint.load_encoder = lambda *_, **__: FakeEncoder()
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    app(["build-dataset", *sys.argv[1:]])


if __name__ == "__main__":
    main()
