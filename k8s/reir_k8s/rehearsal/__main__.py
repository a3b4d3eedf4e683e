"""Runs what the manifests say on this machine, and checks that it works: `k8s/rehearse.sh`.

A Ray cluster starts here, with authentication by a token, as in the manifests. It runs
`serveConfigV2` of the RayService, deployed as KubeRay does, and the entrypoints of the RayJob and
of the scheduled jobs, submitted as KubeRay does. The command lines are those of the manifests; only
folders, ports and the address of the store differ. Each process has the variables of its pod. Jobs
also see those of the service, because they share one Ray cluster with it. A local S3 server holds
photos and backups, in the buckets that the manifests name. The store is a Milvus server if the
package `milvus` is installed, and an embedded store otherwise.

What this cannot show: Kubernetes itself, its operators, several machines, GPUs, and images.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from reir.errors import ReirError
from reir_k8s.manifests import OVERLAYS, commands, render
from reir_k8s.rehearsal.checks import Client, check_metrics, check_monitor, check_probes
from reir_k8s.rehearsal.local_cluster import Cluster, programs_folder, ray_cluster, run_here
from reir_k8s.rehearsal.local_copy import LocalCopy
from reir_k8s.rehearsal.storage import local_buckets, local_store
from reir_serving.ray.environment import server_folder
from reir_testing import data_dir

SERVING, BACKUP = "RayService/reir-serve replicas", "CronJob/reir-backup"
MONITOR = "Deployment/reir-monitor"
NUM_PHOTOS = 24


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print what is done, and how long it took."""
    sys.stdout.write(f"{title} ...")
    sys.stdout.flush()
    begin_s = time.monotonic()
    yield
    sys.stdout.write(f" {time.monotonic() - begin_s:.1f} s\n")


def rehearse(overlay: str, photos: list[Path], *, embedded: bool) -> None:
    """Run everything, and clean up.

    Raises:
        ReirError: something does not work; the message says what.
    """
    manifests = render(overlay)
    lines = commands(manifests)
    with ExitStack() as stack:
        folder = stack.enter_context(server_folder())
        with step("starting the store and the buckets"):
            store = stack.enter_context(local_store(folder / "store", embedded=embedded))
            names = [word for line in lines.values() for word in line if word.startswith("s3://")]
            buckets = stack.enter_context(local_buckets(names, photos))
        local = LocalCopy.make(manifests, folder, programs_folder(), store, buckets)
        local.write_settings()
        client = Client.with_new_key(local)
        with step("starting Ray"):
            cluster = stack.enter_context(ray_cluster(local, folder, local.variables(SERVING)))
        _index_and_serve(local, cluster, client, lines)
        _run_scheduled_jobs(local, cluster, client, lines)


def _index_and_serve(
    local: LocalCopy, cluster: Cluster, client: Client, lines: dict[str, list[str]]
) -> None:
    with step("RayService: serveConfigV2"):
        cluster.deploy(local.serve_config())
        try:
            client.wait_until_ready()
        except ReirError as error:
            raise ReirError(f"{error}\n{cluster.serve_status()}") from error
    with step("probes"):
        check_probes(local)
    _run_job(local, cluster, lines, "RayJob/reir-index")
    with step("searches, feedback, a picture, metrics"):
        client.search_and_confirm()
        client.fetch_picture()
        check_metrics(local)


def _run_job(local: LocalCopy, cluster: Cluster, lines: dict[str, list[str]], owner: str) -> None:
    with step(owner.replace("/", " ")):
        cluster.run_job(lines[owner], local.variables(f"{owner} head"))


def _run_scheduled_jobs(
    local: LocalCopy, cluster: Cluster, client: Client, lines: dict[str, list[str]]
) -> None:
    # In the order of the schedules: canaries come from the feedback of the searches before, and the
    # check of the re-indexing asks them.
    for name in ("reir-refresh", "reir-canary", "reir-reindex"):
        _run_job(local, cluster, lines, f"RayCronJob/{name}")
    with step("searches in the new version"):
        client.search_and_confirm()
    with step("CronJob reir-backup"):
        run_here(lines[BACKUP], local.variables(BACKUP))
    with step("Deployment reir-monitor"):
        check_monitor(local, lines[MONITOR], local.variables(MONITOR))


def main() -> int:
    """Run the rehearsal with the options of the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="k8s/rehearse.sh")
    parser.add_argument("--overlay", choices=OVERLAYS, default="dev")
    parser.add_argument("--photos", type=Path, help="folder of photos; default: the shared photos")
    parser.add_argument("--embedded", action="store_true", help="do not use a Milvus server")
    options = parser.parse_args()
    folder = options.photos or (data_dir() or Path("missing")) / "photos" / "images"
    photos = sorted(folder.glob("*.jpg"))[:NUM_PHOTOS]
    if not photos:
        parser.error(f"no photos (*.jpg) in {folder}; name a folder with --photos")
    try:
        rehearse(options.overlay, photos, embedded=options.embedded)
    except ReirError as error:
        sys.stderr.write(f"\nfailed: {error}\n")
        return 1
    sys.stdout.write("passed\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
