"""Does Ray Data keep up with training? The same steps, streamed and from memory.

    python benchmarks/train_feed.py [--steps 40] [--pairs 5] [--device cpu]

The small model of `train_scenes.py` trains on generated scenes, first on batches in memory, then on
the same batches as `reir train` streams them: read, decoded, augmented and collated by Ray actors
on this machine. Both take turns. `train.feed_ratio` is the streamed throughput relative to that
from memory, from the first step on; median over the pairs. The start of a stream, once per stage,
is reported separately. `train.model_share` is the share of a streamed step in which the model
computes instead of waiting for its batch.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import ray
import torch
from _report import write_report
from train_scenes import RECIPE, SHAPE, SIDE_PX

from reir_testing.scenes import make_scenes, save_scenes
from reir_training.clare.data import ClareBatch
from reir_training.clare.task import ClareTask
from reir_training.config import ClareTrainConfig
from reir_training.run.jobs import READER_CPUS
from reir_training.run.readers import ReaderLimits, stream_steps
from reir_training.run.schedule import Epoch

NUM_SCENES = 400


@dataclass
class TrainingPass:
    """One run over the steps: seconds until the first batch, of all steps, and of waiting."""

    startup: float
    seconds: float
    waiting: float


def settings(folder: Path, steps: int) -> ClareTrainConfig:
    """Return the training settings: only stage 1, because both stages cost about the same."""
    optimization = RECIPE["optimization"] | {"steps_per_epoch": steps}
    source = {"format": "photos", "path": folder}
    return ClareTrainConfig(
        **(RECIPE | {"data": [source], "shape": SHAPE, "optimization": optimization})
    )


class Trainer:
    """Runs steps of the task on one device."""

    def __init__(self, config: ClareTrainConfig, device: torch.device) -> None:
        stream = partial(stream_steps, readers=ReaderLimits(cpus=1, max_actors=1))
        self.task = ClareTask("clare-base", config, init=None, rank=0, world_size=1, stream=stream)
        self._device = device
        self.task.objective.to(device).train()
        self._optimizer = torch.optim.AdamW(self.task.groups())

    def run(self, batches: Iterator[ClareBatch]) -> TrainingPass:
        """Train on all batches."""
        start = time.perf_counter()
        batch = next(batches, None)
        first = before = time.perf_counter()
        waiting = 0.0
        while batch is not None:
            loss, _ = self.task.objective(batch.to(self._device), "grounding")
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            before = time.perf_counter()
            batch = next(batches, None)
            waiting += time.perf_counter() - before
        return TrainingPass(first - start, before - first, waiting)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    ray.init(
        address="local",
        # `reir train` keeps one CPU for the training itself, so the readers must not have it here.
        num_cpus=max((os.cpu_count() or 1) - 1, READER_CPUS),
        include_dashboard=False,
        log_to_driver=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        save_scenes(folder, {"train": make_scenes(NUM_SCENES, 1, SIDE_PX)}, scope="photo")
        trainer = Trainer(settings(Path(folder), arguments.steps), torch.device(arguments.device))
        epoch = Epoch(number=0, stage="grounding", first_of_stage=0, epochs_of_stage=1)
        in_memory = list(trainer.task.batches(epoch, 0))
        trainer.run(iter(in_memory[:3]))  # warms up
        ratios, shares, startups, rates = [], [], [], []
        for _ in range(arguments.pairs):
            bare = trainer.run(iter(in_memory))
            fed = trainer.run(trainer.task.batches(epoch, 0))
            ratios.append(bare.seconds / fed.seconds)
            shares.append(1 - fed.waiting / fed.seconds)
            startups.append(fed.startup)
            rates.append(arguments.steps * trainer.task.photos_per_step / fed.seconds)
            print(
                f"in memory {bare.seconds:.2f} s, streamed {fed.seconds:.2f} s (start "
                f"{fed.startup:.2f} s): ratio {ratios[-1]:.3f}, model {shares[-1]:.1%} of the time"
            )
    ray.shutdown()
    figures = {
        "train.feed_ratio": round(median(ratios), 3),
        "train.feed_ratio_least": round(min(ratios), 3),
        "train.model_share": round(median(shares), 3),
        "train.feed_startup_s": round(median(startups), 2),
        "train.fed_photos_per_s": round(median(rates), 1),
        "steps": arguments.steps,
        "pairs": arguments.pairs,
    }
    on_gpu = arguments.device.startswith("cuda")
    name = torch.cuda.get_device_name() if on_gpu else None
    print(write_report("train_feed", figures, accelerator=name))


if __name__ == "__main__":
    main()
