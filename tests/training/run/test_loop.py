"""Schedule, weight averaging and the training loop, with a plain optimizer as the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reir_training.config import ClareSchedule, NanoSchedule, Schedule
from reir_training.run.loop import ExponentialMovingAverage, Position, TrainLoop, TrainProgress
from reir_training.run.schedule import Epoch, Stage, plan, rate_factor

# --------------------------------------------------------------------------------------- schedule


def test_rate_rises_then_falls_to_two_percent() -> None:
    assert rate_factor(0, 1000, Schedule(warmup_steps=50)) == pytest.approx(1 / 50)
    assert rate_factor(24, 1000, Schedule(warmup_steps=50)) == pytest.approx(0.5, rel=0.01)
    assert rate_factor(525, 1000, Schedule(warmup_steps=50)) == pytest.approx(0.47, abs=0.01)
    assert rate_factor(1000, 1000, Schedule(warmup_steps=50)) == pytest.approx(0.02)
    assert rate_factor(5000, 1000, Schedule(warmup_steps=50)) == pytest.approx(0.02)


def test_rate_without_warm_up_starts_at_one() -> None:
    assert rate_factor(0, 100, Schedule(warmup_steps=1)) == pytest.approx(1)


def test_rate_falls_after_the_warm_up_and_stays_above_zero() -> None:
    rates = [rate_factor(step, 300, Schedule(warmup_steps=20)) for step in range(300)]
    assert all(a < b for a, b in pairwise(rates[:20]))
    assert all(a > b for a, b in pairwise(rates[20:]))
    assert min(rates) > 0
    assert max(rates) <= 1


def test_rate_of_a_stage_without_steps_is_finite() -> None:
    assert math.isfinite(rate_factor(0, 0, Schedule(warmup_steps=50)))


def test_rate_of_the_published_schedule_falls_once() -> None:
    published = ClareSchedule()
    assert rate_factor(0, 60_000, published) == pytest.approx(0.01)
    assert rate_factor(100, 60_000, published) == pytest.approx(0.505)
    assert rate_factor(47_999, 60_000, published) == 1
    assert rate_factor(48_000, 60_000, published) == pytest.approx(0.1)


def test_plan_of_both_stages_and_of_each() -> None:
    settings = NanoSchedule(grounding_epochs=2, clia_epochs=3)
    everything = plan(settings, "all")
    assert [e.number for e in everything] == [0, 1, 2, 3, 4]
    assert [e.stage for e in everything] == ["grounding"] * 2 + ["clia"] * 3
    assert [e.first_of_stage for e in everything] == [0, 0, 2, 2, 2]
    assert [e.epochs_of_stage for e in everything] == [2, 2, 3, 3, 3]
    assert plan(settings, "grounding") == everything[:2]
    assert plan(settings, "clia") == [Epoch(i, "clia", 0, 3) for i in range(3)]


def test_plan_skips_a_stage_without_epochs() -> None:
    settings = NanoSchedule(grounding_epochs=0, clia_epochs=1)
    assert plan(settings, "all") == [Epoch(0, "clia", 0, 1)]


# -------------------------------------------------------------------------------------- averaging


def module() -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(3, 2)
    linear.bias.requires_grad_(False)
    return linear


def test_average_equals_the_slow_formula() -> None:
    linear, averaged = module(), ExponentialMovingAverage(decay=0.5)
    want: Tensor | None = None
    for step in range(12):
        with torch.no_grad():
            linear.weight.copy_(torch.randn(2, 3))
        averaged.update(linear)
        now = linear.weight.detach().double()
        decay = min(0.5, (1 + step) / (10 + step))
        want = now if want is None else decay * want + (1 - decay) * now
    assert want is not None
    torch.testing.assert_close(averaged.weights["weight"].double(), want)
    assert averaged.updates == 12
    assert set(averaged.weights) == {"weight"}  # the frozen bias is not averaged


def test_the_first_average_is_a_copy() -> None:
    linear, averaged = module(), ExponentialMovingAverage(decay=0.9)
    averaged.update(linear)
    before = averaged.weights["weight"].clone()
    with torch.no_grad():
        linear.weight.zero_()
    assert torch.equal(averaged.weights["weight"], before)


def test_applied_uses_the_average_and_restores_the_weights() -> None:
    linear, averaged = module(), ExponentialMovingAverage(decay=0.9)
    averaged.update(linear)
    kept = averaged.weights["weight"].clone()
    with torch.no_grad():
        linear.weight.add_(1)
    live = {k: v.clone() for k, v in linear.state_dict().items()}
    with averaged.applied(linear):
        assert torch.equal(linear.weight, kept)
        assert torch.equal(linear.bias, live["bias"])
    for name, value in linear.state_dict().items():
        assert torch.equal(value, live[name])


def test_applied_restores_after_an_error() -> None:
    linear, averaged = module(), ExponentialMovingAverage(decay=0.9)
    averaged.update(linear)
    with torch.no_grad():
        linear.weight.add_(1)
    live = linear.weight.detach().clone()
    with pytest.raises(RuntimeError, match="disk full"), averaged.applied(linear):
        raise RuntimeError("disk full")
    assert torch.equal(linear.weight, live)


class Normed(nn.Module):
    """A linear layer between two batch norms; the first one is frozen and stays in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.norm = nn.BatchNorm1d(3), nn.BatchNorm1d(2)
        self.linear = nn.Linear(3, 2)
        self.frozen.requires_grad_(False)

    def train(self, mode: bool = True) -> Normed:
        """Keep the frozen norm in eval mode."""
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3) -> (B, 2)."""
        found: Tensor = self.norm(self.linear(self.frozen(x)))
        return found


def test_running_statistics_are_averaged_like_weights() -> None:
    model, averaged = Normed().train(), ExponentialMovingAverage(decay=0.5)
    want = {"mean": torch.zeros(2), "var": torch.zeros(2)}
    for step in range(5):
        model(3 * torch.randn(8, 3) + step)
        averaged.update(model)
        decay = min(0.5, (1 + step) / (10 + step)) if step else 0.0
        for name, value in want.items():
            now = getattr(model.norm, f"running_{name}")
            want[name] = decay * value + (1 - decay) * now
    for name, value in want.items():
        torch.testing.assert_close(averaged.weights[f"norm.running_{name}"], value)
    statistics = {name for name in averaged.weights if "running" in name}
    assert statistics == {"norm.running_mean", "norm.running_var"}
    live = {name: value.clone() for name, value in model.state_dict().items()}
    # Validation comes in eval mode.
    with averaged.applied(model.eval()):
        assert model.norm.running_mean is not None
        torch.testing.assert_close(model.norm.running_mean, want["mean"])
        assert torch.equal(model.linear.weight, averaged.weights["linear.weight"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, live[name])


# ----------------------------------------------------------------------------------------- epochs


class Regression(nn.Module):
    """Replaces the objective: fits one weight, with noise like that of dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Tensor, stage: str) -> tuple[Tensor, dict[str, float]]:
        """Return the loss and its parts."""
        loss = ((self.weight - batch.mean() - 0.01 * torch.randn(1)) ** 2).sum()
        return loss, {stage: loss.item()}


class PlainEngine:
    """The part of the DeepSpeed engine that the loop uses, with a plain optimizer."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        groups = [{"params": list(module.parameters()), "lr": 0.1, "base_lr": 0.1}]
        self.optimizer = torch.optim.SGD(groups)
        self.rates: list[float] = []

    def train(self) -> None:
        """Put the module into training mode."""
        self.module.train()

    def __call__(self, *inputs: Any) -> Any:
        """Run the module."""
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Take a step and note its rate."""
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.optimizer.zero_grad()


class Numbers:
    """A task of twelve steps per epoch with a few random numbers each."""

    photos_per_step = 2

    def __init__(self, objective: nn.Module) -> None:
        self.objective = objective

    def steps(self, stage: Stage) -> int:  # noqa: ARG002 - the same for both
        """Twelve."""
        return 12

    def batches(self, epoch: Epoch, first: int) -> Iterator[Tensor]:
        """Numbers that depend on epoch and step."""
        for i in range(first, 12):
            rng = np.random.default_rng([epoch.number, i])
            yield torch.from_numpy(rng.random(2)).float() + 1000 * epoch.number + i


def loop_of(
    engine: PlainEngine,
    averaged: ExponentialMovingAverage | None,
    seen: list[TrainProgress],
    on_position: Callable[[Position], None] = lambda _: None,
) -> TrainLoop:
    return TrainLoop(
        engine,
        Numbers(engine.module),
        NanoSchedule(warmup_steps=4, save_every_steps=5),
        rank=0,
        zero_stage=1,
        averaged=averaged,
        on_progress=seen.append,
        on_position=on_position,
    )


def run(
    epochs: Sequence[Epoch], engine: PlainEngine, averaged: ExponentialMovingAverage | None = None
) -> tuple[TrainLoop, list[TrainProgress], list[dict[str, float]]]:
    seen: list[TrainProgress] = []
    loop = loop_of(engine, averaged, seen)
    return loop, seen, [loop.run_epoch(epoch, len(epochs)) for epoch in epochs]


EPOCHS = plan(NanoSchedule(grounding_epochs=1, clia_epochs=2), "all")


def test_learning_rates_follow_the_schedule_of_their_stage() -> None:
    engine, schedule = PlainEngine(Regression()), Schedule(warmup_steps=4)
    run(EPOCHS, engine)
    want = [rate_factor(i, 12, schedule) for i in range(12)]
    want += [rate_factor(i, 24, schedule) for i in range(24)]
    assert engine.rates == pytest.approx([0.1 * factor for factor in want])


def test_a_repeated_epoch_gives_the_same_result() -> None:
    torch.manual_seed(1)
    whole = PlainEngine(Regression())
    _, _, parts = run(EPOCHS, whole)
    first = PlainEngine(Regression())
    run(EPOCHS[:2], first)
    torch.manual_seed(99)  # another process
    resumed = PlainEngine(Regression())
    resumed.module.load_state_dict(first.module.state_dict())
    _, _, last = run(EPOCHS[2:], resumed)
    assert last[0] == parts[2]
    assert torch.equal(resumed.module.state_dict()["weight"], whole.module.state_dict()["weight"])


def test_an_interrupted_epoch_resumes_from_its_last_position() -> None:
    whole_seen: list[TrainProgress] = []
    whole = PlainEngine(Regression())
    parts = loop_of(whole, None, whole_seen).run_epoch(EPOCHS[0], 3)

    kept: list[tuple[Position, dict[str, Tensor]]] = []
    first = PlainEngine(Regression())

    def keep(position: Position) -> None:
        weights = {k: v.clone() for k, v in first.module.state_dict().items()}
        kept.append((replace(position, sums=dict(position.sums)), weights))

    loop = loop_of(first, None, [], keep)
    loop.run_epoch(EPOCHS[0], 3)
    assert [(p.epochs, p.steps) for p, _ in kept] == [(0, 5), (0, 10)]

    for position, weights in kept:
        torch.manual_seed(99)  # another process
        resumed, seen = PlainEngine(Regression()), list[TrainProgress]()
        resumed.module.load_state_dict(weights)
        again = loop_of(resumed, None, seen).run_epoch(EPOCHS[0], 3, position)
        assert again == parts
        assert torch.equal(
            resumed.module.state_dict()["weight"], whole.module.state_dict()["weight"]
        )
        assert (seen[-1].loss, seen[-1].parts) == (whole_seen[-1].loss, whole_seen[-1].parts)


def test_progress_is_reported_every_ten_steps_and_at_the_end() -> None:
    _, seen, parts = run(EPOCHS, PlainEngine(Regression()))
    assert [(p.epoch, p.step, p.stage) for p in seen] == [
        (e.number + 1, step, e.stage) for e in EPOCHS for step in (10, 12)
    ]
    assert {p.steps for p in seen} == {12}
    assert seen[-1].parts["clia"] == pytest.approx(parts[-1]["clia"], abs=1e-4)
    assert list(parts[0]) == ["grounding"]


def test_final_weights_are_the_average_and_training_continues_from_the_last() -> None:
    engine, averaged = PlainEngine(Regression()), ExponentialMovingAverage(decay=0.9)
    loop, _, _ = run(EPOCHS, engine, averaged)
    last = engine.module.state_dict()["weight"].clone()
    with loop.final_weights() as kept:
        inside = dict(kept.named_parameters())["weight"].detach().clone()
    assert torch.equal(inside, averaged.weights["weight"])
    assert not torch.equal(inside, last)
    assert torch.equal(engine.module.state_dict()["weight"], last)
    assert averaged.updates == 36


def test_final_weights_without_averaging_are_the_last() -> None:
    engine = PlainEngine(Regression())
    loop, _, _ = run(EPOCHS[:1], engine)
    with loop.final_weights() as kept:
        module_in_use: nn.Module = kept
        assert module_in_use is engine.module
