"""`--verify` finds every kind of difference, changes nothing, and names what repair_commands it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from reir.cli import main
from reir.images.decode import canonical_uri, image_id
from reir.store import InstanceStore, open_store
from reir.store.embedded.embedded_store import EmbeddedStore
from reir.store.memory import MemoryStore
from reir.store.names import instances_collection
from reir_ingestion.pipeline import IndexOptions, index
from reir_ingestion.sources import local, open_source
from reir_ingestion.sources.contract import ABSENT_FILE, FileStatus
from reir_ingestion.sources.local import status_of_file
from reir_ingestion.verify import DIFFERENCES, VerifyReport, verify
from reir_testing import FakeEncoder
from reir_testing.ingestion import stored_rows, write_scenes


def compared(store: InstanceStore, folder: Path) -> VerifyReport:
    return verify(open_source(folder), "g", store, store.live_version("g"))


def differences(store: InstanceStore, folder: Path) -> dict[str, int]:
    """Those that are not 0; and nothing has changed by looking."""
    before = stored_rows(store, "g")
    report = compared(store, folder)
    assert stored_rows(store, "g") == before
    assert list(report.differences) == list(DIFFERENCES)
    assert report.is_consistent == (not any(report.differences.values()))
    return {kind: count for kind, count in report.differences.items() if count}


def test_differences_of_source_and_ledger(any_store: InstanceStore, photos: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"x")
    (photos / "link.jpg").symlink_to("gone")
    (photos / "copy.png").write_bytes((photos / "000.png").read_bytes())
    options = IndexOptions(batch_size=8)
    index(photos, "g", any_store, FakeEncoder(), options=options)
    assert differences(any_store, photos) == {}
    report = compared(any_store, photos)
    assert (report.listed, report.num_images, report.failed) == (23, 23, 2)
    (info,) = any_store.versions("g")
    assert report.num_instances == info.num_instances
    gone, changed, touched = sorted(photos.glob("0*"))[:3]
    gone.unlink()
    changed.write_bytes(b"other")
    os.utime(touched, ns=(1, 10**18))
    write_scenes(photos / "more", 3, seed=8)
    assert differences(any_store, photos) == {"new": 3, "changed": 2, "gone": 1}
    report = compared(any_store, photos)
    assert report.examples["gone"] == [canonical_uri(gone)]
    assert list(report.repair_commands("photos")) == [
        "reir index photos --gallery g",
        "reir index photos --gallery g --prune",
    ]
    index(photos, "g", any_store, FakeEncoder(), options=IndexOptions(prune=True))
    assert differences(any_store, photos) == {}


@pytest.mark.parametrize("seen", [ABSENT_FILE, FileStatus(7, 7)], ids=["gone", "half written"])
def test_a_file_that_was_incomplete_when_listed_is_indexed_again_by_the_next_run(
    store: MemoryStore, photos: Path, monkeypatch: pytest.MonkeyPatch, seen: FileStatus
) -> None:
    odd = photos / "003.jpg"

    def status(path: bytes) -> FileStatus:
        return seen if os.fsdecode(path) == str(odd) else status_of_file(path)

    with monkeypatch.context() as patch:
        patch.setattr(local, "status_of_file", status)
        assert index(photos, "g", store, FakeEncoder()).new == 20
    assert differences(store, photos) == {"changed": 1}
    assert list(compared(store, photos).repair_commands("p")) == ["reir index p --gallery g"]
    assert index(photos, "g", store, FakeEncoder()).num_failed == 0
    assert differences(store, photos) == {}
    assert index(photos, "g", store, FakeEncoder()).read == 0


@pytest.fixture
def lite(tmp_path: Path, photos: Path) -> EmbeddedStore:
    store = open_store(str(tmp_path / "store"))
    assert isinstance(store, EmbeddedStore)
    (photos / "copy.png").write_bytes((photos / "000.png").read_bytes())
    index(photos, "g", store, FakeEncoder())
    return store


def key_of(path: Path) -> str:
    return image_id(canonical_uri(path))


def test_lost_instances_are_found_and_repaired(lite: EmbeddedStore, photos: Path) -> None:
    expected = stored_rows(lite, "g")
    _, instances = lite._collections("g", lite.live_version("g"))
    instances.delete([f"{key_of(photos / '003.jpg')}#0", f"{key_of(photos / '004.png')}#0"])
    report = compared(lite, photos)
    assert report.differences["damaged"] == 2
    assert report.differences["orphans"] == 0
    assert list(report.repair_commands("a b", " --store x")) == [
        "reir index 'a b' --gallery g --store x --repair"
    ]
    repaired = index(photos, "g", lite, FakeEncoder(), options=IndexOptions(repair=True))
    assert (repaired.new, repaired.unchanged) == (2, 19)
    assert differences(lite, photos) == {}
    assert stored_rows(lite, "g") == expected
    lite.close()


def test_the_search_copy_is_compared_and_repaired(
    lite: EmbeddedStore, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = lite.live_version("g")
    (image,) = lite.get_indexed("g", version, [key_of(photos / "003.jpg")]).values()
    assert image.instances is not None
    image.instances.vectors[0] *= -1
    lite._journals.put(instances_collection("g", version), image.instances.dim, [image])
    report = compared(lite, photos)
    assert (report.repaired, report.is_consistent) == (1, True)
    assert compared(lite, photos).repaired == 0
    lite._journals.put(instances_collection("g", version), image.instances.dim, [image])
    command = ["index", str(photos), "--gallery", "g", "--verify"]
    assert main.run([*command, "--store", lite._connection.address]) == 0
    assert "images that differed in the copy for searches" in capsys.readouterr().out
    lite.close()


def test_a_duplicate_without_its_holder_is_damaged(lite: EmbeddedStore, photos: Path) -> None:
    lite.delete_images("g", lite.live_version("g"), [key_of(photos / "000.png")])
    assert differences(lite, photos) == {"new": 1, "damaged": 1}
    index(photos, "g", lite, FakeEncoder(), options=IndexOptions(repair=True))
    assert differences(lite, photos) == {}
    lite.close()


def test_orphans_are_counted(lite: EmbeddedStore, photos: Path) -> None:
    _, instances = lite._collections("g", lite.live_version("g"))
    (row,) = instances.get([f"{key_of(photos / '003.jpg')}#0"], ["*"]).values()
    instances.upsert([{**row, "instance_id": "0" * 20 + "#0", "image_id": "0" * 20}])
    assert differences(lite, photos) == {"orphans": 1}
    assert list(compared(lite, photos).repair_commands("p")) == [
        "reir rm g && reir index p --gallery g"
    ]
    lite.close()


def test_an_interrupted_first_write_is_found_and_repaired(
    lite: EmbeddedStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = write_scenes(photos.parent / "other", 2, seed=9)
    here = [path.rename(photos / f"new {path.name}") for path in new]
    ledger, _ = lite._collections("g", lite.live_version("g"))
    upsert = type(ledger).upsert
    calls: list[int] = []

    def die_before_the_last(self: object, rows: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        upsert(self, rows)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(ledger), "upsert", die_before_the_last)
        with pytest.raises(KeyboardInterrupt):
            index(photos, "g", lite, FakeEncoder())
    found = differences(lite, photos)
    orphans = found.pop("orphans")
    assert found == {"new": 2, "unfinished": 2}
    assert orphans > 0
    assert list(compared(lite, photos).repair_commands("p")) == ["reir index p --gallery g"]
    here[0].unlink()
    report = index(photos, "g", lite, FakeEncoder())
    assert (report.new, report.missing, report.removed) == (1, 0, 0)
    assert differences(lite, photos) == {}
    lite.close()


def test_the_command_prints_differences_and_exits_with_1(
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REIR_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _: FakeEncoder())
    assert main.run(["index", str(photos), "--gallery", "g"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("reir.checkpoint.load_encoder", lambda _: pytest.fail("not needed"))
    assert main.run(["index", str(photos), "--gallery", "g", "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_consistent"] is True
    sorted(photos.iterdir())[0].unlink()
    assert main.run(["index", str(photos), "--gallery", "g", "--verify"]) == 1
    shown = capsys.readouterr().out
    assert "gone: " in shown
    assert f"To repair:  reir index {photos} --gallery g" in shown
    assert "--prune" in shown
    assert main.run(["index", str(photos), "--gallery", "none", "--verify"]) == 1
    assert "no gallery 'none'" in capsys.readouterr().err
