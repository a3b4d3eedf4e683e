"""`reir schedule`, as a user types it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from reir.operations.schedule.runs import last_runs
from reir.operations.schedule.scheduler import is_scheduler_alive
from reir.operations.schedule.schedules import Schedule, add_schedule


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
    reir("schedule", "add", "check", "--cron", "0 3 * * *", "--", "doctor", home=tmp_path)
    assert '"last_run": null' in reir("schedule", "list", "--json", home=tmp_path).stdout
    assert "succeeded" in reir("schedule", "runs", "check", home=tmp_path).stdout


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


# Under `nohup`, these tests would inherit that the signal is ignored.
NOTICED = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"
IGNORED = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"


@contextmanager
def running_now(
    home: Path, *, seconds: float = 60, before: str = NOTICED
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Yield a `reir schedule run-now`, and the process id of the command that it runs.

    Args:
        home: folder of the schedules.
        seconds: how long the command runs.
        before: Python code that comes first.
    """
    command = f"import os, time; print(os.getpid(), flush=True); time.sleep({seconds})"
    program = (
        f"{before}\nimport sys; from reir.operations.schedule import runs\n"
        f"runs._REIR = [sys.executable, '-c', {command!r}]\n"
        "from reir.cli.main import main; main()"
    )
    add_schedule(home / "schedules.yaml", "slow", Schedule(command=("doctor",), cron="0 3 * * *"))
    with subprocess.Popen(
        [sys.executable, "-c", program, "schedule", "run-now", "slow"],
        env={**os.environ, "REIR_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        pid = wait_for_pid(home / "schedule-runs")
        try:
            yield process, pid
        finally:
            for each in (process.pid, pid):
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_run_now_stops_the_command(tmp_path: Path, number: signal.Signals) -> None:
    with running_now(tmp_path) as (process, pid):
        process.send_signal(number)
        process.send_signal(number)
        shown, told = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "stopped after" in shown
        assert told == "stopping; a running command has 60 s to finish\n"
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    (run,) = last_runs(tmp_path / "schedule-runs", "slow")
    assert (run.status, run.exit_code) == ("stopped", -signal.SIGINT)
    assert run.ended_s > run.started_s


def test_a_run_that_is_stopped_is_recorded_although_nobody_reads_any_more(tmp_path: Path) -> None:
    """A lost SSH connection, for example, closes the streams before the signal comes."""
    with running_now(tmp_path) as (process, pid):
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
        process.send_signal(signal.SIGHUP)
        process.wait(30)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    (run,) = last_runs(tmp_path / "schedule-runs", "slow")
    assert (run.status, run.exit_code) == ("stopped", -signal.SIGINT)


def test_under_nohup_the_end_of_the_terminal_stops_nothing(tmp_path: Path) -> None:
    with running_now(tmp_path, seconds=1, before=IGNORED) as (process, _):
        process.send_signal(signal.SIGHUP)
        shown, told = process.communicate(timeout=30)
        assert (process.returncode, told) == (0, "")
        assert "succeeded after" in shown


def wait_for_pid(folder: Path) -> int:
    """Return the process id that the command of a run prints."""
    deadline_s = time.monotonic() + 30
    while not (lines := [line for log in folder.glob("*/*.log") for line in log.open()]):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return int(lines[0])
