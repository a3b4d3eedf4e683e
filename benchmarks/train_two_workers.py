"""Two workers under DeepSpeed give the loss and the gradients of one process on the same batch.

    python benchmarks/train_two_workers.py

Tiny models of the real classes in fp32 on CPUs, both stages, ZeRO 1, 2 and 3, with every weight
split under ZeRO 3. The single process is plain autograd on the whole global batch, without
DeepSpeed. Differences of the loss are relative to the loss, and differences of a gradient to the
largest element of all gradients of the step; up to 1e-5 is allowed. Absolute differences are
reported too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from _report import write_report

from reir_testing.training.workers import CASES, Difference, step_alone, steps_of_workers


def measure(work: Path) -> dict[str, Difference]:
    """Return the difference between two workers and one process, by name of the case."""
    # A single process knows no ZeRO stage, so each step is run only once.
    alone = {(c.model, c.task): step_alone(work, c) for c in CASES if c.zero_stage == 1}
    together = steps_of_workers(work, CASES)
    return {
        str(case): alone[case.model, case.task].difference(step) for case, step in together.items()
    }


def figures_of(found: dict[str, Difference]) -> dict[str, float]:
    figures = {
        "train.two_workers_max_diff": max(each.largest for each in found.values()),
        "train.two_workers_max_loss_diff_absolute": max(e.loss_absolute for e in found.values()),
        "train.two_workers_max_gradient_diff_absolute": max(
            each.gradient_absolute for each in found.values()
        ),
    }
    for name, each in found.items():
        figures[f"train.two_workers.{name}.loss"] = each.loss
        figures[f"train.two_workers.{name}.gradient"] = each.gradient
        figures[f"train.two_workers.{name}.gradient_absolute"] = each.gradient_absolute
    return figures


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = figures_of(measure(Path(folder)))
    for key, value in figures.items():
        print(f"{key:64} {value:.3g}")
    write_report("train_two_workers", figures)


if __name__ == "__main__":
    main()
