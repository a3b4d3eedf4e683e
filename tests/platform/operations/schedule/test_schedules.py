"""Schedules: the file, cron expressions, and when runs are due."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from threading import Thread
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from reir.config import load_config
from reir.errors import ConfigError
from reir.operations.schedule import schedules
from reir.operations.schedule.schedules import (
    Schedule,
    add_schedule,
    read_schedules,
    remove_schedule,
)

BERLIN = ZoneInfo("Europe/Berlin")
NIGHTLY: dict[str, Any] = {
    "command": ["reindex", "photos"],
    "cron": "0 3 * * *",
    "timezone": "Europe/Berlin",
}


def schedule(**changes: Any) -> Schedule:
    return load_config(Schedule, {**NIGHTLY, **changes})


def due(cron: str, *after: int) -> str:
    found = schedule(cron=cron).next_due(datetime(*after, tzinfo=BERLIN))  # type: ignore[misc,arg-type]
    assert found is not None
    return f"{found:%a %Y-%m-%d %H:%M}"


def test_days_of_the_week_are_counted_as_in_cron() -> None:
    """Sunday is 0 and 7; the library behind it counts from Monday."""
    for number, day in enumerate(("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")):
        assert due(f"0 3 * * {number}", 2026, 11, 24)[:3] == day
    assert due("0 3 * * 1-5", 2026, 11, 27, 4) == "Mon 2026-11-30 03:00"
    assert due("0 3 * * 0-2", 2026, 11, 24, 4) == "Sun 2026-11-29 03:00"
    assert due("0 3 * * 5-7", 2026, 11, 24, 4) == "Fri 2026-11-27 03:00"
    assert due("0 3 * * 0,3", 2026, 11, 26) == "Sun 2026-11-29 03:00"
    assert due("0 3 * * 1-5/2", 2026, 11, 24, 4) == "Wed 2026-11-25 03:00"
    assert due("0 3 * * mon-fri", 2026, 11, 27, 4) == "Mon 2026-11-30 03:00"
    assert due("*/10 * * * *", 2026, 11, 24, 3, 5) == "Tue 2026-11-24 03:10"
    assert due("0 3 1 * *", 2026, 11, 24) == "Tue 2026-12-01 03:00"


@pytest.mark.parametrize(
    ("field", "days"),
    [
        ("*", "Sun Mon Tue Wed Thu Fri Sat"),
        ("*/2", "Sun Tue Thu Sat"),
        ("*/3", "Sun Wed Sat"),
        ("*/7", "Sun"),
        ("0-6/2", "Sun Tue Thu Sat"),
        ("1-5/2", "Mon Wed Fri"),
        ("mon-fri/2", "Mon Wed Fri"),
        ("MON-Fri/2", "Mon Wed Fri"),
        ("tue/2", "Tue Thu Sat"),
        ("sun-tue", "Sun Mon Tue"),
        ("fri-sun", "Sun Fri Sat"),
        ("mon-sun/3", "Sun Mon Thu"),
        ("mon,3-5/2,sat", "Mon Wed Fri Sat"),
    ],
)
def test_ranges_and_steps_of_days_of_the_week(field: str, days: str) -> None:
    """In the week of Sunday, November 29."""
    found = [due(f"0 3 * * {field}", 2026, 11, day, 3) for day in range(28, 31)]
    found += [due(f"0 3 * * {field}", 2026, 12, day, 3) for day in range(1, 5)]
    order = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"]
    assert sorted({each[:3] for each in found}, key=order.index) == days.split()


def test_times_are_those_of_the_time_zone_also_when_the_clock_changes() -> None:
    found = schedule().next_due(datetime(2026, 10, 24, 4, tzinfo=BERLIN))
    assert found is not None
    assert found.isoformat() == "2026-10-25T03:00:00+01:00"


LOCAL = """
from datetime import datetime
from reir.operations.schedule.schedules import Schedule
nightly = Schedule(command=("doctor",), cron="0 3 * * *")
for day in (24, 25):
    print(nightly.next_due(datetime(2026, 10, day).astimezone()).isoformat()[11:])
"""


@pytest.mark.parametrize(
    ("zone", "times"),
    [
        ("Europe/Berlin", ["03:00:00+02:00", "03:00:00+01:00"]),
        (":Europe/Berlin", ["03:00:00+02:00", "03:00:00+01:00"]),
        (":/usr/share/zoneinfo/Europe/Berlin", ["03:00:00+02:00", "03:00:00+01:00"]),
        ("XYZ-5", ["03:00:00+05:00", "03:00:00+05:00"]),
        ("", ["03:00:00+00:00", "03:00:00+00:00"]),
    ],
)
def test_without_a_time_zone_times_are_those_of_the_machine(zone: str, times: list[str]) -> None:
    """On two days between which the clocks of Berlin change."""
    done = subprocess.run(
        [sys.executable, "-c", LOCAL],
        env={**os.environ, "TZ": zone},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == times, done.stderr


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"cron": "0 3 * *"}, "cron '0 3 \\* \\* ?\\*?' must have five fields"),
        ({"cron": "61 3 * * *"}, "must have five fields"),
        ({"cron": "0 3 * * 8"}, "'8' is not a range of days of the week"),
        ({"cron": "0 3 * * 5-2"}, "not a range of days"),
        ({"cron": "0 3 * * fri-tue"}, "'fri-tue' is not a range of days of the week"),
        ({"cron": "0 3 * * */0"}, "not a range of days"),
        ({"cron": "0 3 * * weekdays"}, "'weekdays' is not a day of the week"),
        ({"cron": ""}, "must have five fields"),
        ({"timezone": "Europe/Bonn"}, "timezone 'Europe/Bonn' is unknown"),
        ({"command": []}, "must begin with one of backup"),
        ({"command": ["serve"]}, "must begin with one of"),
        ({"command": ["rm", "-rf"]}, "must begin with one of"),
        ({"command": ["reindx"]}, "did you mean 'reindex'"),
        ({"jitter_s": -1}, "'jitter_s': got -1"),
        ({"missed": "sometimes"}, "'missed': got 'sometimes'"),
    ],
)
def test_mistakes_are_explained(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        schedule(**changes)


def test_schedules_are_added_and_removed(tmp_path: Path) -> None:
    file = tmp_path / "new" / "schedules.yaml"
    assert read_schedules(file) == {}
    add_schedule(file, "nightly", schedule(time_limit_s=3600))
    add_schedule(file, "hourly", schedule(cron="0 * * * *", missed="skip"))
    assert read_schedules(file) == {
        "hourly": schedule(cron="0 * * * *", missed="skip"),
        "nightly": schedule(time_limit_s=3600),
    }
    with pytest.raises(ConfigError, match="there is a schedule 'nightly' already"):
        add_schedule(file, "nightly", schedule())
    with pytest.raises(ConfigError, match=r"no schedule 'nigtly'.*did you mean 'nightly'"):
        remove_schedule(file, "nigtly")
    remove_schedule(file, "nightly")
    assert list(read_schedules(file)) == ["hourly"]
    assert {path.name for path in file.parent.iterdir()} == {
        "schedules.yaml",
        ".schedules.yaml.lock",
    }


def test_changes_at_the_same_time_do_not_lose_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "schedules.yaml"
    add_schedule(file, "old", schedule())

    def read_slowly(path: Path) -> dict[str, Schedule]:
        found = read_schedules(path)
        time.sleep(0.2)
        return found

    monkeypatch.setattr(schedules, "read_schedules", read_slowly)
    changes = [
        *[Thread(target=add_schedule, args=(file, f"new-{n}", schedule())) for n in range(3)],
        Thread(target=remove_schedule, args=(file, "old")),
    ]
    for change in changes:
        change.start()
    for change in changes:
        change.join()
    assert sorted(read_schedules(file)) == ["new-0", "new-1", "new-2"]


def test_removing_from_a_file_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are: none"):
        remove_schedule(tmp_path / "typo" / "schedules.yaml", "nightly")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a/b", "../x", "-a", "x" * 61])
def test_names_are_safe_as_names_of_folders(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="the name of a schedule must be"):
        add_schedule(tmp_path / "s.yaml", name, schedule())


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("schedules: {a: {command: [index], crn: '* * * * *'}}")
    with pytest.raises(ConfigError, match=r"unknown key 'crn'.*did you mean 'cron'"):
        read_schedules(file)
