"""Counts the parameters of PIZA's methods, and holds the published counts to compare them with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reir.models.piza.config import Method
from reir.models.piza.model import PizaModel

PUBLISHED_M: Mapping[Method, float] = {
    "full": 173.0,
    "coop": 0.1,
    "piza-coop": 0.9,
    "lora": 1.3,
    "piza-lora": 1.5,
    "adapter": 3.3,
    "piza-adapter": 3.5,
}
"""Published counts in millions, for the Swin-T size (docs/piza.md)."""
RELEASED_COPIES = 2
"""How often the released history encoder contains its transformer layer; it uses it once."""


@dataclass(frozen=True)
class ParameterCounts:
    """The parameters of an adapted model that do not come from its base.

    Attributes:
        adapters: of all adapters, LoRA layers or prompts.
        step: of the embedding of the zoom step.
        base: weights of the base that are trained, as layer norms.
        history: of the history encoder, which is frozen when the others are trained.
        unused_history: those that the released history encoder has in addition, and does not use.
    """

    adapters: int
    step: int
    base: int
    history: int
    unused_history: int

    @property
    def trained(self) -> int:
        """Number of parameters that the training of adapters changes."""
        return self.adapters + self.step + self.base

    @property
    def total(self) -> int:
        """Number of parameters that are trained at any time."""
        return self.trained + self.history


def count_parameters(model: PizaModel) -> ParameterCounts:
    """Count the parameters of a model; it may be on the `meta` device."""
    sizes = {"adapters": 0, "step": 0, "base": 0}
    for name, parameter in model.trainable():
        sizes[name.partition(".")[0]] += parameter.numel()
    history, copied = 0, 0
    if model.history is not None:
        history = sum(each.numel() for each in model.history.parameters())
        copied = sum(each.numel() for each in model.history.layer.parameters())
    return ParameterCounts(**sizes, history=history, unused_history=(RELEASED_COPIES - 1) * copied)
