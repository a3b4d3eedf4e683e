"""The runs of schedules: starts the command, keeps its output, and remembers how it ended.

Each schedule has a folder with a file `TIME.json` and a file `TIME.log` for every run.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Literal

from reir.errors import JobRunning
from reir.operations.schedule.report_note import REPORT_NOTE, take_report_note
from reir.operations.schedule.schedules import Schedule
from reir.store.embedded.locks import FileLock

KEPT_RUNS = 50
STOP_GRACE_S = 60.0
"""How long a command may take to stop after SIGINT, before it is killed."""

_REIR = [sys.executable, "-c", "from reir.cli.main import main; main()"]

_POLL_S = 0.2
_LOCK_WAIT_S = 1.0

logger = logging.getLogger(__name__)

Status = Literal["running", "succeeded", "failed", "timed out", "stopped"]


@dataclass(frozen=True, kw_only=True)
class ScheduledRun:
    """One run.

    Attributes:
        schedule: name of the schedule.
        command: words of the `reir` command.
        status: how it ended; "stopped" if the scheduler ended or was killed meanwhile.
        exit_code: of the command; None while it runs.
        started_s, ended_s: Unix times; `ended_s` is 0 while it runs.
        log: file with the output of the command.
        report: page with the report of a re-indexing job; empty if there is none.
    """

    schedule: str
    command: tuple[str, ...]
    status: Status
    exit_code: int | None
    started_s: float
    ended_s: float
    log: str
    report: str = ""

    @property
    def has_failed(self) -> bool:
        """Whether it has ended without success."""
        return self.status not in ("running", "succeeded")


def run_schedule(
    folder: Path, name: str, schedule: Schedule, stop: threading.Event | None = None
) -> ScheduledRun:
    """Run the command of a schedule, wait for its end, and record it.

    Args:
        folder: folder of the runs of all schedules.
        name: name of the schedule.
        schedule: the schedule.
        stop: if this is set meanwhile, the command is stopped.

    Raises:
        JobRunning: the schedule is running already, in this or another process.
    """
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "lock") as lock:
        # Commands that list runs hold the lock for a moment, to see whether a run does.
        if not lock.acquire(timeout_s=_LOCK_WAIT_S):
            running = last_runs(folder, name, 1)
            since_s = running[0].started_s if running else time.time()
            raise JobRunning(f"schedule {name}", "this machine", _pid_in(place / "lock"), since_s)
        # In place, since a lock belongs to the file and not to its path, and a new file has none.
        (place / "lock").write_text(str(os.getpid()))
        run = _start(place, name, schedule)
        _write(place, run)
        ended = _run_command(run, schedule, stop or threading.Event())
        _write(place, ended)
        _remove_old(place)
        return ended


def last_runs(folder: Path, name: str, limit: int = KEPT_RUNS) -> list[ScheduledRun]:
    """Return the last runs of a schedule, newest first, without those whose record is damaged."""
    place = folder / name
    files = _files(place)[::-1]
    # Before the files are read: a run that ends in between has written its end before it releases
    # the lock, so it cannot be taken for one that was killed.
    is_running = _is_locked(place / "lock")
    found: list[ScheduledRun] = []
    for number, file in enumerate(files):
        run = _read(file)
        if run is None:
            continue
        # If a run is recorded as running, but nobody holds the lock, its scheduler was killed.
        if run.status == "running" and not (is_running and number == 0):
            run = replace(run, status="stopped", ended_s=run.started_s)
        found.append(run)
        if len(found) == limit:
            break
    return found


def own_runs(
    folder: Path, name: str, schedule: Schedule, limit: int = KEPT_RUNS
) -> list[ScheduledRun]:
    """Like `last_runs`, without those of a schedule of the same name that was removed before."""
    return [run for run in last_runs(folder, name, limit) if run.started_s >= schedule.added_s]


def last_success_s(folder: Path, name: str, schedule: Schedule) -> float:
    """Return the Unix time at which a schedule last succeeded; at first, when it was added."""
    runs = own_runs(folder, name, schedule)
    return next((run.ended_s for run in runs if run.status == "succeeded"), schedule.added_s)


def due_s(folder: Path, name: str, schedule: Schedule) -> float | None:
    """Return the Unix time by which a schedule should have succeeded again.

    That is the end of the first run that was due after its last success: the time at which it is
    due, the largest jitter, and the time limit. None if it is never due again.
    """
    since = datetime.fromtimestamp(last_success_s(folder, name, schedule), UTC)
    following = schedule.next_due(since)
    if following is None:
        return None
    return following.timestamp() + schedule.jitter_s + (schedule.time_limit_s or 0.0)


def _start(place: Path, name: str, schedule: Schedule) -> ScheduledRun:
    now = datetime.now(UTC)
    log = place / f"{now:%Y%m%d-%H%M%S-%f}.log"
    return ScheduledRun(
        schedule=name,
        command=tuple(schedule.command),
        status="running",
        exit_code=None,
        started_s=now.timestamp(),
        ended_s=0.0,
        log=str(log),
    )


def _run_command(run: ScheduledRun, schedule: Schedule, stop: threading.Event) -> ScheduledRun:
    """Run the command to its end, or to its time limit, or until `stop` is set or an error."""
    note = Path(run.log).with_suffix(".report")
    with Path(run.log).open("wb") as output:
        # A group of its own, so that Ctrl-C at the scheduler does not reach the command: the
        # scheduler stops it itself.
        process = subprocess.Popen(
            [*_REIR, *run.command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {REPORT_NOTE: str(note)},
        )
        try:
            status = _wait(process, run, schedule, stop)
        except BaseException:
            # Ctrl-C among them, which does not reach the command.
            _stop(process)
            raise
    return replace(
        run,
        status=status,
        exit_code=process.returncode,
        ended_s=time.time(),
        report=take_report_note(note),
    )


def _wait(
    process: subprocess.Popen[bytes], run: ScheduledRun, schedule: Schedule, stop: threading.Event
) -> Status:
    """Wait for the end of a command, or bring it about; return how it ended."""
    while process.poll() is None:
        time_is_over = schedule.time_limit_s is not None and (
            time.time() - run.started_s > schedule.time_limit_s
        )
        if time_is_over or stop.is_set():
            _stop(process)
            return "timed out" if time_is_over else "stopped"
        stop.wait(_POLL_S)
    return "succeeded" if process.returncode == 0 else "failed"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a command, so that it can finish what it is doing; kill it if it takes too long.

    Unlike Ctrl-C in a terminal, this interrupts the command alone, which ends what it has started.
    """
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        # Also processes that the command has started; `start_new_session` gave the group its id.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _write(place: Path, run: ScheduledRun) -> None:
    file = Path(run.log).with_suffix(".json")
    # Renamed when it is complete, because other commands may read it at any moment.
    temporary = place / f".{file.name}"
    with temporary.open("w") as opened:
        opened.write(json.dumps(asdict(run), indent=2) + "\n")
        opened.flush()
        os.fsync(opened.fileno())  # so that a power failure cannot leave an empty file
    temporary.replace(file)


def _files(place: Path) -> list[Path]:
    """Return the files of all runs, oldest first, without those that `_write` has not completed."""
    return sorted(place.glob("[!.]*.json"))


def _read(file: Path) -> ScheduledRun | None:
    """Return the run of a record; None if the record is damaged, which is reported."""
    try:
        values = json.loads(file.read_text())
        return ScheduledRun(**{**values, "command": tuple(values["command"])})
    except (ValueError, TypeError, KeyError) as error:
        _report_damage(file, repr(error))
        return None


@cache
def _report_damage(file: Path, problem: str) -> None:
    """Warn of a damaged record, once in a process: the monitor reads them every minute."""
    logger.warning("%s is damaged (%s), so its run is left out; delete the file", file, problem)


def _remove_old(place: Path) -> None:
    for file in _files(place)[:-KEPT_RUNS]:
        file.with_suffix(".log").unlink(missing_ok=True)
        file.unlink()


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with FileLock(path) as lock:
        return not lock.acquire(shared=True)


def _pid_in(path: Path) -> int:
    text: Sequence[str] = path.read_text().split()
    return int(text[0]) if text else 0
