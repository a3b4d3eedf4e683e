"""Canaries, jobs, reports, the search log, uploads and other logs are cleaned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reir.images.decode import canonical_uri
from reir.operations.canary import Canary, add_canaries, canaries_of
from reir.operations.erase.places import ErasedNames, ErasePlaces, erase_log_lines
from reir.operations.feedback import Feedback, add_feedback, read_feedback
from reir.operations.feedback.records import new_key, submission
from reir.operations.gate.page import report_page
from reir.operations.gate.verdicts import CanaryChange, GateReport
from reir.operations.search_log import Event, SearchLog, read_events
from reir.records import ImageRecord
from reir.store import InstanceStore
from reir_testing.operations.erased_gallery import GALLERY as G
from reir_testing.operations.erased_gallery import erase_now, findings, photo, uri
from reir_testing.operations.search_logs import submit


def test_canaries_sources_and_reports_are_cleaned(
    store: InstanceStore, places: ErasePlaces
) -> None:
    kept = Canary(expression="the blue one", uri=uri("mug.jpg"))
    add_canaries(store, G, [Canary(expression="the red one", uri=uri("party.jpg")), kept])
    store.put_document("source", f"{G}/1", {"text": "/data/me/party.jpg", "indexed_s": 1})
    store.put_document("source", f"{G}/2", {"text": "/data/me", "indexed_s": 1})
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
    receipt = erase_now(store, places, photos=(uri("party.jpg"),))
    assert (receipt.canaries, receipt.sources, receipt.reports) == (1, 1, 2)
    assert canaries_of(store, G) == [kept]
    assert [each["text"] for each in store.find_documents("source").values()] == ["/data/me"]
    (left,) = store.find_documents("reindex-report").values()
    assert [each["uri"] for each in left["lost"]] == [uri("mug.jpg")]
    assert "party" not in (folder / "report.html").read_text()
    assert "party" not in (folder / "report.json").read_text()
    assert "mug" in (folder / "report.html").read_text()


def test_a_reindexing_job_is_cleaned(store: InstanceStore, places: ErasePlaces) -> None:
    job = {
        "sources": [{"text": "/data/me/party.jpg"}, {"text": "/data/me"}],
        "state": "checking",
    }
    store.put_document("reindex", G, {**job, "error": "cannot read /data/me/party.jpg"})
    store.put_document("reindex", f"{G}2", {**job, "error": ""})
    assert erase_now(store, places, photos=(uri("party.jpg"),)).reports == 1
    found = store.find_documents("reindex")
    assert found[G] == {"sources": [{"text": "/data/me"}], "state": "checking", "error": ""}
    assert found[f"{G}2"] == {**job, "error": ""}, "another gallery"


def test_searches_about_a_photo_are_erased(store: InstanceStore, places: ErasePlaces) -> None:
    """Searches that found it or named it, and all with an expression that describes it."""
    gone, kept = photo("party.jpg").record, photo("mug.jpg").record

    def hit(row: ImageRecord) -> dict[str, object]:
        return {"image_id": row.image_id, "uri": row.uri}

    head = {"request_id": "1", "version": "v2", "tenant": ""}
    search = {**head, "event": "search", "k": 1, "presence": 0.9, "found": True, "where": None}
    right = {
        **head,
        "event": "feedback",
        "verdict": "right",
        "instance_id": "",
        "box": [0, 0, 1, 1],
    }
    events: list[Event] = [
        {**search, "expression": "anything", "hits": [hit(kept), hit(gone)]},
        {**search, "expression": "all", "hits": [], "where": f'uri == "{gone.uri}" and area > 0'},
        {**search, "expression": "The  GUEST", "hits": [hit(kept)]},
        {**right, "expression": "the guest", **hit(gone)},
        {**right, "expression": "the mug", **hit(kept)},
        {**search, "expression": "a mug", "hits": [hit(kept)], "where": 'uri == "x"'},
    ]
    log = SearchLog(places.search_log)
    assert all([submit(log, each, G).result() for each in events])
    log.close()
    described = Canary(expression="the host", uri=gone.uri)
    queries = [Canary(expression=each) for each in ("the guest", "the HOST", "a dog")]
    add_canaries(store, G, [described, *queries])
    receipt = erase_now(store, places, photos=(gone.uri,))
    assert (receipt.search_events, receipt.canaries) == (4, 3)
    assert [each["expression"] for each in read_events(places.search_log, G)] == [
        "the mug",
        "a mug",
    ]
    assert canaries_of(store, G) == [Canary(expression="a dog")]


def test_feedback_about_a_photo_is_erased(store: InstanceStore, places: ErasePlaces) -> None:
    """Boxes in it and verdicts on its instances, and all with an expression that describes it."""
    gone, kept = photo("party.jpg").record, photo("mug.jpg").record
    box = (0.1, 0.2, 0.3, 0.4)
    about: dict[str, Any] = {"uri": gone.uri, "image_id": gone.image_id, "box": box}
    other: dict[str, Any] = {"uri": kept.uri, "image_id": kept.image_id, "box": box}
    places.search_log.mkdir()
    for said in (
        Feedback(expression="the guest in the box", verdict="box", **about),
        Feedback(expression="the wrong guest", verdict="wrong", **about),
        Feedback(expression="the wrong guest", verdict="wrong", **other),
        Feedback(expression="The guest  in the box", verdict="right", **other),
        Feedback(expression="a giraffe", verdict="absent"),
        Feedback(expression="the mug", verdict="box", **other),
    ):
        add_feedback(places.search_log, G, said, submission({}, new_key()))
    receipt = erase_now(store, places, photos=(gone.uri,))
    assert receipt.search_events == 3
    left = read_feedback(places.search_log, G)
    assert [each.expression for each in left] == ["the wrong guest", "a giraffe", "the mug"]
    for file in (places.search_log / G).iterdir():
        assert b"in the box" not in file.read_bytes()
        assert gone.image_id.encode() not in file.read_bytes()
    assert findings(store, receipt, places) == []
    back = Feedback(expression="again", verdict="box", **about)
    add_feedback(places.search_log, G, back, submission({}, new_key()))
    (finding,) = findings(store, receipt, places)
    assert "feedback in" in finding


def test_uploads_are_deleted_and_other_files_are_not(
    store: InstanceStore, places: ErasePlaces, tmp_path: Path
) -> None:
    upload = places.uploads / G / "0123" / "up.jpg"
    outside = tmp_path / "mine.jpg"
    upload.parent.mkdir(parents=True)
    for path, scene in ((upload, "dog.jpg"), (outside, "mug.jpg")):
        path.write_bytes(b"jpeg")
        store.upsert_images(G, "v2", [photo(path.name, scene, location=canonical_uri(path))])
    upload.with_name(".up.jpg.tmp").write_bytes(b"of an upload that was killed")
    receipt = erase_now(store, places, photos=(str(upload), str(outside)))
    assert receipt.uploads == 1
    assert not upload.parent.exists()
    assert outside.exists()


def test_lines_of_a_log_are_overwritten_while_it_is_written(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    names = ErasedNames(frozenset({"abc"}), frozenset({"file:///data/me/a%20b.jpg"}))
    with log.open("ab", buffering=0) as server:
        server.write(b'{"image": "abc"}\n{"image": "xyz"}\nread /data/me/a b.jpg\n')
        server.write(b"get file:///data/me/a%20b.jpg\nlast line of abc")
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
