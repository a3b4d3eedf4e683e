"""`PizaConfig`: how a grounding model is adapted, and its input about the search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from reir.errors import ConfigError, nearest_name
from reir.models.piza.history import HistoryConfig

Method = Literal["piza-adapter", "piza-lora", "piza-coop", "adapter", "lora", "coop", "full"]
Inserted = Literal["step", "summary", "nothing"]
METHODS: tuple[Method, ...] = get_args(Method)
INSERTED: tuple[Inserted, ...] = get_args(Inserted)
ZOOMING = "piza-"
"""Prefix of the methods with a history encoder."""
RANKS = {"adapter": 256, "lora": 16}
"""Published bottleneck of each kind of adapter."""


@dataclass(frozen=True, kw_only=True)
class PizaConfig:
    """How a grounding model is adapted; the defaults are those of the paper.

    Attributes:
        method: kind of adapter. The methods that start with `piza-` zoom: they have a history
            encoder, which says when a search has ended.
        rank: size of the bottleneck of adapters and of LoRA; 0 for the published one.
        prompt_tokens: number of learned prompt vectors of CoOp.
        inserted: input about the search that the adapters get: the embedding of its zoom step, the
            summary of its boxes, or nothing. None for the default of the method: the step for
            adapters, as in the released code, and the summary for the others, as in the paper.
        history: shape of the history encoder.
        paper_parity: keep two slips of the released code: dropout is active in the frozen history
            encoder during training, and estimated progress is not clipped to [0, 1].

    Raises:
        ConfigError: a value is unknown or out of range.
    """

    method: Method = "piza-adapter"
    rank: int = 0
    prompt_tokens: int = 144
    inserted: Inserted | None = None
    history: HistoryConfig = field(default_factory=HistoryConfig)
    paper_parity: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.method not in METHODS:
            raise ConfigError(
                f"unknown method {self.method!r}{nearest_name(self.method, METHODS) or ';'} "
                f"use one of {', '.join(METHODS)}"
            )
        if self.rank < 0:
            raise ConfigError(f"rank must be 0 (the published one) or more, got {self.rank}")
        if self.prompt_tokens < 1:
            raise ConfigError(f"prompt_tokens must be 1 or more, got {self.prompt_tokens}")
        if self.inserted is None:
            return
        if self.inserted not in INSERTED:
            raise ConfigError(
                f"unknown value {self.inserted!r} of inserted; use one of {', '.join(INSERTED)}"
            )
        if self.inserted == "step" and self.method != "piza-adapter":
            raise ConfigError(
                f"method {self.method!r} cannot take the zoom step as input; use "
                f"inserted=summary or inserted=nothing, or method piza-adapter"
            )
        if self.inserted == "summary" and not self.zooms:
            raise ConfigError(
                f"method {self.method!r} does not zoom, so there is no summary of a search; use "
                f"inserted=nothing, or method {ZOOMING}{self.method}"
            )

    @property
    def zooms(self) -> bool:
        """Whether the method has a history encoder, so that a search can zoom."""
        return self.method.startswith(ZOOMING)

    @property
    def kind(self) -> str:
        """Kind of adapter: "adapter", "lora", "coop" or "full"."""
        return self.method.removeprefix(ZOOMING)

    @property
    def inserts(self) -> Inserted:
        """The input about the search that the adapters get."""
        if self.inserted is not None:
            return self.inserted
        if not self.zooms:
            return "nothing"
        return "step" if self.kind == "adapter" else "summary"

    @property
    def bottleneck(self) -> int:
        """Size of the bottleneck of adapters and of LoRA."""
        return self.rank or RANKS.get(self.kind, 0)
