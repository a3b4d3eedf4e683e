"""Runs of schedules: real commands in processes of their own."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from reir.errors import JobRunning
from reir.operations.schedule import runs
from reir.operations.schedule.runs import (
    due_s,
    last_runs,
    last_success_s,
    own_runs,
    run_schedule,
)
from reir.store.embedded.locks import FileLock
from reir_testing.operations.scheduled_programs import long_ago, schedule


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


def test_an_interrupted_run_stops_its_command(tmp_path: Path) -> None:
    """Ctrl-C raises KeyboardInterrupt wherever the program is."""

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if pids():
                raise KeyboardInterrupt
            return super().wait(timeout)

    def pids() -> list[int]:
        (log,) = tmp_path.glob("a/*.log")
        return [int(line) for line in log.read_text().splitlines()[:1]]

    program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        run_schedule(tmp_path, "a", schedule(program), Interrupted())
    (pid,) = pids()
    try:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert last_runs(tmp_path, "a")[0].status == "stopped"


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


@pytest.mark.parametrize(
    "content",
    ["", "\0\0\0", '{"schedule": "a"', "[]", "{}", '{"schedule": "a", "command": []}', "\udcff"],
)
def test_a_damaged_record_is_left_out_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    first, second = (run_schedule(tmp_path, "a", schedule()) for _ in range(2))
    damaged = Path(second.log).with_suffix(".json")
    damaged.write_bytes(content.encode(errors="surrogateescape"))
    assert last_runs(tmp_path, "a", 1) == last_runs(tmp_path, "a") == [first]
    assert last_success_s(tmp_path, "a", schedule()) == first.ended_s
    assert caplog.text.count(f"{damaged} is damaged") == 1
    assert "delete the file" in caplog.text


def test_a_record_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, a power failure could leave an empty file of that name."""
    synced: list[int] = []
    really_sync = os.fsync

    def fsync(handle: int) -> None:
        really_sync(handle)
        synced.append(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    run = run_schedule(tmp_path, "a", schedule())
    assert Path(run.log).with_suffix(".json").stat().st_ino in synced


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


def test_a_schedule_that_is_added_again_has_no_runs(tmp_path: Path) -> None:
    """The runs of the removed one of the same name are kept, but are not its own."""
    first = run_schedule(tmp_path, "a", schedule("sys.exit(3)"))
    again = schedule(added_s=time.time())
    assert own_runs(tmp_path, "a", schedule()) == [first]
    assert own_runs(tmp_path, "a", again) == []
    second = run_schedule(tmp_path, "a", again)
    assert own_runs(tmp_path, "a", again) == [second]
    assert last_runs(tmp_path, "a") == [second, first]


def test_a_schedule_that_is_added_again_is_due_after_that(tmp_path: Path) -> None:
    """The runs of the removed one of the same name are kept."""
    now_s = time.time()
    run = run_schedule(tmp_path, "a", schedule())
    runs._write(tmp_path / "a", replace(run, started_s=long_ago(), ended_s=long_ago() + 5))
    again = schedule(added_s=now_s)
    assert last_success_s(tmp_path, "a", again) == now_s
    due = due_s(tmp_path, "a", again)
    assert due is not None
    assert now_s < due
