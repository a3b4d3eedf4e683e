"""The webhook remembers which alerts fire, from the messages of Alertmanager."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from reir_testing.alerting.webhook import webhook


def alert(name: str, status: str, fingerprint: str = "1") -> dict[str, Any]:
    labels = {"alertname": name}
    return {"labels": labels, "status": status, "fingerprint": fingerprint, "annotations": {}}


def send(url: str, *alerts: dict[str, Any]) -> None:
    data = json.dumps({"alerts": alerts}).encode()
    urllib.request.urlopen(urllib.request.Request(url, data), timeout=10).close()


def test_alerts_fire_until_all_of_their_series_are_resolved() -> None:
    with webhook() as received:
        assert received.wait_until_fired("Down", 0.0, timeout_s=0) is None
        send(received.url, alert("Down", "firing", "1"), alert("Down", "firing", "2"))
        send(received.url, alert("Full", "firing", "3"))
        fired_s = received.wait_until_fired("Down", 0.0, timeout_s=10)
        assert fired_s is not None
        assert received.wait_until_fired("Down", fired_s + 1, timeout_s=0) is None
        assert received.firing() == {"Down", "Full"}
        send(received.url, alert("Down", "resolved", "1"))
        assert received.wait_until_silent("Down", timeout_s=0) is None
        send(received.url, alert("Down", "resolved", "2"))
        silent_s = received.wait_until_silent("Down", timeout_s=10)
        assert silent_s is not None
        assert silent_s >= fired_s
        assert received.firing() == {"Full"}
