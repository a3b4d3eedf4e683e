"""After an erasure, nothing of the photo is left, wherever it was kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reir.errors import ConfigError, DataError, FilterError
from reir.images.decode import image_id
from reir.operations.canary import Canary, add_canaries, canaries_of
from reir.operations.documents import delete_gallery
from reir.operations.erase import erase as module
from reir.operations.erase import receipts
from reir.operations.erase.erase import KIND, erase
from reir.operations.erase.places import ErasePlaces
from reir.operations.erase.receipts import Receipt, read_receipt, write_receipt
from reir.operations.erase.selection import EraseScope
from reir.operations.erase.tombstones import Tombstones
from reir.store import InstanceStore, open_store
from reir.store.duplicates import remove_images
from reir_testing import FakeEncoder
from reir_testing.operations.erased_gallery import GALLERY as G
from reir_testing.operations.erased_gallery import (
    SCENES,
    erase_now,
    fill,
    findings,
    names_in,
    photo,
    uri,
)

# -------------------------------------------------------------------------------- what is erased


@pytest.mark.parametrize(
    "name", ["/data/me/party.jpg", uri("party.jpg"), image_id(uri("party.jpg"))]
)
def test_a_photo_is_erased_from_all_versions(
    store: InstanceStore, places: ErasePlaces, name: str
) -> None:
    receipt = erase_now(store, places, photos=(name,))
    assert (receipt.photos, receipt.instances) == ({"v1": 1, "v2": 1}, {"v1": 1, "v2": 1})
    assert receipt.is_gone_from_disk
    for version in ("v1", "v2"):
        assert names_in(store, version) == {"mug.jpg", "dog.jpg"}
        assert store.num_stored(G, version) == 3
    query = FakeEncoder().encode_expressions(["the red one"])
    assert "party" not in str(store.search(G, "v2", query, 10))
    assert store.find_documents(KIND) == {}


@pytest.mark.milvus
@pytest.mark.slow
def test_a_photo_is_erased_from_a_server(milvus_uri: str, places: ErasePlaces) -> None:
    with closing(open_store(milvus_uri)) as server:
        fill(server, "v1")
        try:
            add_canaries(server, G, [Canary(expression="a guest", uri=uri("party.jpg"))])
            receipt = erase_now(server, places, photos=(uri("party.jpg"),))
            assert (receipt.photos, receipt.canaries) == ({"v1": 1}, 1)
            assert not receipt.is_gone_from_disk, "its garbage collection deletes the files later"
            assert names_in(server, "v1") == {"mug.jpg", "dog.jpg"}
            assert server.num_stored(G, "v1") == 3
            query = FakeEncoder().encode_expressions(["the red one"])
            assert "party" not in str(server.search(G, "v1", query, 10))
            assert Tombstones(server, G).covers(photo("party.jpg").record)
            assert findings(server, receipt, places) == []
        finally:
            server.drop_gallery(G)
            for kind in ("erased", "receipt"):
                server.delete_documents(kind, server.find_documents(kind).keys())


def test_copies_with_the_same_content_are_erased_too(
    store: InstanceStore, places: ErasePlaces
) -> None:
    copy = photo("copy.jpg", "party.jpg", same_as=image_id(uri("party.jpg")))
    store.upsert_images(G, "v2", [copy])
    receipt = erase_now(store, places, photos=(uri("copy.jpg"),))
    assert receipt.photos == {"v1": 1, "v2": 2}
    assert names_in(store, "v2") == {"mug.jpg", "dog.jpg"}


def test_a_copy_that_is_written_while_the_erasure_begins_is_erased(
    store: InstanceStore, places: ErasePlaces
) -> None:
    def index_copy(step: str) -> None:
        if step.startswith("waiting"):
            theirs = photo("theirs.jpg", "party.jpg", attributes={"tenant": "b"})
            store.upsert_images(G, "v2", [photo("copy.jpg", "party.jpg"), theirs])

    scope = EraseScope(photos=(uri("party.jpg"),))
    receipt = erase(store, G, scope, places, settle_s=0, on_step=index_copy)
    assert receipt.photos == {"v1": 1, "v2": 2}
    assert names_in(store, "v2") == {"mug.jpg", "dog.jpg", "theirs.jpg"}
    assert receipt.covers(image_id(uri("copy.jpg")))
    assert Tombstones(store, G).covers_uri(uri("copy.jpg"))


def test_the_same_picture_of_another_tenant_stays(
    store: InstanceStore, places: ErasePlaces
) -> None:
    theirs = photo("theirs.jpg", "party.jpg", attributes={"tenant": "b"})
    ours = photo("ours.jpg", "party.jpg", attributes={"tenant": "a"})
    store.upsert_images(G, "v2", [theirs, ours])
    receipt = erase_now(store, places, tenant="a")
    assert receipt.photos == {"v1": 0, "v2": 1}
    assert names_in(store, "v2") == {*SCENES, "theirs.jpg"}
    assert not Tombstones(store, G).covers(theirs.record)
    assert Tombstones(store, G).covers(ours.record)
    assert findings(store, receipt, places) == []


def test_photos_are_chosen_by_their_attributes(store: InstanceStore, places: ErasePlaces) -> None:
    for number, who in enumerate(["J. Doe", "M. Roe", "J. Doe"]):
        one = photo(f"{number}.jpg", "dog.jpg", attributes={"person": who})
        store.upsert_images(G, "v2", [replace(one, record=replace(one.record, content_hash=who))])
    receipt = erase_now(store, places, where='attr.person == "J. Doe"')
    assert receipt.photos == {"v1": 0, "v2": 2}
    assert names_in(store, "v2") == {*SCENES, "1.jpg"}


def test_what_is_not_there_is_an_error(store: InstanceStore, places: ErasePlaces) -> None:
    with pytest.raises(DataError, match="no photo of gallery 'photos' fits --photo"):
        erase_now(store, places, photos=("/data/me/none.jpg",))
    with pytest.raises(FilterError, match="names area, which belongs to instances"):
        erase_now(store, places, where="area > 0.5")
    with pytest.raises(ConfigError, match="exactly one of them is needed, got 0"):
        EraseScope()
    with pytest.raises(ConfigError, match="got 2"):
        EraseScope(photos=("a",), tenant="b")
    assert names_in(store, "v2") == {*SCENES}


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
        receipt = erase_now(store, places, photos=(uri("party.jpg"),))
        write_receipt(tmp_path / "receipt.json", receipt)
        assert {trace: files_with(trace) for trace in traces} == {trace: [] for trace in traces}
        assert files_with(b"mug")


# ------------------------------------------------------------------------------------- receipts


def test_a_receipt_can_be_verified(
    store: InstanceStore, places: ErasePlaces, tmp_path: Path
) -> None:
    receipt = erase_now(store, places, photos=(uri("party.jpg"),))
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


def test_receipts_get_names_of_their_own(
    store: InstanceStore, places: ErasePlaces, tmp_path: Path
) -> None:
    receipt = erase_now(store, places, photos=(uri("party.jpg"),))
    found = [write_receipt(tmp_path / "new" / "a.b.json", receipt) for _ in range(3)]
    assert [path.name for path in found] == ["a.b.json", "a.b-2.json", "a.b-3.json"]
    assert sorted(found) == sorted((tmp_path / "new").iterdir())
    assert all(read_receipt(path) == receipt for path in found)


def test_what_comes_back_in_other_places_is_found(
    store: InstanceStore, places: ErasePlaces
) -> None:
    receipt = erase_now(store, places, photos=(uri("party.jpg"),))
    add_canaries(store, G, [Canary(expression="the red one", uri=uri("party.jpg"))])
    change = {"uri": uri("mug.jpg"), "wrong_uri": uri("party.jpg")}
    report = {"lost": [change], "won": []}
    store.put_document("reindex-report", f"{G}/v2", report)
    file = places.reports / "one" / "report.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(report))
    assert findings(store, receipt, places) == [
        "the canary 'the red one' names the photo",
        "the report of version v2 names a photo",
        f"{file} names a photo",
    ]
    delete_gallery(store, G)
    assert findings(store, receipt, places) == [f"{file} names a photo"]


def test_a_photo_whose_first_write_was_interrupted_is_erased(
    tmp_path: Path, places: ErasePlaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = photo("late.jpg", "party.jpg")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with closing(open_store(str(tmp_path / "store"))) as store:
        fill(store, "v1")
        with monkeypatch.context() as patch:
            patch.setattr(store, "_after_upsert", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.upsert_images(G, "v1", [late])
        assert [*store.unfinished_images(G, "v1")] == [(late.record.image_id, late.record.uri)]
        receipt = erase_now(store, places, photos=(late.record.uri,))
        assert [*store.unfinished_images(G, "v1")] == []
        assert names_in(store, "v1") == {*SCENES}
        assert findings(store, receipt, places) == []


def test_receipts_form_a_chain(store: InstanceStore, places: ErasePlaces) -> None:
    first = erase_now(store, places, photos=(uri("party.jpg"),))
    second = erase_now(store, places, photos=(uri("mug.jpg"),))
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
    monkeypatch.setattr(module, "_PART_BYTES", 1_000)
    monkeypatch.setattr(receipts, "MAX_KEPT_HASHES", 10)
    for n in range(40):
        one = photo(f"{n}.jpg", "dog.jpg", attributes={"tenant": "a"})
        hashed = replace(one.record, content_hash=f"{n:064x}")
        store.upsert_images(G, "v2", [replace(one, record=hashed)])
    receipt = erase_now(store, places, tenant="a")
    assert receipt.photos == {"v1": 0, "v2": 40}
    assert len(receipt.hashes) == 80
    assert findings(store, receipt, places) == []
    store.upsert_images(G, "v2", [photo("39.jpg", "dog.jpg")])
    assert len(findings(store, receipt, places)) == 1


def test_photos_with_long_names_are_erased(store: InstanceStore, places: ErasePlaces) -> None:
    folder = "%D0%AF" * 55  # Cyrillic letters
    dog = photo("dog.jpg")
    many = [
        replace(dog.record, image_id=image_id(each), uri=each, attributes={"tenant": "a"})
        for each in (uri(f"{folder}/{n}.jpg") for n in range(200))
    ]
    store.upsert_images(G, "v2", [replace(dog, record=each) for each in many])
    assert erase_now(store, places, tenant="a").photos == {"v1": 0, "v2": 200}


def test_copies_in_several_chunks_are_counted_once(
    store: InstanceStore, places: ErasePlaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 1)
    for name in ("a.jpg", "b.jpg"):
        copy = photo(name, "party.jpg", same_as=image_id(uri("party.jpg")))
        store.upsert_images(G, "v2", [copy])
    receipt = erase_now(store, places, photos=(uri("party.jpg"),))
    assert (receipt.photos, receipt.instances) == ({"v1": 1, "v2": 3}, {"v1": 1, "v2": 1})


# --------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("scope", ["party.jpg", "mug.jpg"])
def test_a_receipt_counts_what_was_deleted_before_an_interruption(
    store: InstanceStore, places: ErasePlaces, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    """Of version v1, before the second run, which may be about another photo, too."""

    def interrupted(_: InstanceStore, gallery: str, version: str, image_ids: list[str]) -> int:
        if version == "v2":
            raise KeyboardInterrupt
        return remove_images(store, gallery, version, image_ids)

    with monkeypatch.context() as patch:
        patch.setattr(module, "remove_images", interrupted)
        with pytest.raises(KeyboardInterrupt):
            erase_now(store, places, photos=(uri("party.jpg"),))
    assert "party.jpg" not in names_in(store, "v1")
    receipt = erase_now(store, places, photos=(uri(scope),))
    photos, instances = (1, 1) if scope == "party.jpg" else (2, 3)
    assert receipt.photos == {"v1": photos, "v2": photos}
    assert receipt.instances == {"v1": instances, "v2": instances}


@pytest.mark.parametrize("step", ["noted", "in the chain"])
def test_the_hashes_of_a_large_erasure_survive_an_interruption(
    store: InstanceStore,
    places: ErasePlaces,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    monkeypatch.setattr(receipts, "MAX_KEPT_HASHES", 2)
    scope = EraseScope(where='uri != ""')
    save = receipts.save_receipt

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def saved(*each: Any) -> None:
        save(*each)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "noted":
            patch.setattr(store, "compact", interrupted)
        else:
            patch.setattr(receipts, "save_receipt", saved)
        with pytest.raises(KeyboardInterrupt):
            erase(store, G, scope, places, settle_s=0)
    receipt = erase(store, G, scope, places, settle_s=0)
    assert len(receipt.hashes) == 6
    assert receipt.photos == {"v1": 3, "v2": 3}
    assert findings(store, receipt, places) == []
    assert store.find_documents(KIND) == {}


def test_a_receipt_that_was_not_delivered_is_delivered_by_the_next_run(
    store: InstanceStore, places: ErasePlaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large erasure, whose hashes the store keeps no longer than that."""
    monkeypatch.setattr(receipts, "MAX_KEPT_HASHES", 1)

    def interrupted(_: Receipt) -> None:
        raise KeyboardInterrupt

    party, mug = (EraseScope(photos=(uri(name),)) for name in ("party.jpg", "mug.jpg"))
    with pytest.raises(KeyboardInterrupt):
        erase(store, G, party, places, settle_s=0, on_receipt=interrupted)
    assert module.is_interrupted(store, G)
    delivered: list[Receipt] = []
    receipt = erase(store, G, mug, places, settle_s=0, on_receipt=delivered.append)
    assert [each.covers(image_id(uri("party.jpg"))) for each in delivered] == [True, False]
    assert delivered[1] == receipt
    assert [each.hash for each in receipts.chain(store)][1:] == [each.hash for each in delivered]
    assert store.find_documents(KIND) == {}


def test_an_interruption_between_hashes_and_receipt_leaves_nothing(
    store: InstanceStore, places: ErasePlaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receipts, "MAX_KEPT_HASHES", 1)
    put = store.put_document

    def interrupted(kind: str, name: str, value: Mapping[str, Any]) -> None:
        if name == f"{G}/receipt":
            raise KeyboardInterrupt
        put(kind, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(store, "put_document", interrupted)
        with pytest.raises(KeyboardInterrupt):
            erase_now(store, places, photos=(uri("party.jpg"),))
    receipt = erase_now(store, places, photos=(uri("party.jpg"),))
    assert receipt.photos == {"v1": 1, "v2": 1}
    assert findings(store, receipt, places) == []
    assert store.find_documents(KIND) == {}


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


@pytest.mark.parametrize(
    "step",
    [
        "rewriting",
        *(
            pytest.param(step, marks=pytest.mark.slow)
            for step in ("waiting", "deleting from", "deleting uploads")
        ),
    ],
)
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
        receipt = erase_now(store, places, photos=(uri("party.jpg"),))
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
