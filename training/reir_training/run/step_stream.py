"""`StepStream`: the batches of tasks whose steps are loaded one by one, possibly ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from reir_training.clare.data import Arrays
from reir_training.data.sampling import Sampler, Step
from reir_training.run.schedule import Epoch, Stage

Load = Callable[[int], Arrays]
"""Loads the part of a step with this number, counted over all steps of a stage, in any process."""
Stream = Callable[[Load, int, int], Iterator[Arrays]]
"""(load, first, last): yields the result of `load` for each step in [first, last), in order."""


def load_in_process(load: Load, first: int, last: int) -> Iterator[Arrays]:
    """Load each step in this process when it is needed; the simplest `Stream`."""
    return map(load, range(first, last))


def load_share(
    load: Callable[[Step, int], Arrays], sampler: Sampler, place: tuple[int, int, int], number: int
) -> Arrays:
    """Load one worker's share of a part of a step.

    Args:
        load: loads samples, given those of a step and the number of the share.
        sampler: chooses the samples of each step.
        place: rank of the worker, number of workers, and parts per step.
        number: number of the part, counted over all steps of the stage.
    """
    rank, world_size, parts = place
    step, part = divmod(number, parts)
    # The parts of a step are divided like workers, so a step has the same photos for any number.
    share = rank * parts + part
    return load(sampler.step(step, share, world_size * parts), share)


class StepStream:
    """Yields the parts of the steps of a run.

    Args:
        stream: loads the steps.
        parts: parts per step; see `Schedule.accumulate_steps`.
    """

    def __init__(self, stream: Stream, parts: int) -> None:
        self._stream, self._parts = stream, parts
        # The open stream, and the stage and number of the part that it yields next.
        self._arrays: Iterator[Arrays] = iter(())
        self._next: tuple[Stage, int] | None = None

    def epoch(
        self, epoch: Epoch, steps: int, first: int, loader: Callable[[int], Load]
    ) -> Iterator[Arrays]:
        """Yield the parts of an epoch.

        All epochs of a stage use the same stream, because opening one may take many seconds.

        Args:
            epoch: epoch of the run.
            steps: number of its steps.
            first: step to start at.
            loader: returns the `Load` of a stage, given its number of parts.
        """
        parts_of_epoch = steps * self._parts
        done = (epoch.number - epoch.first_of_stage) * parts_of_epoch
        due = range(done + first * self._parts, done + parts_of_epoch)
        if self._next != (epoch.stage, due.start):
            of_stage = epoch.epochs_of_stage * parts_of_epoch
            # Only a dry run continues after the last epoch of the stage.
            self._arrays = self._stream(loader(of_stage), due.start, max(due.stop, of_stage))
        # `due` comes first: when it ends, `zip` must not have taken a part of the next epoch.
        for number, arrays in zip(due, self._arrays, strict=False):
            self._next = (epoch.stage, number + 1)
            yield arrays
        if due.stop == epoch.epochs_of_stage * parts_of_epoch:
            next(self._arrays, None)  # exhaust the stream, so that it closes before Ray shuts down
