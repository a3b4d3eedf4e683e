"""Runs of schedules: real commands in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from reir.config import load_config
from reir.errors import JobRunning
from reir.operations.schedule import runs, scheduler
from reir.operations.schedule.runs import (
    ScheduledRun,
    due_s,
    last_runs,
    last_success_s,
    run_schedule,
)
from reir.operations.schedule.scheduler import Scheduler, is_scheduler_alive
from reir.operations.schedule.schedules import Schedule, add_schedule, remove_schedule
from reir.store.embedded.locks import FileLock

EVERY_SECOND = "* * * * *"


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The word after `data` is a Python program; the real commands take seconds to start."""
    program = "import sys; exec(sys.argv[2])"
    monkeypatch.setattr(runs, "_REIR", [sys.executable, "-c", program])
    monkeypatch.setattr(runs, "_POLL_S", 0.02)


def schedule(program: str = "print('done')", **changes: Any) -> Schedule:
    values = {"command": ["data", program], "cron": "0 3 * * *", "timezone": "UTC", "added_s": 1.0}
    return load_config(Schedule, {**values, **changes})


def test_a_run_is_recorded_with_its_output(tmp_path: Path) -> None:
    run = run_schedule(tmp_path, "a", schedule("print('hello'); print('problem', file=sys.stderr)"))
    assert (run.status, run.exit_code, run.has_failed) == ("succeeded", 0, False)
    assert Path(run.log).read_text().split() == ["hello", "problem"]
    assert last_runs(tmp_path, "a") == [run]
    assert last_success_s(tmp_path, "a", schedule()) == run.ended_s


def test_a_run_remembers_the_report_of_its_command(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from reir.operations.schedule.report_note import note_report; "
        f"note_report(Path({str(tmp_path / 'report.html')!r}))"
    )
    run = run_schedule(tmp_path, "a", schedule(program))
    assert run.report == str(tmp_path / "report.html")
    assert last_runs(tmp_path, "a") == [run]
    assert not list(tmp_path.glob("a/*.report"))
    assert run_schedule(tmp_path, "a", schedule()).report == ""


def test_a_failed_run_is_no_success(tmp_path: Path) -> None:
    run = run_schedule(tmp_path, "a", schedule("sys.exit(3)"))
    assert (run.status, run.exit_code, run.has_failed) == ("failed", 3, True)
    assert last_success_s(tmp_path, "a", schedule()) == 1.0


def test_a_run_that_takes_too_long_is_stopped_as_by_ctrl_c(tmp_path: Path) -> None:
    program = (
        "import time\n"
        "try:\n    print('started', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('stopped'); sys.exit(130)"
    )
    run = run_schedule(tmp_path, "a", schedule(program, time_limit_s=1.0))
    assert (run.status, run.exit_code) == ("timed out", 130)
    assert Path(run.log).read_text().split() == ["started", "stopped"]
    assert run.ended_s - run.started_s < 20


def test_a_command_that_ignores_ctrl_c_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "STOP_GRACE_S", 0.3)
    program = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    run = run_schedule(tmp_path, "a", schedule(program, time_limit_s=1.0))
    assert (run.status, run.exit_code) == ("timed out", -signal.SIGKILL)


def test_one_run_of_a_schedule_at_a_time(tmp_path: Path) -> None:
    stop = threading.Event()
    slow = schedule("import time; time.sleep(60)")
    thread = threading.Thread(target=run_schedule, args=(tmp_path, "a", slow, stop))
    thread.start()
    deadline_s = time.monotonic() + 20
    while not last_runs(tmp_path, "a"):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert last_runs(tmp_path, "a")[0].status == "running"
    with pytest.raises(
        JobRunning, match=f"schedule a is already running, as process {os.getpid()}"
    ):
        run_schedule(tmp_path, "a", slow)
    assert run_schedule(tmp_path, "b", schedule()).status == "succeeded"
    stop.set()
    thread.join()
    assert last_runs(tmp_path, "a")[0].status == "stopped"


def test_a_run_whose_scheduler_was_killed_is_not_running_for_ever(tmp_path: Path) -> None:
    run = run_schedule(tmp_path, "a", schedule())
    runs._write(tmp_path / "a", replace(run, status="running", exit_code=None, ended_s=0.0))
    (found,) = last_runs(tmp_path, "a")
    assert (found.status, found.has_failed) == ("stopped", True)


def test_a_record_that_is_not_complete_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_schedule(tmp_path, "a", schedule())

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            runs._write(tmp_path / "a", run)
    assert last_runs(tmp_path, "a") == [run]


def test_a_run_starts_while_runs_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with FileLock(tmp_path / "a" / "lock") as reader:
        assert reader.acquire(shared=True)
        timer = threading.Timer(0.2, reader.release)
        timer.start()
        try:
            assert run_schedule(tmp_path, "a", schedule()).status == "succeeded"
        finally:
            timer.join()


def test_old_runs_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "KEPT_RUNS", 3)
    for _ in range(5):
        last = run_schedule(tmp_path, "a", schedule())
    found = last_runs(tmp_path, "a")
    assert (len(found), found[0]) == (3, last)
    assert len(list((tmp_path / "a").glob("*.log"))) == 3


def test_when_a_schedule_should_have_succeeded_again(tmp_path: Path) -> None:
    added = datetime(2026, 11, 24, 12, tzinfo=UTC).timestamp()
    due = due_s(tmp_path, "a", schedule(added_s=added, jitter_s=60, time_limit_s=600))
    assert due == datetime(2026, 11, 25, 3, 11, tzinfo=UTC).timestamp()
    run_schedule(tmp_path, "a", schedule())
    later = due_s(tmp_path, "a", schedule(added_s=added))
    assert later is not None
    assert time.time() < later <= time.time() + 86_400


# ------------------------------------------------------------------------------- the scheduler


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
        deadline_s = time.monotonic() + 30
        while len(self.ended) < number:
            assert time.monotonic() < deadline_s, self.ended
            time.sleep(0.02)


@pytest.fixture(autouse=True)
def quick_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "POLL_S", 0.05)


def long_ago() -> float:
    return time.time() - 10 * 86_400


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
        assert [job.id for job in running.scheduler._timer.get_jobs()] == ["late"]
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


# --------------------------------------------------------------------------------- the command


def reir(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    program = "from reir.cli.main import main; main()"
    environment = {**os.environ, "REIR_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_the_commands_as_a_user_types_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = reir(
        *("schedule", "add", "check", "--cron", "0 3 * * *", "--timezone", "UTC"),
        *("--time-limit", "5m", "--", "doctor", "--json"),
        home=tmp_path,
    )
    assert shown.returncode == 0, shown.stderr
    assert "due next" in shown.stdout
    listed = reir("schedule", "list", home=tmp_path)
    assert "reir doctor --json" in listed.stdout
    assert "never" in listed.stdout
    assert "No scheduler runs on this machine" in listed.stderr
    ran = reir("schedule", "run-now", "check", home=tmp_path)
    assert "exit status" in ran.stdout
    assert '"name": "python"' in ran.stdout
    assert "succeeded" in reir("schedule", "runs", "check", home=tmp_path).stdout
    wrong = reir("schedule", "run-now", "chek", home=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean 'check'" in wrong.stderr
    assert reir("schedule", "remove", "check", home=tmp_path).returncode == 0
    assert "No schedules yet" in reir("schedule", "list", home=tmp_path).stderr


def test_the_scheduler_process_ends_cleanly(tmp_path: Path) -> None:
    program = "from reir.cli.main import main; main()"
    environment = {**os.environ, "REIR_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program, "schedule", "start"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert "press Ctrl-C to stop" in process.stderr.readline()
        deadline_s = time.monotonic() + 20
        while not is_scheduler_alive(tmp_path / "schedule-runs"):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        second = reir("schedule", "start", home=tmp_path)
        assert second.returncode == 2
        assert "runs already" in second.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
