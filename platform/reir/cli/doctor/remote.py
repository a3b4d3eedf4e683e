"""Checks of what runs elsewhere: a server of ours, and the Ray cluster."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

import reir
from reir.cli.common import plural
from reir.cli.doctor.check import Check
from reir.cli.doctor.galleries import clock_check

if TYPE_CHECKING:
    from reir.models.interfaces import InstanceEncoder

SERVER_TIMEOUT_S, CLUSTER_TIMEOUT_S = 10.0, 30.0

_ASK_CLUSTER = (
    "import json; from reir.apps import app_function; print(json.dumps(app_function('cluster')()))"
)


def check_server(url: str, encoder: InstanceEncoder | None) -> Iterator[Check]:
    """Compare release, checkpoints and clock of a server with those of this machine.

    Args:
        url: address of the server.
        encoder: the checkpoint of this machine.
    """
    advice = "start it with `reir serve`, or correct --server"
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/about", timeout=SERVER_TIMEOUT_S) as got:
            # Not before the request: a server may take longer to answer than clocks may differ.
            answered_s, date = time.time(), got.headers["Date"]
            about = json.load(got)
    # HTTPException: the address is invalid, the answer is cut, or it is of another protocol.
    except (OSError, ValueError, HTTPException) as error:
        yield Check("server", "fail", f"{url} does not answer: {error}", advice)
        return
    if not isinstance(about, dict) or not {"release", "checkpoints"} <= about.keys():
        yield Check("server", "fail", f"{url} is not a server of reir", advice)
        return
    detail = f"release {about['release']} at {url}"
    if about["release"] != reir.__version__:
        problem = f"{detail}, but this command line is release {reir.__version__}"
        yield Check("server", "warn", problem, "install the same release on both")
    elif (
        encoder is not None and about["checkpoints"] and encoder.digest not in about["checkpoints"]
    ):
        served = ", ".join(each[:12] for each in about["checkpoints"])
        problem = f"{detail} searches with checkpoint {served}, here it is {encoder.digest[:12]}"
        yield Check("server", "warn", problem, "expected if the gallery has an encoder of its own")
    else:
        yield Check("server", "ok", detail)
    if date:
        yield clock_check(f"server {url}", parsedate_to_datetime(date).timestamp() - answered_s)


def check_cluster() -> Iterator[Check]:
    """Check nodes, CPUs and GPUs of the Ray cluster that `RAY_ADDRESS` names, if it is set."""
    address = os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        return
    advice = "check RAY_ADDRESS, and `ray status` on the head node; or unset it to run Ray here"
    try:
        # A process of its own, because joining a cluster that does not answer can take minutes.
        done = subprocess.run(
            [sys.executable, "-c", _ASK_CLUSTER],
            capture_output=True,
            text=True,
            timeout=CLUSTER_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        problem = f"{address} did not answer within {CLUSTER_TIMEOUT_S:g} s"
        yield Check("cluster", "fail", problem, advice)
        return
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        # The last line of a traceback begins with the class of the error, which helps no user.
        reason = re.sub(r"^reir\.errors\.\w+: ", "", reason)
        yield Check("cluster", "fail", f"{address} cannot be used: {reason}", advice)
        return
    # The answer is the last line, because Ray may print messages on standard output before it.
    yield cluster_check(address, json.loads(done.stdout.splitlines()[-1]))


def cluster_check(address: str, found: dict[str, Any]) -> Check:
    """Return the check of a cluster, from what the function `cluster` of the ingestion app says."""
    total, free = found["total"], found["free"]
    resources = ", ".join(
        f"{free.get(name, 0):g} of {total[name]:g} {name}s free"
        for name in ("CPU", "GPU")
        if total.get(name)
    )
    nodes = plural(found["nodes"], "node")
    detail = f"{address}: {nodes}, {resources or 'no CPU'}; Ray {found['ray']}"
    if not total.get("CPU"):
        return Check("cluster", "fail", detail, "add worker nodes that have CPUs")
    if not free.get("CPU"):
        wait = "wait for the jobs that use it, or add worker nodes; new jobs wait for a free CPU"
        return Check("cluster", "warn", detail, wait)
    return Check("cluster", "ok", detail)
