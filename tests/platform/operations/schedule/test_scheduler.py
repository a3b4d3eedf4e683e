"""The scheduler: a thread or a process that starts real commands."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from reir.operations.schedule import runs, scheduler
from reir.operations.schedule.runs import ScheduledRun, run_schedule
from reir.operations.schedule.scheduler import Scheduler, is_scheduler_alive
from reir.operations.schedule.schedules import Schedule, add_schedule, remove_schedule
from reir_testing.operations.scheduled_programs import long_ago, schedule


class Running:
    """A scheduler in a thread."""

    def __init__(self, tmp_path: Path) -> None:
        self.file, self.folder = tmp_path / "schedules.yaml", tmp_path / "runs"
        self.stop = threading.Event()
        self.ended: list[tuple[str, str]] = []
        note = lambda name, run: self.ended.append((name, run.status))  # noqa: E731
        self.scheduler = Scheduler(self.file, self.folder, note)
        self.thread = threading.Thread(target=self.scheduler.run, args=(self.stop,))

    def __enter__(self) -> Running:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def wait_for(self, number: int) -> None:
        self.wait_until(lambda: len(self.ended) >= number)

    def wait_for_jobs(self, number: int) -> None:
        self.wait_until(lambda: len(self.scheduler._timer.get_jobs()) == number)

    def wait_until(self, is_done: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 30
        while not is_done():
            assert time.monotonic() < deadline_s, self.ended
            time.sleep(0.02)


@pytest.fixture(autouse=True)
def quick_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "POLL_S", 0.05)


def test_a_missed_run_is_made_up_for_once(tmp_path: Path) -> None:
    with Running(tmp_path) as running:
        add_schedule(running.file, "late", schedule(added_s=long_ago()))
        add_schedule(running.file, "skipped", schedule(added_s=long_ago(), missed="skip"))
        add_schedule(running.file, "early", schedule(added_s=time.time()))
        running.wait_for(1)
        time.sleep(0.5)
        assert running.ended == [("late", "succeeded")]
        assert is_scheduler_alive(running.folder)
    assert not is_scheduler_alive(running.folder)
    with Running(tmp_path) as again:
        time.sleep(0.5)
        assert again.ended == [], "the run has been made up for"


def test_a_run_that_was_due_during_the_one_before_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run seems to take an hour, and another one is due every hour."""
    hourly = {"cron": "0 * * * *", "added_s": long_ago()}
    began = tmp_path / "began"
    program = f"from pathlib import Path; Path({str(began)!r}).open('a').write('x')"
    started = runs._start

    def start_earlier(place: Path, name: str, one: Schedule) -> ScheduledRun:
        run = started(place, name, one)
        is_first = not began.exists()
        return replace(run, started_s=run.started_s - 3600 * is_first)

    monkeypatch.setattr(runs, "_start", start_earlier)
    with Running(tmp_path) as running:
        add_schedule(running.file, "late", schedule(program, **hourly))
        running.wait_for(2)
    assert began.read_text() == "xx"


def test_a_scheduler_that_was_killed_can_be_started_again_at_once(tmp_path: Path) -> None:
    program = "from reir.cli.main import main; main()"
    environment = {**os.environ, "REIR_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program, "schedule", "start"]
    for _ in range(2):
        with subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            assert "press Ctrl-C to stop" in process.stderr.readline()
            process.kill()


def test_a_running_command_is_stopped_with_the_scheduler(tmp_path: Path) -> None:
    program = (
        "import time\ntry:\n    print('x', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    with Running(tmp_path) as running:
        add_schedule(running.file, "slow", schedule(program, added_s=long_ago()))
        deadline_s = time.monotonic() + 20
        while not any((running.folder / "slow").glob("*.log")):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        time.sleep(0.5)
        started_s = time.monotonic()
    assert time.monotonic() - started_s < 20
    assert running.ended == [("slow", "stopped")]


def test_a_wrong_file_leaves_the_schedules_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Running(tmp_path) as running:
        add_schedule(running.file, "late", schedule(added_s=long_ago()))
        running.wait_for(1)
        good = running.file.read_text()
        running.file.write_text("schedules: [")
        time.sleep(0.3)
        assert caplog.text.count("the schedules stay as they were") == 1
        assert [job.name for job in running.scheduler._timer.get_jobs()] == ["late"]
        running.file.write_text(good)
        remove_schedule(running.file, "late")
        time.sleep(0.3)
        assert running.scheduler._timer.get_jobs() == []


def test_a_changed_schedule_replaces_the_old_one(tmp_path: Path) -> None:
    with Running(tmp_path) as running:
        add_schedule(running.file, "a", schedule(added_s=time.time()))
        time.sleep(0.3)
        (before,) = running.scheduler._timer.get_jobs()
        remove_schedule(running.file, "a")
        add_schedule(running.file, "a", schedule(cron="0 5 * * *", added_s=time.time()))
        time.sleep(0.3)
        (after,) = running.scheduler._timer.get_jobs()
        assert (before.next_run_time.hour, after.next_run_time.hour) == (3, 5)


def test_schedules_that_wait_for_their_jitter_do_not_keep_others_from_running(
    tmp_path: Path,
) -> None:
    with Running(tmp_path) as running:
        for number in range(scheduler._MAX_PARALLEL):
            waits = schedule(added_s=long_ago(), jitter_s=86_400)
            add_schedule(running.file, f"waits-{number}", waits)
        running.wait_for_jobs(scheduler._MAX_PARALLEL)
        time.sleep(0.3)
        add_schedule(running.file, "plain", schedule(added_s=long_ago()))
        running.wait_for(1)
        assert running.ended == [("plain", "succeeded")]


def test_only_so_many_commands_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command counts those that run: when a second one has started, and a little later."""
    began, now, counts = tmp_path / "began", tmp_path / "now", tmp_path / "counts"
    began.mkdir()
    now.mkdir()
    program = (
        "import os, time; from pathlib import Path\n"
        f"began, now, counts = (Path(each) for each in {[str(began), str(now), str(counts)]})\n"
        "deadline_s, own = time.monotonic() + 10, str(os.getpid())\n"
        "(now / own).touch(); (began / own).touch()\n"
        "while len(os.listdir(began)) < 2 and time.monotonic() < deadline_s: time.sleep(0.02)\n"
        "for pause_s in (0.5, 0.0):\n"
        "    counts.open('a').write(f'{len(os.listdir(now))} '); time.sleep(pause_s)\n"
        "(now / own).unlink()"
    )
    monkeypatch.setattr(scheduler, "_MAX_PARALLEL", 2)
    with Running(tmp_path) as running:
        for number in range(4):
            add_schedule(running.file, f"s-{number}", schedule(program, added_s=long_ago()))
        running.wait_for(4)
    assert max(counts.read_text().split()) == "2"


@pytest.mark.parametrize("changes", [None, {"time_limit_s": 60.0}])
def test_a_schedule_that_is_removed_or_changed_during_its_jitter_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, float] | None
) -> None:
    monkeypatch.setattr(random, "uniform", lambda _, high: min(high, 1.5))
    ran = tmp_path / "ran"
    program = f"from pathlib import Path; Path({str(ran)!r}).open('a').write('old ')"
    changed = program.replace("old", "new")
    with Running(tmp_path) as running:
        add_schedule(running.file, "a", schedule(program, added_s=long_ago(), jitter_s=3600))
        running.wait_for_jobs(1)
        remove_schedule(running.file, "a")
        if changes is not None:
            add_schedule(running.file, "a", schedule(changed, added_s=long_ago(), **changes))
            running.wait_for(1)
        time.sleep(2)
    assert (ran.read_text() if ran.exists() else "") == ("" if changes is None else "new ")


def test_a_schedule_that_is_added_again_is_not_late(tmp_path: Path) -> None:
    """The runs of the removed one of the same name are kept."""
    with Running(tmp_path) as running:
        ended = run_schedule(running.folder, "a", schedule())
        runs._write(running.folder / "a", replace(ended, started_s=long_ago()))
        add_schedule(running.file, "a", schedule(added_s=time.time()))
        running.wait_for_jobs(1)
        time.sleep(0.5)
        assert running.ended == []


def test_a_full_disk_does_not_stop_the_scheduler(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Running(tmp_path) as running:
        running.wait_until(lambda: is_scheduler_alive(running.folder))
        heartbeat, full = running.folder / scheduler.HEARTBEAT, tmp_path / "full"
        full.symlink_to("/dev/full")  # every write to it says that there is no space left
        full.replace(heartbeat)  # in one step, since the scheduler makes the file again
        running.wait_until(lambda: "No space left on device" in caplog.text)
        add_schedule(running.file, "late", schedule(added_s=long_ago()))
        running.wait_for(1)
        assert caplog.text.count("No space left on device") == 1
        heartbeat.unlink()
        running.wait_until(heartbeat.exists)


def test_an_error_stops_the_commands_and_the_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Path) -> dict[str, Schedule]:
        raise RuntimeError("a mistake")

    running = Running(tmp_path)
    add_schedule(running.file, "waits", schedule(added_s=long_ago(), jitter_s=86_400))
    errors: list[BaseException] = []

    def run() -> None:
        try:
            running.scheduler.run(running.stop)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        running.wait_for_jobs(1)
        time.sleep(0.3)
        monkeypatch.setattr(scheduler, "read_schedules", broken)
        thread.join(10)
        assert not thread.is_alive(), "it waits for a schedule that waits for its jitter"
        assert [str(error) for error in errors] == ["a mistake"]
    finally:
        running.stop.set()
        thread.join()
