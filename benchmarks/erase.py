"""After `reir erase`, no file of the platform has anything of the photos.

    python benchmarks/erase.py                               6 minutes on two cores
    python benchmarks/erase.py --images 40 --uploads 8       a minute, to try it out

An installation is made in a new folder: photos are indexed from a list with attributes, others are
uploaded to the service, which logs searches, feedback and requests; canaries are made from the log,
the gallery is re-indexed, and a backup is written elsewhere. Then photos are erased by name, by
tenant and by attribute, with three commands. All this uses the commands and the HTTP API.

`erase.traces` counts, over all files below this folder, ids, content hashes, names, expressions,
vectors (as float32) and parts of the files of erased photos that were found. Parquet files are
searched without compression, too. The files are searched again after the same list was indexed
again, the gallery re-indexed, and the backup restored. `erase.traces_before` is the same count
before the erasure; `erase.backup_traces` is that of the backup, which keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from _indexing import copy_photos, expressions
from _report import write_report
from _traces import distinctive, find, traces_of
from fastapi.testclient import TestClient

from reir.attributes import tenant_of
from reir.cli import main as cli
from reir.config import reir_home
from reir.records import IndexedImage
from reir.store import InstanceStore, open_store
from reir_serving.backend.models import ModelCache
from reir_serving.backend.service import Service
from reir_serving.backend.workers import SearchWorkers
from reir_serving.config import ServeConfig
from reir_serving.http.app import create_app
from reir_serving.middleware.logs import open_logs

GALLERY, TENANT, PERSON = "photos", "acme", "Jane Q. Sample"
REJECTED = 3
PERIOD = 8
"""Of so many photos, one is erased by name, one by its tenant and one by an attribute."""


@dataclass(frozen=True)
class Installation:
    """The folders of an installation.

    Attributes:
        work: folder of everything.
        reindex: more options of `reir reindex`.
    """

    work: Path
    reindex: tuple[str, ...] = ()

    @property
    def config(self) -> ServeConfig:
        """Settings of the service."""
        home = reir_home()
        return ServeConfig(
            store=str(home / "store"),
            uploads=home / "uploads",
            search_log=home / "searches",
            access_log=home / "access.log",
        )

    def run(self, *words: str, allowed: Sequence[int] = (0,)) -> str:
        """Run a command; return what it prints."""
        printed = StringIO()
        with redirect_stdout(printed):
            code = cli.run([*words, "--store", self.config.store])
        if code not in allowed:
            raise SystemExit(f"reir {' '.join(words)} ended with {code}:\n{printed.getvalue()}")
        return printed.getvalue()

    def index(self) -> dict[str, Any]:
        """Index the list."""
        words = ("index", str(self.work / "list.jsonl"), "--gallery", GALLERY, "--json")
        report: dict[str, Any] = json.loads(self.run(*words))
        return report

    def reindex_all(self) -> None:
        """Re-index; whether the new version is accepted does not matter here."""
        limits = ("--limit", "min_canaries=0", "--limit", "latency_ratio=1000")
        self.run("reindex", GALLERY, *limits, *self.reindex, allowed=(0, REJECTED))


def attributes_of(number: int) -> dict[str, str]:
    return {1: {"tenant": TENANT}, 2: {"person": PERSON}}.get(number % PERIOD, {})


def write_list(installation: Installation, photos: Sequence[Path]) -> None:
    lines = [
        json.dumps({"path": str(path), **attributes_of(number)})
        for number, path in enumerate(photos)
    ]
    (installation.work / "list.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@contextmanager
def serving(installation: Installation) -> Iterator[TestClient]:
    """Run the service in this process."""
    config = installation.config
    open_logs(config.access_log)
    assert config.uploads is not None
    with closing(open_store(config.store)) as store:
        workers = SearchWorkers(store, ModelCache(), config.limits)
        app = create_app(Service(config, store, workers, config.uploads), config)
        with TestClient(app, base_url=f"http://{config.host}:{config.port}") as client:
            yield client
        app.state.app_state.search_log.close()
    open_logs(None)


def post(client: TestClient, path: str, **options: Any) -> dict[str, Any]:
    answer = client.post(path, **options)
    if not answer.is_success:
        raise SystemExit(f"POST {path}: {answer.status_code} {answer.text}")
    found: dict[str, Any] = answer.json()
    return found


def upload(client: TestClient, photos: Sequence[Path]) -> None:
    for number, path in enumerate(photos):
        post(
            client,
            f"/v1/galleries/{GALLERY}/images",
            files={"image": (path.name, path.read_bytes())},
            data={"attributes": json.dumps(attributes_of(number))},
        )


def use(client: TestClient, images: Sequence[IndexedImage], texts: Sequence[str]) -> dict[str, str]:
    """Search, look at photos, and confirm hits; return an expression for each photo with one."""
    for text in texts:
        found = post(client, "/v1/search", json={"gallery": GALLERY, "expression": text})
        for hit in found["hits"][:2]:
            client.get(hit["thumbnail_url"])
    described = {}
    for number, image in enumerate(images):
        if not image.record.num_instances:
            continue
        text = f"the red guest number {number:05} at the table"
        body = {"gallery": GALLERY, "expression": text}
        post(client, "/v1/search", json=body)
        instance_id = f"{image.record.image_id}#0"
        post(client, "/v1/feedback", json={**body, "verdict": "right", "instance_id": instance_id})
        described[image.record.image_id] = text
    return described


def images_of(store: InstanceStore) -> list[IndexedImage]:
    """Return all photos of the live version, by URI."""
    version = store.live_version(GALLERY)
    ids = [row.image_id for row in store.iter_images(GALLERY, version)]
    found = store.get_indexed(GALLERY, version, ids).values()
    return sorted(found, key=lambda image: image.record.uri)


def chosen(images: Sequence[IndexedImage]) -> dict[str, list[IndexedImage]]:
    """Return the photos to erase, by the option that selects them."""
    free = [image for image in images if not image.record.attributes]
    return {
        "photo": free[:: PERIOD - 2],
        "tenant": [each for each in images if tenant_of(each.record.attributes) == TENANT],
        "where": [each for each in images if each.record.attributes.get("person") == PERSON],
    }


def erase_all(
    installation: Installation, groups: dict[str, list[IndexedImage]]
) -> tuple[list[str], float]:
    """Erase with three commands; return the receipts, and the seconds."""
    names = [word for each in groups["photo"] for word in ("--photo", each.record.uri)]
    started_s = time.perf_counter()
    receipts = [
        json.loads(
            installation.run(
                *("erase", GALLERY, "--yes", "--json", *scope),
                *("--log", str(installation.config.access_log)),
            )
        )["receipt"]
        for scope in (names, ["--tenant", TENANT], ["--where", f'attr.person == "{PERSON}"'])
    ]
    return receipts, time.perf_counter() - started_s


def num_served(client: TestClient, gone: Sequence[IndexedImage], texts: Sequence[str]) -> int:
    """Return how many erased photos the running service still shows or finds."""
    ids = {image.record.image_id for image in gone}
    shown = [
        client.get(f"/v1/images/{each}", params={"gallery": GALLERY}).is_success for each in ids
    ]
    found = {
        hit["image_id"]
        for text in texts
        for hit in post(client, "/v1/search", json={"gallery": GALLERY, "expression": text})["hits"]
    }
    return sum(shown) + len(found & ids)


def num_findings(installation: Installation, receipts: Sequence[str]) -> int:
    return sum(
        len(
            json.loads(installation.run("erase", "--verify", each, "--json", allowed=(0, 1)))[
                "findings"
            ]
        )
        for each in receipts
    )


def measure(
    installation: Installation, photos: Sequence[Path], num_uploads: int, texts: Sequence[str]
) -> dict[str, Any]:
    """Make an installation, erase, and return the figures; `$REIR_HOME` is a new folder."""
    home, backup = reir_home(), installation.work / "backup"
    write_list(installation, photos[num_uploads:])
    installation.index()
    with serving(installation) as client:
        upload(client, photos[:num_uploads])
        with closing(open_store(installation.config.store)) as store:
            images = images_of(store)
        described = use(client, images, texts)
        installation.run("canary", "make", GALLERY)
        installation.reindex_all()
        installation.run("backup", GALLERY, str(backup))
        groups = chosen(images)
        gone = [image for group in groups.values() for image in group]
        ids = {image.record.image_id for image in gone}
        traces = {
            each.record.image_id: [*traces_of(each, described.get(each.record.image_id, ""))]
            for each in images
        }
        wanted = distinctive(
            (trace for key in ids for trace in traces[key]),
            (trace for key in traces.keys() - ids for trace in traces[key]),
        )
        before = find(home, wanted)
        receipts, seconds = erase_all(installation, groups)
        served = num_served(client, gone, texts)
    after = find(home, wanted)
    again = installation.index()
    installation.reindex_all()
    restored = json.loads(installation.run("restore", str(backup), "--json"))
    later = find(home, wanted)
    for path, trace in [*after, *later]:
        print(f"{path.relative_to(home)}: {trace.kind} of {trace.image_id}")
    with closing(open_store(installation.config.store)) as store:
        left = {image.record.image_id for image in images_of(store)}
    return {
        "erase.photos": len(photos),
        "erase.erased": len(gone),
        **{f"erase.by_{kind}": len(group) for kind, group in groups.items()},
        "erase.files": sum(path.is_file() for path in home.rglob("*")),
        **{
            f"erase.before_{kind.replace(' ', '_')}": count
            for kind, count in Counter(trace.kind for _, trace in before).items()
        },
        "erase.traces_before": len(before),
        "erase.traces": len(after) + len(later),
        "erase.served": served,
        "erase.came_back": len(left & ids),
        "erase.kept_lost": len(traces.keys() - ids - left),
        "erase.left_out_by_index": again["erased"],
        "erase.left_out_by_restore": restored["erased"],
        "erase.findings": num_findings(installation, receipts),
        "erase.backup_traces": len(find(backup, wanted)),
        "erase.seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=400, help="Photos in the gallery.")
    parser.add_argument("--uploads", type=int, default=80, help="So many of them are uploaded.")
    parser.add_argument("--searches", type=int, default=60, help="Expressions of the search log.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ["REIR_HOME"] = str(work / "home")
        photos = sorted(copy_photos(work / "photos", arguments.images).iterdir())
        texts = expressions(arguments.searches)
        figures = measure(Installation(work), photos, arguments.uploads, texts)
    for key, value in figures.items():
        print(f"{key:28} {value}")
    write_report("erase", figures)


if __name__ == "__main__":
    main()
