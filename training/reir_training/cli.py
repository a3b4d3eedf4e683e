"""`reir train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from reir_training.config import CommonConfig
    from reir_training.dry_run import DryRun

STAGES = ("grounding", "clia", "all", "rerank")


def register(app: typer.Typer) -> None:
    """Add the subcommand to the CLI."""
    app.command("train", help="Train a model on annotated photos.")(train)


def train(  # noqa: PLR0913 - one by one is clearer than a bag
    data: Annotated[Path, typer.Option(help="YAML file: data sources, weights, settings.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; a rerun goes on in it.")],
    preset: Annotated[
        str, typer.Option(help="Model to train: clare-nano, clare-base or clare-large.")
    ] = "clare-nano",
    stage: Annotated[
        str, typer.Option(help="grounding, clia, all (both), or rerank (needs --init).")
    ] = "all",
    init: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    num_workers: Annotated[
        str, typer.Option(help="Ray Train workers; 2:8 for as many as there is room for.")
    ] = "1",
    gpu: Annotated[bool, typer.Option("--gpu", help="One GPU a worker.")] = False,
    storage: Annotated[
        str | None,
        typer.Option(help="s3://, gs:// or folder: keeps the states and a copy of the rest."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only say what the run would take; writes nothing to --output."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override one setting: optimisation.clia_epochs=3."),
    ] = None,
) -> None:
    """Train from the start weights, or from a checkpoint, to a checkpoint directory."""
    from reir.config import load_config
    from reir.errors import ConfigError, nearest_name
    from reir_training.checks import parse_num_workers
    from reir_training.config import PRESETS
    from reir_training.run import run

    for what, value, known in (("preset", preset, tuple(PRESETS)), ("stage", stage, STAGES)):
        if value not in known:
            nearest = nearest_name(value, known)
            raise ConfigError(f"unknown {what} {value!r}, allowed: {', '.join(known)}{nearest}")
    config = load_config(PRESETS[preset], data, override or [])
    workers = parse_num_workers(num_workers)
    if dry_run:
        _dry_run(as_json, preset, config, stage=stage, init=init, num_workers=workers, use_gpu=gpu)
        return
    run(
        preset,
        config,
        output=output,
        stage=stage,
        init=init,
        num_workers=workers,
        use_gpu=gpu,
        storage=storage,
    )


def _dry_run(as_json: bool, preset: str, config: CommonConfig, **arguments: Any) -> None:
    """Measure and print what a run would take."""
    from reir.cli_common import messages, print_json

    if not arguments["use_gpu"]:
        os.environ["DS_ACCELERATOR"] = "cpu"  # asked for when DeepSpeed is imported
    from reir_training.dry_run import dry_run
    from reir_training.run import absolute

    with messages().status("measuring a few steps"):
        report = dry_run(preset, absolute(config), **arguments)
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)


def _show(report: DryRun) -> None:
    """Print parameters, memory, plan and measured steps."""
    from reir.cli_common import new_table, output

    console = output()
    parts = new_table("part", "trainable", "frozen", "learning rate", right=("trainable", "frozen"))
    for part in report.parts:
        rates = ", ".join(f"{rate:.3g}" for rate in part.learning_rates)
        parts.add_row(part.name, f"{part.trainable:,}", f"{part.frozen:,}", rates)
    trainable, frozen = (sum(getattr(p, n) for p in report.parts) for n in ("trainable", "frozen"))
    parts.add_row("all", f"{trainable:,}", f"{frozen:,}", "", style="bold")
    console.print(parts, "")

    fields = ("weights", "gradients", "optimiser", "buffers", "total")
    memory = new_table("GB a worker, by formula", *fields, right=fields)
    for each in report.memory:
        chosen = each.zero_stage == report.zero_stage
        cells = (f"{getattr(each, field) / 1e9:.3f}" for field in fields)
        memory.add_row(f"ZeRO {each.zero_stage}", *cells, style="bold" if chosen else None)
    console.print(memory)
    held = report.measured.activation_bytes
    console.print(
        "activations: not measured on a CPU"
        if held is None
        else f"activations: {held / 1e9:.3f} GB, measured",
        "",
    )

    columns = ("epochs", "steps an epoch", "photos")
    stages = new_table("stage", *columns, right=columns)
    for planned in report.stages:
        counts = (planned.epochs, planned.steps_per_epoch, planned.photos)
        stages.add_row(planned.stage, *(f"{count:,}" for count in counts))
    console.print(stages, "")

    taken = report.measured
    console.print(
        f"5 steps of {taken.stage} on {report.device}: {taken.step_seconds:.3f} s a step of "
        f"{taken.photos} photos, loading them {taken.load_seconds:.3f} s (a run loads ahead)\n"
        f"{report.num_workers} x that, exchange not counted: {report.photos_per_s:g} photos/s, "
        f"{report.hours:g} hours"
    )
