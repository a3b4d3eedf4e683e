"""Rules about `reir serve`: requests, errors, latencies and replicas."""

from __future__ import annotations

from reir_k8s.monitoring.rules.rule import Alert, Durations, Limits, Recording, RuleGroup, duration

JOB = "(.+/)?reir-serve"
"""Names of the scrape job of the servers; a `PodMonitor` puts its namespace in front."""

_USERS = 'route!~"/metrics|/healthz|/readyz"'
"""Selects the requests of users: other requests would hide errors, and come also without users."""

_FAILED = f'{_USERS}, status=~"5..", status!="501"'  # 501: the server records no feedback


def serving_rules(times: Durations, limits: Limits) -> RuleGroup:
    """Return the rules about the servers."""
    alerts = [
        *_replica_alerts(times, limits),
        *_budget_alerts(times, limits),
        *_request_alerts(times, limits),
    ]
    return RuleGroup("reir-serving", _recordings(times, limits), alerts)


def _recordings(times: Durations, limits: Limits) -> list[Recording]:
    rate = duration(times.rate)
    # The names stay those of the durations in use when durations are scaled for a test, so that
    # alerts and dashboards find the series.
    burns = dict(zip(("5m", "1h", "30m", "6h"), (*times.page, *times.ticket), strict=True))
    quantiles = [
        Recording(
            f"reir:serve_{name}_seconds:p{round(100 * share)}_5m",
            f"histogram_quantile({share}, "
            f"sum by ({label}, le) (rate(reir_serve_{name}_seconds_bucket[{rate}])))",
        )
        for name, label in (("latency", "route"), ("stage", "stage"))
        for share in (0.5, 0.95, 0.99)
    ]
    return [
        Recording(
            "reir:serve_requests:rate5m",
            f"sum by (route, status) (rate(reir_serve_requests_total[{rate}]))",
        ),
        *quantiles,
        Recording("reir:serve_rejected:ratio_rate5m", _problem_ratio("overloaded", times)),
        Recording("reir:serve_storeless:ratio_rate5m", _problem_ratio("store-unavailable", times)),
        *(
            Recording(f"reir:serve_failed:ratio_rate{name}", _failed_ratio(seconds))
            for name, seconds in burns.items()
        ),
        *(
            Recording(
                f"reir:serve_budget_burn:ratio_rate{name}",
                f"reir:serve_failed:ratio_rate{name} / {limits.error_budget:g}",
            )
            for name in burns
        ),
    ]


def _failed_ratio(seconds: float) -> str:
    of = f"[{duration(seconds)}]"
    # Without a failure so far, there is no series of failures, and the share is 0.
    return (
        f"(sum(rate(reir_serve_requests_total{{{_FAILED}}}{of})) or vector(0))"
        f" / sum(rate(reir_serve_requests_total{{{_USERS}}}{of}))"
    )


def _problem_ratio(problem: str, times: Durations) -> str:
    of = f"[{duration(times.rate)}]"
    return (
        f'(sum(rate(reir_serve_problems_total{{problem="{problem}"}}{of})) or vector(0))'
        f" / sum(rate(reir_serve_requests_total{{{_USERS}}}{of}))"
    )


def _replica_alerts(times: Durations, limits: Limits) -> list[Alert]:
    killed = f"sum(increase(reir_serve_replicas_killed_total[{duration(times.killed)}]))"
    return [
        Alert(
            name="ReirServerDown",
            # `up == 0` has no value for a target that has vanished, such as that of a deleted pod.
            expr=f'absent(up{{job=~"{JOB}"}} == 1)',
            hold_s=times.down,
            severity="critical",
            summary="No server answers",
            description="Prometheus reaches no server: the servers are stopped, or none of their "
            "replicas is ready. Users get no answers.",
            runbook="server-down",
        ),
        Alert(
            name="ReirReplicaKilled",
            # `increase` extrapolates to the whole range, so one killed replica is seldom exactly 1.
            expr=f"{killed} > 0.5",
            severity="warning",
            summary="A replica was killed",
            description='About {{ printf "%.0f" $value }} replicas ended within '
            f"{duration(times.killed)} without having been stopped. Ray Serve replaces them.",
            runbook="replica-killed",
        ),
        Alert(
            name="ReirReplicaCrashLoop",
            expr=f"{killed} >= {limits.crash_loop}",
            hold_s=times.at_once,
            severity="critical",
            summary="Replicas are killed again and again",
            description='About {{ printf "%.0f" $value }} replicas ended within '
            f"{duration(times.killed)} without having been stopped. Ray Serve replaces them, but "
            "the new ones end as well.",
            runbook="replica-killed",
        ),
    ]


def _budget_alerts(times: Durations, limits: Limits) -> list[Alert]:
    def burns(ranges: tuple[str, str], long_s: float, factor: float) -> str:
        failures = f"sum(increase(reir_serve_requests_total{{{_FAILED}}}[{duration(long_s)}]))"
        # The long range ignores a brief burst; the short range lets the alert end soon after the
        # failures have ended.
        above = (f"reir:serve_budget_burn:ratio_rate{each} > {factor:g}" for each in ranges)
        return " and ".join((*above, f"{failures} >= {limits.failed_requests}"))

    text = (
        "The error budget ({budget}% of requests) is used up {{{{ $value | humanize }}}} times "
        "faster than allowed: requests of users get answers with status 5xx."
    ).format(budget=f"{100 * limits.error_budget:g}")
    return [
        Alert(
            name="ReirErrorBudgetBurnFast",
            expr=burns(("5m", "1h"), times.page[1], limits.page_burn),
            severity="critical",
            summary="Many requests fail",
            description=text,
            runbook="error-budget",
        ),
        Alert(
            name="ReirErrorBudgetBurnSlow",
            expr=burns(("30m", "6h"), times.ticket[1], limits.ticket_burn),
            severity="warning",
            summary="Requests fail more often than the objective allows",
            description=text,
            runbook="error-budget",
        ),
    ]


def _request_alerts(times: Durations, limits: Limits) -> list[Alert]:
    rate = duration(times.rate)
    return [
        Alert(
            name="ReirSearchesSlow",
            expr=f'reir:serve_latency_seconds:p95_5m{{route="/v1/search"}} > {limits.latency_s:g}',
            hold_s=times.settled,
            severity="warning",
            summary="Searches are slow",
            description="5% of the searches take longer than {{ $value | humanizeDuration }}; the "
            f"limit is {limits.latency_s:g} s.",
            runbook="searches-slow",
        ),
        Alert(
            name="ReirServerOverloaded",
            expr=f"reir:serve_rejected:ratio_rate5m > {limits.rejected:g}",
            hold_s=times.at_once,
            severity="warning",
            summary="The server rejects requests",
            description="{{ $value | humanizePercentage }} of the requests are rejected, because "
            "the server has as many requests in progress and waiting as it accepts.",
            runbook="server-overloaded",
        ),
        Alert(
            name="ReirSearchesWithoutStore",
            expr=f"reir:serve_storeless:ratio_rate5m > {limits.storeless:g}",
            hold_s=times.at_once,
            severity="critical",
            summary="The server cannot reach its store",
            description="{{ $value | humanizePercentage }} of the requests fail, because the "
            "store does not answer the server.",
            runbook="store-down",
        ),
        Alert(
            name="ReirKeysUnusable",
            expr=f'sum(rate(reir_serve_problems_total{{problem="keys-unusable"}}[{rate}])) > 0',
            severity="critical",
            summary="The server cannot check API keys",
            description="{{ $value | humanize }} requests a second are refused, because the file "
            "of API keys cannot be read or contains an error.",
            runbook="keys-unusable",
        ),
        Alert(
            name="ReirSearchLogDropped",
            expr=f"sum(increase(reir_serve_search_log_dropped_total[{rate}])) > 0",
            severity="warning",
            summary="The search log is incomplete",
            description='About {{ printf "%.0f" $value }} events could not be written to the '
            f"search log within {rate}. Searches work.",
            runbook="search-log-dropped",
        ),
    ]
