"""What a run goes on from after a kill: the state of DeepSpeed's engine, the average, the place."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from reir_training.loop import Averaged, Position

TAG = "state"
AVERAGED = "averaged.safetensors"


def save_state(folder: Path, engine: Any, averaged: Averaged | None, done: Position) -> None:
    """Write this worker's part of the state; the parts of all workers may share a folder.

    Args:
        folder: exists.
        engine: of DeepSpeed; frozen weights are left out.
        averaged: written by the first worker alone.
        done: how far the run has come.
    """
    client_state = {"done": asdict(done), "updates": averaged.updates if averaged else 0}
    engine.save_checkpoint(
        str(folder), tag=TAG, client_state=client_state, exclude_frozen_parameters=True
    )
    if averaged is not None and dist.get_rank() == 0:
        save_file(averaged.weights, folder / AVERAGED)


def load_state(folder: Path, engine: Any, averaged: Averaged | None) -> Position:
    """Load what `save_state` wrote on all workers; returns how far the run had come."""
    _, client_state = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
    if averaged is not None:
        averaged.weights = load_file(folder / AVERAGED)
        averaged.updates = int(client_state["updates"])
    return Position(**client_state["done"])
