"""Checks of what runs for long: re-indexing jobs, restores, backups, schedules."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from reir.cli.doctor.check import Check, age
from reir.operations.lease import holder_of
from reir.operations.monitor.checks import BACKUP, REINDEX, REINDEX_ENDS

if TYPE_CHECKING:
    from reir.operations.schedule.schedules import Schedule
    from reir.store.contract import InstanceStore

OLD_BACKUP_S = 7 * 86_400.0
RESTORE = "restore"
"""Kind of the documents that unfinished restores leave in the store."""


def check_jobs(store: InstanceStore, gallery: str) -> Iterator[Check]:
    """Find re-indexing jobs and restores of a gallery that stopped before their end."""
    job = store.find_documents(REINDEX, gallery).get(gallery)
    if job is not None and job["state"] not in REINDEX_ENDS:
        holder = holder_of(store, f"{REINDEX}/{gallery}")
        since = f"{job['state']} since {age(time.time() - job['updated_s'])}"
        if holder is not None:
            where = f"process {holder.pid} on {holder.host}"
            yield Check(f"reindex {gallery}", "ok", f"{since}, in {where}")
        else:
            error = f"; its error: {job['error']}" if job.get("error") else ""
            yield Check(
                f"reindex {gallery}",
                "warn",
                f"stopped before its end: {since}{error}",
                f"`reir reindex {gallery}` finishes it, `reir reindex {gallery} --drop` gives up",
            )
    restores = store.find_documents(RESTORE, f"{gallery}/")
    if restores and holder_of(store, f"{RESTORE}/{gallery}") is None:
        yield Check(
            f"restore {gallery}",
            "warn",
            f"stopped before its end: {', '.join(sorted(restores))}",
            "run the same `reir restore` again, which continues it",
        )


def check_backup(store: InstanceStore, gallery: str) -> Check:
    """Check the age of the last backup of a gallery."""
    backups = store.find_documents(BACKUP, f"{gallery}/").values()
    label, command = f"backup {gallery}", f"`reir backup {gallery} DEST`"
    if not backups:
        advice = f"{command}; `reir schedule add` repeats it"
        return Check(label, "warn", "never backed up", advice)
    seconds = time.time() - max(float(each["ended_s"]) for each in backups)
    if seconds > OLD_BACKUP_S:
        return Check(label, "warn", f"the last one is {age(seconds)} old", command)
    # Negative if another machine, whose clock is ahead, has just written the backup.
    return Check(label, "ok", f"{age(max(0.0, seconds))} ago")


def check_schedules() -> Iterator[Check]:
    """Check the schedules of this machine: their last runs, and whether a scheduler runs."""
    from reir.operations.schedule.settings import (
        ScheduleSettings,
        default_runs_folder,
        default_schedule_file,
    )
    from reir.settings import load_settings

    settings = load_settings("schedule", ScheduleSettings).values
    file = settings.file or default_schedule_file()
    if not file.exists():
        return
    # Only now: who has no schedules needs none of the packages that these import.
    from reir.operations.schedule.scheduler import is_scheduler_alive
    from reir.operations.schedule.schedules import read_schedules

    folder, known = settings.folder or default_runs_folder(), read_schedules(file)
    if known and not is_scheduler_alive(folder):
        yield Check(
            "schedules",
            "warn",
            f"no scheduler runs the schedules of {file}",
            "start `reir schedule start`, best as a service (docs/operations/install.md)",
        )
    for name, schedule in known.items():
        yield check_schedule(folder, name, schedule)


def check_schedule(folder: Path, name: str, schedule: Schedule) -> Check:
    """Check the last runs of one schedule."""
    from reir.operations.schedule.runs import due_s, own_runs

    label, look = f"schedule {name}", f"`reir schedule runs {name}` shows its output"
    ended = [run for run in own_runs(folder, name, schedule) if run.status != "running"]
    if ended and ended[0].has_failed:
        when = age(time.time() - ended[0].started_s)
        return Check(label, "warn", f"the last run, {when} ago, {_how(ended[0].status)}", look)
    due = due_s(folder, name, schedule)
    if due is not None and due < time.time():
        late = f"no success, although it was due {age(time.time() - due)} ago"
        return Check(label, "warn", late, f"`reir schedule run-now {name}`; {look}")
    last = f"succeeded {age(time.time() - ended[0].ended_s)} ago" if ended else "not due yet"
    return Check(label, "ok", last)


def _how(status: str) -> str:
    return {"stopped": "was stopped", "timed out": "timed out"}.get(status, status)
