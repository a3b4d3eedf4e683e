"""`Webhook`: receives what Alertmanager sends, as the pager of an operator would."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Notification:
    """One alert in a message of Alertmanager.

    Attributes:
        name: of the alert.
        status: "firing" or "resolved".
        fingerprint: identifies the alert with its labels.
        annotations: summary, description and `runbook_url`.
        received_s: Unix time.
    """

    name: str
    status: str
    fingerprint: str
    annotations: Mapping[str, str]
    received_s: float


class Webhook:
    """The notifications so far.

    Attributes:
        url: address that Alertmanager sends to.
    """

    def __init__(self, url: str) -> None:
        """Start without notifications."""
        self.url = url
        self._received: list[Notification] = []
        self._changed = threading.Condition()

    @property
    def received(self) -> list[Notification]:
        """All notifications, in the order in which they came."""
        with self._changed:
            return [*self._received]

    def config(self, ignored: Sequence[str] = ()) -> dict[str, Any]:
        """Return a configuration of Alertmanager that sends each alert at once.

        Args:
            ignored: names of alerts that are not sent.
        """
        route: dict[str, Any] = {"receiver": "webhook", "group_by": ["..."], "group_wait": "0s"}
        route |= {"group_interval": "1s", "repeat_interval": "12h"}
        route["routes"] = [
            {"receiver": "nobody", "matchers": [f'alertname = "{name}"']} for name in ignored
        ]
        webhook = {"url": self.url, "send_resolved": True}
        receivers = [{"name": "webhook", "webhook_configs": [webhook]}, {"name": "nobody"}]
        return {"route": route, "receivers": receivers}

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire now."""
        return {each.name for each in self._last().values() if each.status == "firing"}

    def wait_until_fired(self, name: str, since_s: float, timeout_s: float) -> float | None:
        """Return when an alert fired after `since_s`; None if it did not in time."""
        return self._wait(timeout_s, lambda: self._fired_s(name, since_s))

    def wait_until_silent(self, name: str, timeout_s: float) -> float | None:
        """Return when an alert was resolved; None if it still fires after that time."""
        return self._wait(timeout_s, lambda: self._silent_s(name))

    def add(self, message: Mapping[str, Any]) -> None:
        """Add the alerts of a message of Alertmanager."""
        now_s = time.time()
        with self._changed:
            self._received += [
                Notification(
                    name=each["labels"]["alertname"],
                    status=each["status"],
                    fingerprint=each["fingerprint"],
                    annotations=each["annotations"],
                    received_s=now_s,
                )
                for each in message["alerts"]
            ]
            self._changed.notify_all()

    def _last(self) -> dict[str, Notification]:
        return {each.fingerprint: each for each in self.received}

    def _fired_s(self, name: str, since_s: float) -> float | None:
        times = (
            each.received_s
            for each in self.received
            if each.name == name and each.status == "firing" and each.received_s >= since_s
        )
        return next(times, None)

    def _silent_s(self, name: str) -> float | None:
        last = [each for each in self._last().values() if each.name == name]
        if any(each.status == "firing" for each in last):
            return None
        return max((each.received_s for each in last), default=time.time())

    def _wait(self, timeout_s: float, look: Any) -> float | None:
        deadline_s = time.monotonic() + timeout_s
        while (found := look()) is None and time.monotonic() < deadline_s:
            with self._changed:
                self._changed.wait(1.0)
        return None if found is None else float(found)


@contextmanager
def webhook() -> Iterator[Webhook]:
    """Receive notifications on a free port of 127.0.0.1 until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.add(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Webhook(f"http://127.0.0.1:{server.server_port}/")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
