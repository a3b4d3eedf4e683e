"""`reir train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

STAGES = ("grounding", "clia", "all")


def register(app: typer.Typer) -> None:
    """Add the subcommand to the CLI."""
    app.command("train", help="Train a model on annotated photos.")(train)


def train(  # noqa: PLR0913 - one by one is clearer than a bag
    data: Annotated[Path, typer.Option(help="YAML file: data sources, weights, settings.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; a rerun goes on in it.")],
    preset: Annotated[
        str, typer.Option(help="Model to train: clare-nano, clare-base or clare-large.")
    ] = "clare-nano",
    stage: Annotated[str, typer.Option(help="grounding, clia or all (both).")] = "all",
    init: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    num_workers: Annotated[int, typer.Option(min=1, help="Ray Train workers.")] = 1,
    gpu: Annotated[bool, typer.Option("--gpu", help="One GPU a worker.")] = False,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override one setting: optimisation.clia_epochs=3."),
    ] = None,
) -> None:
    """Train from the start weights, or from a checkpoint, to a checkpoint directory."""
    from reir.config import load_config
    from reir.errors import ConfigError, nearest_name
    from reir_training.config import PRESETS
    from reir_training.run import run

    for what, value, known in (("preset", preset, tuple(PRESETS)), ("stage", stage, STAGES)):
        if value not in known:
            nearest = nearest_name(value, known)
            raise ConfigError(f"unknown {what} {value!r}, allowed: {', '.join(known)}{nearest}")
    config = load_config(PRESETS[preset], data, override or [])
    run(
        preset,
        config,
        output=output,
        stage=stage,
        init=init,
        num_workers=num_workers,
        use_gpu=gpu,
    )
