"""The rules of Prometheus: they are valid, fire when they should, and only then."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from reir_k8s.monitoring.declared_metrics import names_in, series_names
from reir_k8s.monitoring.rules.files import all_alerts, rule_files, rule_groups
from reir_k8s.monitoring.rules.rule import Durations, duration
from reir_testing.repository import ROOT

CASES = ROOT / "tests" / "k8s" / "alerts"
SUBJECTS = tuple(rule_groups())

Promtool = Callable[..., None]


@pytest.mark.parametrize("factor", [1, 1 / 20])
def test_the_rules_are_valid(promtool: Promtool, tmp_path: Path, factor: float) -> None:
    for name, text in rule_files(Durations().scaled(factor)).items():
        (tmp_path / name).write_text(text)
        promtool("check", "rules", tmp_path / name)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_each_alert_stays_silent_and_fires_and_ends(promtool: Promtool, subject: str) -> None:
    promtool("test", "rules", CASES / f"{subject}.yaml")


@pytest.mark.parametrize("subject", SUBJECTS)
def test_each_alert_has_such_a_case(subject: str) -> None:
    cases = yaml.safe_load((CASES / f"{subject}.yaml").read_text())["tests"]
    alerts = rule_groups()[subject].alerts
    assert [case["name"] for case in cases] == [alert.name for alert in alerts]
    for case in cases:
        silent, fires, ends = case["promql_expr_test"]
        for each in (silent, fires, ends):
            assert (
                each["expr"] == f'count(ALERTS{{alertname="{case["name"]}", alertstate="firing"}})'
            )
        found = [
            [sample["value"] for sample in each["exp_samples"]] for each in (silent, fires, ends)
        ]
        assert found == [[], [1], []]


def test_the_rules_read_only_series_that_exist() -> None:
    recorded = {each.record for group in rule_groups().values() for each in group.recordings}
    known = series_names() | recorded
    for group in rule_groups().values():
        expressions = [each.expr for each in group.recordings]
        for expression in (*expressions, *(each.expr for each in group.alerts)):
            names = names_in(expression)
            assert names, expression
            assert names <= known, f"{expression} reads {names - known}, which nobody exports"


def test_texts_name_only_labels_that_the_expression_keeps() -> None:
    for alert in all_alerts():
        for label in ("gallery", "schedule", "check"):
            if f"$labels.{label}" in alert.summary + alert.description:
                groups = rule_groups().values()
                read = [r.expr for g in groups for r in g.recordings if r.record in alert.expr]
                found = [alert.expr, *read]
                assert any(f"by ({label}" in each or f"{label}=" in each for each in found), alert


def test_scaled_rules_differ_in_nothing_but_their_durations() -> None:
    def without_durations(times: Durations) -> dict[str, str]:
        numbers = f"(?<=, ){times.ahead:g}(?=\\))|(?<=> ){times.check_late:g}\\b"
        in_use = re.compile(rf"{numbers}|\b[0-9]+(?:ms|[smhd])\b")
        return {name: in_use.sub("DURATION", text) for name, text in rule_files(times).items()}

    assert without_durations(Durations()) == without_durations(Durations().scaled(1 / 20))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(300, "5m"), (90, "90s"), (86_400, "1d"), (1.5, "1500ms"), (3_600, "1h"), (604_800, "7d")],
)
def test_durations_are_written_as_prometheus_reads_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
