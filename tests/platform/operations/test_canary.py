"""Canaries: files, documents, and what counts as a right answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reir.errors import DataError
from reir.images.decode import canonical_uri, image_id
from reir.operations.canary import (
    Canary,
    add_canaries,
    ask_canaries,
    canaries_of,
    read_canaries,
    remove_canaries,
    resolve_canaries,
    select_canaries,
    to_line,
)
from reir.query.search import Gallery
from reir.records import ImageRecord, IndexedImage
from reir.results import Hit
from reir.store import VersionSpec
from reir.store.memory import MemoryStore
from reir_testing import FakeEncoder, draw_scene

G, V = "photos", "v1"
RED = Canary(expression="the red one", uri="file:///red.jpg", box=(0.1, 0.1, 0.4, 0.9))
BLUE = Canary(expression="the blue one", uri="file:///blue.jpg")
ABSENT = Canary(expression="the purple one", absent=True)
PLAIN = Canary(expression="something green")


def hit(uri: str, box: tuple[float, float, float, float]) -> Hit:
    return Hit(instance_id="i#0", image_id="i", uri=uri, box=box, score=1.0, objectness=1.0)


def store_with(scenes: dict[str, list[tuple[str, tuple[int, int, int, int]]]]) -> MemoryStore:
    store, encoder = MemoryStore(), FakeEncoder()
    store.create_version(G, V, VersionSpec(dim=encoder.dim, digest=encoder.digest))
    for uri, shapes in scenes.items():
        (instances,) = encoder.encode_images([draw_scene((100, 100), shapes)])
        record = ImageRecord(
            image_id=image_id(uri), uri=uri, status="indexed", num_instances=len(instances)
        )
        store.upsert_images(G, V, [IndexedImage(record, instances)])
    store.promote(G, V)
    return store


# ------------------------------------------------------------------------------------------- files


def test_canaries_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text("\n\n".join(map(to_line, (RED, BLUE, ABSENT, PLAIN))) + "\n")
    assert read_canaries(path) == [RED, BLUE, ABSENT, PLAIN]


def test_paths_become_uris(tmp_path: Path) -> None:
    path = tmp_path / "canaries.jsonl"
    photo = tmp_path / "a b.jpg"
    path.write_text(json.dumps({"expression": " the mug ", "photo": str(photo)}))
    assert read_canaries(path) == [Canary(expression="the mug", uri=canonical_uri(photo))]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "Expecting property name"),
        ("[1]", "must be a JSON object"),
        ('{"photo": "x"}', "expression: must be text, got NoneType"),
        ('{"expression": ""}', "expression: is empty"),
        ('{"expression": 3}', "expression: must be text, got int"),
        ('{"expression": "\\u200b"}', "expression: is empty"),
        (json.dumps({"expression": "x" * 600}), "expression: has 600 characters, at most 512"),
        ('{"expression": "a", "image": "x"}', "unknown key 'image'; allowed: expression, photo"),
        ('{"expression": "a", "photo": 3}', "'photo' must be a path"),
        ('{"expression": "a", "absent": "yes"}', "'absent' must be true or false"),
        ('{"expression": "a", "photo": "x", "absent": true}', "exclude each other"),
        ('{"expression": "a", "box": [0, 0, 1, 1]}', "'box' needs the 'photo'"),
        ('{"expression": "a", "photo": "x", "box": [0, 0, 1]}', "four numbers"),
        ('{"expression": "a", "photo": "x", "box": [0.5, 0, 0.2, 1]}', "x1 < x2"),
        ('{"expression": "a", "photo": "x", "box": [0, 0, 640, 480]}', r"in \[0, 1\]"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text('{"expression": "right"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"canaries.jsonl, line 2: .*{problem}"):
        read_canaries(path)


def test_missing_and_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the canaries in .*none.jsonl"):
        read_canaries(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="contains no canaries"):
        read_canaries(tmp_path / "empty.jsonl")


# --------------------------------------------------------------------------------------- documents


def test_the_canaries_of_a_gallery_are_kept_in_its_store() -> None:
    store = MemoryStore()
    assert add_canaries(store, G, [RED, BLUE, ABSENT]) == 3
    assert add_canaries(store, G, [RED, PLAIN]) == 1
    add_canaries(store, "photos2", [PLAIN])
    assert canaries_of(store, G) == [PLAIN, BLUE, ABSENT, RED]
    remove_canaries(store, G, [BLUE, PLAIN])
    assert canaries_of(store, G) == [ABSENT, RED]
    assert canaries_of(store, "photos2") == [PLAIN]


def test_a_new_box_replaces_the_old_one() -> None:
    store = MemoryStore()
    add_canaries(store, G, [RED])
    moved = Canary(expression=RED.expression, uri=RED.uri, box=(0.0, 0.0, 0.5, 0.5))
    assert add_canaries(store, G, [moved]) == 0
    assert canaries_of(store, G) == [moved]


def test_a_selection_is_always_the_same() -> None:
    many = [Canary(expression=f"number {n}", absent=n % 5 == 0) for n in range(200)]
    chosen = select_canaries(many, 50)
    assert chosen == select_canaries(many[::-1], 50)
    assert len(set(chosen)) == 50
    assert 3 <= sum(each.absent for each in chosen) <= 20
    assert select_canaries(many[:30], 50) == many[:30]


# ----------------------------------------------------------------------------------------- answers


def test_a_hit_is_right_if_its_photo_and_its_box_are() -> None:
    assert RED.is_right(hit(RED.uri, (0.1, 0.1, 0.4, 0.9)))
    assert RED.is_right(hit(RED.uri, (0.1, 0.1, 0.4, 0.5 + 0.01)))
    assert not RED.is_right(hit(RED.uri, (0.1, 0.1, 0.4, 0.5 - 0.01)))
    assert not RED.is_right(hit(BLUE.uri, (0.1, 0.1, 0.4, 0.9)))
    assert BLUE.is_right(hit(BLUE.uri, (0.0, 0.0, 0.1, 0.1)))
    assert not ABSENT.is_right(hit(BLUE.uri, (0.0, 0.0, 0.1, 0.1)))


def test_ranks_are_those_of_the_first_right_hit() -> None:
    store = store_with(
        {
            RED.uri: [("red", (10, 10, 40, 90)), ("green", (60, 10, 90, 90))],
            BLUE.uri: [("blue", (10, 10, 40, 90))],
        }
    )
    elsewhere = Canary(expression="the red one", uri=RED.uri, box=(0.6, 0.1, 0.9, 0.9))
    gallery = Gallery(G, store, FakeEncoder())
    asked = {each: each for each in (RED, BLUE, ABSENT, PLAIN, elsewhere)}
    answers = ask_canaries(gallery, asked)
    assert [each.canary for each in answers] == list(asked)
    assert [each.rank for each in answers] == [1, 1, 0, 0, 0]


def test_canaries_of_lost_photos_are_told_apart_and_duplicates_resolved() -> None:
    store = store_with({RED.uri: [("red", (10, 10, 40, 90))]})
    copy = "file:///copy.jpg"
    duplicate = ImageRecord(
        image_id=image_id(copy), uri=copy, status="indexed", same_as=image_id(RED.uri)
    )
    bad = ImageRecord(
        image_id=image_id("file:///bad.jpg"),
        uri="file:///bad.jpg",
        status="failed",
        reason="empty",
    )
    store.upsert_images(G, V, [IndexedImage(duplicate, None), IndexedImage(bad, None)])
    of_copy = Canary(expression="red", uri=copy, box=RED.box)
    of_bad = Canary(expression="bad", uri="file:///bad.jpg")
    known, lost = resolve_canaries(store, G, V, [RED, of_copy, BLUE, of_bad, ABSENT, PLAIN])
    assert lost == [BLUE, of_bad]
    assert known == {
        RED: RED,
        of_copy: Canary(expression="red", uri=RED.uri, box=RED.box),
        ABSENT: ABSENT,
        PLAIN: PLAIN,
    }
    (answer,) = ask_canaries(Gallery(G, store, FakeEncoder()), {of_copy: known[of_copy]})
    assert answer.rank == 1
