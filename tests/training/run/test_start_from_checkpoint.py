"""Training from a checkpoint (`--init`): what is kept, what may change, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from reir.checkpoint import load_encoder, save_checkpoint
from reir.config import load_config
from reir.errors import CheckpointError, ConfigError
from reir_testing.tiny import tiny_tokenizer
from reir_testing.tiny_clare import tiny_clare, tiny_training
from reir_training.clare.task import DENOISING, ClareTask, start_clare
from reir_training.config import ClareTrainConfig


def config(parity: bool = False, **shape: Any) -> ClareTrainConfig:
    data = [{"format": "photos", "path": "photos"}]
    values = {"data": data, "shape": shape, "paper_parity": parity}
    return ClareTrainConfig.model_validate(values)


@pytest.fixture(scope="module")
def with_more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with 4 experts, of which 2 are chosen."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, tiny_clare(), tiny_tokenizer(), {})
    return folder


def test_experts_can_change_and_all_other_weights_are_kept(with_more: Path) -> None:
    own = tiny_clare().state_dict()
    off, _ = start_clare("clare-base", config(num_experts=0), [], with_more)
    assert off.config.num_experts == 0
    assert not any(".router." in name or ".experts." in name for name in off.state_dict())
    for name, value in off.state_dict().items():
        assert torch.equal(value, own[name]), name

    wanted = config(num_experts=2, top_k_experts=1, nms_iou=0.5)
    fewer, same = (start_clare("clare-base", wanted, [], with_more)[0] for _ in "ab")
    assert (fewer.config.num_experts, fewer.config.top_k_experts) == (2, 1)
    assert fewer.config.nms_iou == 0.5
    changed = {name for name, value in fewer.state_dict().items() if value.shape != own[name].shape}
    assert changed
    assert all(".router." in name or ".experts." in name for name in changed)
    for name, value in fewer.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name  # the same on every worker
        assert name in changed or torch.equal(value, own[name]), name


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (config(dim=64), r"dim=64, but it is 32 in the checkpoint .*only expert_mix, "),
        (config(num_expert=2), r"num_expert=2, but there is no such setting in the checkpoint"),
        (config(num_experts=2, top_k_experts=3), r"top_k must be between 1 and num_experts=2"),
        (config(parity=True), r"paper_parity=True, but the checkpoint .* trained with False"),
    ],
)
def test_settings_that_do_not_fit_the_checkpoint_are_refused(
    with_more: Path, wanted: ClareTrainConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        start_clare("clare-base", wanted, [], with_more)


def test_another_preset_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny_clare(), tiny_tokenizer(), {"preset": "clare-base"})
    start_clare("clare-base", config(), [], tmp_path)
    with pytest.raises(
        ConfigError, match=r"'clare-large', but .* trained with 'clare-base': use --p"
    ):
        start_clare("clare-large", config(), [], tmp_path)


def test_paper_parity_must_match_the_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny_clare(paper_parity=True), tiny_tokenizer(), {})
    assert start_clare("clare-base", config(parity=True), [], tmp_path)[0].config.paper_parity
    with pytest.raises(ConfigError, match=r"set paper_parity: true"):
        start_clare("clare-base", config(), [], tmp_path)


def test_denoising_queries_are_saved_and_loaded(tmp_path: Path) -> None:
    def settings(seed: int) -> ClareTrainConfig:
        return load_config(ClareTrainConfig, tiny_training(tmp_path, seed=seed))

    def task(seed: int, init: Path | None) -> ClareTask:
        return ClareTask("clare-base", settings(seed), init=init, rank=0, world_size=1)

    def content(of: ClareTask) -> dict[str, torch.Tensor]:
        assert of.objective.denoising is not None
        return of.objective.denoising.state_dict()

    checkpoint = tmp_path / "checkpoint"
    first = task(1, None)
    run = {"stage": "grounding", "epoch": 1, "steps": 2, "hours": 0.1, "metrics": {}}
    first.save(
        checkpoint, {**first.about(), **run, "settings": settings(1).model_dump(mode="json")}
    )
    assert load_encoder(checkpoint).dim == 32
    for name, value in content(task(2, checkpoint)).items():
        assert torch.equal(value, content(first)[name]), name
    assert not torch.equal(content(task(2, None))["linear.weight"], content(first)["linear.weight"])
    (checkpoint / DENOISING).write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"denoising\.safetensors cannot be loaded"):
        task(2, checkpoint)
    (checkpoint / DENOISING).unlink()
    task(2, checkpoint)
