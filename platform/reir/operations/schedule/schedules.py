"""The schedules of one machine, in a YAML file: which `reir` command runs when."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from apscheduler.triggers.cron import CronTrigger
from pydantic import Field, field_validator, model_validator

from reir.config import StrictConfig, load_config
from reir.errors import ConfigError, nearest_name
from reir.store.embedded.locks import exclusive

COMMANDS = ("backup", "canary", "data", "doctor", "eval", "index", "reindex", "restore")
"""Commands that may run on a schedule: those that end by themselves."""

_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat", "sun")
_ZONES, _LOCAL_ZONE = Path("/usr/share/zoneinfo"), "/etc/localtime"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")


class Schedule(StrictConfig):
    """One schedule.

    Attributes:
        command: words of a `reir` command, e.g. ["reindex", "photos"].
        cron: five fields: minute, hour, day of month, month, day of week.
        timezone: IANA name of the time zone of `cron`, such as "Europe/Berlin"; empty for that of
            the machine.
        jitter_s: a run starts up to so many seconds later, so that many machines do not start at
            once.
        time_limit_s: a run that takes longer is stopped, and counts as failed; None for no limit.
        missed: what happens to runs that were due while the scheduler did not run, or while the
            run before was still going on: "run" starts one run as soon as possible, "skip" waits
            for the next one.
        added_s: Unix time at which the schedule was added.
    """

    command: tuple[str, ...]
    cron: str
    timezone: str = ""
    jitter_s: int = Field(0, ge=0, le=86_400)
    time_limit_s: float | None = Field(None, gt=0)
    missed: Literal["run", "skip"] = "run"
    added_s: float = 0.0

    @field_validator("command")
    @classmethod
    def _check_command(cls, command: tuple[str, ...]) -> tuple[str, ...]:
        if not command or command[0] not in COMMANDS:
            raise ValueError(
                f"must begin with one of {', '.join(COMMANDS)}"
                f"{nearest_name(command[0], COMMANDS) if command else ''}"
            )
        return command

    @model_validator(mode="after")
    def _check_times(self) -> Self:
        self.trigger()
        return self

    def trigger(self) -> CronTrigger:
        """Return the times at which the schedule is due, without jitter.

        Raises:
            ValueError: the time zone or the cron expression is wrong.
        """
        zone = self._zone()
        try:
            return CronTrigger.from_crontab(_with_weekday_names(self.cron), timezone=zone)
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"cron {self.cron!r} must have five fields: minute, hour, day of month, month, day "
                f"of week, such as '0 3 * * *' for every night at 3:00 ({error})"
            ) from error

    def next_due(self, after: datetime) -> datetime | None:
        """Return when the schedule is due next after a time; None if it never is again."""
        # With None as the first argument, APScheduler could return the time itself.
        found: datetime | None = self.trigger().get_next_fire_time(after, after)
        return found

    def _zone(self) -> tzinfo:
        if not self.timezone:
            return _local_zone()
        try:
            return ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError(
                f"timezone {self.timezone!r} is unknown; use an IANA name such as 'Europe/Berlin'"
            ) from error


def _local_zone() -> tzinfo:
    """Return the time zone of the machine, with its changes between summer and winter.

    If TZ holds rules instead of the name of a zone, it is the difference from UTC at present.
    """
    # Where the C library looks, so that the zone is that of all other programs.
    place = os.environ.get("TZ", _LOCAL_ZONE).removeprefix(":")
    try:
        with (_ZONES / place).open("rb") as file:  # an absolute path stays as it is
            return ZoneInfo.from_file(file)
    except (OSError, ValueError):
        return datetime.now().astimezone().tzinfo or UTC


def _with_weekday_names(cron: str) -> str:
    """Return a cron expression whose days of the week are lists of names.

    In cron, 0 and 7 are Sunday; APScheduler counts from Monday, also in a step such as "*/2", and
    ignores the step of a range of names.
    """
    *others, weekdays = cron.split()
    return " ".join([*others, ",".join(map(_weekday_names, weekdays.lower().split(",")))])


def _weekday_names(part: str) -> str:
    """Return the days of one part of the field: a day, a range such as "1-5", or "*"; or a step."""
    days, slash, step = part.partition("/")
    first, dash, last = ("0-6" if days == "*" else days).partition("-")
    start = _weekday_number(first)
    # Without an end, a step goes on to Saturday, the last day of the week in cron.
    end = _weekday_number(last) if dash else (6 if slash else start)
    if last == "sun" and start:
        end = 7
    by = int(step) if slash else 1
    if not start <= end <= 7 or by < 1:
        raise ValueError(f"{part!r} is not a range of days of the week, 0 to 7 or sun to sat")
    return ",".join(_WEEKDAYS[day] for day in range(start, end + 1, by))


def _weekday_number(day: str) -> int:
    if day in _WEEKDAYS:
        return _WEEKDAYS.index(day)
    if not day.isdigit():
        raise ValueError(f"{day!r} is not a day of the week, 0 to 7 or sun to sat")
    return int(day)


class ScheduleFile(StrictConfig):
    """The content of a file of schedules.

    Attributes:
        schedules: by name.
    """

    schedules: Mapping[str, Schedule] = Field(default_factory=dict)

    @field_validator("schedules")
    @classmethod
    def _check_names(cls, schedules: Mapping[str, Schedule]) -> Mapping[str, Schedule]:
        for name in schedules:
            check_schedule_name(name)
        return schedules


def check_schedule_name(name: str) -> str:
    """Return a name if a schedule may have it.

    Raises:
        ValueError: it may not; the message says what is allowed.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"the name of a schedule must be 1 to 60 ASCII letters, digits, '_' or '-', starting "
            f"with a letter or digit, got {name!r}"
        )
    return name


def read_schedules(file: Path) -> dict[str, Schedule]:
    """Return the schedules of a file by name; none if the file does not exist.

    Raises:
        ConfigError: the file cannot be used.
    """
    if not file.exists():
        return {}
    return dict(load_config(ScheduleFile, file).schedules)


def add_schedule(file: Path, name: str, schedule: Schedule) -> None:
    """Add a schedule to a file.

    Raises:
        ConfigError: the file has a schedule of this name, or the name is not allowed.
    """
    try:
        check_schedule_name(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with _changing(file) as known:
        if name in known:
            raise ConfigError(
                f"there is a schedule {name!r} already; remove it first with `reir schedule remove "
                f"{name}`, or choose another name"
            )
        known[name] = schedule


def remove_schedule(file: Path, name: str) -> None:
    """Remove a schedule from a file; its past runs are kept.

    Raises:
        ConfigError: the file has no schedule of this name.
    """
    # Before a folder and a lock are made for a file that does not exist.
    find_schedule(read_schedules(file), name)
    with _changing(file) as known:
        known.pop(name, None)


def find_schedule(known: Mapping[str, Schedule], name: str) -> Schedule:
    """Return a schedule by its name.

    Raises:
        ConfigError: there is none of this name; the message names the others.
    """
    if name not in known:
        raise ConfigError(
            f"there is no schedule {name!r}; there are: {', '.join(known) or 'none'}"
            f"{nearest_name(name, [*known])}"
        )
    return known[name]


@contextmanager
def _changing(file: Path) -> Iterator[dict[str, Schedule]]:
    """Give a block the schedules of a file to change, and write them back unless it fails.

    Two processes that change a file wait for each other.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # Beside the file, which is replaced: a lock would stay with the old one.
    with exclusive(file.with_name(f".{file.name}.lock")):
        known = read_schedules(file)
        yield known
        _write(file, known)


def _write(file: Path, schedules: Mapping[str, Schedule]) -> None:
    values = ScheduleFile(schedules=schedules).model_dump(mode="json", exclude_defaults=True)
    # Written beside the file and renamed, because a scheduler may read it at any moment.
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
        yaml.safe_dump({"schedules": values.get("schedules", {})}, opened, sort_keys=True)
        opened.flush()
        os.fsync(opened.fileno())  # so that a power failure cannot leave an empty file
    os.replace(temporary, file)
