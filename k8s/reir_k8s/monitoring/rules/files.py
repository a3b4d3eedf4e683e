"""The rule files of Prometheus."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from reir_k8s.monitoring.rules.galleries import gallery_rules
from reir_k8s.monitoring.rules.operations import operation_rules
from reir_k8s.monitoring.rules.rule import Alert, Durations, Limits, RuleGroup, duration
from reir_k8s.monitoring.rules.serving import serving_rules

RUNBOOKS = "docs/runbooks/"
"""Folder of the run-books in this repository; its address on a server can take its place."""

_LABEL = re.compile(r"\{\{ \$labels\.(\w+) \}\}")
_PAGE = """\
# Alerts and run-books

Each alert of Prometheus links one of these pages. A page tells how to recognize the problem,
which queries show more, what the likely causes are, and how to repair it. `critical` means that
users are affected now, or soon will be; `warning` means that somebody should look at it during
the day.

{table}

The rules are declared in `k8s/reir_k8s/monitoring/rules/`: durations and limits in `rule.py`, and
one module for each subject. `python -m reir_k8s.generate` writes them to `k8s/monitoring/rules/`,
and this page. They expect that the scrape job of the servers is called `reir-serve`, and that of
the monitor `reir-monitor`. For example, on one machine:

```yaml
rule_files: [k8s/monitoring/rules/*.yaml]
scrape_configs:
- job_name: reir-serve
  static_configs: [{targets: ["127.0.0.1:8000"]}]
- job_name: reir-monitor
  static_configs: [{targets: ["127.0.0.1:9464"]}]
```

Some alerts ask for something that has to be set up first: canaries (`reir canary`), backups
(`reir backup`) and schedules (`reir schedule`). Silence them in Alertmanager if you do not want
these.

Commands on these pages name the gallery `photos`; use the name of the alert's label `gallery`.
With a store other than the default, add `--store`, or set `REIR_STORE`.

`tests/k8s/alerts/` has a case for each alert, which `promtool test rules` runs: it stays silent,
fires, and ends. `benchmarks/alerts.py` runs a real system with Prometheus and Alertmanager,
causes faults, and counts which of them were reported, and how many alerts fired without a fault.
"""

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


def write_rules(folder: Path, times: Durations) -> list[Path]:
    """Write the rules with these durations, for a test that cannot wait; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = rule_files(times)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _group(group: RuleGroup, runbooks: str) -> dict[str, object]:
    # First, because alerts read recordings, and Prometheus evaluates a group in its order.
    rules = [each.to_dict() for each in group.recordings]
    return {
        "name": group.name,
        "rules": [*rules, *(each.to_dict(runbooks) for each in group.alerts)],
    }


def alerts_page() -> str:
    """Return the text of docs/runbooks/README.md, which lists all alerts."""
    lines = [
        "| alert | severity | fires after | what is wrong | run-book |",
        "|---|---|---|---|---|",
    ]
    for alert in all_alerts():
        hold = duration(alert.hold_s) if alert.hold_s else "at once"
        summary = _LABEL.sub(lambda found: found[1].upper(), alert.summary)
        link = f"[{alert.runbook}]({alert.runbook}.md)"
        lines.append(f"| `{alert.name}` | {alert.severity} | {hold} | {summary} | {link} |")
    # Not `format`, because the page itself contains braces.
    return _PAGE.replace("{table}", "\n".join(lines))
