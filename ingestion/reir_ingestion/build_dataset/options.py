"""The options of `reir build-dataset`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MODELS, _BUDGET = "Models", "Budget"

Photos = Annotated[
    str,
    typer.Argument(
        metavar="PHOTOS", help="A folder with instances.json, or any folder or pattern of photos."
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the dataset.")]
Annotations = Annotated[
    Path | None, typer.Option(help="COCO instances file. Default: instances.json in PHOTOS.")
]
Split = Annotated[
    str | None, typer.Option(help="Use only this split of the expressions.json in PHOTOS.")
]
PerInstance = Annotated[
    int, typer.Option(min=1, help="Maximum number of expressions of an instance.")
]
ValShare = Annotated[
    float, typer.Option(min=0, max=0.9, help="Share of the photos in the split val.")
]
Writer = Annotated[
    str, typer.Option(help="Who writes: template, endpoint, transformers or ray-data.")
]
Judges = Annotated[
    str,
    typer.Option(help="Who filters, separated by commas: rules, endpoint, transformers, ray-data."),
]
UniqueIn = Annotated[
    str,
    typer.Option(help="An expression must describe only one instance of the: photo or gallery."),
]
Endpoint = Annotated[
    str,
    typer.Option(
        envvar="REIR_ENDPOINT_URL",
        help="Base URL of an OpenAI-compatible endpoint, with /v1. Its key is read from the "
        "variable REIR_ENDPOINT_KEY.",
        rich_help_panel=_MODELS,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        envvar="REIR_ENDPOINT_MODEL",
        help="Model of the writer: its name at the endpoint, or a hub name or folder.",
        rich_help_panel=_MODELS,
    ),
]
JudgeModel = Annotated[
    str, typer.Option(help="Model of the judge. Default: --model.", rich_help_panel=_MODELS)
]
Threads = Annotated[
    int,
    typer.Option(
        min=1,
        max=256,
        help="Requests at the same time; for ray-data, photos to prepare at the same time.",
        rich_help_panel=_MODELS,
    ),
]
Timeout = Annotated[
    float, typer.Option(min=1, help="Seconds for one request.", rich_help_panel=_MODELS)
]
Engines = Annotated[
    int,
    typer.Option(
        min=1,
        help="Maximum number of vLLM engines on the Ray cluster, for ray-data only.",
        rich_help_panel=_MODELS,
    ),
]
EngineOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Argument of the vLLM engines, such as tensor_parallel_size=2, for ray-data only. "
        "May be repeated.",
        rich_help_panel=_MODELS,
    ),
]
AskAgain = Annotated[
    bool,
    typer.Option(
        "--ask-again",
        help="Ask again where the answer of an earlier run could not be used.",
        rich_help_panel=_MODELS,
    ),
]
MaxRequests = Annotated[
    int | None,
    typer.Option(min=0, help="Maximum number of requests for OUT.", rich_help_panel=_BUDGET),
]
MaxCost = Annotated[
    float | None,
    typer.Option(min=0, help="Send no request once OUT has cost this.", rich_help_panel=_BUDGET),
]
PriceIn = Annotated[
    float, typer.Option(min=0, help="Price of 1,000 tokens asked.", rich_help_panel=_BUDGET)
]
PriceOut = Annotated[
    float, typer.Option(min=0, help="Price of 1,000 tokens answered.", rich_help_panel=_BUDGET)
]
