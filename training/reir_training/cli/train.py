"""`reir train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from reir_training.config import TrainConfig
    from reir_training.report.dry_run import DryRun

STAGES = (
    "grounding",
    "clia",
    "all",
    "rerank",
    "masks",
    "query-zoom",
    "colors",
    "candidates",
    "crops",
)


Data = Annotated[
    Path, typer.Option(help="YAML file with the data sources and the settings of the run.")
]
Output = Annotated[
    Path, typer.Option(help="Output folder. A run with the same folder resumes there.")
]
Preset = Annotated[
    str, typer.Option(help="Model to train: clare-nano, clare-base, clare-large, piza or weak-rec.")
]
Method = Annotated[
    str | None,
    typer.Option(
        help="For --preset piza, what to train: piza-adapter, piza-lora or piza-coop (these zoom), "
        "adapter, lora, coop or full. The same as --set method=..."
    ),
]
StageName = Annotated[
    str,
    typer.Option(
        help="Stage to train: grounding (stage 1), clia (stage 2), all (both), rerank (the "
        "re-ranker), masks (the mask head), query-zoom (the zoom policy of searches), colors (the "
        "color head), candidates (the candidate head, which compares classes and places) or crops "
        "(the model together with its crop network); the last six require --init."
    ),
]
Init = Annotated[Path | None, typer.Option(help="Checkpoint directory to start from.")]
NumWorkersText = Annotated[
    str,
    typer.Option(
        help="Number of Ray Train workers, or a range such as 2:8, to use as many as the cluster "
        "has room for."
    ),
]
Gpu = Annotated[bool, typer.Option("--gpu", help="Train on GPUs, one per worker. Default: CPUs.")]
StorageUri = Annotated[
    str | None,
    typer.Option(
        help="Bucket (s3:// or gs://) or folder that stores the saved states and a copy of the "
        "other output."
    ),
]
DryRunOnly = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the memory, steps and time that the run needs, and exit without training.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result of --dry-run as JSON.")]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a setting of the YAML file, such as optimization.clia_epochs=3. May be "
        "repeated.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add `reir train` to the command line."""
    app.command("train")(train)


def train(  # noqa: PLR0913 - every argument is an option of the command
    data: Data,
    output: Output,
    preset: Preset = "clare-nano",
    method: Method = None,
    stage: StageName = "all",
    init: Init = None,
    num_workers: NumWorkersText = "1",
    gpu: Gpu = False,
    storage: StorageUri = None,
    dry_run: DryRunOnly = False,
    as_json: AsJson = False,
    override: Override = None,
) -> None:
    """Train a model on annotated photos and write a checkpoint directory."""
    # Imported here, because every `reir` command loads this module to list its subcommands, and
    # `reir --help` must not wait for torch, Ray and DeepSpeed.
    from reir.config import load_config
    from reir.errors import ConfigError, nearest_name
    from reir_training.presets import PRESETS
    from reir_training.run.driver import run
    from reir_training.run.num_workers import parse_num_workers
    from reir_training.run.schedule import PIZA

    for what, value, known in (("preset", preset, tuple(PRESETS)), ("stage", stage, STAGES)):
        if value not in known:
            nearest = nearest_name(value, known)
            raise ConfigError(f"unknown {what} {value!r}; allowed: {', '.join(known)}{nearest}")
    overrides = list(override or [])
    if method is not None:
        if preset != PIZA:
            raise ConfigError(f"--method {method} requires --preset {PIZA}, got {preset!r}")
        overrides.append(f"method={method}")
    config = load_config(PRESETS[preset], data, overrides)
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


def _dry_run(as_json: bool, preset: str, config: TrainConfig, **arguments: Any) -> None:
    """Estimate a run and print the estimate."""
    from reir.cli.common import messages, print_json

    if not arguments["use_gpu"]:
        # DeepSpeed chooses its accelerator on import, and would take a GPU of this machine.
        os.environ["DS_ACCELERATOR"] = "cpu"
    from reir_training.report.dry_run import dry_run
    from reir_training.run.driver import with_absolute_paths

    with messages().status("measuring a few steps"):
        report = dry_run(preset, with_absolute_paths(config), **arguments)
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)


def _show(report: DryRun) -> None:
    """Print the parameters, the memory, the steps and the measured time."""
    from reir.cli.common import new_table, output

    console = output()
    parts = new_table("part", "trainable", "frozen", "learning rate", right=("trainable", "frozen"))
    for part in report.parts:
        rates = ", ".join(f"{rate:.3g}" for rate in part.learning_rates)
        parts.add_row(part.name, f"{part.trainable:,}", f"{part.frozen:,}", rates)
    trainable, frozen = (sum(getattr(p, n) for p in report.parts) for n in ("trainable", "frozen"))
    parts.add_row("all", f"{trainable:,}", f"{frozen:,}", "", style="bold")
    console.print(parts, "")

    fields = ("weights", "gradients", "optimizer", "buffers", "total")
    memory = new_table("GB per worker, estimated", *fields, right=fields)
    for each in report.memory:
        chosen = each.zero_stage == report.zero_stage
        cells = (f"{getattr(each, field) / 1e9:.3f}" for field in fields)
        memory.add_row(f"ZeRO {each.zero_stage}", *cells, style="bold" if chosen else None)
    console.print(memory)
    held = report.measured.activation_bytes
    console.print(
        "activations: not measured on a CPU"
        if held is None
        else f"activations: {held / 1e9:.3f} GB per worker, measured",
        "",
    )

    columns = ("epochs", "steps per epoch", "photos")
    stages = new_table("stage", *columns, right=columns)
    for planned in report.stages:
        counts = (planned.epochs, planned.steps_per_epoch, planned.photos)
        stages.add_row(planned.stage, *(f"{count:,}" for count in counts))
    console.print(stages, "")

    taken = report.measured
    console.print(
        f"measured: 5 steps of stage {taken.stage} on {report.device}, with one worker\n"
        f"  {taken.step_seconds:.3f} s per step of {taken.photos} photos\n"
        f"  {taken.load_seconds:.3f} s to load the photos of a step (a real run loads ahead)\n"
        f"estimate for {report.num_workers} workers, without communication and validation: "
        f"{report.photos_per_s:g} photos/s, {report.hours:g} hours"
    )
