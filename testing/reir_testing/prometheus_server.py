"""`prometheus_server`: runs Debian's Prometheus, and Alertmanager, for tests and benchmarks."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

import yaml

from reir_testing.serving import free_port

READY_TIMEOUT_S = 60.0
PROGRAMS = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
}
"""Name of each program -> the Debian package that installs it."""
KEEP_ALERTS: Mapping[str, Any] = {
    "route": {"receiver": "nobody", "group_wait": "0s", "group_interval": "1s"},
    "receivers": [{"name": "nobody"}],
}
"""A configuration of Alertmanager that keeps alerts for `notified` and sends them to nobody."""


class ProgramMissing(RuntimeError):
    """A program that must be installed is not on the PATH; the message says how to get it."""


@dataclass(frozen=True)
class Series:
    """One time series of an answer.

    Attributes:
        labels: its labels; `__name__` is the metric.
        points: Unix time in seconds and value, oldest first; a query at one time has one point.
    """

    labels: Mapping[str, str]
    points: tuple[tuple[float, float], ...]

    @property
    def value(self) -> float:
        """The newest value."""
        return self.points[-1][1]


@dataclass(frozen=True)
class RunningPrometheus:
    """A running server.

    Attributes:
        uri: address, such as `http://127.0.0.1:9090`.
        pid: process id of Prometheus.
        alertmanager_uri: address of Alertmanager, if one runs.
    """

    uri: str
    pid: int
    alertmanager_uri: str | None = None

    def query(self, expression: str, time_s: float | None = None) -> list[Series]:
        """Evaluate an expression at one Unix time, by default now.

        Raises:
            ValueError: Prometheus refuses the expression; the message is its own.
        """
        at = {} if time_s is None else {"time": time_s}
        return self._series("query", query=expression, **at)

    def query_range(
        self, expression: str, start_s: float, end_s: float, step_s: float
    ) -> list[Series]:
        """Evaluate an expression from one Unix time to another, every `step_s` seconds.

        Raises:
            ValueError: Prometheus refuses the expression; the message is its own.
        """
        return self._series("query_range", query=expression, start=start_s, end=end_s, step=step_s)

    def alerts(self) -> list[dict[str, Any]]:
        """Return the alerts that are pending or firing, in the format of Prometheus."""
        return list(self._get("alerts")["alerts"])

    def notified(self) -> list[dict[str, Any]]:
        """Return the alerts that Alertmanager holds, in its format.

        Raises:
            ValueError: the server was started without Alertmanager.
        """
        if self.alertmanager_uri is None:
            raise ValueError("no Alertmanager runs; start the server with `alertmanager`")
        return list(_get_json(f"{self.alertmanager_uri}/api/v2/alerts"))

    def targets(self) -> list[dict[str, Any]]:
        """Return what is scraped, with `health` and `lastError`, in the format of Prometheus."""
        return list(self._get("targets")["activeTargets"])

    def wait_for(self, holds: Callable[[RunningPrometheus], Any], timeout_s: float = 30.0) -> Any:
        """Call `holds` twice a second until it returns something true, and return that.

        Raises:
            TimeoutError: it did not do so in time.
        """
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if found := holds(self):
                return found
            time.sleep(0.5)
        raise TimeoutError(f"what was waited for did not happen within {timeout_s:g} s")

    def _series(self, path: str, **parameters: object) -> list[Series]:
        data = self._get(path, **parameters)
        if data["resultType"] == "scalar":
            return [Series({}, (_point(data["result"]),))]
        return [
            Series(each["metric"], tuple(map(_point, each.get("values") or [each["value"]])))
            for each in data["result"]
        ]

    def _get(self, path: str, **parameters: object) -> Any:
        return _get_json(f"{self.uri}/api/v1/{path}?{urlencode(parameters)}")["data"]


def require_program(name: str) -> str:
    """Return the path of one of `PROGRAMS`.

    Raises:
        ProgramMissing: it is not on the PATH.
    """
    if found := shutil.which(name):
        return found
    raise ProgramMissing(
        f"{name} is not on the PATH; `apt-get install {PROGRAMS[name]}` installs it"
    )


@contextmanager
def prometheus_server(  # noqa: PLR0913, each is a part of the configuration
    directory: Path,
    scrape: Sequence[Mapping[str, Any]],
    *,
    rules: Iterable[Path] = (),
    alertmanager: Mapping[str, Any] | None = None,
    scrape_interval_s: float = 1.0,
    evaluation_interval_s: float = 1.0,
) -> Iterator[RunningPrometheus]:
    """Run Prometheus on a free port of 127.0.0.1, and stop it at the end of the block.

    Args:
        directory: folder for configuration, data and log; it is created.
        scrape: the entries of `scrape_configs`.
        rules: files of recording and alert rules.
        alertmanager: configuration of an Alertmanager to start too, such as `KEEP_ALERTS`.
        scrape_interval_s: time between two scrapes of a target.
        evaluation_interval_s: time between two evaluations of the rules.

    Raises:
        ProgramMissing: a program is not installed.
        RuntimeError: a program does not start; the message ends with its log.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "global": {
            "scrape_interval": f"{round(scrape_interval_s * 1000)}ms",
            "scrape_timeout": f"{round(scrape_interval_s * 1000)}ms",
            "evaluation_interval": f"{round(evaluation_interval_s * 1000)}ms",
        },
        "scrape_configs": [dict(each) for each in scrape],
        "rule_files": [str(Path(path).resolve()) for path in rules],
    }
    with ExitStack() as stack:
        alertmanager_uri = None
        if alertmanager is not None:
            alertmanager_uri = stack.enter_context(_alertmanager(directory, alertmanager))
            target = {"targets": [alertmanager_uri.removeprefix("http://")]}
            config["alerting"] = {"alertmanagers": [{"static_configs": [target]}]}
        path = directory / "prometheus.yml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        uri, pid = stack.enter_context(
            _running(
                "prometheus",
                directory,
                f"--config.file={path}",
                f"--storage.tsdb.path={directory / 'data'}",
            )
        )
        yield RunningPrometheus(uri, pid, alertmanager_uri)


@contextmanager
def _alertmanager(directory: Path, config: Mapping[str, Any]) -> Iterator[str]:
    path = directory / "alertmanager.yml"
    path.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    with _running(
        "prometheus-alertmanager",
        directory,
        f"--config.file={path}",
        f"--storage.path={directory / 'alertmanager'}",
        "--cluster.listen-address=",  # a single one, so it needs no port for others
    ) as (uri, _):
        yield uri


@contextmanager
def _running(program: str, directory: Path, *options: str) -> Iterator[tuple[str, int]]:
    """Run one of `PROGRAMS`; give its address and process id."""
    address = f"127.0.0.1:{free_port()}"
    log = directory / f"{program}.log"
    words = [require_program(program), f"--web.listen-address={address}", *options]
    with log.open("wb") as out, subprocess.Popen(words, stdout=out, stderr=out) as process:
        try:
            _wait_until_ready(f"http://{address}", process, log)
            yield f"http://{address}", process.pid
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_ready(uri: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        try:
            with _OPENER.open(f"{uri}/-/ready", timeout=5):
                return
        except OSError:  # not listening yet, or answering 503
            time.sleep(0.1)
    end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise RuntimeError(f"{process.args!r} is not ready; its log ends with:\n{end}")


_OPENER = build_opener(ProxyHandler({}))  # the servers are on this machine: never ask a proxy


def _get_json(address: str) -> Any:
    try:
        with _OPENER.open(address, timeout=30) as answer:
            return json.load(answer)
    except URLError as error:
        body = error.read().decode("utf-8", "replace") if hasattr(error, "read") else ""
        raise ValueError(f"{address}: {error} {body}") from error


def _point(pair: Sequence[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])
