"""Builds the `ClareNano` to train: initial weights, frozen parts, learning rates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from reir.checkpoint import load_model
from reir.datasets.coco_classes import COCO_CLASSES
from reir.models.nano.encoder import tokenize
from reir.models.nano.model import ClareNano, ClareNanoConfig, InstanceMember
from reir.models.nano.sentence_tower import from_bert
from reir.models.relation_experts import MixtureOfRelationExperts
from reir_training.config import NanoModelSettings, NanoSchedule, NanoTrainConfig
from reir_training.data.examples import VAL, TrainPhoto
from reir_training.nano.start_weights import load_crop_network, load_picodet, minilm_files

CLASS_NAME_SCALE, TEXT_SCALE, VECTOR_SCALE = 2.0, 2.0, 0.3
"""Initial scales of the class inputs, and of the last layers of the text and visual streams."""

ALIGN_TEXTS = 4096
TEXT_BATCH = 128


def start_model(config: NanoTrainConfig, init: Path | None) -> tuple[ClareNano, Tokenizer]:
    """Build the model from the published weights of its parts, or load a checkpoint.

    Args:
        config: settings of the run.
        init: checkpoint directory to start from; None for the published weights.

    Raises:
        CheckpointError: a weights file or the checkpoint is missing or does not fit.
    """
    # All workers must start from the same random weights, and a repeated run too.
    torch.manual_seed(config.optimization.seed)
    if init is not None:
        model, tokenizer = load_model(init)
    else:
        model, tokenizer = _from_start_weights(config)
    freeze(model, config.model)
    return model, tokenizer


def _from_start_weights(config: NanoTrainConfig) -> tuple[ClareNano, Tokenizer]:
    settings = config.model
    shape = ClareNanoConfig(
        num_members=settings.num_members,
        num_layers=settings.num_layers,
        crop_network=settings.crop_network,
        crop_px=settings.crop_px,
        num_experts=settings.num_experts,
        # Ablations without experts or with a single one still need a valid number.
        top_k_experts=min(2, max(settings.num_experts, 1)),
        dropout=settings.dropout,
    )
    model = ClareNano(shape, clia_bias=settings.clia_bias)
    model.detector.load_state_dict(load_picodet(config.weights))
    model.crop_network.load_state_dict(load_crop_network(shape.crop_network, config.weights))
    files = minilm_files()
    model.text.tower.load_state_dict(
        from_bert(
            load_file(files.weights), num_layers=shape.text_layers, max_tokens=shape.max_tokens
        )
    )
    tokenizer = Tokenizer.from_file(str(files.tokenizer))
    # `tokenize` pads and truncates; the tokenizer's own settings would do it a second time.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return model, tokenizer


@torch.no_grad()
def align_streams(model: ClareNano, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Initialize both streams in the vector space of the sentence encoder.

    The class inputs are initialized to the sentence vectors of the class names. The last layers of
    both streams are initialized to a projection onto the principal components of the sentences in
    the training set. So from the start, a candidate is close to the words for its class, even if
    few expressions mention it.

    Args:
        model: model whose text tower has the weights of the sentence encoder.
        tokenizer: tokenizer of that tower.
        texts: sentences of the training set. With fewer than `member_dim`, nothing is changed,
            because they do not span a space to project to.
    """
    dim = model.config.member_dim
    if len(texts) < dim:
        return
    names = _sentence_vectors(model, tokenizer, COCO_CLASSES)
    # Class names have a large common component, which would make all classes look alike.
    names = F.normalize(names - names.mean(0), dim=-1)
    # Spread the sample over the whole training set; all sentences would take too long.
    chosen = texts[:: max(1, len(texts) // ALIGN_TEXTS)][:ALIGN_TEXTS]
    sentences = _sentence_vectors(model, tokenizer, chosen)
    # The mean direction is removed: it is common to all sentences and distinguishes none.
    center = sentences.mean(0)
    directions = torch.linalg.svd(sentences - center, full_matrices=False).Vh[:dim]
    for more in model.text.members:
        assert isinstance(more, MixtureOfRelationExperts)
        more.shared.weight.copy_(directions * TEXT_SCALE)
        more.shared.bias.copy_(-TEXT_SCALE * directions @ center)
    for member in model.visual.members:
        assert isinstance(member, InstanceMember)
        member.class_names.weight.copy_(names.T * CLASS_NAME_SCALE)
        member.to_vector.weight.copy_(directions * VECTOR_SCALE)
        member.to_image_vector.weight.copy_(directions * VECTOR_SCALE)


def training_sentences(photos: Sequence[TrainPhoto]) -> list[str]:
    """Return the expressions and first captions of the training photos."""
    train = [photo for photo in photos if photo.split != VAL]
    written = [e.text for photo in train for e in photo.expressions]
    return written + [photo.captions[0] for photo in train if photo.captions]


def _sentence_vectors(model: ClareNano, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Return (N, C) normalized means of token states, as the sentence encoder was trained."""
    tower, parts = model.text.tower.eval(), []
    for start in range(0, len(texts), TEXT_BATCH):
        some = texts[start : start + TEXT_BATCH]
        ids_NL, mask_NL = tokenize(tokenizer, some, model.config.max_tokens)
        shares = mask_NL[..., None] / mask_NL.sum(1)[:, None, None]
        parts.append(F.normalize((tower(ids_NL, mask_NL) * shares).sum(1), dim=-1))
    return torch.cat(parts)


def freeze(model: ClareNano, settings: NanoModelSettings) -> None:
    """Freeze the detector, crop network, embeddings and lowest layers of the text tower.

    A candidate head is frozen, too: it has a stage of its own.
    """
    for part in (*model.frozen_parts(), model.candidate_head):
        if part is not None:
            part.requires_grad_(False)
    for name, parameter in model.text.tower.named_parameters():
        layer = re.match(r"layers\.(\d+)\.", name)
        parameter.requires_grad = layer is not None and int(layer[1]) >= settings.frozen_text_layers


def parameter_groups(objective: torch.nn.Module, settings: NanoSchedule) -> list[dict[str, Any]]:
    """Return parameter groups: lower rates for pretrained parts, no weight decay for vectors.

    The schedule computes `lr` of a group from its `base_lr` in every step. "Vectors" are parameters
    with one axis: biases, the weights of normalization layers, and scales.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, decay = 1.0, settings.weight_decay if parameter.ndim > 1 else 0.0
        if ".text.tower." in name:
            factor = settings.text_tower_factor
        if ".crop_network." in name:
            # Batch norms are folded in, so that the weights of one layer may be 40 times as large
            # as those of another: one rate for all would destroy the small ones (docs/LOG.md).
            size = float(parameter.detach().square().mean().sqrt())
            factor, decay = settings.crop_network_factor * size, 0.0
        groups.setdefault((factor * settings.learning_rate, decay), []).append(parameter)
    return [
        {"params": members, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]
