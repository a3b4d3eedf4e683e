"""Start weights -> a `ClareNano` ready to train: what is frozen, what learns at which rate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from reir.checkpoint import load_model
from reir.datasets.coco_classes import COCO_CLASSES
from reir.models.clare_nano import ClareNano, ClareNanoConfig
from reir.models.nano_encoder import tokenise
from reir.models.sentence_tower import from_bert
from reir_training.config import ModelSettings, Optimisation, TrainConfig
from reir_training.start_weights import load_mobilenet, load_yolox_nano, minilm_files

CLASS_NAME_SCALE = 2.0


def start_model(config: TrainConfig, init: Path | None) -> tuple[ClareNano, Tokenizer]:
    """Build the model from the published start weights, or go on from a checkpoint.

    Args:
        config: of the run.
        init: checkpoint directory to start from; None for the start weights.

    Raises:
        CheckpointError: a start weight file or the checkpoint is missing or does not fit.
    """
    torch.manual_seed(config.optimisation.seed)
    if init is not None:
        model, tokenizer = load_model(init)
    else:
        model, tokenizer = _from_start_weights(config)
    freeze(model, config.model)
    return model, tokenizer


def _from_start_weights(config: TrainConfig) -> tuple[ClareNano, Tokenizer]:
    settings = config.model
    shape = ClareNanoConfig(
        num_layers=settings.num_layers,
        num_experts=settings.num_experts,
        top_k_experts=min(2, max(settings.num_experts, 1)),
        dropout=settings.dropout,
    )
    model = ClareNano(shape, clia_bias=settings.clia_bias)
    model.detector.load_state_dict(load_yolox_nano(config.weights))
    model.crop_network.load_state_dict(load_mobilenet(config.weights))
    files = minilm_files()
    model.text.tower.load_state_dict(
        from_bert(
            load_file(files.weights), num_layers=shape.text_layers, max_tokens=shape.max_tokens
        )
    )
    tokenizer = Tokenizer.from_file(str(files.tokenizer))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _name_classes(model, tokenizer)
    return model, tokenizer


@torch.no_grad()
def _name_classes(model: ClareNano, tokenizer: Tokenizer) -> None:
    """Start the detector's class input at the sentence encoder's vectors of the class names.

    So a candidate begins near the words for it, also for classes that few expressions name.
    """
    layer = model.visual.class_names
    ids_NL, mask_NL = tokenise(tokenizer, COCO_CLASSES, model.config.max_tokens)
    tower = model.text.tower.eval()
    states = tower(ids_NL, mask_NL)
    shares = mask_NL[..., None] / mask_NL.sum(1)[:, None, None]
    names = (states * shares).sum(1)
    names = F.normalize(names - names.mean(0), dim=-1)
    if names.shape[1] == layer.weight.shape[0]:
        layer.weight.copy_(names.T * CLASS_NAME_SCALE)


def freeze(model: ClareNano, settings: ModelSettings) -> None:
    """Freeze detector, crop network, embeddings and the lowest layers of the text tower."""
    for part in model.frozen_parts():
        part.requires_grad_(False)
    for name, parameter in model.text.tower.named_parameters():
        layer = re.match(r"layers\.(\d+)\.", name)
        parameter.requires_grad = layer is not None and int(layer[1]) >= settings.frozen_text_layers


def parameter_groups(objective: torch.nn.Module, settings: Optimisation) -> list[dict[str, Any]]:
    """Optimiser groups: new layers, pretrained parts at lower rates, no decay on vectors.

    Each has `base_lr`, from which the schedule sets `lr` at every step.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, decay = 1.0, settings.weight_decay if parameter.ndim > 1 else 0.0
        if ".text.tower." in name:
            factor = settings.text_tower_factor
        groups.setdefault((factor * settings.learning_rate, decay), []).append(parameter)
    return [
        {"params": members, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]
