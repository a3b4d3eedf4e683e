"""The scheduler process: starts the runs of all schedules of a file at their times.

APScheduler keeps the time. The file is read again when it changes, so schedules can be added and
removed while the scheduler runs.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from apscheduler.job import Job
from apscheduler.schedulers.background import BackgroundScheduler

from reir.errors import ConfigError, JobRunning
from reir.operations.schedule.runs import ScheduledRun, own_runs, run_schedule
from reir.operations.schedule.schedules import Schedule, read_schedules
from reir.store.embedded.locks import FileLock

HEARTBEAT = "scheduler.alive"
"""File whose time of change says that a scheduler process runs."""

ALIVE_S = 30.0
POLL_S = 2.0
_MAX_PARALLEL = 4
_MAX_WAITING = 1000
"""Number of threads. One that waits, for its jitter or for another run to end, costs little."""

logger = logging.getLogger(__name__)
# It would warn of every run that is due while the one before it is going on.
logging.getLogger("apscheduler").setLevel(logging.ERROR)

OnRun = Callable[[str, ScheduledRun], None]


class Scheduler:
    """Runs the schedules of a file until it is stopped."""

    def __init__(self, file: Path, folder: Path, on_run: OnRun = lambda _, __: None) -> None:
        """Prepare a scheduler.

        Args:
            file: the schedules.
            folder: for the runs.
            on_run: called with the name of a schedule and its run, after each run.
        """
        self._file, self._folder, self._on_run = file, folder, on_run
        self._known: dict[str, Schedule] = {}
        self._jobs: dict[str, Job] = {}
        self._problem = self._heartbeat_problem = ""
        self._stop = threading.Event()
        self._slots = threading.Semaphore(_MAX_PARALLEL)
        executors = {"default": {"type": "threadpool", "max_workers": _MAX_WAITING}}
        self._timer = BackgroundScheduler(executors=executors, timezone=UTC)

    def run(self, stop: threading.Event) -> None:
        """Run schedules until `stop` is set; then stop the commands that are running.

        An error sets it, too.
        """
        self._stop = stop
        self._folder.mkdir(parents=True, exist_ok=True)
        self._timer.start()
        try:
            while not stop.is_set():
                self._reload()
                self._beat()
                stop.wait(POLL_S)
        finally:
            stop.set()  # otherwise, an error would leave it waiting for runs and their jitter
            with suppress(OSError):
                (self._folder / HEARTBEAT).unlink(missing_ok=True)
            self._timer.shutdown(wait=True)

    def _beat(self) -> None:
        """Say that the scheduler runs; go on if that fails, such as on a full disk."""
        file = self._folder / HEARTBEAT
        try:
            file.write_text(str(os.getpid()))
        except OSError as error:
            if str(error) != self._heartbeat_problem:
                logger.warning(
                    "cannot write %s (%s); the schedules go on, but `reir schedule list` and the "
                    "monitor take the scheduler for stopped",
                    file,
                    error,
                )
            self._heartbeat_problem = str(error)
        else:
            self._heartbeat_problem = ""

    def _reload(self) -> None:
        """Bring the timer up to date with the file; keep the old schedules if it is wrong."""
        try:
            found = read_schedules(self._file)
        except ConfigError as error:
            if str(error) != self._problem:
                logger.warning("the schedules stay as they were: %s", error)
            self._problem = str(error)
            return
        self._problem = ""
        # Before jobs are added: a run begins only if its schedule is known.
        before, self._known = self._known, found
        for name in before.keys() - found.keys():
            self._jobs.pop(name).remove()
            logger.info("removed schedule %s", name)
        for name, schedule in found.items():
            if before.get(name) != schedule:
                self._add(name, schedule)

    def _add(self, name: str, schedule: Schedule) -> None:
        is_late = schedule.missed == "run" and self._was_missed(name, schedule)
        if name in self._jobs:
            self._jobs[name].remove()
        # Without an id, so that a run of the old schedule that waits does not count as an instance.
        self._jobs[name] = self._timer.add_job(
            self._start,
            schedule.trigger(),
            args=(name, schedule),
            name=name,
            # One run at a time. What becomes due meanwhile is one run, or none; see `_start`.
            max_instances=1,
            coalesce=True,
            misfire_grace_time=None if schedule.missed == "run" else 60,
            **({"next_run_time": datetime.now(UTC)} if is_late else {}),
        )
        logger.info("schedule %s: %s%s", name, schedule.cron, ", late" if is_late else "")

    def _was_missed(self, name: str, schedule: Schedule) -> bool:
        """Whether a run was due since the last one, while no scheduler ran."""
        runs = own_runs(self._folder, name, schedule, 1)
        since_s = runs[0].started_s if runs else schedule.added_s
        due = schedule.next_due(datetime.fromtimestamp(since_s, UTC))
        return due is not None and due.timestamp() < time.time()

    def _start(self, name: str, schedule: Schedule) -> None:
        """Run a schedule; and once more if that took so long that another run became due."""
        # Not APScheduler's own jitter, which may start a run before it is due.
        while not self._stop.wait(random.uniform(0, schedule.jitter_s)):
            with self._slots:
                # It may have been removed or changed while this waited.
                if self._stop.is_set() or self._known.get(name) != schedule:
                    return
                try:
                    run = run_schedule(self._folder, name, schedule, self._stop)
                except JobRunning as error:
                    logger.warning("%s", error)
                    return
            self._on_run(name, run)
            if schedule.missed == "skip" or not self._was_missed(name, schedule):
                return


@contextmanager
def only_scheduler(folder: Path) -> Iterator[None]:
    """Be the only scheduler of a folder of runs during a block.

    Raises:
        ConfigError: there is another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "scheduler.lock") as lock:
        if not lock.acquire():
            raise ConfigError(
                f"a scheduler with the folder {folder} runs already; stop it first, or use another "
                f"folder with --runs"
            )
        yield


def is_scheduler_alive(folder: Path) -> bool:
    """Whether a scheduler process runs the schedules whose runs are in this folder."""
    try:
        changed_s = (folder / HEARTBEAT).stat().st_mtime
    except OSError:
        return False
    return time.time() - changed_s < ALIVE_S


def next_due_times(known: Mapping[str, Schedule]) -> dict[str, datetime | None]:
    """Return when each schedule is due next."""
    now = datetime.now(UTC)
    return {name: schedule.next_due(now) for name, schedule in known.items()}
