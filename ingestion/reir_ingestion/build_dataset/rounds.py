"""`build_outcomes`: builds the expressions of all photos, in rounds if a model answers in batches.

With such a model, the first round notes the writer's questions, which are then answered together;
the second round writes from the answers and notes the questions of the first judge, and so on. A
round tries only the photos that wait for an answer, and finds earlier answers on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from reir_ingestion.build_dataset.answers.failures import AnswerPending
from reir_ingestion.build_dataset.outcomes import Builder, Outcome
from reir_ingestion.build_dataset.tasks import WritingTask

WRITING, ANSWERING = "writing expressions", "answering questions"

Progress = Callable[[str, int, int], None]
"""Called with the stage, the number of photos or answers that are done, and of all."""


def build_outcomes(
    builder: Builder, tasks: Sequence[WritingTask], threads: int, progress: Progress
) -> list[Outcome]:
    """Return the outcome of each task, in the order given.

    Raises:
        WorkersUnavailable: a batch failed as a whole; the answers until then are kept.
    """
    outcomes: dict[int, Outcome] = {}
    for number in count(1):
        left = [at for at in range(len(tasks)) if at not in outcomes]
        for at, outcome in zip(
            left, _try(builder, [tasks[at] for at in left], threads), strict=True
        ):
            if outcome is not None:
                outcomes[at] = outcome
                progress(WRITING, len(outcomes), len(tasks))
        if len(outcomes) == len(tasks):
            break
        _answer_waiting(builder, f"{ANSWERING}, round {number}", progress)
    return [outcomes[at] for at in range(len(tasks))]


def _try(builder: Builder, tasks: Sequence[WritingTask], threads: int) -> Iterator[Outcome | None]:
    """Yield the outcome of each task, or None if it waits for an answer."""

    def build(task: WritingTask) -> Outcome | None:
        try:
            return builder.build(task)
        except AnswerPending:
            return None

    pool = ThreadPoolExecutor(threads, thread_name_prefix="build-dataset")
    try:
        yield from pool.map(build, tasks)
    finally:
        # After Ctrl-C, only the photos in progress are finished.
        pool.shutdown(cancel_futures=True)


def _answer_waiting(builder: Builder, stage: str, progress: Progress) -> None:
    total = sum(each.num_waiting for each in builder.answers)
    assert total, "a photo waits, so its question does; is `Builder.answers` complete?"
    done = count(1)
    for answers in builder.answers:
        for _ in answers.answer_waiting():
            progress(stage, next(done), total)
