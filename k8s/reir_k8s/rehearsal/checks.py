"""What a rehearsal checks: searches, probes and metrics."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reir.errors import ImageError, ReirError
from reir.images.decode import decode
from reir_k8s.rehearsal.local_cluster import (
    program_environment,
    programs_folder,
    run_here,
)
from reir_k8s.rehearsal.local_copy import (
    METRICS,
    MONITOR,
    SERVICE,
    LocalCopy,
)

READY_TIMEOUT_S, MONITOR_TIMEOUT_S = 300.0, 300.0
GALLERY, EXPRESSIONS = "photos", ("the man on the left", "a dog", "the red car", "a white plate")


def get(address: str) -> str:
    """Return the body of an answer.

    Raises:
        OSError: there is none, or its status is an error.
    """
    with urllib.request.urlopen(address, timeout=10) as answer:
        body: bytes = answer.read()
    return body.decode()


def wait_for(address: str, timeout_s: float) -> str:
    """Return the body of the first answer without an error.

    Raises:
        ReirError: none came in time.
    """
    until_s, last = time.monotonic() + timeout_s, ""
    while time.monotonic() < until_s:
        try:
            return get(address)
        except OSError as error:
            last = str(error)
        time.sleep(0.5)
    raise ReirError(f"{address} did not answer within {timeout_s:g} s: {last}")


@dataclass(frozen=True)
class Client:
    """Uses the service with a key.

    Attributes:
        address: address of the service.
        key: the key.
    """

    address: str
    key: str

    @classmethod
    def with_new_key(cls, local: LocalCopy) -> Client:
        """Create the file of keys that the settings of serving name."""
        file = Path(local.text("/etc/reir/keys/keys.yaml"))
        file.parent.mkdir(parents=True, exist_ok=True)
        made = run_here(["reir", "keys", "new", "--file", str(file), "--write", GALLERY], {})
        # The key itself is printed last, and only here: the file has its hash.
        return cls(f"http://127.0.0.1:{local.ports[SERVICE]}", made.split()[-1])

    def wait_until_ready(self) -> None:
        """Wait until the service says that it is ready.

        Raises:
            ReirError: it does not.
        """
        wait_for(f"{self.address}/readyz", READY_TIMEOUT_S)

    def search_and_confirm(self) -> None:
        """Search, and say of each first hit that it is right.

        Raises:
            ReirError: a search has no hits, or the service answers without a key.
        """
        for expression in EXPRESSIONS:
            found = self._post("/v1/search", {"gallery": GALLERY, "expression": expression, "k": 3})
            if not found["hits"]:
                raise ReirError(f"a search for {expression!r} found nothing: {found}")
            self._post(
                "/v1/feedback",
                {
                    "gallery": GALLERY,
                    "expression": expression,
                    "instance_id": found["hits"][0]["instance_id"],
                    "verdict": "right",
                },
            )
        with suppress(urllib.error.HTTPError):
            get(f"{self.address}/v1/galleries")
            # Reached only without an HTTP error, such as the status 401 that is expected.
            raise ReirError("the service answers without a key")

    def fetch_picture(self) -> None:
        """Fetch the photo of a hit, which the service reads from the bucket.

        Raises:
            ReirError: it cannot.
        """
        found = self._post("/v1/search", {"gallery": GALLERY, "expression": EXPRESSIONS[0], "k": 1})
        path = found["hits"][0]["image_url"]
        picture = self._request(path)
        try:
            decode(picture)
        except ImageError as error:
            raise ReirError(f"{path} is no picture: {error}") from error

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._request(path, json.dumps(body).encode()))
        return found

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                data: bytes = answer.read()
        except urllib.error.HTTPError as error:
            raise ReirError(f"{path}: {error} {error.read().decode()}") from error
        return data


def check_probes(local: LocalCopy) -> None:
    """Ask what Kubernetes would ask the pods of the RayService.

    Raises:
        ReirError: a probe fails.
    """
    for owner in ("RayService/reir-serve head", "RayService/reir-serve replicas"):
        container = local.pod(owner).spec["containers"][0]
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[name]["httpGet"]
            wait_for(f"http://127.0.0.1:{local.ports[probe['port']]}{probe['path']}", 30)


def check_metrics(local: LocalCopy) -> None:
    """Check that the searches are counted where Prometheus looks.

    Raises:
        ReirError: they are not.
    """
    text = get(f"http://127.0.0.1:{local.ports[METRICS]}/metrics")
    if 'route="/v1/search"' not in text:
        raise ReirError(f"the metrics of the replicas do not count searches:\n{text[:2000]}")


def check_monitor(local: LocalCopy, command: Sequence[str], variables: Mapping[str, str]) -> None:
    """Run the monitor until it has measured something.

    Raises:
        ReirError: it does not.
    """
    address = f"http://127.0.0.1:{local.ports[MONITOR]}/metrics"
    process = subprocess.Popen(
        [str(programs_folder() / command[0]), *command[1:]],
        env=program_environment(variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(address, READY_TIMEOUT_S)
        until_s = time.monotonic() + MONITOR_TIMEOUT_S
        while f'gallery="{GALLERY}"' not in get(address):
            if time.monotonic() > until_s:
                raise ReirError(f"the monitor has not measured gallery {GALLERY}")
            time.sleep(1)
    finally:
        process.terminate()
        process.wait(60)
