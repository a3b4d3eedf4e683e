"""`PizaModel`: a frozen (MM-)GroundingDINO with adapters that know how far a search has zoomed.

The base is a model of `transformers`, and stays as it is: adapters are attached with hooks, so the
base keeps its names and its weights, and its own code computes everything else.

Positions. Adapter+ has two adapters in each layer of the encoder for the image tokens (deformable
layer) and two for the text tokens (text enhancer layer), each after a residual sum and before the
norm of that sum. LoRA is added to the linear layers of all attention modules with softmax: the
self-attention of text and of queries, and the cross-attention between image and text, in both
directions, and from queries to text. CoOp puts vectors after the first token of an expression.
"""

# Shapes: B photos, one expression each, H x W pixels, L tokens, T boxes of a search, Q queries

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn

from reir.errors import ConfigError
from reir.models.piza.adapters import STEP_WIDTH, Adapter, Lora, Prompts, StepEmbedding
from reir.models.piza.config import PizaConfig
from reir.models.piza.history import HistoryEncoder, HistoryOutput

IMAGE_NORMS = ("deformable_layer.self_attn_layer_norm", "deformable_layer.final_layer_norm")
TEXT_NORMS = ("text_enhancer_layer.layer_norm_before", "text_enhancer_layer.layer_norm_after")
"""Norms in a layer of the encoder that have an adapter before them."""
ENCODER_ATTENTION = ("text_enhancer_layer.self_attn", "fusion_layer.attn")
DECODER_ATTENTION = ("self_attn", "encoder_attn_text")
"""Attention modules in a layer whose linear layers have LoRA."""
PLACEHOLDER = 1
"""Token in place of a prompt vector: any but those at which the base divides a text."""
LEAST_TOKENS = 8
"""Start, end, period and a few words of an expression."""
TOKEN_LOGITS = ("logits", "enc_outputs_class", "encoder_logits")
"""Fields of the base's output with one logit per token in the last axis."""

_inserted: ContextVar[Tensor | None] = ContextVar("inserted", default=None)
"""Input of the adapters about the search, in the forward pass of this thread."""


class PizaModel(nn.Module):
    """A grounding model with adapters; only `trainable` parameters require gradients.

    Attributes:
        base: `GroundingDinoForObjectDetection` or `MMGroundingDinoForObjectDetection`.
        config: the adapters.
        adapters: by the name of the module of the base that they are attached to, with "/" for ".".
        history: frozen; None for methods that do not zoom.
        step: embeds the progress of a search; None unless it is inserted.

    Raises:
        ConfigError: the prompts leave too few tokens to the expression.
    """

    def __init__(self, base: Any, config: PizaConfig) -> None:
        super().__init__()
        self.base, self.config = base, config
        self.history = HistoryEncoder(config.history) if config.zooms else None
        self.step = StepEmbedding() if config.inserts == "step" else None
        self.adapters = nn.ModuleDict()
        self._add_adapters()
        lacking = LEAST_TOKENS - self.max_tokens
        if lacking > 0:
            raise ConfigError(
                f"prompt_tokens={config.prompt_tokens} leaves too few of the base's tokens to the "
                f"expression; use {config.prompt_tokens - lacking} or fewer"
            )
        self.requires_grad_(False)
        for _, parameter in self.trainable():
            parameter.requires_grad_(True)

    def forward(  # noqa: PLR0913, the inputs of the base and the two of a history
        self,
        pixels: Tensor,
        pixel_mask: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        histories_BT4: Tensor | None = None,
        valid_BT: Tensor | None = None,
        *,
        all_layers: bool = False,
    ) -> Any:
        """Find what each expression describes in its photo, or in a crop of it.

        Args:
            pixels: (B, 3, H, W), as the image processor of the base makes them.
            pixel_mask: (B, H, W), 0 where a smaller picture is padded.
            input_ids, attention_mask: (B, L) tokens.
            histories_BT4, valid_BT: boxes of each search up to this crop, see
                `HistoryEncoder.forward`; may be missing if nothing of them is inserted.
            all_layers: also compute the predictions of the decoder layers before the last, as
                `auxiliary_outputs`: a list of {"logits": ..., "pred_boxes": ...}.

        Returns:
            the output of the base; `logits` (B, Q, tokens) and cxcywh `pred_boxes` (B, Q, 4) in
            [0, 1] of the picture. Its tokens are those of `input_ids`, without prompts.

        Raises:
            ValueError: the tokens and prompts are more than the base reads.
        """
        prompts = self._prompts
        if prompts is not None:
            input_ids, attention_mask = self._with_places(input_ids, attention_mask, prompts.count)
        token = _inserted.set(self._insertion(histories_BT4, valid_BT))
        try:
            output = self.base(
                pixel_values=pixels,
                pixel_mask=pixel_mask,
                input_ids=input_ids,
                attention_mask=attention_mask,
            )
        finally:
            _inserted.reset(token)
        # Before the prompts are dropped: `_auxiliary` compares with all tokens that the base read,
        # and `_drop_tokens` then removes the prompts from these logits, too.
        if all_layers:
            output.auxiliary_outputs = self._auxiliary(output, attention_mask)
        if prompts is not None:
            _drop_tokens(output, prompts.count)
        return output

    def read_history(self, histories_BT4: Tensor, valid_BT: Tensor) -> HistoryOutput:
        """Return what the boxes of B searches say about them.

        Raises:
            ValueError: the method of this model does not zoom.
        """
        if self.history is None:
            raise ValueError(f"method {self.config.method!r} has no history encoder")
        output: HistoryOutput = self.history(histories_BT4, valid_BT)
        if self.config.paper_parity:
            return output
        return output._replace(progress=output.progress.clamp(0, 1))

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of an expression."""
        config, prompts = self.base.config, self._prompts
        limit = min(config.max_text_len, config.text_config.max_position_embeddings)
        return int(limit) - (prompts.count if prompts else 0)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the names and parameters that training changes.

        These are the adapters and, as in the release, the layer norms of the base with Adapter+.
        The history encoder is trained before, and on its own.
        """
        norms = _norm_parameters(self.base) if self.config.kind == "adapter" else set()
        for name, parameter in self.named_parameters():
            part, _, inner = name.partition(".")
            if part in ("adapters", "step") or self.config.kind == "full" or inner in norms:
                yield name, parameter

    def train(self, mode: bool = True) -> Self:
        """Set the mode; the frozen history encoder stays in eval mode unless `paper_parity`."""
        super().train(mode)
        if self.history is not None and not self.config.paper_parity:
            self.history.eval()
        return self

    @property
    def _prompts(self) -> Prompts | None:
        return next((each for each in self.adapters.values() if isinstance(each, Prompts)), None)

    def _insertion(self, histories_BT4: Tensor | None, valid_BT: Tensor | None) -> Tensor | None:
        if self.config.inserts == "nothing":
            return None
        if histories_BT4 is None or valid_BT is None:
            raise ValueError(f"method {self.config.method!r} needs the histories of the searches")
        output = self.read_history(histories_BT4, valid_BT)
        return output.summary if self.step is None else self.step(output.progress)

    def _with_places(self, ids: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Make room for prompts after the first token."""
        if ids.shape[1] > self.max_tokens:
            raise ValueError(
                f"an expression may have {self.max_tokens} tokens beside {count} prompt vectors, "
                f"got {ids.shape[1]}; truncate it"
            )
        places = ids.new_full((len(ids), count), PLACEHOLDER)
        ids = torch.cat([ids[:, :1], places, ids[:, 1:]], dim=1)
        return ids, torch.cat([mask[:, :1], torch.ones_like(places), mask[:, 1:]], dim=1)

    def _auxiliary(self, output: Any, attention_mask: Tensor) -> list[dict[str, Tensor]]:
        """Return the predictions of the decoder layers before the last."""
        found = []
        references = output.init_reference_points
        for number, head in enumerate(self.base.class_embed[:-1]):
            states = output.intermediate_hidden_states[:, number]
            logits = head(states, output.encoder_last_hidden_state_text, attention_mask.bool())
            shift = self.base.bbox_embed[number](states)
            # Each layer of the decoder corrects the boxes of the layer before it.
            boxes = (torch.special.logit(references, eps=1e-5) + shift).sigmoid()
            found.append({"logits": logits, "pred_boxes": boxes})
            references = output.intermediate_reference_points[:, number]
        return found

    def _add_adapters(self) -> None:
        add = {"adapter": self._add_plus, "lora": self._add_lora, "coop": self._add_prompts}
        if self.config.kind in add:
            add[self.config.kind]()

    def _add_plus(self) -> None:
        width, rank = self.base.config.d_model, self.config.bottleneck
        for number in range(len(self.base.model.encoder.layers)):
            for norm in (*IMAGE_NORMS, *TEXT_NORMS):
                inserted = self._inserted_width if norm in IMAGE_NORMS else 0
                self._attach(
                    f"model.encoder.layers.{number}.{norm}", Adapter(width, rank, inserted)
                )

    def _add_lora(self) -> None:
        parts = (("encoder", ENCODER_ATTENTION), ("decoder", DECODER_ATTENTION))
        for part, modules in parts:
            for number, layer in enumerate(getattr(self.base.model, part).layers):
                for module in modules:
                    for name, linear in layer.get_submodule(module).named_children():
                        if isinstance(linear, nn.Linear):
                            lora = Lora(
                                linear.in_features,
                                linear.out_features,
                                self.config.bottleneck,
                                self._inserted_width,
                            )
                            self._attach(f"model.{part}.layers.{number}.{module}.{name}", lora)

    def _add_prompts(self) -> None:
        name = "model.text_backbone.embeddings.word_embeddings"
        width = self.base.get_submodule(name).embedding_dim
        self._attach(name, Prompts(self.config.prompt_tokens, width, self._inserted_width))

    @property
    def _inserted_width(self) -> int:
        widths = {"step": STEP_WIDTH, "summary": self.config.history.out, "nothing": 0}
        return widths[self.config.inserts]

    def _attach(self, name: str, adapter: Adapter | Lora | Prompts) -> None:
        """Let an adapter change what goes into, or comes out of, a module of the base."""
        # The keys of a `ModuleDict` must not contain dots.
        key = name.replace(".", "/")
        self.adapters[key] = adapter
        module = self.base.get_submodule(name)
        # Bound methods of this model, not closures: a deep copy of the model has hooks of its own.
        if isinstance(adapter, Adapter):
            module.register_forward_pre_hook(partial(self._before, key))
        else:
            module.register_forward_hook(partial(self._after, key))

    def _before(self, key: str, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (self.adapters[key](inputs[0], _inserted.get()),)

    def _after(self, key: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        adapter, inserted = self.adapters[key], _inserted.get()
        if isinstance(adapter, Prompts):
            prompted: Tensor = adapter(output, inserted)
            return prompted
        change: Tensor = adapter(inputs[0], inserted)
        return output + change


def add_adapters(base: Any, config: PizaConfig) -> PizaModel:
    """Freeze a grounding model, and return it with adapters.

    Args:
        base: `GroundingDinoForObjectDetection` or `MMGroundingDinoForObjectDetection` without
            adapters. It is not copied.
        config: the adapters.

    Raises:
        ConfigError: the prompts leave too few tokens to the expression.
        ValueError: the base already has adapters.
    """
    if any(map(_is_adapted, base.modules())):
        raise ValueError("the base already has adapters; load it again")
    model = PizaModel(base, config)
    device = next(base.model.encoder.parameters()).device
    for name, part in model.named_children():
        if name != "base":
            part.to(device)
    return model


def _is_adapted(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    # The hooks of adapters are partials of bound methods, see `PizaModel._attach`.
    return any(isinstance(getattr(hook, "func", None), MethodType) for hook in hooks)


def _norm_parameters(base: nn.Module) -> set[str]:
    """Return the names of the parameters of all layer norms."""
    return {
        f"{name}.{inner}"
        for name, module in base.named_modules()
        if isinstance(module, nn.LayerNorm)
        for inner, _ in module.named_parameters()
    }


def _drop_tokens(output: Any, count: int) -> None:
    """Remove the logits of prompts, and keep the number of tokens, with the rest at -inf."""
    fields = [output, *(output.auxiliary_outputs or [])]
    for each in fields:
        for name in TOKEN_LOGITS:
            logits = each.get(name)
            if logits is not None:
                rest = torch.full_like(logits[..., :count], -torch.inf)
                each[name] = torch.cat([logits[..., :1], logits[..., 1 + count :], rest], dim=-1)
