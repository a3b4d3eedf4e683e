"""Workers and parts of a step: a step has the same photos for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reir.config import load_config
from reir.errors import ConfigError
from reir_testing.tiny_clare import tiny_training
from reir_training.clare.data import Arrays, ClareBatch
from reir_training.clare.task import ClareTask
from reir_training.config import ClareTrainConfig, Schedule
from reir_training.run.num_workers import NumWorkers, check_shares, parse_num_workers
from reir_training.run.schedule import Epoch
from reir_training.run.step_stream import load_in_process
from reir_training.run.tasks import make_task


@pytest.mark.parametrize(
    ("text", "number"), [("1", 1), ("16", 16), ("2:8", (2, 8)), ("3:3", (3, 3))]
)
def test_num_workers_is_parsed(text: str, number: NumWorkers) -> None:
    assert parse_num_workers(text) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "two", "1.5", "8:2", "0:2", "2:", ":2", "1:2:3"])
def test_invalid_num_workers_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="2:8"):
        parse_num_workers(text)


def test_workers_that_cannot_share_a_step_are_refused() -> None:
    settings = Schedule(photos_per_batch=32, accumulate_steps=2)
    for good in (1, 2, 16, (3, 8)):
        check_shares(settings, good)
    for bad in (3, 32, (5, 7)):
        with pytest.raises(ConfigError, match="photos_per_batch=32 cannot be shared"):
            check_shares(settings, bad)


def views(folder: Path, num_workers: int, parts: int) -> dict[tuple[int, float], Tensor]:
    """Return (photo, mean of its pixels) for all samples of all workers in two steps."""
    config = load_config(ClareTrainConfig, tiny_training(folder, accumulate_steps=parts))
    seen: list[tuple[int, Tensor]] = []

    def of(rank: int) -> Iterator[int]:
        task = make_task(
            "clare-base", config, stage="clia", init=None, rank=rank, world_size=num_workers
        )
        for batch in task.batches(Epoch(0, "clia", 0, 1), 0):
            assert isinstance(batch, ClareBatch)
            yield len(batch.pixels)
            heights_widths = batch.size_px.tolist()
            for key, pixels, (height, width) in zip(
                batch.photo_key.tolist(), batch.pixels, heights_widths, strict=True
            ):
                seen.append((key, pixels[:, :height, :width]))

    sizes = [list(of(rank)) for rank in range(num_workers)]
    assert sizes == [[4 // (num_workers * parts)] * 2 * parts] * num_workers
    return {(key, pixels.float().mean().item()): pixels for key, pixels in seen}


def test_a_step_has_the_same_views_for_any_number_of_workers(tmp_path: Path) -> None:
    alone = views(tmp_path, 1, 1)
    assert len(alone) == 8
    for num_workers, parts in ((1, 4), (2, 1), (2, 2), (4, 1)):
        shared = views(tmp_path, num_workers, parts)
        assert shared.keys() == alone.keys()
        assert all(torch.equal(shared[key], alone[key]) for key in alone)


@pytest.mark.parametrize(
    ("given", "text_rate"), [({}, 0.0025), ({"text_tower_factor": 0.1}, 0.001)]
)
def test_towers_and_offsets_have_their_own_learning_rates(
    tmp_path: Path, given: dict[str, float], text_rate: float
) -> None:
    settings = {"learning_rate": 0.01, "tower_factor": 0.25, **given}
    config = load_config(ClareTrainConfig, tiny_training(tmp_path, **settings))
    task = ClareTask("clare-base", config, init=None, rank=0, world_size=1)
    rates = {id(p): group["lr"] for group in task.groups() for p in group["params"]}
    assert all(group["base_lr"] == group["lr"] for group in task.groups())
    parameters = dict(task.objective.named_parameters())
    assert rates.keys() == {id(parameter) for parameter in parameters.values()}
    for name, parameter in parameters.items():
        slow_parts = ("model.vision.", "model.pyramid.upsample.", ".sampling_offsets.")
        slow = 0.0025 if any(part in name for part in slow_parts) else 0.01
        expected = text_rate if "model.language." in name else slow
        assert rates[id(parameter)] == pytest.approx(expected), name


@pytest.mark.parametrize("parity", [False, True])
def test_records_of_one_photo_are_contrasted_only_under_parity(
    tmp_path: Path, parity: bool
) -> None:
    values = tiny_training(tmp_path) | {"paper_parity": parity}
    task = ClareTask(
        "clare-base", load_config(ClareTrainConfig, values), init=None, rank=0, world_size=1
    )
    batch = next(task.batches(Epoch(0, "clia", 0, 1), 0))
    of_one_photo = replace(batch, photo_key=torch.zeros_like(batch.photo_key))
    apart, together = (
        task.objective.eval()(each, "clia")[1]["clia"] for each in (batch, of_one_photo)
    )
    assert (together == pytest.approx(apart)) == parity
    assert parity or together < apart


def test_the_epochs_of_a_stage_use_one_stream(tmp_path: Path) -> None:
    config = load_config(ClareTrainConfig, tiny_training(tmp_path, clia_epochs=2))
    opened: list[tuple[int, int]] = []
    ended: list[tuple[int, int]] = []

    def stream(load: Callable[[int], Arrays], first: int, last: int) -> Iterator[Arrays]:
        opened.append((first, last))
        yield from load_in_process(load, first, last)
        ended.append((first, last))

    def seen(task: ClareTask, number: int, first: int = 0) -> list[Tensor]:
        return [batch.pixels for batch in task.batches(Epoch(number, "clia", 0, 2), first)]

    def make() -> ClareTask:
        return ClareTask("clare-base", config, init=None, rank=0, world_size=1, stream=stream)

    whole, steps = make(), config.optimization.steps_per_epoch
    epochs = [seen(whole, 0)]
    assert not ended
    epochs.append(seen(whole, 1))
    assert [len(each) for each in epochs] == [steps, steps]
    assert opened == ended == [(0, 2 * steps)]
    again = seen(make(), 1, first=1)
    assert opened[1:] == [(steps + 1, 2 * steps)]
    assert all(torch.equal(a, b) for a, b in zip(again, epochs[1][1:], strict=True))
    seen(whole, 0)
    assert opened[2:] == [(0, 2 * steps)]
