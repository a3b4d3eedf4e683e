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
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from apscheduler.schedulers.background import BackgroundScheduler

from reir.errors import ConfigError, JobRunning
from reir.operations.schedule.runs import ScheduledRun, last_runs, run_schedule
from reir.operations.schedule.schedules import Schedule, read_schedules
from reir.store.embedded.locks import FileLock

HEARTBEAT = "scheduler.alive"
"""File whose time of change says that a scheduler process runs."""

ALIVE_S = 30.0
POLL_S = 2.0
_MAX_PARALLEL = 4

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
        self._problem = ""
        self._stop = threading.Event()
        executors = {"default": {"type": "threadpool", "max_workers": _MAX_PARALLEL}}
        self._timer = BackgroundScheduler(executors=executors, timezone=UTC)

    def run(self, stop: threading.Event) -> None:
        """Run schedules until `stop` is set; then stop the commands that are running."""
        self._stop = stop
        self._folder.mkdir(parents=True, exist_ok=True)
        self._timer.start()
        try:
            while not stop.is_set():
                self._reload()
                (self._folder / HEARTBEAT).write_text(str(os.getpid()))
                stop.wait(POLL_S)
        finally:
            (self._folder / HEARTBEAT).unlink(missing_ok=True)
            self._timer.shutdown(wait=True)

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
        for name in self._known.keys() - found.keys():
            self._timer.remove_job(name)
            logger.info("removed schedule %s", name)
        for name, schedule in found.items():
            if self._known.get(name) != schedule:
                self._add(name, schedule)
        self._known = found

    def _add(self, name: str, schedule: Schedule) -> None:
        is_late = schedule.missed == "run" and self._was_missed(name, schedule)
        self._timer.add_job(
            self._start,
            schedule.trigger(),
            args=(name, schedule),
            id=name,
            replace_existing=True,
            # One run at a time. What becomes due meanwhile is one run, or none; see `_start`.
            max_instances=1,
            coalesce=True,
            misfire_grace_time=None if schedule.missed == "run" else 60,
            **({"next_run_time": datetime.now(UTC)} if is_late else {}),
        )
        logger.info("schedule %s: %s%s", name, schedule.cron, ", late" if is_late else "")

    def _was_missed(self, name: str, schedule: Schedule) -> bool:
        """Whether a run was due since the last one, while no scheduler ran."""
        runs = last_runs(self._folder, name, 1)
        since_s = runs[0].started_s if runs else schedule.added_s
        due = schedule.next_due(datetime.fromtimestamp(since_s, UTC))
        return due is not None and due.timestamp() < time.time()

    def _start(self, name: str, schedule: Schedule) -> None:
        """Run a schedule; and once more if that took so long that another run became due."""
        # Not APScheduler's own jitter, which may start a run before it is due.
        while not self._stop.wait(random.uniform(0, schedule.jitter_s)):
            try:
                run = run_schedule(self._folder, name, schedule, self._stop)
            except JobRunning as error:
                logger.warning("%s", error)
                return
            self._on_run(name, run)
            is_current = self._known.get(name) == schedule
            if schedule.missed == "skip" or not is_current or not self._was_missed(name, schedule):
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
