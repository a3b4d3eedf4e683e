"""A damaged embedded store gives the same results as before, or an error that says what to do."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from reir.cli import main
from reir.errors import StoreDamaged
from reir.records import FloatArray, IndexedImage
from reir.store import VersionSpec
from reir.store.embedded.embedded_store import EmbeddedStore
from reir.store.embedded.lite_server import LiteServer
from reir.store.embedded.lite_server_process import ADDRESS_FILE
from reir.store.embedded.locks import is_locked
from reir.store.names import images_collection, instances_collection, live_alias

DIM = 8
SPEC = VersionSpec(dim=DIM, digest="d")
SOUND = [f"s{number}" for number in range(40)]

MakeImage = Callable[..., IndexedImage]
OpenLite = Callable[[Path], EmbeddedStore]


def query() -> FloatArray:
    return np.random.default_rng(3).standard_normal((1, DIM)).astype(np.float32)


def answers(store: EmbeddedStore, gallery: str = "g") -> dict[str, float]:
    hits = store.search(gallery, store.live_version(gallery), query(), 16_384)[0]
    return {hit.instance_id: round(hit.score, 5) for hit in hits}


def end_server(directory: Path, number: signal.Signals) -> None:
    """End the server and wait for it.

    Then Milvus Lite has its rows in Parquet files, or, if it was killed, in its log.
    """
    os.kill(json.loads((directory / ADDRESS_FILE).read_text())["pid"], number)
    deadline = time.monotonic() + 20
    while is_locked(directory / "server.lock"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def journal_of(directory: Path, gallery: str = "g") -> Path:
    return directory / "reader" / f"{instances_collection(gallery, 'v1')}.journal"


def collection_of(directory: Path, name: str) -> Path:
    return directory / "milvus" / "collections" / name


@pytest.fixture(scope="module")
def template(
    tmp_path_factory: pytest.TempPathFactory, make_image: MakeImage, open_lite: OpenLite
) -> Path:
    """A store with two galleries, whose server has ended."""
    directory = tmp_path_factory.mktemp("damage") / "store"
    store = open_lite(directory)
    for gallery in ("g", "other"):
        store.create_version(gallery, "v1", SPEC)
        store.promote(gallery, "v1")
        for first in range(0, len(SOUND), 10):
            store.upsert_images(gallery, "v1", [make_image(each) for each in SOUND[first:][:10]])
        assert len(answers(store, gallery)) == 3 * len(SOUND)
    store.close()
    end_server(directory, signal.SIGTERM)
    return directory


@pytest.fixture
def directory(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def store(directory: Path, open_lite: OpenLite) -> Iterator[EmbeddedStore]:
    store = open_lite(directory)
    yield store
    store.close()


def cut_to_half(journal: Path) -> None:
    os.truncate(journal, journal.stat().st_size // 2)


def test_a_journal_with_other_photos_is_rebuilt_with_a_warning(
    store: EmbeddedStore,
    directory: Path,
    make_image: MakeImage,
    open_lite: OpenLite,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = answers(store)
    journals, name = store._journals, instances_collection("g", "v1")
    changes: list[tuple[Callable[[], object], str]] = [
        (lambda: journals.delete(name, DIM, ["s1", "s2"]), "2 photos were missing, 0 were"),
        (lambda: journals.put(name, DIM, [make_image("s")]), "0 photos were missing, 1 were"),
        (lambda: journals.put(name, DIM, [make_image("s3", seed=1)]), "1 had other content"),
        (lambda: cut_to_half(journal_of(directory)), "journal ends at byte"),
    ]
    for change, reason in changes:
        change()
        journal_of(directory).with_suffix(".stamp").unlink()
        another = open_lite(directory)
        with caplog.at_level(logging.WARNING):
            assert another.versions("g")[0].num_instances == len(expected)
        assert answers(another) == expected
        (record,) = caplog.records
        assert record.getMessage().startswith("the search copy of version v1 of gallery g did")
        assert reason in record.getMessage()
        caplog.clear()
        another.close()


def test_instances_that_the_store_lost_are_not_missing_from_the_journal(
    store: EmbeddedStore, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise every process would rebuild it; `--verify` reports the loss."""
    expected = {key: score for key, score in answers(store).items() if not key.startswith("s3#")}
    _, instances = store._collections("g", "v1")
    instances.delete([f"s3#{number}" for number in range(3)])
    store._journals.delete(instances.name, DIM, ["s3"])
    journal_of(directory).with_suffix(".stamp").unlink()
    store._journals.close()
    assert answers(store) == expected
    assert not caplog.records


def test_repair_search_copy_compares_every_bit(
    store: EmbeddedStore, directory: Path, make_image: MakeImage
) -> None:
    expected = answers(store)
    assert store.repair_search_copy("g", "v1") == 0
    name = instances_collection("g", "v1")
    store._journals.put(name, DIM, [make_image("s3", seed=1), make_image("s7", seed=1)])
    assert answers(store) != expected
    assert store.repair_search_copy("g", "v1") == 2
    assert answers(store) == expected


def test_unfinished_photos_of_a_killed_writer_are_not_compared(
    store: EmbeddedStore, directory: Path, caplog: pytest.LogCaptureFixture, open_lite: OpenLite
) -> None:
    """They are in the journal, but not in the ledger. The next run writes them again."""
    expected = answers(store)
    ledger, _ = store._collections("g", "v1")
    (row,) = ledger.get(["s5"], ["*"]).values()
    ledger.upsert([{**row, "status": "pending"}])
    journal_of(directory).with_suffix(".stamp").unlink()
    another = open_lite(directory)
    with caplog.at_level(logging.WARNING):
        assert answers(another) == expected
        assert journal_of(directory).with_suffix(".stamp").exists(), "it was compared"
        assert another.repair_search_copy("g", "v1") == 0
    assert not caplog.records
    another.close()


def flip_the_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["rows", "schema", "ledger rows", "ledger"])
def test_a_damaged_version_is_refused_with_an_error_that_says_what_to_do(
    store: EmbeddedStore, directory: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other gallery still works, and so does the remedy that the error names."""
    ledger = collection_of(directory, images_collection("g", "v1"))
    instances = collection_of(directory, instances_collection("g", "v1"))
    if what == "ledger":
        shutil.rmtree(ledger)
    elif what == "schema":
        flip_the_middle(instances / "schema.json")
    else:
        (file,) = (instances if what == "rows" else ledger).glob("partitions/*/data/*.parquet")
        flip_the_middle(file)
    with pytest.raises(StoreDamaged) as caught:
        answers(store)
    message = str(caught.value)
    assert message.startswith(f"version v1 of gallery g in the store at {directory} is damaged: ")
    for command in ("`reir rm g`", "`reir restore BACKUP`", "`reir index SOURCE --gallery g`"):
        assert command in message
    assert "Milvus" not in message
    assert len(answers(store, "other")) == 3 * len(SOUND)
    assert main.run(["rm", "g", "--yes", "--store", str(directory)]) == 0
    assert capsys.readouterr().out == "Deleted gallery g (damaged).\n"
    assert store.galleries() == ["other"]
    store.create_version("g", "v1", SPEC)
    store.promote("g", "v1")
    assert answers(store) == {}


def test_damaged_aliases_raise_an_error_that_says_what_to_do(
    store: EmbeddedStore, directory: Path
) -> None:
    expected = answers(store)
    store.close()
    end_server(directory, signal.SIGKILL)
    aliases = directory / "milvus" / "aliases.json"
    text = aliases.read_text()
    assert live_alias("g") in text
    aliases.write_text(text.replace(live_alias("g"), live_alias("h")))
    with pytest.raises(StoreDamaged, match=r"Delete milvus/aliases\.json .*`reir promote GALLERY"):
        answers(store)
    aliases.unlink()
    aliases.with_name("aliases.json.sum").unlink()
    assert [each.name for each in store.versions("g")] == ["v1"]
    store.promote("g", "v1")
    assert answers(store) == expected


def test_the_log_of_a_killed_server_is_verified(
    store: EmbeddedStore, directory: Path, make_image: MakeImage
) -> None:
    store.upsert_images("g", "v1", [make_image("new")])
    expected = answers(store)
    store.close()
    end_server(directory, signal.SIGKILL)
    (log,) = collection_of(directory, instances_collection("g", "v1")).glob("wal/wal_data*.arrow")
    sound = log.read_bytes()
    assert answers(store) == expected
    store.close()
    end_server(directory, signal.SIGKILL)
    flip_the_middle(log)
    with pytest.raises(StoreDamaged, match=log.name):
        answers(store)
    log.write_bytes(sound)
    assert answers(store) == expected


def test_a_directory_that_was_created_again_is_served_at_once(
    store: EmbeddedStore, directory: Path, make_image: MakeImage, open_lite: OpenLite
) -> None:
    """A client of the old directory reaches it too, and the old server does not touch it."""
    assert answers(store)
    old = json.loads((directory / ADDRESS_FILE).read_text())["pid"]
    # The old server notices this, and may delete its address file at the same moment.
    shutil.rmtree(directory, ignore_errors=True)
    assert not directory.exists()
    fresh = open_lite(directory)
    fresh.create_version("g", "v1", SPEC)
    fresh.promote("g", "v1")
    fresh.upsert_images("g", "v1", [make_image("new", 2)])
    deadline = time.monotonic() + 20
    while LiteServer(directory).is_running() and _is_running(old):
        assert time.monotonic() < deadline, "the old server has not ended"
        time.sleep(0.05)
    assert json.loads((directory / ADDRESS_FILE).read_text())["pid"] != old
    assert len(answers(fresh)) == len(answers(store)) == 2
    fresh.close()


def _is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_a_lost_or_corrupt_address_file_is_restored(
    store: EmbeddedStore, directory: Path, open_lite: OpenLite
) -> None:
    expected = answers(store)
    record = directory / ADDRESS_FILE
    for harm in (record.unlink, lambda: record.write_text("{"), lambda: record.write_text("[1]")):
        harm()
        other = open_lite(directory)
        assert answers(other) == expected
        other.close()


def stamps(directory: Path) -> dict[Path, tuple[int, int]]:
    found = {path: path.stat() for path in directory.rglob("*")}
    return {path: (each.st_size, each.st_mtime_ns) for path, each in found.items()}


WITHOUT_OVERRIDE = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)  # permissions apply to root
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_read_only_store_can_be_searched(directory: Path) -> None:
    """A copy of its small files is served, and the store does not change."""
    (directory / "server.log").unlink(missing_ok=True)
    cut_to_half(journal_of(directory, "other"))
    before = stamps(directory)
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[2])\n"
        "from reir.errors import StoreError; from reir.store import open_store\n"
        "from test_damage import SPEC, answers\n"
        "store = open_store(sys.argv[1])\n"
        "print(json.dumps([answers(store), answers(store, 'other')]))\n"
        "for change in (lambda: store.create_version('new', 'v1', SPEC),\n"
        "    lambda: store.promote('g', 'v1'), lambda: store.drop_gallery('g'),\n"
        "    lambda: store.upsert_images('g', 'v1', []),\n"
        "    lambda: store.delete_images('g', 'v1', [])):\n"
        "    try: change()\n"
        "    except StoreError as error: print(error)\n"
        "store.close()\n"
    )
    for path in [directory, *directory.rglob("*")]:
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222)
    temporary = directory.parent / "tmp"
    temporary.mkdir()
    done = subprocess.run(
        [
            *(sys.executable, "-c", WITHOUT_OVERRIDE),
            *(sys.executable, "-c", code, str(directory), str(Path(__file__).parent)),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, *refusals = done.stdout.splitlines()
    of_g, of_other = json.loads(found)
    assert of_g == of_other
    assert len(of_g) == 3 * len(SOUND)
    assert "of gallery other did not match the store" in done.stderr
    wanted = f"the store at {directory} can be searched but not changed: its folder is not "
    assert [each.startswith(wanted) for each in refusals] == [True] * 5
    assert stamps(directory) == before
    assert list(temporary.glob("reir-*")) == []
