"""`reir schedule`, as a user types it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_run_now_stops_the_command(tmp_path: Path, number: signal.Signals) -> None:
    command = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    program = (
        "import sys; from reir.operations.schedule import runs\n"
        f"runs._REIR = [sys.executable, '-c', {command!r}]\n"
        "from reir.cli.main import main; main()"
    )
    add_schedule(
        tmp_path / "schedules.yaml", "slow", Schedule(command=("doctor",), cron="0 3 * * *")
    )
    folder = tmp_path / "schedule-runs"
    with subprocess.Popen(
        [sys.executable, "-c", program, "schedule", "run-now", "slow"],
        env={**os.environ, "REIR_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        pid = wait_for_pid(folder)
        try:
            process.send_signal(number)
            shown, _ = process.communicate(timeout=30)
            assert process.returncode == 130
            assert "stopped after" in shown
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        finally:
            for each in (process.pid, pid):
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
    (run,) = last_runs(folder, "slow")
    assert (run.status, run.exit_code) == ("stopped", -signal.SIGINT)
    assert run.ended_s > run.started_s


def wait_for_pid(folder: Path) -> int:
    """Return the process id that the command of a run prints."""
    deadline_s = time.monotonic() + 30
    while not (lines := [line for log in folder.glob("*/*.log") for line in log.open()]):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return int(lines[0])
