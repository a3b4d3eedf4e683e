"""A Ray cluster on this machine that is used as KubeRay uses one: through its dashboard."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from reir.errors import ReirError
from reir_k8s.rehearsal.local_copy import AGENT, DASHBOARD, LocalCopy
from reir_serving.ray.environment import variables as server_variables
from reir_serving.ray.processes import of_session
from reir_testing.serving import free_port

START_TIMEOUT_S, COMMAND_TIMEOUT_S = 180.0, 1200.0
_LAST_LINES = 30


def programs_folder() -> Path:
    """Return the folder of the programs that are installed with this Python."""
    return Path(sys.executable).parent


def run_here(words: Sequence[str], variables: Mapping[str, str]) -> str:
    """Run a program of this environment and return what it printed.

    Raises:
        ReirError: it failed, or took too long; the message has the end of its output.
    """
    line = " ".join(words)
    try:
        done = subprocess.run(
            [str(programs_folder() / words[0]), *words[1:]],
            env=program_environment(variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ReirError(f"`{line}` took more than {COMMAND_TIMEOUT_S:g} s") from error
    if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-_LAST_LINES:])
        raise ReirError(f"`{line}` exited with status {done.returncode}:\n{end}")
    return done.stdout


def program_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of this process, its programs first in the path, and variables."""
    path = f"{programs_folder()}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **variables, "PATH": path}


@dataclass(frozen=True)
class Cluster:
    """A running Ray cluster.

    Attributes:
        dashboard: address of its dashboard.
        folder: for files of the rehearsal.
        token: variables by which programs authenticate with it.
    """

    dashboard: str
    folder: Path
    token: Mapping[str, str]

    def deploy(self, serve_config: str) -> None:
        """Deploy an application of Ray Serve, as KubeRay does with `serveConfigV2`."""
        file = self.folder / "serve.yaml"
        file.write_text(serve_config, encoding="utf-8")
        run_here(["serve", "deploy", "--address", self.dashboard, str(file)], self.token)

    def serve_status(self) -> str:
        """Return what Ray Serve says of its applications."""
        return run_here(["serve", "status", "--address", self.dashboard], self.token)

    def run_job(self, entrypoint: Sequence[str], variables: Mapping[str, str]) -> str:
        """Run an entrypoint to its end, with the command that KubeRay's submitting pod runs.

        Args:
            entrypoint: the command of the job.
            variables: variables of the pods in which the job would run.
        """
        submit = ["ray", "job", "submit", "--address", self.dashboard]
        submit += ["--runtime-env-json", json.dumps({"env_vars": dict(variables)})]
        return run_here([*submit, "--", *entrypoint], self.token)


@contextmanager
def ray_cluster(local: LocalCopy, folder: Path, variables: Mapping[str, str]) -> Iterator[Cluster]:
    """Start a Ray cluster with one node, and end all of its processes at the end.

    Args:
        local: the manifests.
        folder: for its files; its path must be short.
        variables: variables of the pods of the service.

    Raises:
        ReirError: it does not start.
    """
    ports = {
        "port": free_port(),
        "dashboard-port": local.ports[DASHBOARD],
        "dashboard-agent-listen-port": local.ports[AGENT],
        "dashboard-agent-grpc-port": free_port(),
        "runtime-env-agent-port": free_port(),
        "metrics-export-port": free_port(),
        "ray-client-server-port": free_port(),
    }
    options = [f"--{name}={port}" for name, port in ports.items()]
    options += [f"--num-cpus={local.num_cpus()}", f"--temp-dir={folder / 'ray'}"]
    options += ["--node-ip-address=127.0.0.1", "--disable-usage-stats", "--block"]
    # In a pod, the network and the file system are its own. Here, other servers may use the ports
    # and files of HAProxy that Ray chooses by default.
    own = {**server_variables(folder), **variables, "REIR_SERVE_SECRET": secrets.token_hex(16)}
    # Processes of Ray that are killed leave temporary files behind.
    own["TMPDIR"] = str(folder / "tmp")
    Path(own["TMPDIR"]).mkdir()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    log = folder / "ray.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [str(programs_folder() / "ray"), "start", "--head", *options],
            env=program_environment({**own, **token}),
            stdout=output,
            stderr=output,
            start_new_session=True,
        ) as process,
    ):
        try:
            cluster = Cluster(f"http://127.0.0.1:{local.ports[DASHBOARD]}", folder, token)
            _wait_until_up(f"{cluster.dashboard}/api/gcs_healthz", process, log)
            yield cluster
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            for pid in of_session(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _wait_until_up(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until_s and process.poll() is None:
        with (
            suppress(OSError, urllib.error.URLError),
            urllib.request.urlopen(address, timeout=5),
        ):
            return
        time.sleep(0.2)
    end = "\n".join(log.read_text().splitlines()[-_LAST_LINES:])
    raise ReirError(f"Ray did not start within {START_TIMEOUT_S:g} s:\n{end}")
