"""How many parameters does each method of PIZA have, compared with the published numbers?

    python benchmarks/piza_parameters.py

The base has the published size, Swin-T and BERT base, but random weights or none.
`piza.<method>_params_m` is the number of parameters in millions that a method adds to the base or
trains of it, with the history encoder: for `piza-adapter`, as the paper describes it.
`piza.released_adapter_params_m` is that of the released code, which inserts the embedding of the
zoom step instead of the summary of the search, and has a second copy of a layer of the history
encoder. docs/piza.md explains the differences. `piza.checkpoint_mb` is the size of a written
checkpoint.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from _report import ROOT, write_report
from transformers import MMGroundingDinoConfig, MMGroundingDinoForObjectDetection

from reir.models.piza.checkpoint import save_piza
from reir.models.piza.config import Inserted, Method, PizaConfig
from reir.models.piza.model import PizaModel, add_adapters
from reir.models.piza.parameters import PUBLISHED_M, ParameterCounts, count_parameters

METHODS: dict[str, tuple[Method, Inserted | None]] = {
    "adapter": ("piza-adapter", "summary"),
    "lora": ("piza-lora", None),
    "coop": ("piza-coop", None),
    "plain_adapter": ("adapter", None),
    "plain_lora": ("lora", None),
    "plain_coop": ("coop", None),
    "full": ("full", None),
}


def main() -> None:
    figures = {}
    for name, (method, inserted) in METHODS.items():
        total = counts(method, inserted).total
        figures[f"piza.{name}_params_m"] = millions(total)
        figures[f"piza.{name}_published_m"] = PUBLISHED_M[method]
    released = counts("piza-adapter", None)
    figures["piza.released_adapter_params_m"] = millions(released.total + released.unused_history)
    figures["piza.history_params_m"] = millions(released.history)
    figures["piza.checkpoint_mb"] = checkpoint_mb()
    for name, value in figures.items():
        print(f"{name:<34} {value:>8}")
    print(f"written to {write_report('piza_parameters', figures).relative_to(ROOT)}")


def counts(method: Method, inserted: Inserted | None) -> ParameterCounts:
    """Count the parameters of a method at the published size."""
    with torch.device("meta"):
        return count_parameters(adapted(PizaConfig(method=method, inserted=inserted)))


def adapted(config: PizaConfig) -> PizaModel:
    """Return a model of the published size with random weights."""
    shape = MMGroundingDinoConfig(decoder_bbox_embed_share=False, decoder_cls_embed_share=False)
    base: Any = MMGroundingDinoForObjectDetection(shape)
    return add_adapters(base, config)


def checkpoint_mb() -> float:
    """Return the size of a written checkpoint of the method with the most parameters."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_piza(folder, adapted(PizaConfig(method="piza-adapter")), {})
        return round(sum(each.stat().st_size for each in folder.iterdir()) / 1e6, 1)


def millions(count: int) -> float:
    return round(count / 1e6, 3)


if __name__ == "__main__":
    main()
