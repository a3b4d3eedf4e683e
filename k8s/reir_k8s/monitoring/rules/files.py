"""The rule files of Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from reir_k8s.monitoring.rules.galleries import gallery_rules
from reir_k8s.monitoring.rules.operations import operation_rules
from reir_k8s.monitoring.rules.rule import Alert, Durations, Limits, RuleGroup
from reir_k8s.monitoring.rules.serving import serving_rules

RUNBOOKS = "docs/runbooks/"
"""Folder of the run-books in this repository; its address on a server can take its place."""

SUBJECTS = {"serving": serving_rules, "galleries": gallery_rules, "operations": operation_rules}


def rule_groups(
    times: Durations | None = None, limits: Limits | None = None
) -> Mapping[str, RuleGroup]:
    """Return the rules of each subject; without arguments, with the durations and limits in use."""
    return {
        subject: rules(times or Durations(), limits or Limits())
        for subject, rules in SUBJECTS.items()
    }


def all_alerts() -> list[Alert]:
    """Return the alerts of all subjects."""
    return [alert for group in rule_groups().values() for alert in group.alerts]


def rule_files(
    times: Durations | None = None, limits: Limits | None = None, *, runbooks: str = RUNBOOKS
) -> dict[str, str]:
    """Return the name and the text of each rule file.

    Args:
        times: durations; None for those in use.
        limits: limits; None for those in use.
        runbooks: what `runbook_url` begins with.
    """
    return {
        f"{subject}.yaml": yaml.safe_dump(
            {"groups": [_group(group, runbooks)]}, sort_keys=False, width=100
        )
        for subject, group in rule_groups(times, limits).items()
    }


def _group(group: RuleGroup, runbooks: str) -> dict[str, object]:
    rules = [each.to_dict() for each in group.recordings]
    return {
        "name": group.name,
        "rules": [*rules, *(each.to_dict(runbooks) for each in group.alerts)],
    }
