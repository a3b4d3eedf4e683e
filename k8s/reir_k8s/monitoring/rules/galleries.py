"""Rules about galleries: quality of the answers, freshness, re-indexing and backups."""

from __future__ import annotations

from reir_k8s.monitoring.rules.rule import Alert, Durations, Limits, Recording, RuleGroup, duration


def gallery_rules(times: Durations, limits: Limits) -> RuleGroup:
    """Return the rules about galleries."""
    alerts = [
        *_quality_alerts(times, limits),
        *_index_alerts(times, limits),
        *_backup_alerts(times, limits),
    ]
    return RuleGroup("reir-galleries", _recordings(), alerts)


def _recordings() -> list[Recording]:
    # Without the labels of the target, which change when the monitor moves to another machine.
    return [
        Recording("reir:recall:ratio", "min by (gallery) (reir_monitor_recall_ratio)"),
        Recording("reir:canary_br:ratio", "min by (gallery, k) (reir_monitor_canary_br_ratio)"),
        Recording(
            "reir:canary_absent:ratio", "min by (gallery) (reir_monitor_canary_absent_ratio)"
        ),
        Recording(
            "reir:presence_drift:difference",
            'avg by (gallery) (reir_monitor_presence_mean_ratio{window="recent"})'
            ' - avg by (gallery) (reir_monitor_presence_mean_ratio{window="before"})',
        ),
        Recording(
            "reir:failed_photos:ratio",
            'sum by (gallery) (reir_monitor_photos{status="failed"})'
            " / sum by (gallery) (reir_monitor_photos)",
        ),
        Recording(
            "reir:index_age:seconds",
            "time() - max by (gallery) (reir_monitor_index_timestamp_seconds)",
        ),
        Recording(
            "reir:backup_age:seconds",
            "time() - max by (gallery) (reir_monitor_backup_timestamp_seconds)",
        ),
    ]


def _quality_alerts(times: Durations, limits: Limits) -> list[Alert]:
    # The median, because what is broken for a while can also make one of the values better.
    usual = f"[{duration(times.baseline)}]"
    return [
        Alert(
            name="ReirRecallLow",
            expr=f"reir:recall:ratio < {limits.recall:g}",
            hold_s=times.deep,
            severity="critical",
            summary="Searches in {{ $labels.gallery }} miss the nearest instances",
            description="Recall@10 of recent searches in gallery {{ $labels.gallery }} is "
            "{{ $value | humanizePercentage }} of what an exact scan of the stored vectors finds; "
            f"the limit is {limits.recall:.0%}.",
            runbook="recall-low",
        ),
        Alert(
            name="ReirCanaryAnswersWorse",
            expr=f'quantile_over_time(0.5, reir:canary_br:ratio{{k="1"}}{usual})'
            f' - reir:canary_br:ratio{{k="1"}} > {limits.canary_drop:g}',
            hold_s=times.deep,
            severity="critical",
            summary="Answers in {{ $labels.gallery }} have become worse",
            description="BR@1 of the canaries of gallery {{ $labels.gallery }} is "
            "{{ $value | humanizePercentage }} of all canaries below its median of the last "
            f"{duration(times.baseline)}.",
            runbook="canary-answers-worse",
        ),
        Alert(
            name="ReirCanaryAbsentWorse",
            expr=f"quantile_over_time(0.5, reir:canary_absent:ratio{usual})"
            f" - reir:canary_absent:ratio > {limits.absent_drop:g}",
            hold_s=times.deep,
            severity="warning",
            summary="Absent objects are recognized less often in {{ $labels.gallery }}",
            description="The share of absent canaries that gallery {{ $labels.gallery }} "
            "recognizes as absent is {{ $value | humanizePercentage }} of all absent canaries "
            f"below its median of the last {duration(times.baseline)}.",
            runbook="canary-answers-worse",
        ),
        Alert(
            name="ReirCanaryAnswersMissing",
            # A value that was never measured has no series, which a comparison cannot notice.
            expr="max by (gallery) (reir_monitor_instances) unless on (gallery) "
            'reir:canary_br:ratio{k="1"}',
            hold_s=times.check_late,
            severity="warning",
            summary="Nobody checks the answers in {{ $labels.gallery }}",
            description="Gallery {{ $labels.gallery }} with {{ $value }} instances has no "
            "canaries with known answers, or the monitor has not asked them, so worse answers "
            "would not be noticed.",
            runbook="canary-answers-missing",
        ),
        Alert(
            name="ReirPresenceDrift",
            expr=f"abs(reir:presence_drift:difference) > {limits.presence_drift:g}",
            hold_s=times.settled,
            severity="warning",
            summary="The presence of answers in {{ $labels.gallery }} has changed",
            description="The mean presence of recent answers in gallery {{ $labels.gallery }} "
            "differs by {{ $value | humanize }} from that of earlier ones; the limit is "
            f"{limits.presence_drift:g}.",
            runbook="presence-drift",
        ),
    ]


def _index_alerts(times: Durations, limits: Limits) -> list[Alert]:
    return [
        Alert(
            name="ReirIndexStale",
            expr=f"reir:index_age:seconds > {limits.index_age_s:g}",
            hold_s=times.at_once,
            severity="warning",
            summary="Gallery {{ $labels.gallery }} is out of date",
            description="`reir index` or `reir reindex` last ended "
            "{{ $value | humanizeDuration }} ago for gallery {{ $labels.gallery }}; newer photos "
            "are not found.",
            runbook="index-stale",
        ),
        Alert(
            name="ReirIndexFailures",
            expr=f"reir:failed_photos:ratio > {limits.failed_photos:g}",
            hold_s=times.at_once,
            severity="warning",
            summary="Many photos of {{ $labels.gallery }} could not be indexed",
            description="{{ $value | humanizePercentage }} of the photos of gallery "
            "{{ $labels.gallery }} could not be indexed, so searches do not find them.",
            runbook="index-failures",
        ),
        Alert(
            name="ReirReindexRejected",
            expr='max by (gallery) (reir_monitor_reindex_state{state="rejected"}) == 1',
            severity="warning",
            summary="The new version of {{ $labels.gallery }} failed its check",
            description="The last `reir reindex` of gallery {{ $labels.gallery }} built a version "
            "that failed the check. The live version was not changed.",
            runbook="reindex-rejected",
        ),
        Alert(
            name="ReirReindexStopped",
            expr="max by (gallery) (reir_monitor_reindex_stopped) == 1",
            hold_s=times.down,
            severity="warning",
            summary="The re-indexing of {{ $labels.gallery }} stopped before its end",
            description="The last `reir reindex` of gallery {{ $labels.gallery }} has not ended, "
            "but no process works on it: it failed, or it was killed.",
            runbook="reindex-stopped",
        ),
    ]


def _backup_alerts(times: Durations, limits: Limits) -> list[Alert]:
    return [
        Alert(
            name="ReirBackupOld",
            expr=f"reir:backup_age:seconds > {limits.backup_age_s:g}",
            hold_s=times.at_once,
            severity="warning",
            summary="The last backup of {{ $labels.gallery }} is old",
            description="The last backup of gallery {{ $labels.gallery }} ended "
            "{{ $value | humanizeDuration }} ago.",
            runbook="backup-old",
        ),
        Alert(
            name="ReirBackupMissing",
            expr="max by (gallery) (reir_monitor_instances) unless on (gallery) "
            "reir:backup_age:seconds",
            hold_s=times.missing,
            severity="warning",
            summary="Gallery {{ $labels.gallery }} has no backup",
            description="Gallery {{ $labels.gallery }} with {{ $value }} instances was never "
            "backed up.",
            runbook="backup-old",
        ),
    ]
