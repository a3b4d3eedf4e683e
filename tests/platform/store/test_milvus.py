"""An embedded store with crashes, killed processes and several processes at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reir.errors import StoreError
from reir.records import FloatArray, IndexedImage
from reir.store import InstanceStore, VersionSpec
from reir.store.client import MilvusConnection
from reir.store.embedded.embedded_store import EmbeddedStore
from reir.store.embedded.lite_server import LiteServer
from reir.store.embedded.version_journals import VersionJournals
from reir.store.memory import MemoryStore

DIM = 8
SPEC = VersionSpec(dim=DIM, digest="d")

MakeImage = Callable[..., IndexedImage]
OpenLite = Callable[[Path], EmbeddedStore]


def query() -> FloatArray:
    return np.random.default_rng(3).standard_normal((1, DIM)).astype(np.float32)


def state(store: InstanceStore, gallery: str = "g") -> dict[str, object]:
    """Everything that a user can see of version v1."""
    records = list(store.iter_images(gallery, "v1"))
    ids = [record.image_id for record in records]
    instances = store.get_instances(gallery, "v1", ids, with_vectors=True)
    hits = store.search(gallery, "v1", query(), 16_384)[0]
    return {
        "records": records,
        "vectors": {
            row.instance_id: row.vector.tobytes()
            for rows in instances.values()
            for row in rows
            if row.vector is not None
        },
        "hits": sorted((hit.instance_id, round(hit.score, 4)) for hit in hits),
        "counts": [
            (info.num_images, info.num_failed, info.num_instances)
            for info in store.versions(gallery)
        ],
    }


def expected(images: Sequence[IndexedImage], deleted: Sequence[str] = ()) -> dict[str, object]:
    twin = MemoryStore()
    twin.create_version("g", "v1", SPEC)
    twin.upsert_images("g", "v1", images)
    twin.delete_images("g", "v1", deleted)
    return state(twin)


@pytest.fixture
def store(lite_store: EmbeddedStore) -> Iterator[EmbeddedStore]:
    """The embedded store that the tests share, with an empty version of gallery g."""
    lite_store.create_version("g", "v1", SPEC)
    yield lite_store
    lite_store.drop_gallery("g")


class CrashError(Exception):
    """Simulates the end of the process."""


class DyingConnection(MilvusConnection):
    """Crashes before one of its write calls."""

    calls_left = 0

    def call(self, method: str, **arguments: Any) -> Any:
        if method in ("upsert", "delete"):
            if not self.calls_left:
                raise CrashError(method)
            self.calls_left -= 1
        return super().call(method, **arguments)


class DyingJournals(VersionJournals):
    """Crashes before it appends to a journal."""

    def _append(self, *_: object) -> None:
        raise CrashError("journal")


@pytest.mark.parametrize("calls_left", [0, 1, 2, 3, None], ids=str)
@pytest.mark.parametrize(("before", "during", "after"), [(0, 6, 2), (3, 6, 2), (6, 2, 4)])
def test_a_rerun_repairs_a_write_that_crashed(
    store: EmbeddedStore,
    make_image: MakeImage,
    calls_left: int | None,
    before: int,
    during: int,
    after: int,
) -> None:
    """The writer crashes at each step of a batch; before the rerun, the photo changes again."""
    directory = store._connection.address
    if before:
        store.upsert_images("g", "v1", [make_image("a", before), make_image("b", 1)])
    dying = DyingConnection(LiteServer(Path(directory), idle_s=1.0))
    journals = (DyingJournals if calls_left is None else VersionJournals)(
        Path(directory) / "reader"
    )
    dying.calls_left = 99 if calls_left is None else calls_left
    try:
        batch = [make_image("a", during, seed=1), make_image("b", 2, seed=1)]
        EmbeddedStore(dying, journals).upsert_images("g", "v1", batch)
    except CrashError:
        seen = {record.image_id for record in store.iter_images("g", "v1")}
        assert seen == ({"a", "b"} if before else set())
    dying.close()
    batch = [make_image("a", after, seed=2), make_image("b", 1, seed=2)]
    store.upsert_images("g", "v1", batch)
    assert state(store) == expected(batch)


@pytest.mark.parametrize("calls_left", [0, 1])
def test_a_second_delete_completes_one_that_crashed(
    store: EmbeddedStore, make_image: MakeImage, calls_left: int
) -> None:
    images = [make_image("a", 4), make_image("b", 3)]
    store.upsert_images("g", "v1", images)
    directory = Path(store._connection.address)
    dying = DyingConnection(LiteServer(directory, idle_s=1.0))
    dying.calls_left = calls_left
    with pytest.raises(CrashError):
        EmbeddedStore(dying, VersionJournals(directory / "reader")).delete_images("g", "v1", ["a"])
    dying.close()
    assert store.delete_images("g", "v1", ["a"]) == 1
    assert state(store) == expected(images, deleted=["a"])


def test_a_new_image_is_not_listed_before_it_is_complete(
    store: EmbeddedStore, make_image: MakeImage
) -> None:
    directory = Path(store._connection.address)
    dying = DyingConnection(LiteServer(directory, idle_s=1.0))
    dying.calls_left = 2
    with pytest.raises(CrashError):
        EmbeddedStore(dying, DyingJournals(directory / "reader")).upsert_images(
            "g", "v1", [make_image("a")]
        )
    dying.close()
    assert store.get_images("g", "v1", ["a"]) == {}
    assert store.get_instances("g", "v1", ["a"]) == {}
    assert list(store.iter_images("g", "v1")) == []
    assert store.delete_images("g", "v1", ["a"]) == 0
    assert state(store) == expected([])


_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from conftest import _make_image, _open_lite
store = _open_lite(Path(sys.argv[1]))
for batch in range(int(sys.argv[3])):
    images = [_make_image(f"{batch:03}-{n}", 1 + (batch + n) % 5) for n in range(8)]
    store.upsert_images("g", "v1", images)
    print(batch, flush=True)
    if sys.argv[4] == "wait":
        sys.stdin.readline()
store.close()
"""


def writer(directory: str, batches: int, pace: str) -> subprocess.Popen[str]:
    here = str(Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, directory, here, str(batches), pace],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def written(make_image: MakeImage, batches: int) -> list[IndexedImage]:
    return [
        make_image(f"{batch:03}-{n}", 1 + (batch + n) % 5)
        for batch in range(batches)
        for n in range(8)
    ]


def test_another_process_sees_each_write_once_it_is_acknowledged(
    store: EmbeddedStore, make_image: MakeImage
) -> None:
    assert store.search("g", "v1", query(), 5) == [[]]
    with writer(store._connection.address, 5, "wait") as process:
        assert process.stdout is not None
        assert process.stdin is not None
        for line in process.stdout:
            assert state(store) == expected(written(make_image, int(line) + 1))
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert int(line) == 4


def test_killing_the_writer_loses_and_duplicates_nothing(
    store: EmbeddedStore, make_image: MakeImage
) -> None:
    """Three kills at random moments, each followed by the next run of the same batches."""
    rng = np.random.default_rng(7)
    batches = 12
    for _ in range(3):
        with writer(store._connection.address, batches, "run") as process:
            assert process.stdout is not None
            acknowledged = int(process.stdout.readline())
            time.sleep(float(rng.uniform(0, 0.25)))
            process.kill()
            acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
        ids = [image.record.image_id for image in written(make_image, acknowledged + 1)]
        assert list(store.get_images("g", "v1", ids)) == ids
    with writer(store._connection.address, batches, "run") as process:
        assert process.wait(timeout=60) == 0
    assert state(store) == expected(written(make_image, batches))


def test_a_killed_server_is_started_again_by_the_next_call(
    tmp_path: Path, open_lite: OpenLite, make_image: MakeImage
) -> None:
    store = open_lite(tmp_path)
    store.create_version("g", "v1", SPEC)
    images = [make_image("a", 3), make_image("b", 2)]
    for image in images:
        store.upsert_images("g", "v1", [image])
        record = json.loads((tmp_path / "server.json").read_text())
        os.kill(record["pid"], signal.SIGKILL)
    store.promote("g", "v1")
    assert store.live_version("g") == "v1"
    assert state(store) == expected(images)
    store.close()


def test_threads_that_share_a_store_survive_the_kill_of_its_server(
    tmp_path: Path, open_lite: OpenLite, make_image: MakeImage
) -> None:
    store = open_lite(tmp_path)
    store.create_version("g", "v1", SPEC)
    store.upsert_images("g", "v1", [make_image("a", 3)])

    def read(_: int) -> int:
        found = store.get_instances("g", "v1", ["a"])["a"]
        return len(found) + len(store.search("g", "v1", query(), 9)[0])

    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(read, range(400))
        os.kill(json.loads((tmp_path / "server.json").read_text())["pid"], signal.SIGKILL)
        assert set(answers) == {6}
    store.close()


def test_a_search_sees_either_the_old_or_the_new_photo(
    store: EmbeddedStore, make_image: MakeImage, open_lite: OpenLite
) -> None:
    """Another store object replaces the photo again and again meanwhile."""
    states = [make_image("a", 2 + 3 * n, seed=n, attributes={"n": n}) for n in range(2)]
    store.upsert_images("g", "v1", [make_image("b", 4), states[0]])
    wanted = [
        {(f"a#{number}", n) for number in range(image.record.num_instances)}
        for n, image in enumerate(states)
    ]
    writer = open_lite(Path(store._connection.address))

    def replace() -> None:
        for n in range(1, 40):
            writer.upsert_images("g", "v1", [states[n % 2]])

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(replace)
        searches = 0
        while not writing.done():
            (hits,) = store.search("g", "v1", query(), 99, where='image_id == "a"')
            assert {(hit.instance_id, hit.attributes["n"]) for hit in hits} in wanted
            searches += 1
        writing.result()
    assert searches > 20
    writer.close()


@pytest.mark.parametrize("harm", ["missing", "damaged", "rows missing", "rows damaged"])
@pytest.mark.parametrize("by", ["reader", "writer"])
def test_a_missing_or_damaged_journal_is_rebuilt(
    store: EmbeddedStore, make_image: MakeImage, harm: str, by: str
) -> None:
    images = [make_image("a", 3, attributes={"k": 1}), make_image("b", 2), make_image("c", 0)]
    store.upsert_images("g", "v1", images[:2])
    journal = Path(store._connection.address) / "reader" / "g__v1__instances.journal"
    (rows,) = journal.parent.glob("g__v1__instances.*.rows")
    harmed = rows if harm.startswith("rows") else journal
    if harm.endswith("missing"):
        harmed.unlink()
    else:
        data = bytearray(harmed.read_bytes())
        data[0] ^= 0xFF
        harmed.write_bytes(data)
    store._journals.close()  # so that the store opens the journal again, as another process would
    if by == "reader":
        assert len(store.search("g", "v1", query(), 9)[0]) == 5
    store.upsert_images("g", "v1", images[2:])
    assert state(store) == expected(images)
    assert len(store.search("g", "v1", query(), 9, where="attr.k == 1")[0]) == 3
    assert journal.exists()


def test_a_refusal_by_milvus_raises_a_store_error(
    store: EmbeddedStore, make_image: MakeImage
) -> None:
    with pytest.raises(StoreError, match="refused upsert"):
        store.upsert_images("g", "v1", [make_image("x" * 2000)])


def test_a_gallery_has_a_live_version_at_every_moment_of_a_switch(
    store: EmbeddedStore, make_image: MakeImage
) -> None:
    """Another process reads the live version while two versions are promoted in turn."""
    store.create_version("g", "v2", SPEC)
    store.promote("g", "v1")
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from conftest import _open_lite; store = _open_lite(Path(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "print(*(store.live_version('g') for _ in range(300)))\n"
    )
    here = str(Path(__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-c", code, store._connection.address, here],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        switches = 0
        while process.poll() is None:
            store.promote("g", ("v2", "v1")[switches % 2])
            switches += 1
        seen = process.stdout.read().split()
    assert len(seen) == 300
    assert set(seen) <= {"v1", "v2"}
    assert switches > 5
