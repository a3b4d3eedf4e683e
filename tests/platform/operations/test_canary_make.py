"""Canaries from a search log: which verdict counts, and what is added to a gallery."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from reir.cli import main
from reir.errors import DataError
from reir.images.decode import image_id
from reir.operations.canary import Canary, add_canaries, canaries_of, read_canaries
from reir.operations.canary_make import MadeCanaries, add_made_canaries, make_canaries
from reir.operations.feedback import Feedback, Verdict, add_feedback
from reir.operations.feedback.records import new_key, submission
from reir.operations.search_log import SearchLog
from reir.query.search import Gallery
from reir.records import ImageRecord, IndexedImage
from reir.store import VersionSpec, open_store
from reir.store.contract import InstanceStore
from reir.store.memory import MemoryStore
from reir_testing import FakeEncoder, draw_scene
from reir_testing.operations.search_logs import event, submit

G, V = "photos", "v1"
COLORS = ("red", "blue", "green")
LEFT, RIGHT = (0.1, 0.1, 0.4, 0.9), (0.6, 0.1, 0.9, 0.9)


def uri(color: str) -> str:
    return f"file:///{color}.png"


def fill(store: InstanceStore, colors: Sequence[str] = COLORS) -> InstanceStore:
    encoder = FakeEncoder()
    store.create_version(G, V, VersionSpec(dim=encoder.dim, digest=encoder.digest))
    for color in colors:
        (instances,) = encoder.encode_images([draw_scene((100, 100), [(color, (10, 10, 40, 90))])])
        record = ImageRecord(
            image_id=image_id(uri(color)),
            uri=uri(color),
            status="indexed",
            num_instances=len(instances),
        )
        store.upsert_images(G, V, [IndexedImage(record, instances)])
    store.promote(G, V)
    return store


@pytest.fixture
def store() -> InstanceStore:
    return fill(MemoryStore())


class Users:
    """Users who search and give feedback, one event a minute."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._minute = 0

    def say(
        self,
        verdict: Verdict,
        expression: str,
        color: str = "red",
        box: tuple[float, float, float, float] = LEFT,
        *,
        minute: int | None = None,
        **changes: Any,
    ) -> None:
        photo = image_id(uri(color))
        about: dict[str, Any] = {"image_id": photo, "uri": uri(color), "box": box}
        said = Feedback(
            expression=expression,
            verdict=verdict,
            time=datetime.fromisoformat(self._time(minute)),
            **({} if verdict == "absent" else about),
            **changes,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        assert add_feedback(self.folder, G, said, submission({}, new_key()))

    def search(self, expression: str, *, minute: int | None = None) -> None:
        log = SearchLog(self.folder, 10_000)
        assert submit(log, {**event(expression), "time": self._time(minute)}).result(20)
        log.close()

    def _time(self, minute: int | None) -> str:
        self._minute += 1
        hours, minutes = divmod(self._minute if minute is None else minute, 60)
        return f"2026-11-24T{hours:02d}:{minutes:02d}:00.000+00:00"


@pytest.fixture
def users(tmp_path: Path) -> Users:
    return Users(tmp_path / "searches")


def made_of(store: InstanceStore, users: Users, **options: Any) -> MadeCanaries:
    return make_canaries(store, G, users.folder, **options)


def right(expression: str, color: str = "red", box: Any = LEFT) -> Canary:
    return Canary(expression=expression, uri=uri(color), box=box)


def absent(expression: str) -> Canary:
    return Canary(expression=expression, absent=True)


# ------------------------------------------------------------------------------------------- making


def test_right_and_absent_become_canaries_newest_first(store: InstanceStore, users: Users) -> None:
    users.say("right", "the red one")
    users.say("wrong", "the green one")
    users.say("absent", "a giraffe")
    users.say("right", "the blue one", "blue", (0.1234, 0.0, 0.5, 1.0))
    users.say("box", "the other green one", "green", RIGHT)
    made = made_of(store, users)
    assert made.present == (
        right("the other green one", "green", RIGHT),
        right("the blue one", "blue", (0.1234, 0.0, 0.5, 1.0)),
        right("the red one"),
    )
    assert made.absent == (absent("a giraffe"),)
    assert (made.queries, made.num_lost, made.num_of_tenants) == ((), 0, 0)
    answers = Gallery(G, store, FakeEncoder()).search("the red one")
    assert made.present[2].is_right(answers[0])


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([("right", "red"), ("wrong", "red")], None),
        ([("wrong", "red"), ("right", "red")], right("it")),
        ([("right", "red"), ("right", "blue")], right("it", "blue")),
        ([("right", "blue"), ("right", "red")], right("it")),
        ([("right", "red"), ("right", "blue"), ("wrong", "blue")], right("it")),
        ([("absent", ""), ("right", "red")], right("it")),
        ([("right", "blue"), ("box", "red")], right("it")),
        ([("box", "red"), ("absent", "")], absent("it")),
        ([("right", "red"), ("absent", "")], absent("it")),
        ([("absent", ""), ("wrong", "red")], absent("it")),
        ([("absent", ""), ("right", "red"), ("wrong", "red")], absent("it")),
        ([("wrong", "red")], None),
        ([("right", "gone")], None),
        ([("right", "red"), ("right", "gone")], right("it")),
        ([("absent", ""), ("right", "gone")], None),
        ([("right", "gone"), ("absent", "")], absent("it")),
    ],
    ids=lambda value: " ".join(map("-".join, value)) if isinstance(value, list) else "",
)
def test_the_newest_verdict_counts(
    store: InstanceStore, users: Users, said: list[tuple[Verdict, str]], expected: Canary | None
) -> None:
    for verdict, color in said:
        users.say(verdict, "it", color)
    assert list(made_of(store, users)) == ([expected] if expected else [])


def test_the_order_is_that_of_time_and_not_of_files(store: InstanceStore, users: Users) -> None:
    users.say("wrong", "it", minute=30)
    users.say("right", "it", minute=20)
    users.say("absent", "a giraffe", minute=50)
    users.say("right", "a giraffe", minute=40)
    assert list(made_of(store, users)) == [absent("a giraffe")]


def test_equal_expressions_are_one(store: InstanceStore, users: Users) -> None:
    users.say("right", "The red\u200b  One ")
    users.say("right", "the \x1b[31mred one")
    users.search("THE RED ONE")
    users.say("wrong", "the RED one", "blue")
    assert list(made_of(store, users)) == [right("the [31mred one"), right("The red One")]


def test_another_box_with_the_same_number_is_another_instance(
    store: InstanceStore, users: Users
) -> None:
    users.say("right", "it", box=LEFT, version="v1")
    users.say("wrong", "it", box=RIGHT, version="v2")
    assert list(made_of(store, users)) == [right("it", box=LEFT)]


def test_photos_that_are_gone_are_counted_once(store: InstanceStore, users: Users) -> None:
    users.say("right", "one", "gone")
    users.say("right", "two", "gone")
    users.say("right", "three", "also gone")
    users.say("right", "four")
    made = made_of(store, users)
    assert (list(made), made.num_lost) == ([right("four")], 2)


def test_a_tenant_cannot_say_what_the_whole_gallery_lacks(
    store: InstanceStore, users: Users
) -> None:
    users.say("absent", "a giraffe", tenant="acme")
    made = made_of(store, users)
    assert (list(made), made.num_of_tenants) == ([], 1)
    users.say("right", "the red one", tenant="acme")
    assert list(made_of(store, users)) == [right("the red one")]


def test_the_newest_are_taken(store: InstanceStore, users: Users) -> None:
    for number in range(6):
        users.say("absent" if number % 2 else "right", f"thing {number}")
        users.search(f"query {number}")
        users.search(f"Query {number % 3}")
        users.search(f"thing {number}")
    made = made_of(store, users, size=3, queries=4)
    assert made.present == (right("thing 4"),)
    assert made.absent == (absent("thing 5"), absent("thing 3"))
    assert [each.expression for each in made.queries] == [
        "Query 2",
        "query 5",
        "Query 1",
        "query 4",
    ]
    assert not any(each.absent or each.uri for each in made.queries)
    assert list(made_of(store, users, size=0, queries=0)) == []


def test_without_feedback_the_error_says_how_it_is_given(
    store: InstanceStore, users: Users
) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match=r"no feedback about gallery 'photos'.*--search-log"):
            made_of(store, users)
        users.search("the red one")


# ------------------------------------------------------------------------------------------- adding


def test_canaries_are_added_to_those_of_the_gallery(store: InstanceStore, users: Users) -> None:
    add_canaries(store, G, [right("by hand", "green"), absent("a zebra")])
    users.say("right", "the red one")
    users.say("absent", "a giraffe")
    users.search("something")
    made = made_of(store, users)
    assert add_made_canaries(store, G, made) == 3
    assert add_made_canaries(store, G, made) == 0
    assert set(canaries_of(store, G)) == {
        right("by hand", "green"),
        absent("a zebra"),
        right("the red one"),
        absent("a giraffe"),
        Canary(expression="something"),
    }


def test_a_photo_replaces_what_contradicts_it(store: InstanceStore, users: Users) -> None:
    add_canaries(store, G, [absent("The red one"), Canary(expression="the blue one")])
    users.say("right", "the red one")
    users.say("right", "the blue one", "blue")
    add_made_canaries(store, G, made_of(store, users))
    assert set(canaries_of(store, G)) == {right("the red one"), right("the blue one", "blue")}


def test_a_known_photo_is_kept(store: InstanceStore, users: Users) -> None:
    add_canaries(store, G, [right("the red one")])
    users.say("absent", "the red one")
    assert add_made_canaries(store, G, made_of(store, users)) == 0
    assert canaries_of(store, G) == [right("the red one")]


def test_a_query_never_replaces_a_known_answer(store: InstanceStore, users: Users) -> None:
    known = [absent("a zebra"), right("by hand")]
    add_canaries(store, G, known)
    users.search("a zebra")
    users.search("By hand")
    users.search("new")
    users.say("wrong", "it")
    assert add_made_canaries(store, G, made_of(store, users)) == 1
    assert set(canaries_of(store, G)) == {*known, Canary(expression="new")}


# ------------------------------------------------------------------------------------------ command


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Users:
    """The gallery in an embedded store, and the log, where the command looks for them."""
    monkeypatch.setenv("REIR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REIR_STORE", str(tmp_path / "store"))
    store = open_store(str(tmp_path / "store"))
    fill(store)
    store.close()
    return Users(tmp_path / "home" / "searches")


def test_the_command_adds_canaries(command: Users, capsys: pytest.CaptureFixture[str]) -> None:
    command.say("right", "the red one")
    command.say("right", "the lost one", "gone")
    command.say("absent", "a giraffe", tenant="acme")
    command.say("absent", "a giraffe")
    command.search("something")
    assert main.run(["canary", "make", G]) == 0
    shown = capsys.readouterr().out
    assert "1 object in the gallery, 1 not in it, 1 without a known answer" in shown
    assert "Left out: 1 photo no longer in the gallery." in shown
    assert "Left out: 1 verdict 'absent' of keys with a tenant" in shown
    assert "Canaries added to gallery photos: 3. It has 3 now." in shown
    assert main.run(["canary", "make", G, "--size", "1", "--queries", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "gallery": G,
        "present": 0,
        "absent": 1,
        "queries": 0,
        "lost_photos": 1,
        "left_out_of_tenants": 1,
        "added": 0,
        "total": 3,
        "file": None,
    }


def test_the_command_writes_a_file_that_can_be_added(
    command: Users, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.say("right", "the red one", box=(0.1, 0.2, 0.33333, 0.9))
    command.say("absent", "l'éléphant")
    elsewhere = tmp_path / "elsewhere"
    command.folder.rename(elsewhere)
    out = tmp_path / "canaries.jsonl"
    arguments = ["canary", "make", G, "--search-log", str(elsewhere), "--out", str(out)]
    assert main.run(arguments) == 0
    assert f"reir canary add {G} {out}" in capsys.readouterr().out
    assert read_canaries(out) == [
        replace(right("the red one"), box=(0.1, 0.2, 0.3333, 0.9)),
        absent("l'éléphant"),
    ]
    assert main.run(["canary", "list", G, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main.run(["canary", "add", G, str(out)]) == 0


def test_the_command_fails_without_feedback(
    command: Users, capsys: pytest.CaptureFixture[str]
) -> None:
    command.search("the red one")
    assert main.run(["canary", "make", G]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "has no feedback about gallery 'photos'" in error
    assert str(command.folder) in error
    assert main.run(["canary", "make", "none"]) == 1
    assert "no gallery 'none'" in capsys.readouterr().err
    assert main.run(["canary", "make", G, "--size", "-1"]) == 2
