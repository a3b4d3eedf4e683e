"""Speed of training and indexing with `clare-base` at its real size, and its share of the peak.

    python benchmarks/clare_step.py [--device cuda] [--precision bf16] [--train-batches 1 2 4 8]

Weights are random; photos have the published size, 800 x 1333. The benchmark times training steps
of stage 2 with denoising, as a whole and by part (model, losses with assignment, backward,
optimizer), with growing batches until memory is full, and the forward pass of indexing with batches
of 1, 8 and 32. FLOPs are those that torch counts for one photo (matrix products, convolutions and
attention, but not sampling, norms and activations), times the batch. The model FLOP utilization
(mfu) is relative to the data sheet of a known GPU; on any device, a second figure is relative to
one large matrix product in the same run.

`train.mfu` and `index.mfu` are those of the fastest batch and exist for known GPUs only.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import torch
from _report import write_report
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reir.models.clare.config import ClareConfig, clare_base, clare_large
from reir.models.clare.encoder import model_input
from reir.models.clare.model import Clare
from reir_testing.tiny_clare import tiny_clare_config
from reir_training.clare.data import ClareBatch
from reir_training.clare.losses import ClareLossWeights
from reir_training.clare.objective import ClareObjective
from reir_training.clare.task import build_word_tokenizer

SHAPES: dict[str, Callable[[], ClareConfig]] = {
    "clare-base": clare_base,
    "clare-large": clare_large,
    "tiny": partial(tiny_clare_config, vocabulary=256),
}
DENSE_BF16_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0}
"""Peaks from the makers' data sheets, without sparsity, by a part of the device's name."""
TEXTS = ("the man in red left of the bus", "a dog behind the bench", "the second cup from the left")
PARTS = ("model", "losses", "backward", "optimizer")


@dataclass(frozen=True)
class Bench:
    """The device, the precision and the time limit of all measurements."""

    device: torch.device
    half: bool
    seconds: float

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, call: Callable[[], object]) -> float:
        """Return the median seconds of at least two calls, after one to warm up."""
        # The first call allocates memory and chooses kernels.
        call()
        self.wait()
        seconds: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(seconds) < 2 or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            self.wait()
            seconds.append(time.perf_counter() - start)
        return median(seconds)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Run the block in the precision of the model."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            yield


def some_batch(size: int, photo_px: tuple[int, int], seed: int = 0) -> ClareBatch:
    """Return noise of the real size with one target and one text per photo."""
    random = np.random.default_rng(seed)
    height, width = photo_px
    corners = np.sort(random.random((size, 2, 2)), axis=1).reshape(size, 4)
    one_each = np.arange(size)
    return ClareBatch.from_arrays(
        {
            "pixels": random.integers(0, 256, (size, 3, height, width), dtype=np.uint8),
            "size_px": np.full((size, 2), (height, width)),
            "boxes": corners.astype(np.float32),
            "box_photo": one_each,
            "box_text": one_each,
            "texts": np.array([TEXTS[i % len(TEXTS)] for i in range(size)]),
            "text_target": one_each,
            "photo_key": one_each,
            "instance_key": one_each,
            "max_targets": np.array(1),
            "noise_seeds": one_each,
        }
    )


class Step:
    """A training step as the trainer runs it, which records how long its parts take."""

    def __init__(self, config: ClareConfig, bench: Bench) -> None:
        torch.manual_seed(0)
        tokenizer = build_word_tokenizer(TEXTS)
        self._bench = bench
        self.objective = ClareObjective(
            Clare(config), tokenizer, ClareLossWeights(), half=bench.half
        ).to(bench.device)
        self.objective.train()
        # A tiny rate: the time of a step does not depend on it, but the weights must stay finite.
        self._optimizer = torch.optim.AdamW(self.objective.parameters(), lr=1e-6)
        self.marks: list[float] = []
        self.objective.model.register_forward_hook(lambda *_: self._mark())

    def _mark(self) -> None:
        self._bench.wait()
        self.marks.append(time.perf_counter())

    def run(self, batch: ClareBatch, *, marked: bool = True) -> None:
        """Run one step, and put the time at the end of each part into `marks`."""
        self.marks.clear()
        loss, _ = self.objective(batch, "clia")
        if marked:
            self._mark()
        loss.backward()
        if marked:
            self._mark()
        self._optimizer.step()
        self._optimizer.zero_grad()


def parts_of(step: Step, batch: ClareBatch, bench: Bench) -> dict[str, float]:
    """Return each part's share of a step's time, with a synchronization after each part."""
    bench.wait()
    start = time.perf_counter()
    step.run(batch)
    bench.wait()
    edges = [start, *step.marks, time.perf_counter()]
    return {
        name: (after - before) / (edges[-1] - start)
        for name, (before, after) in zip(PARTS, itertools.pairwise(edges), strict=True)
    }


def flops(call: Callable[[], object]) -> float:
    """Return the floating point operations of a call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def matmul_tflops(bench: Bench) -> float:
    """Return the rate of one large matrix product."""
    # Large enough to reach the device's peak.
    side = 8192 if bench.device.type == "cuda" else 2048
    kind = torch.bfloat16 if bench.half else torch.float32
    a, b = torch.randn(2, side, side, device=bench.device, dtype=kind)
    return 2 * side**3 / bench.time(lambda: a @ b) / 1e12


def data_sheet_tflops(bench: Bench) -> float | None:
    """Return the bf16 peak of a known GPU; None for any other device or precision."""
    if bench.device.type != "cuda" or not bench.half:
        return None
    name = torch.cuda.get_device_name(bench.device)
    return next((peak for part, peak in DENSE_BF16_TFLOPS.items() if part in name), None)


class Table:
    """Rows that are printed and saved as figures."""

    def __init__(self, kind: str, one_photo: float, peaks: tuple[float | None, float]) -> None:
        self._kind, self._flops, (self._peak, self._matmul) = kind, one_photo, peaks
        self.figures: dict[str, float] = {f"{kind}.gflops_per_photo": round(one_photo / 1e9, 1)}
        self._best = 0.0

    def add(self, size: int, seconds: float, memory_gib: float | None) -> None:
        """Add the row of one batch size."""
        rate = size * self._flops / seconds / 1e12
        row = {
            "step_ms": round(1000 * seconds, 1),
            "photos_per_s": round(size / seconds, 2),
            "matmul_share": round(rate / self._matmul, 3),
        }
        if memory_gib is not None:
            row["memory_gib"] = round(memory_gib, 2)
        if self._peak is not None:
            row["mfu"] = round(rate / self._peak, 3)
        self.figures |= {f"{self._kind}.batch{size}.{key}": value for key, value in row.items()}
        if rate > self._best:
            self._best = rate
            self.figures[f"{self._kind}.matmul_share"] = row["matmul_share"]
            if self._peak is not None:
                self.figures[f"{self._kind}.mfu"] = row["mfu"]
        print(f"{self._kind} batch {size:3d}: " + "  ".join(f"{k} {v}" for k, v in row.items()))


def memory_gib(bench: Bench) -> float | None:
    """Return the peak memory of the device since the last call; None if it is not counted."""
    if bench.device.type != "cuda":
        return None
    most = torch.cuda.max_memory_allocated(bench.device) / 2**30
    torch.cuda.reset_peak_memory_stats(bench.device)
    return most


def train_table(
    config: ClareConfig,
    photo_px: tuple[int, int],
    batches: Sequence[int],
    bench: Bench,
    peaks: tuple[float | None, float],
) -> dict[str, float]:
    """Time steps of growing batches until memory is full."""
    step = Step(config, bench)
    one = some_batch(1, photo_px).to(bench.device)
    # The first step creates the optimizer's state, which later steps have in memory.
    step.run(one, marked=False)
    table = Table("train", flops(lambda: step.run(one, marked=False)), peaks)
    for size in batches:
        batch = some_batch(size, photo_px).to(bench.device)
        memory_gib(bench)
        try:
            # Timed without marks after the losses and the backward pass, since waiting there makes
            # a step on a GPU slower.
            seconds = bench.time(partial(step.run, batch, marked=False))
            shares = parts_of(step, batch, bench)
        except torch.OutOfMemoryError:
            print(f"train batch {size}: does not fit into memory")
            break
        table.add(size, seconds, memory_gib(bench))
        print("    " + "  ".join(f"{name} {share:.0%}" for name, share in shares.items()))
        table.figures |= {f"train.batch{size}.share_{k}": round(v, 3) for k, v in shares.items()}
    return table.figures


@torch.inference_mode()
def index_table(
    config: ClareConfig,
    photo_px: tuple[int, int],
    batches: Sequence[int],
    bench: Bench,
    peaks: tuple[float | None, float],
) -> dict[str, float]:
    """Time the forward pass that indexing runs."""
    torch.manual_seed(0)
    model = Clare(config).eval().to(bench.device)

    def forward(pixels: Tensor, mask: Tensor) -> None:
        with bench.precision():
            model(pixels, mask)

    def inputs(size: int) -> tuple[Tensor, Tensor]:
        batch = some_batch(size, photo_px).to(bench.device)
        return model_input(batch.pixels, batch.size_px, config)

    one = inputs(1)
    table = Table("index", flops(lambda: forward(*one)), peaks)
    for size in batches:
        photos = inputs(size)
        memory_gib(bench)
        seconds = bench.time(partial(forward, *photos))
        table.add(size, seconds, memory_gib(bench))
    return table.figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=SHAPES, default="clare-base")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--photo", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument("--train-batches", type=int, nargs="*", default=(1, 2, 4, 8, 16, 32, 64))
    parser.add_argument("--index-batches", type=int, nargs="*", default=(1, 8, 32))
    parser.add_argument("--seconds", type=float, default=5.0, help="Time spent on each row.")
    arguments = parser.parse_args()
    bench = Bench(torch.device(arguments.device), arguments.precision == "bf16", arguments.seconds)
    peaks = data_sheet_tflops(bench), matmul_tflops(bench)
    print(f"one large matrix product: {peaks[1]:.3g} TFLOP/s; data sheet: {peaks[0] or 'unknown'}")
    config, photo_px = SHAPES[arguments.preset](), tuple(arguments.photo)
    figures: dict[str, float | str] = {
        "device.matmul_tflops": round(peaks[1], 3),
        "model": arguments.preset,
        "precision": arguments.precision,
    }
    figures |= index_table(config, photo_px, arguments.index_batches, bench, peaks)
    figures |= train_table(config, photo_px, arguments.train_batches, bench, peaks)
    on_gpu = bench.device.type == "cuda"
    name = torch.cuda.get_device_name(bench.device) if on_gpu else None
    print(write_report("clare_step" if on_gpu else "clare_step_cpu", figures, accelerator=name))


if __name__ == "__main__":
    main()
