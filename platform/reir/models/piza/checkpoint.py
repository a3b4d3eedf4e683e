"""Reads and writes the adapters of PIZA: a few megabytes that belong to one base.

A directory contains `piza.json` and `piza.safetensors`. The weights are those that training
changed, in float32, and the history encoder. The base is not stored, only where it came from and
the digest of all its weights that stayed as they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection

from reir.errors import CheckpointError, ConfigError
from reir.models.grounding_dino import MODEL_TYPES
from reir.models.piza.config import PizaConfig
from reir.models.piza.history import HistoryConfig
from reir.models.piza.model import PizaModel, add_adapters
from reir.models.pretrained import PretrainedModel, load_pretrained

CONFIG, WEIGHTS = "piza.json", "piza.safetensors"
FORMAT = 1


def save_piza(
    folder: Path, model: PizaModel, about: Mapping[str, Any], base_source: str = ""
) -> str:
    """Write the adapters of a model, and return the digest of the weights file.

    Args:
        folder: created if it does not exist; files in it are replaced.
        model: on any device, in float32: the digest of the base is that of its float32 weights, and
            a cast to half precision changes them.
        about: JSON values to store under "training" (data, steps, metrics).
        base_source: hub name or directory of the base, from which the adapters will be loaded; by
            default, the one that the base was loaded from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.float().cpu().contiguous() for name, value in _state(model).items()}
    save_file(weights, folder / WEIGHTS)
    source = base_source or str(model.base.name_or_path)
    config = {
        "format": FORMAT,
        "model_config": asdict(model.config),
        "base": {
            # A directory becomes an absolute path, since adapters may be loaded from another
            # working directory.
            "source": str(Path(source).resolve()) if source and Path(source).is_dir() else source,
            "digest": frozen_digest(model),
        },
        "training": dict(about),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    return weights_digest(folder)


def load_piza(folder: Path, base_source: str | None = None) -> PizaModel:
    """Load adapters onto their base, in eval mode and without gradients.

    Args:
        folder: that `save_piza` wrote.
        base_source: hub name or directory of the base; None for the one in the checkpoint.

    Raises:
        CheckpointError: the adapters or the base cannot be loaded, or the adapters were trained
            on another base.
    """
    return load_piza_parts(folder, base_source)[0]


def load_piza_parts(
    folder: Path, base_source: str | None = None, *, device: str = "cpu"
) -> tuple[PizaModel, PretrainedModel]:
    """Do as `load_piza`, and also return the base with its tokenizer and image processor."""
    config = _read_config(folder)
    with _checkpoint_errors(folder):
        settings = dict(config["model_config"])
        history = HistoryConfig(**settings.pop("history"))
        adapters = PizaConfig(**settings, history=history)
        source, digest = base_source or str(config["base"]["source"]), config["base"]["digest"]
    if not source:
        raise CheckpointError(
            f"{folder / CONFIG} does not say where the base of the adapters is; give its hub name "
            f"or directory"
        )
    parts = load_pretrained(source, AutoModelForZeroShotObjectDetection, MODEL_TYPES, device=device)
    model = add_adapters(parts.model, adapters)
    # After the adapters are attached, because they determine which weights of the base training
    # changes, and the digest leaves these out.
    found = frozen_digest(model)
    if found != digest:
        raise CheckpointError(
            f"the adapters in {folder} were trained on a base whose weights have digest "
            f"{digest[:12]}, but those of {source} have {found[:12]}; give the directory or the "
            f"revision of the base that they were trained on"
        )
    with _checkpoint_errors(folder):
        _restore(model, load_file(folder / WEIGHTS))
    return model.eval().requires_grad_(False), parts


def frozen_digest(model: PizaModel) -> str:
    """Return the sha256, in hex, of the weights of the base that training does not change."""
    trained = {name for name, _ in model.trainable()}
    sha = hashlib.sha256()
    for name, value in sorted(model.base.named_parameters()):
        # Of a trained weight, only name and shape are known before its values are restored.
        sha.update(f"{name} {tuple(value.shape)}".encode())
        if f"base.{name}" not in trained:
            sha.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def weights_digest(folder: Path) -> str:
    """Return the sha256 of the weights file, in hex."""
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(model: PizaModel) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint: what was trained, and the history encoder."""
    trained = {name: value.detach() for name, value in model.trainable()}
    history = model.history.state_dict() if model.history is not None else {}
    return trained | {f"history.{name}": value for name, value in history.items()}


@torch.no_grad()
def _restore(model: PizaModel, weights: Mapping[str, Tensor]) -> None:
    """Set the weights of a model to those of a checkpoint.

    Raises:
        ValueError: names or shapes differ.
    """
    # These tensors share the memory of the model, so copying into them below changes it.
    state = _state(model)
    if state.keys() != weights.keys():
        differing = sorted(state.keys() ^ weights.keys())
        raise ValueError(f"{len(differing)} weights are missing or unknown, as {differing[0]}")
    for name, value in state.items():
        if value.shape != weights[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(value.shape)}"
            )
        value.copy_(weights[name])


def _read_config(folder: Path) -> dict[str, Any]:
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} contains no adapters: {' and '.join(missing)} missing; give a directory "
            f"that `reir train --preset piza` wrote"
        )
    with _checkpoint_errors(folder):
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        version = config["format"]
    if version != FORMAT:
        raise CheckpointError(
            f"{folder} has format {version}, but this release reads format {FORMAT}; use the "
            f"release that wrote it, or train the adapters again with `reir train --preset piza`"
        )
    return config


@contextmanager
def _checkpoint_errors(folder: Path) -> Iterator[None]:
    """Turn errors of damaged files into a `CheckpointError` that names the folder."""
    try:
        yield
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(
            f"cannot load the adapters in {folder}: {str(error).splitlines()[0]}; {WEIGHTS} and "
            f"{CONFIG} must come from one `reir train` run"
        ) from error
