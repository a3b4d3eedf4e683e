"""Adapters of a grounding model: where they sit, what they compute, and what they are told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reir.errors import ConfigError
from reir.models.piza.adapters import Adapter, Lora, Prompts
from reir.models.piza.config import METHODS, Inserted, Method, PizaConfig
from reir.models.piza.model import PizaModel, add_adapters

ZOOMING: tuple[Method, ...] = ("piza-adapter", "piza-lora", "piza-coop")
UNUSED_NORMS = ("swin.layernorm.", "model.enc_output_norm.")
"""Norms of the base that do not influence its output, at least not by gradients."""


def config(method: Method, **changed: Any) -> PizaConfig:
    return PizaConfig(method=method, rank=8, prompt_tokens=4, **changed)


def adapted(base: Any, method: Method, **changed: Any) -> PizaModel:
    """Return a model in eval mode whose adapters change its output."""
    torch.manual_seed(1)
    model = add_adapters(base, config(method, **changed)).eval()
    if model.history is not None:
        # Untrained, it gives all searches about the same progress.
        nn.init.normal_(model.history.get_parameter("progress.2.weight"), std=3.0)
        nn.init.constant_(model.history.get_parameter("progress.2.bias"), 0.5)
    for adapter in model.adapters.values():
        if isinstance(adapter, Lora):
            nn.init.normal_(adapter.up.weight, std=0.3)
        elif isinstance(adapter, Adapter):
            for weight in adapter.parameters():
                nn.init.normal_(weight, std=0.3)
    return model


def run_base(base: Any, inputs: Any) -> Any:
    with torch.no_grad():
        return base(
            pixel_values=inputs.pixels,
            pixel_mask=inputs.pixel_mask,
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
        )


def same(a: Any, b: Any) -> bool:
    return all(
        torch.allclose(getattr(a, name), getattr(b, name), atol=1e-5)
        for name in ("logits", "pred_boxes")
    )


@pytest.mark.parametrize("method", ["lora", "piza-lora", "full"])
def test_adapted_model_starts_as_the_base(base: Any, inputs: Any, method: Method) -> None:
    expected = run_base(base, inputs)
    model = add_adapters(base, config(method)).eval()
    assert same(model(*inputs), expected)


def test_adapter_without_effect_leaves_the_base_as_it_is(base: Any, inputs: Any) -> None:
    expected = run_base(base, inputs)
    model = add_adapters(base, config("piza-adapter")).eval()
    for adapter in model.adapters.values():
        assert isinstance(adapter, Adapter)
        nn.init.zeros_(adapter.scale)
        if adapter.insert is not None:
            nn.init.zeros_(adapter.insert.weight)
    assert same(model(*inputs), expected)


def test_adapters_sit_between_each_residual_and_its_norm(base: Any, inputs: Any) -> None:
    name = "model.encoder.layers.1.deformable_layer.self_attn_layer_norm"
    norm = base.get_submodule(name)
    before, after = [], []
    # Hooks run in the order of their registration.
    norm.register_forward_pre_hook(lambda _, given: before.append(given[0]))
    model = adapted(base, "adapter")
    norm.register_forward_pre_hook(lambda _, given: after.append(given[0]))
    with torch.no_grad():
        model(*inputs)
    adapter = model.adapters[name.replace(".", "/")]
    assert isinstance(adapter, Adapter)
    torch.testing.assert_close(after[0], adapter(before[0], None))
    assert not torch.allclose(after[0], before[0])


def test_adapter_plus_has_two_adapters_per_layer_for_image_and_text(base: Any) -> None:
    model = add_adapters(base, config("piza-adapter"))
    names = [name.replace("/", ".") for name in model.adapters]
    told = {name for name, each in zip(names, model.adapters.values(), strict=True) if each.insert}
    layers = range(base.config.encoder_layers)
    image = {
        f"model.encoder.layers.{number}.deformable_layer.{norm}"
        for number in layers
        for norm in ("self_attn_layer_norm", "final_layer_norm")
    }
    text = {
        f"model.encoder.layers.{number}.text_enhancer_layer.{norm}"
        for number in layers
        for norm in ("layer_norm_before", "layer_norm_after")
    }
    assert set(names) == image | text
    assert told == image


def test_lora_equals_merged_weights(base: Any, inputs: Any) -> None:
    merged = copy.deepcopy(base)
    model = adapted(base, "lora")
    for key, lora in model.adapters.items():
        assert isinstance(lora, Lora)
        with torch.no_grad():
            weight = merged.get_submodule(key.replace("/", ".")).weight
            weight += lora.up.weight @ lora.down.weight
    assert same(model(*inputs), run_base(merged, inputs))


def test_lora_covers_all_attention_with_softmax(base: Any) -> None:
    model = add_adapters(base, config("lora"))
    names = {name.replace("/", ".") for name in model.adapters}
    expected = {
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(("model.encoder", "model.decoder"))
        and ("attn" in name)
        and not any(part in name for part in ("deformable_layer", "encoder_attn."))
    }
    assert names == expected


def test_prompts_take_the_place_of_word_vectors(base: Any, inputs: Any) -> None:
    reference = copy.deepcopy(base)
    model = adapted(base, "coop")
    (prompts,) = model.adapters.values()
    assert isinstance(prompts, Prompts)
    ids = torch.arange(1, 5).expand(2, -1)
    with torch.no_grad():
        reference.model.text_backbone.embeddings.word_embeddings.weight[1:5] = prompts.vectors
    longer = inputs._replace(
        input_ids=torch.cat([inputs.input_ids[:, :1], ids, inputs.input_ids[:, 1:]], 1),
        attention_mask=torch.cat([torch.ones(2, 4).long(), inputs.attention_mask], 1),
    )
    expected, found = run_base(reference, longer), model(*inputs)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes)
    torch.testing.assert_close(found.logits[..., 0], expected.logits[..., 0])
    torch.testing.assert_close(found.logits[..., 1:6], expected.logits[..., 5:10])
    assert found.logits.shape == expected.logits.shape
    assert not found.logits[..., 6:].isfinite().any()


@pytest.mark.parametrize("method", ZOOMING)
def test_output_depends_on_the_history(base: Any, inputs: Any, method: Method) -> None:
    model = adapted(base, method)
    other = inputs._replace(valid=torch.tensor([[True, True, False], [True, False, False]]))
    found, changed = model(*inputs), model(*other)
    assert not torch.allclose(found.pred_boxes[0], changed.pred_boxes[0], atol=1e-6)
    torch.testing.assert_close(found.pred_boxes[1], changed.pred_boxes[1])


@pytest.mark.parametrize("method", ZOOMING)
def test_nothing_inserted_makes_the_history_irrelevant(
    base: Any, inputs: Any, method: Method
) -> None:
    model = adapted(base, method, inserted="nothing")
    assert same(model(*inputs), model(*inputs[:4]))


@pytest.mark.parametrize("inserted", ["step", "summary"])
def test_adapters_can_be_told_step_or_summary(base: Any, inputs: Any, inserted: Inserted) -> None:
    model = adapted(base, "piza-adapter", inserted=inserted)
    # Progress is rounded, so histories that differ little have the same step, but not summary.
    near = inputs._replace(histories=inputs.histories + 1e-4 * (inputs.histories < 1))
    assert torch.equal(model(*inputs).logits, model(*near).logits) == (inserted == "step")


@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_single_photos(base: Any, inputs: Any, method: Method) -> None:
    model = adapted(base, method)
    together = model(*inputs)
    for number in range(2):
        alone = model(*inputs.row(number))
        torch.testing.assert_close(
            alone.pred_boxes[0], together.pred_boxes[number], atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(alone.logits[0], together.logits[number], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_what_is_trained_and_nothing_else(
    base: Any, inputs: Any, method: Method
) -> None:
    model = adapted(base, method).train()
    output = model(*inputs, all_layers=True)
    logits = output.logits[output.logits.isfinite()]
    (logits.square().mean() + output.pred_boxes.square().mean()).backward()
    trained = dict(model.trainable())
    assert trained
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in trained), name
        if name not in trained:
            assert parameter.grad is None, name
        elif method != "full" and not any(part in name for part in UNUSED_NORMS):
            assert parameter.grad is not None, name


def test_layers_before_the_last_are_those_of_the_library(base: Any, inputs: Any) -> None:
    model = add_adapters(base, config("lora")).eval()
    found = model(*inputs, all_layers=True).auxiliary_outputs
    base.config.auxiliary_loss = True
    labels = [
        {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    ] * 2
    expected = base(
        pixel_values=inputs.pixels,
        pixel_mask=inputs.pixel_mask,
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        labels=labels,
    ).auxiliary_outputs
    assert len(found) == base.config.decoder_layers - 1
    for own, library in zip(found, expected, strict=False):
        torch.testing.assert_close(own["pred_boxes"], library["pred_boxes"])
        torch.testing.assert_close(own["logits"], library["logits"])


@pytest.mark.parametrize("parity", [False, True])
def test_dropout_of_the_frozen_history_encoder(base: Any, inputs: Any, parity: bool) -> None:
    model = add_adapters(base, config("piza-adapter", paper_parity=parity)).train()
    first, second = (model.read_history(inputs.histories, inputs.valid) for _ in range(2))
    assert torch.equal(first.summary, second.summary) != parity
    assert model.base.training
    model.eval()
    assert model.history is not None
    assert not model.history.training


@pytest.mark.parametrize("parity", [False, True])
def test_progress_is_clipped_unless_parity_is_kept(base: Any, inputs: Any, parity: bool) -> None:
    model = add_adapters(base, config("piza-adapter", paper_parity=parity)).eval()
    assert model.history is not None
    nn.init.constant_(model.history.get_parameter("progress.2.bias"), 7.0)
    progress: Tensor = model.read_history(inputs.histories, inputs.valid).progress
    assert (progress.max() > 1) == parity


def test_copy_has_adapters_of_its_own(base: Any, inputs: Any) -> None:
    model = adapted(base, "lora")
    expected = model(*inputs)
    other = copy.deepcopy(model)
    assert same(other(*inputs), expected)
    for lora in model.adapters.values():
        nn.init.zeros_(lora.get_parameter("up.weight"))
    assert same(other(*inputs), expected)
    assert not same(model(*inputs), expected)


def test_base_takes_adapters_only_once(base: Any) -> None:
    add_adapters(base, config("lora"))
    with pytest.raises(ValueError, match="the base already has adapters; load it again"):
        add_adapters(base, config("adapter"))


def test_history_is_required(base: Any, inputs: Any) -> None:
    model = adapted(base, "piza-lora")
    with pytest.raises(ValueError, match="'piza-lora' needs the histories of the searches"):
        model(*inputs[:4])
    with pytest.raises(ValueError, match="'lora' has no history encoder"):
        PizaModel(copy.deepcopy(model.base), config("lora")).read_history(*inputs[4:])


def test_too_many_tokens_beside_prompts_are_refused(base: Any, inputs: Any) -> None:
    model = adapted(base, "coop")
    assert model.max_tokens == 28
    ids = torch.full((2, 29), 210)
    with pytest.raises(ValueError, match=r"28 tokens beside 4 prompt vectors, got 29; truncate"):
        model(inputs.pixels, inputs.pixel_mask, ids, torch.ones_like(ids))


def test_prompts_that_leave_no_room_are_refused(base: Any) -> None:
    with pytest.raises(ConfigError, match=r"prompt_tokens=30 leaves .*; use 24 or fewer"):
        add_adapters(base, PizaConfig(method="coop", prompt_tokens=30))
