"""After an erasure, nothing of the photo is left, wherever it was kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from reir.errors import ConfigError, DataError, FilterError
from reir.images.decode import canonical_uri, image_id
from reir.operations.canary import Canary, add_canaries, canaries_of
from reir.operations.erase import erase as module
from reir.operations.erase import receipts
from reir.operations.erase.erase import KIND, erase
from reir.operations.erase.places import ErasedNames, ErasePlaces, erase_log_lines
from reir.operations.erase.receipts import Receipt, read_receipt, write_receipt
from reir.operations.erase.selection import EraseScope
from reir.operations.erase.tombstones import Tombstones
from reir.operations.erase.verify import verify_receipt
from reir.operations.gate.page import report_page
from reir.operations.gate.verdicts import CanaryChange, GateReport
from reir.records import Attributes, ImageRecord, IndexedImage
from reir.store import InstanceStore, VersionSpec, open_store
from reir_testing import FakeEncoder, draw_scene

G = "photos"
SCENES = {
    "party.jpg": [("red", (10, 10, 40, 90))],
    "mug.jpg": [("blue", (10, 10, 40, 90)), ("green", (60, 10, 90, 90))],
    "dog.jpg": [("yellow", (30, 10, 70, 90))],
}


def uri(name: str) -> str:
    return f"file:///home/me/{name}"


def photo(
    name: str,
    scene: str = "",
    *,
    attributes: Attributes | None = None,
    same_as: str = "",
    location: str = "",
) -> IndexedImage:
    (instances,) = FakeEncoder().encode_images([draw_scene((100, 100), SCENES[scene or name])])
    place = location or uri(name)
    record = ImageRecord(
        image_id=image_id(place),
        uri=place,
        status="indexed",
        content_hash=image_id(f"content of {scene or name}") * 3,
        num_instances=0 if same_as else len(instances),
        attributes=attributes or {},
        same_as=same_as,
    )
    return IndexedImage(record, None if same_as else instances)


def fill(store: InstanceStore, *versions: str) -> None:
    encoder = FakeEncoder()
    for version in versions:
        store.create_version(G, version, VersionSpec(dim=encoder.dim, digest=encoder.digest))
        store.upsert_images(G, version, [photo(name) for name in SCENES])
    store.promote(G, versions[-1])


@pytest.fixture(params=["memory", "embedded"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InstanceStore]:
    location = "memory:" if request.param == "memory" else str(tmp_path / "store")
    with closing(open_store(location)) as opened:
        fill(opened, "v1", "v2")
        yield opened


@pytest.fixture
def places(tmp_path: Path) -> ErasePlaces:
    return ErasePlaces(
        uploads=tmp_path / "uploads",
        search_log=tmp_path / "searches",
        reports=tmp_path / "reports",
    )


def run(store: InstanceStore, places: ErasePlaces, **scope: object) -> Receipt:
    return erase(store, G, EraseScope(**scope), places, settle_s=0)  # type: ignore[arg-type]


def names_in(store: InstanceStore, version: str) -> set[str]:
    return {row.uri.rpartition("/")[2] for row in store.iter_images(G, version)}


# -------------------------------------------------------------------------------- what is erased


@pytest.mark.parametrize(
    "name", ["/home/me/party.jpg", uri("party.jpg"), image_id(uri("party.jpg"))]
)
def test_a_photo_is_erased_from_all_versions(
    store: InstanceStore, places: ErasePlaces, name: str
) -> None:
    receipt = run(store, places, photos=(name,))
    assert (receipt.photos, receipt.instances) == ({"v1": 1, "v2": 1}, {"v1": 1, "v2": 1})
    assert receipt.is_gone_from_disk
    for version in ("v1", "v2"):
        assert names_in(store, version) == {"mug.jpg", "dog.jpg"}
        assert store.num_stored(G, version) == 3
    query = FakeEncoder().encode_expressions(["the red one"])
    assert "party" not in str(store.search(G, "v2", query, 10))
    assert store.find_documents(KIND) == {}


def test_copies_with_the_same_content_are_erased_too(
    store: InstanceStore, places: ErasePlaces
) -> None:
    copy = photo("copy.jpg", "party.jpg", same_as=image_id(uri("party.jpg")))
    store.upsert_images(G, "v2", [copy])
    receipt = run(store, places, photos=(uri("copy.jpg"),))
    assert receipt.photos == {"v1": 1, "v2": 2}
    assert names_in(store, "v2") == {"mug.jpg", "dog.jpg"}


def test_the_same_picture_of_another_tenant_stays(
    store: InstanceStore, places: ErasePlaces
) -> None:
    theirs = photo("theirs.jpg", "party.jpg", attributes={"tenant": "b"})
    ours = photo("ours.jpg", "party.jpg", attributes={"tenant": "a"})
    store.upsert_images(G, "v2", [theirs, ours])
    receipt = run(store, places, tenant="a")
    assert receipt.photos == {"v1": 0, "v2": 1}
    assert names_in(store, "v2") == {*SCENES, "theirs.jpg"}
    assert not Tombstones(store, G).covers(theirs.record)
    assert Tombstones(store, G).covers(ours.record)


def test_photos_are_chosen_by_their_attributes(store: InstanceStore, places: ErasePlaces) -> None:
    for number, who in enumerate(["J. Doe", "M. Roe", "J. Doe"]):
        one = photo(f"{number}.jpg", "dog.jpg", attributes={"person": who})
        store.upsert_images(G, "v2", [replace(one, record=replace(one.record, content_hash=who))])
    receipt = run(store, places, where='attr.person == "J. Doe"')
    assert receipt.photos == {"v1": 0, "v2": 2}
    assert names_in(store, "v2") == {*SCENES, "1.jpg"}


def test_what_is_not_there_is_an_error(store: InstanceStore, places: ErasePlaces) -> None:
    with pytest.raises(DataError, match="no photo of gallery 'photos' fits --photo"):
        run(store, places, photos=("/home/me/none.jpg",))
    with pytest.raises(FilterError, match="names area, which belongs to instances"):
        run(store, places, where="area > 0.5")
    with pytest.raises(ConfigError, match="exactly one of them is needed, got 0"):
        EraseScope()
    with pytest.raises(ConfigError, match="got 2"):
        EraseScope(photos=("a",), tenant="b")
    assert names_in(store, "v2") == {*SCENES}


# ---------------------------------------------------------------------------------- other places


def test_canaries_sources_and_reports_are_cleaned(
    store: InstanceStore, places: ErasePlaces
) -> None:
    kept = Canary(expression="the blue one", uri=uri("mug.jpg"))
    add_canaries(store, G, [Canary(expression="the red one", uri=uri("party.jpg")), kept])
    store.put_document("source", f"{G}/1", {"text": "/home/me/party.jpg", "indexed_s": 1})
    store.put_document("source", f"{G}/2", {"text": "/home/me", "indexed_s": 1})
    changes = [
        CanaryChange(
            expression=f"the {name}",
            uri=uri(name),
            box=(0.1, 0.1, 0.5, 0.5),
            live_rank=1,
            candidate_rank=0,
            wrong_uri=uri(wrong),
            wrong_box=(0.1, 0.1, 0.5, 0.5),
        )
        for name, wrong in [
            ("party.jpg", "dog.jpg"),
            ("mug.jpg", "dog.jpg"),
            ("dog.jpg", "party.jpg"),
        ]
    ]
    report = GateReport(
        gallery=G,
        live="v1",
        candidate="v2",
        created_s=1.0,
        checks=(),
        num_lost=3,
        lost=tuple(changes),
    )
    store.put_document("reindex-report", f"{G}/v2", report.to_dict())
    folder = places.reports / "one"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report.to_dict()))
    (folder / "report.html").write_text(report_page(report))
    assert "party" in (folder / "report.html").read_text()
    receipt = run(store, places, photos=(uri("party.jpg"),))
    assert (receipt.canaries, receipt.sources, receipt.reports) == (1, 1, 2)
    assert canaries_of(store, G) == [kept]
    assert [each["text"] for each in store.find_documents("source").values()] == ["/home/me"]
    (left,) = store.find_documents("reindex-report").values()
    assert [each["uri"] for each in left["lost"]] == [uri("mug.jpg")]
    assert "party" not in (folder / "report.html").read_text()
    assert "party" not in (folder / "report.json").read_text()
    assert "mug" in (folder / "report.html").read_text()


def test_uploads_are_deleted_and_other_files_are_not(
    store: InstanceStore, places: ErasePlaces, tmp_path: Path
) -> None:
    upload = places.uploads / G / "0123" / "up.jpg"
    outside = tmp_path / "mine.jpg"
    upload.parent.mkdir(parents=True)
    for path, scene in ((upload, "dog.jpg"), (outside, "mug.jpg")):
        path.write_bytes(b"jpeg")
        store.upsert_images(G, "v2", [photo(path.name, scene, location=canonical_uri(path))])
    receipt = run(store, places, photos=(str(upload), str(outside)))
    assert receipt.uploads == 1
    assert not upload.parent.exists()
    assert outside.exists()


def test_lines_of_a_log_are_overwritten_while_it_is_written(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    names = ErasedNames(frozenset({"abc"}), frozenset({"file:///home/me/a%20b.jpg"}))
    with log.open("ab", buffering=0) as server:
        server.write(b'{"image": "abc"}\n{"image": "xyz"}\nread /home/me/a b.jpg\n')
        server.write(b"get file:///home/me/a%20b.jpg\nlast line of abc")
        assert erase_log_lines(log, names) == 4
        server.write(b"\nnew\n")
    assert [line.strip() for line in log.read_text().splitlines()] == [
        "",
        '{"image": "xyz"}',
        "",
        "",
        "",
        "new",
    ]


def test_nothing_is_left_in_any_file(tmp_path: Path, places: ErasePlaces) -> None:
    """The ids, URIs, vectors and expressions of a photo, in all files of an embedded store."""
    folder = tmp_path / "store"
    gone = photo("party.jpg")
    assert gone.instances is not None
    traces = [
        b"party",
        gone.record.image_id.encode(),
        gone.record.content_hash.encode(),
        gone.instances.vectors[0].tobytes(),
        b"a birthday guest",
    ]

    def files_with(text: bytes) -> list[str]:
        files = (path for path in tmp_path.rglob("*") if path.is_file())
        return [str(path.relative_to(tmp_path)) for path in files if text in path.read_bytes()]

    with closing(open_store(str(folder))) as store:
        fill(store, "v1", "v2")
        store.upsert_images(G, "v2", [replace(gone, record=replace(gone.record, mtime_ns=5))])
        add_canaries(store, G, [Canary(expression="a birthday guest", uri=uri("party.jpg"))])
        assert all(files_with(trace) for trace in traces)
        receipt = run(store, places, photos=(uri("party.jpg"),))
        write_receipt(tmp_path / "receipt.json", receipt)
        assert {trace: files_with(trace) for trace in traces} == {trace: [] for trace in traces}
        assert files_with(b"mug")


# ------------------------------------------------------------------------------------- receipts


def findings(store: InstanceStore, receipt: Receipt, places: ErasePlaces) -> list[str]:
    return [each.what for each in verify_receipt(store, receipt, places)]


def test_a_receipt_can_be_verified(
    store: InstanceStore, places: ErasePlaces, tmp_path: Path
) -> None:
    receipt = run(store, places, photos=(uri("party.jpg"),))
    path = tmp_path / "receipts" / "one.json"
    write_receipt(path, receipt)
    assert read_receipt(path) == receipt
    assert findings(store, read_receipt(path), places) == []
    store.upsert_images(G, "v1", [photo("party.jpg")])
    (found,) = findings(store, receipt, places)
    assert found.startswith("version v1 has photo")
    store.delete_images(G, "v1", [image_id(uri("party.jpg"))])
    store.upsert_images(G, "v1", [photo("renamed.jpg", "party.jpg")])
    assert len(findings(store, receipt, places)) == 1, "the content is known, too"


def test_what_comes_back_in_other_places_is_found(
    store: InstanceStore, places: ErasePlaces
) -> None:
    receipt = run(store, places, photos=(uri("party.jpg"),))
    add_canaries(store, G, [Canary(expression="the red one", uri=uri("party.jpg"))])
    assert findings(store, receipt, places) == ["the canary 'the red one' names the photo"]


def test_receipts_form_a_chain(store: InstanceStore, places: ErasePlaces) -> None:
    first = run(store, places, photos=(uri("party.jpg"),))
    second = run(store, places, photos=(uri("mug.jpg"),))
    assert (first.number, first.previous, second.number) == (0, "", 1)
    assert second.previous == first.hash
    assert findings(store, first, places) == findings(store, second, places) == []
    changed = replace(first, photos={"v1": 0, "v2": 0})
    assert findings(store, changed, places) == [
        "the receipt was changed: it does not have its own hash"
    ]
    shorter = replace(first, hashes=first.hashes[1:])
    assert "list of hashes is not complete" in findings(store, shorter, places)[0]
    store.delete_documents(receipts.KIND, ["00000000"])
    assert findings(store, second, places) == ["the chain of receipts is broken at number 0"]
    assert "the store does not know the receipt" in findings(store, first, places)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 2}', "\udcff"])
def test_other_files_are_not_receipts(tmp_path: Path, text: str) -> None:
    path = tmp_path / "receipt.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match="is not a receipt"):
        read_receipt(path)


def test_a_large_erasure_has_one_receipt(
    store: InstanceStore, places: ErasePlaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PART_PHOTOS", 7)
    monkeypatch.setattr(receipts, "MAX_KEPT_HASHES", 10)
    for n in range(40):
        one = photo(f"{n}.jpg", "dog.jpg", attributes={"tenant": "a"})
        hashed = replace(one.record, content_hash=f"{n:064x}")
        store.upsert_images(G, "v2", [replace(one, record=hashed)])
    receipt = run(store, places, tenant="a")
    assert receipt.photos == {"v1": 0, "v2": 40}
    assert len(receipt.hashes) == 80
    assert findings(store, receipt, places) == []
    store.upsert_images(G, "v2", [photo("39.jpg", "dog.jpg")])
    assert len(findings(store, receipt, places)) == 1


# --------------------------------------------------------------------------------- interruptions

KILL = """
import sys, os
from pathlib import Path
from reir.operations.erase.erase import erase
from reir.operations.erase.places import ErasePlaces
from reir.operations.erase.selection import EraseScope
from reir.store import open_store
folder, step, uri = sys.argv[1:]
places = ErasePlaces(
    uploads=Path(folder, "u"), search_log=Path(folder, "s"), reports=Path(folder, "r")
)
scope = EraseScope(photos=(uri,))
def kill(name):
    if name.startswith(step):
        os.kill(os.getpid(), 9)
erase(open_store(folder + "/store"), "photos", scope, places, settle_s=0, on_step=kill)
"""


@pytest.mark.parametrize("step", ["waiting", "deleting from", "deleting uploads", "rewriting"])
def test_an_erasure_that_was_killed_is_finished_by_the_next(tmp_path: Path, step: str) -> None:
    with closing(open_store(str(tmp_path / "store"))) as store:
        fill(store, "v1")
        add_canaries(store, G, [Canary(expression="a birthday guest", uri=uri("party.jpg"))])
        command = [sys.executable, "-c", KILL, str(tmp_path), step, uri("party.jpg")]
        assert subprocess.run(command, check=False).returncode == -9
        assert module.is_interrupted(store, G)
        places = ErasePlaces(
            uploads=tmp_path / "u", search_log=tmp_path / "s", reports=tmp_path / "r"
        )
        receipt = run(store, places, photos=(uri("party.jpg"),))
        assert findings(store, receipt, places) == []
        assert canaries_of(store, G) == []
        assert store.find_documents(KIND) == {}
        assert names_in(store, "v1") == {"mug.jpg", "dog.jpg"}
        files = (path for path in (tmp_path / "store").rglob("*") if path.is_file())
        assert [path.name for path in files if b"party" in path.read_bytes()] == []


# ----------------------------------------------------------------------------------- tombstones


def test_tombstones_name_nothing(store: InstanceStore) -> None:
    record = photo("party.jpg").record
    Tombstones(store, G).add([record])
    text = str(store.find_documents("erased"))
    for trace in ("party", record.image_id, record.content_hash):
        assert trace not in text
    fresh = Tombstones(store, G)
    assert fresh.covers(record)
    assert fresh.covers_uri(record.uri)
    assert fresh.covers(photo("renamed.jpg", "party.jpg").record)
    assert not fresh.covers(photo("mug.jpg").record)
    assert not Tombstones(store, "other").covers(record)


def test_tombstones_can_be_removed(store: InstanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reir.operations.erase.tombstones.PART_SIZE", 3)
    records = [photo(f"{n}.jpg", "dog.jpg").record for n in range(5)]
    records = [replace(each, content_hash=f"{n:064x}") for n, each in enumerate(records)]
    tombstones = Tombstones(store, G)
    tombstones.add(records)
    tombstones.add(records[:2])
    tombstones.remove(records[:3])
    assert [Tombstones(store, G).covers(each) for each in records] == [False] * 3 + [True] * 2


def test_a_running_reader_notices_new_tombstones(
    store: InstanceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reir.operations.erase.tombstones.FRESH_S", 0.05)
    reader, record = Tombstones(store, G), photo("party.jpg").record
    assert not reader.covers(record)
    Tombstones(store, G).add([record])
    time.sleep(0.1)
    assert reader.covers(record)
