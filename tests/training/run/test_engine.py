"""The DeepSpeed engine: gradient accumulation, and states for another number of workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from reir.errors import ConfigError
from reir_testing.training.processes import run_workers
from reir_training.config import DataSource, Schedule, TrainConfig
from reir_training.report.memory import estimate_memory
from reir_training.run.engine import BestEpoch, RunState, read_state, save_state, start_engine
from reir_training.run.loop import ExponentialMovingAverage, Position, TrainLoop, TrainProgress
from reir_training.run.schedule import Epoch, Stage, rate_factor

PHOTOS = 12
STEPS = 6
EPOCH = Epoch(0, "grounding", 0, 1)
DATA = (DataSource(format="photos", path=Path("none")),)


class Net(nn.Module):
    """A frozen layer, then two layers with a parameter group each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(7, 5).requires_grad_(False)
        self.one, self.two = nn.Linear(5, 11), nn.Linear(11, 3)

    def forward(self, batch: Tensor, stage: str) -> tuple[Tensor, dict[str, float]]:  # noqa: ARG002
        """Return the loss of rows of seven inputs and three targets."""
        out = self.two(self.one(self.frozen(batch[:, :7])).tanh())
        loss = ((out - batch[:, 7:]) ** 2).mean()
        return loss, {"squares": loss.item()}


class Rows:
    """A task with twelve rows of numbers per step, divided among workers and parts."""

    photos_per_step = PHOTOS

    def __init__(self, parts: int = 1, rank: int = 0, world_size: int = 1) -> None:
        self.objective: nn.Module = Net()
        self.model = self.objective
        self._parts, self._rank, self._world_size = parts, rank, world_size

    def groups(self) -> list[dict[str, Any]]:
        """Two groups that differ in all they can."""
        net = self.objective
        assert isinstance(net, Net)
        return [
            {"params": list(part.parameters()), "lr": rate, "base_lr": rate, "weight_decay": decay}
            for part, rate, decay in ((net.one, 1e-2, 0.1), (net.two, 1e-3, 0.0))
        ]

    def steps(self, stage: Stage) -> int:  # noqa: ARG002 - the same for both
        """Six."""
        return STEPS

    def batches(self, epoch: Epoch, first: int) -> Iterator[Tensor]:  # noqa: ARG002 - one epoch
        """Shares of the rows of each step."""
        for step in range(first, STEPS):
            shares = rows_of(step).chunk(self._world_size * self._parts)
            yield from shares[self._rank * self._parts : (self._rank + 1) * self._parts]


def rows_of(step: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(step).normal(size=(PHOTOS, 10))).float()


BETAS = (0.8, 0.95)


def config(zero_stage: Any = 1, **schedule: Any) -> TrainConfig:
    small = {"photos_per_batch": PHOTOS, "warmup_steps": 4, "save_every_steps": 3, "betas": BETAS}
    settings = small | schedule
    return TrainConfig(data=DATA, zero_stage=zero_stage, optimization=Schedule(**settings))


def start(
    settings: TrainConfig,
    averaged: ExponentialMovingAverage | None = None,
    resume_from: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Any, RunState, Rows]:
    task = Rows(settings.optimization.accumulate_steps, rank, world_size)
    engine, state = start_engine(
        task,  # type: ignore[arg-type]  # stands where a model's task does
        settings,
        averaged,
        num_workers=world_size,
        local_rank=rank,
        resume_from=resume_from,
    )
    return engine, state, task


def loop_of(
    settings: TrainConfig,
    engine: Any,
    task: Rows,
    averaged: ExponentialMovingAverage | None = None,
    **seen: Any,
) -> TrainLoop:
    return TrainLoop(
        engine,
        task,
        settings.optimization,
        rank=0,
        zero_stage=settings.zero_stage,
        averaged=averaged,
        on_progress=seen.pop("on_progress", lambda _: None),
        **seen,
    )


def weights(engine: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in engine.module.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Make this process a group of one."""
    os.environ["LOCAL_RANK"] = "0"
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in __all__
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    del os.environ["LOCAL_RANK"]


# ------------------------------------------------------------------------------------ accumulation


def reference(parts: int) -> dict[str, Tensor]:
    """Take the steps in plain PyTorch: mean gradient of the parts, clipping, AdamW."""
    task, settings = Rows(parts), config().optimization
    optimizer = torch.optim.AdamW(task.groups(), betas=BETAS)
    batches = task.batches(EPOCH, 0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate_factor(step, STEPS, settings)
        optimizer.zero_grad()
        for _ in range(parts):
            (task.objective(next(batches), "grounding")[0] / parts).backward()
        nn.utils.clip_grad_norm_(task.objective.parameters(), settings.max_gradient_norm)
        optimizer.step()
    return {n: p.detach() for n, p in task.objective.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("parts", [1, 3])
def test_accumulated_gradients_are_averaged(zero_stage: int, parts: int) -> None:
    settings, averaged = config(zero_stage, accumulate_steps=parts), ExponentialMovingAverage(0.9)
    engine, _, task = start(settings, averaged)
    seen: list[TrainProgress] = []
    kept: list[Position] = []
    loop = loop_of(
        settings, engine, task, averaged, on_progress=seen.append, on_position=kept.append
    )
    losses = loop.run_epoch(EPOCH, 1)
    for name, value in reference(parts).items():
        torch.testing.assert_close(weights(engine)[name], value, rtol=1e-5, atol=1e-6)
    # all that is counted is steps of the optimizer
    assert engine.global_steps == averaged.updates == STEPS
    assert [(p.step, p.photos) for p in seen] == [(STEPS, STEPS * PHOTOS)]
    assert [p.steps for p in kept] == [3]
    assert losses["squares"] == pytest.approx(seen[-1].parts["squares"], abs=1e-4)


def test_a_resumed_run_with_accumulation_gives_the_same_result(tmp_path: Path) -> None:
    settings, averaged = config(accumulate_steps=2), ExponentialMovingAverage(0.9)
    engine, state, task = start(settings, averaged)

    def keep(position: Position) -> None:
        state.done, state.best = position, BestEpoch(4, 12.5)
        save_state(tmp_path, engine, averaged, state, rank=0)

    whole = loop_of(settings, engine, task, averaged, on_position=keep).run_epoch(EPOCH, 1)
    again = ExponentialMovingAverage(0.9)
    resumed, found, task = start(settings, again, resume_from=tmp_path)
    assert found == read_state(tmp_path)
    assert (found.done.steps, found.best) == (3, BestEpoch(4, 12.5))
    assert loop_of(settings, resumed, task, again).run_epoch(EPOCH, 1, found.done) == whole
    for name, value in weights(engine).items():
        assert torch.equal(weights(resumed)[name], value)
        assert torch.equal(again.weights[name], averaged.weights[name])


def test_another_zero_stage_is_refused(tmp_path: Path) -> None:
    engine, state, _ = start(config(1))
    save_state(tmp_path, engine, None, state, rank=0)
    with pytest.raises(ConfigError, match="zero_stage=2, but the run was started with 1"):
        start(config(2), resume_from=tmp_path)


# ------------------------------------------------------------------------- other numbers of workers


def go(engine: Any, task: Rows, first: int, last: int) -> list[float]:
    """Take steps, and return the mean losses over all workers."""
    losses = []
    for step, batch in enumerate(task.batches(EPOCH, first), start=first):
        if step == last:
            break
        loss, _ = engine(batch, "grounding")
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def pair(folder: Path, rank: int, world_size: int) -> None:
    """Run one of two workers: resume the state of a single worker, and save one for it."""
    for stage in range(4):
        settings = config(stage)
        engine, state, task = start(settings, None, folder / f"one-{stage}", rank, world_size)
        losses = go(engine, task, 3, STEPS)
        if rank == 0:
            torch.save(losses, folder / f"went-on-{stage}.pt")
        engine, state, task = start(settings, None, None, rank, world_size)
        go(engine, task, 0, 3)
        save_state(folder / f"two-{stage}", engine, None, state, rank=rank)


def test_a_run_resumes_with_another_number_of_workers(tmp_path: Path) -> None:
    """One worker, then two, then one: the losses equal those of one worker in all ZeRO stages."""
    wanted: dict[int, list[float]] = {}
    for stage in range(4):
        engine, state, task = start(config(stage))
        go(engine, task, 0, 3)
        save_state(tmp_path / f"one-{stage}", engine, None, state, rank=0)
        wanted[stage] = go(engine, task, 3, STEPS)
    run_workers(tmp_path, partial(pair, tmp_path))
    for stage in range(4):
        went_on = torch.load(tmp_path / f"went-on-{stage}.pt")
        assert went_on == pytest.approx(wanted[stage], rel=1e-5), f"one, then two, ZeRO {stage}"
        engine, state, task = start(config(stage), resume_from=tmp_path / f"two-{stage}")
        assert state.num_workers == 1
        losses = go(engine, task, 3, STEPS)
        assert losses == pytest.approx(wanted[stage], rel=1e-5), f"two, then one, ZeRO {stage}"


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_estimated_memory_equals_the_allocated_memory(zero_stage: int) -> None:
    """Compare weights and optimizer states, up to the padding of DeepSpeed."""
    engine, _, task = start(config(zero_stage))
    go(engine, task, 0, 1)
    parameters = list(engine.module.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    formula = estimate_memory(zero_stage, trainable=trainable, frozen=frozen, num_workers=1)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    held = [t for s in inner.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim]
    if zero_stage:
        held += [p for group in inner.param_groups for p in group["params"]]
    assert formula.weights == 4 * sum(p.numel() for p in parameters)
    assert formula.optimizer == pytest.approx(4 * sum(t.numel() for t in held), rel=0.05)
