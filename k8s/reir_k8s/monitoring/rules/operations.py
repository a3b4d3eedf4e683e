"""Rules about what keeps the system running: store, disk, schedules and the monitor itself."""

from __future__ import annotations

from reir_k8s.monitoring.rules.rule import Alert, Durations, Limits, Recording, RuleGroup, duration

JOB = "(.+/)?reir-monitor"
"""Names of the scrape job of the monitor."""


def operation_rules(times: Durations, limits: Limits) -> RuleGroup:
    """Return the rules about store, schedules and monitor."""
    recordings = [
        Recording(
            "reir:store_free:ratio",
            "min(reir_monitor_store_free_bytes / reir_monitor_store_disk_bytes)",
        ),
        # Recorded, so that `predict_linear` can read a range of it.
        Recording("reir:store_free:bytes", "min(reir_monitor_store_free_bytes)"),
    ]
    alerts = [
        *_store_alerts(times, limits),
        *_schedule_alerts(times),
        *_monitor_alerts(times),
    ]
    return RuleGroup("reir-operations", recordings, alerts)


def _store_alerts(times: Durations, limits: Limits) -> list[Alert]:
    return [
        Alert(
            name="ReirStoreDown",
            expr="min(reir_monitor_store_up) == 0",
            hold_s=times.down,
            severity="critical",
            summary="The store does not answer",
            description="The store does not answer the monitor. Servers cannot search, and "
            "indexing waits.",
            runbook="store-down",
        ),
        Alert(
            name="ReirDiskNearlyFull",
            expr=f"reir:store_free:ratio < {limits.free:g}",
            hold_s=times.at_once,
            severity="critical",
            summary="The disk of the store is nearly full",
            description="{{ $value | humanizePercentage }} of the disk of the store are free.",
            runbook="disk-full",
        ),
        Alert(
            name="ReirDiskFullSoon",
            expr=f"predict_linear(reir:store_free:bytes[{duration(times.trend)}], "
            f"{times.ahead:g}) < 0 and reir:store_free:ratio < {limits.free_trend:g}",
            hold_s=times.settled,
            severity="warning",
            summary="The disk of the store will soon be full",
            description=f"If the disk of the store fills up as in the last {duration(times.trend)}"
            f", it will be full within {duration(times.ahead)}.",
            runbook="disk-full",
        ),
    ]


def _schedule_alerts(times: Durations) -> list[Alert]:
    return [
        Alert(
            name="ReirScheduleFailed",
            expr="max by (schedule) (reir_monitor_schedule_failed) == 1",
            severity="warning",
            summary="Schedule {{ $labels.schedule }} failed",
            description="The last run of schedule {{ $labels.schedule }} failed, was stopped, or "
            "exceeded its time limit.",
            runbook="schedule-failed",
        ),
        Alert(
            name="ReirScheduleLate",
            expr="time() - max by (schedule) (reir_monitor_schedule_due_timestamp_seconds) > 0",
            hold_s=times.settled,
            severity="warning",
            summary="Schedule {{ $labels.schedule }} is late",
            description="Schedule {{ $labels.schedule }} should have succeeded "
            "{{ $value | humanizeDuration }} ago.",
            runbook="schedule-late",
        ),
        Alert(
            name="ReirSchedulerDown",
            expr="min(reir_monitor_scheduler_up) == 0",
            hold_s=times.down,
            severity="warning",
            summary="The scheduler does not run",
            description="There are schedules, but no scheduler process runs them.",
            runbook="scheduler-down",
        ),
    ]


def _monitor_alerts(times: Durations) -> list[Alert]:
    return [
        Alert(
            name="ReirMonitorDown",
            # `up == 0` has no value for a target that has vanished, such as that of a deleted pod.
            expr=f'absent(up{{job=~"{JOB}"}} == 1)',
            hold_s=times.down,
            severity="critical",
            summary="The monitor does not answer",
            description="Prometheus reaches no monitor, so alerts about galleries, backups, "
            "schedules and the store cannot fire.",
            runbook="monitor-down",
        ),
        Alert(
            name="ReirMonitorCheckFailing",
            expr="max by (check) (reir_monitor_check_failed) == 1",
            hold_s=times.down,
            severity="warning",
            summary="The check {{ $labels.check }} of reir monitor fails",
            description="The check {{ $labels.check }} of reir monitor ends with an error, so its "
            "values are those of its last success.",
            runbook="monitor-check",
        ),
        Alert(
            name="ReirMonitorCheckLate",
            expr="time() - max by (check) (reir_monitor_check_timestamp_seconds)"
            f" > {times.check_late:g}",
            severity="warning",
            summary="The check {{ $labels.check }} of reir monitor is late",
            description="The check {{ $labels.check }} of reir monitor last ended "
            "{{ $value | humanizeDuration }} ago.",
            runbook="monitor-check",
        ),
    ]
