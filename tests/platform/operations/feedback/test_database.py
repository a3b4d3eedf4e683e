"""Feedback is recorded durably and exactly once, by several processes at a time."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from reir.errors import ConfigError, DataError, QueryError
from reir.operations.feedback import (
    Feedback,
    KeyReused,
    add_feedback,
    database,
    delete_feedback_before,
    is_recorded,
    read_feedback,
    remove_feedback,
    withdraw_feedback,
)
from reir.operations.feedback.records import check_drawn_box, submission, user_of
from reir.operations.search_log import SearchLog
from reir_testing.operations.search_logs import event, line, put, submit

G = "photos"
SECRET = "file:///data/the-photo-of-ann.jpg"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "searches"
    made.mkdir()
    return made


def absent(expression: str = "a giraffe", **changes: Any) -> Feedback:
    return Feedback(expression=expression, verdict="absent", **changes)


def right(expression: str = "the mug", uri: str = "file:///a.jpg", **changes: Any) -> Feedback:
    about: dict[str, Any] = {"image_id": "i", "instance_id": "i#1", "box": (0.1, 0.2, 0.3, 0.4)}
    return Feedback(expression=expression, verdict="right", uri=uri, **{**about, **changes})


def add(folder: Path, said: Feedback, key: str, gallery: str = G) -> bool:
    return add_feedback(folder, gallery, said, submission({"text": said.expression}, key))


def texts(folder: Path, gallery: str = G) -> list[str]:
    return [each.expression for each in read_feedback(folder, gallery)]


def test_what_is_read_is_what_was_recorded(folder: Path) -> None:
    now = datetime(2026, 11, 24, 12, 0, 0, 123000, UTC)
    said = right(
        "l'\u00e9t\u00e9 \U0001f9f2\n",
        box=(0.123456, 0.2, 0.3, 0.98765432),
        version="v2",
        tenant="acme",
        user=user_of("1f2e3d4c"),
        request_id="r1",
        time=now,
    )
    drawn = Feedback(
        expression="the mug",
        verdict="box",
        uri="file:///a%20b.jpg",
        image_id="i",
        box=(0.0, 0.0, 1.0, 1.0),
        time=now + timedelta(seconds=1),
    )
    later = absent(time=now + timedelta(seconds=2))
    for number, each in enumerate((later, said, drawn)):
        assert add(folder, each, str(number))
    assert read_feedback(folder, G) == [said, drawn, later]
    assert said.box == (0.1235, 0.2, 0.3, 0.9877)
    assert read_feedback(folder, "other") == []
    assert [path.name for path in folder.iterdir()] == [G]
    assert stat.S_IMODE((folder / G).stat().st_mode) == 0o700


def test_a_key_belongs_to_a_user_and_a_gallery(folder: Path) -> None:
    assert add(folder, absent(), "k")
    assert not add(folder, absent(), "k")
    assert add(folder, absent(user="u"), "k")
    assert add(folder, absent(), "k", "other")
    sent = submission({"text": "a giraffe"}, "k")
    assert is_recorded(folder, G, "", sent)
    assert not is_recorded(folder, G, "x", sent)
    assert not is_recorded(folder, "never", "", sent)
    assert not (folder / "never").exists()
    with pytest.raises(KeyReused, match="'k' was used for other feedback"):
        add(folder, absent("a zebra"), "k")
    with pytest.raises(KeyReused, match="'k' was used for other feedback"):
        is_recorded(folder, G, "", submission({}, "k"))
    assert texts(folder) == ["a giraffe"] * 2


def test_wrong_feedback_is_refused(folder: Path) -> None:
    with pytest.raises(QueryError, match="must be one of right, wrong, absent, box, got 'maybe'"):
        Feedback(expression="x", verdict="maybe")  # type: ignore[arg-type]
    with pytest.raises(QueryError, match="None does not go with the verdict 'right'"):
        right(box=None)
    with pytest.raises(QueryError, match="does not go with the verdict 'absent'"):
        absent(box=(0, 0, 1, 1))
    for box in ((0, 0, 1, 1.1), (-0.1, 0, 1, 1), (0.5, 0, 0.5, 1), (0, 1, 1, 0), (0, 0, 1, 0.0009)):
        with pytest.raises(QueryError, match=r"x1, y1, x2, y2 in \[0, 1\]"):
            check_drawn_box(box)
    with pytest.raises(ConfigError, match=r"gallery name '\.\./x' is not allowed"):
        add(folder, absent(), "k", "../x")


def test_a_missing_folder_is_not_created(folder: Path) -> None:
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        add(folder, absent(), "k")
    assert not folder.exists()


def test_the_folder_of_a_gallery_can_be_deleted_at_any_time(folder: Path) -> None:
    add(folder, absent("one"), "1")
    shutil.rmtree(folder / G)
    assert add(folder, absent("two"), "2")
    assert texts(folder) == ["two"]


def test_damage_and_locks_are_explained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    add(folder, absent(), "k")
    path = folder / G / database.NAME
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DataError, match=r"photos/feedback\.sqlite3: database is locked"):
            add(folder, absent("x"), "2")
    path.write_bytes(b"this is not a database" * 100)
    for use in (
        lambda: read_feedback(folder, G),
        lambda: add(folder, absent(), "3"),
        lambda: remove_feedback(folder, G, lambda _: True),
    ):
        with pytest.raises(DataError, match=r"file is not a database.*move it away or restore it"):
            use()


def test_a_file_without_a_table_is_used(folder: Path) -> None:
    """Its process was killed between the creation of the file and the first commit."""
    (folder / G).mkdir()
    (folder / G / database.NAME).write_bytes(b"")
    assert read_feedback(folder, G) == []
    assert add(folder, absent(), "k")


# ------------------------------------------------------------------------------ erasing, retention


def test_removed_feedback_leaves_no_trace_on_disk(folder: Path) -> None:
    add(folder, right("the guest Ann", SECRET), "1")
    add(folder, right("the mug"), "2")
    path = folder / G / database.NAME
    assert b"guest Ann" in path.read_bytes()
    assert remove_feedback(folder, G, lambda said: said.uri == SECRET) == 1
    assert remove_feedback(folder, G, lambda said: said.uri == SECRET) == 0
    assert texts(folder) == ["the mug"]
    for text in (b"guest Ann", SECRET.encode()):
        assert text not in path.read_bytes()
    assert [each.name for each in (folder / G).iterdir()] == [database.NAME]
    assert remove_feedback(folder, "never", lambda _: True) == 0


def test_feedback_is_withdrawn_by_the_beginning_of_its_keys(folder: Path) -> None:
    assert withdraw_feedback(folder, G, "", "page 1 ") == 0
    for number, key in enumerate(("page 1 0", "page 1 1", "page 10 0", "page% 1 0", "PAGE 1 0")):
        add(folder, absent(f"{number}"), key)
    add(folder, absent("of another user", user="u"), "page 1 0")
    add(folder, absent("elsewhere"), "page 1 0", "other")
    assert withdraw_feedback(folder, G, "", "page 1 ") == 2
    assert texts(folder) == ["2", "3", "4", "of another user"]
    assert texts(folder, "other") == ["elsewhere"]
    assert add(folder, absent("again"), "page 1 0")


def test_old_feedback_of_all_galleries_is_deleted_with_old_searches(folder: Path) -> None:
    now = datetime.now(UTC)
    for age in (0, 6, 7, 8, 400):
        for gallery in (G, "other"):
            add(folder, absent(f"{age}", time=now - timedelta(days=age)), str(age), gallery)
    log = SearchLog(folder, keep_days=7)
    submit(log, event(), "third").result(20)
    log.close()
    assert texts(folder) == texts(folder, "other") == ["7", "6", "0"]
    delete_feedback_before(folder, (now + timedelta(days=1)).date().isoformat())
    assert texts(folder) == []


def test_a_damaged_file_keeps_no_old_feedback_of_other_galleries(folder: Path) -> None:
    for gallery in ("a", "b", "c", "d"):
        add(folder, absent("old", time=datetime(2020, 1, 1, tzinfo=UTC)), "1", gallery)
    for gallery in ("a", "c"):
        (folder / gallery / database.NAME).write_bytes(b"this is not a database" * 100)
    with pytest.raises(DataError, match=r"/a/feedback\.sqlite3: .*; .*/c/feedback\.sqlite3: "):
        delete_feedback_before(folder, "2026-01-01")
    assert texts(folder, "b") == texts(folder, "d") == []


def test_feedback_that_cannot_be_deleted_keeps_no_search_from_the_log(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "damaged").mkdir()
    (folder / "damaged" / database.NAME).write_bytes(b"this is not a database" * 100)
    log = SearchLog(folder)
    assert submit(log, event()).result(20)
    log.close()
    assert "old feedback is deleted later" in caplog.text


def test_feedback_of_earlier_releases_is_read(folder: Path) -> None:
    """They wrote it into the search log."""
    about = {"instance_id": "i#1", "image_id": "i", "uri": "file:///a.jpg"}
    old = {"event": "feedback", "verdict": "right", **about, "box": [0.1, 0.2, 0.3, 0.4]}
    put(folder, line() + line(**old, expression="old", time="2026-11-24T12:00:00.000+00:00"))
    add(folder, absent("new", time=datetime(2026, 11, 24, 13, tzinfo=UTC)), "1")
    add(folder, absent("oldest", time=datetime(2026, 11, 24, 11, tzinfo=UTC)), "2")
    assert texts(folder) == ["oldest", "old", "new"]
    _, said, _ = read_feedback(folder, G)
    assert (said.verdict, said.uri, said.box) == ("right", "file:///a.jpg", (0.1, 0.2, 0.3, 0.4))
    assert (said.user, said.version, said.request_id) == ("", "v1", "r")


# ------------------------------------------------------------------------- several processes, kills

NUM_PROCESSES, NUM_EACH = 3, 25


def _write_shared_and_own(folder: Path, name: str) -> None:
    new = [
        add(folder, absent(f"shared {number}"), f"shared {number}") for number in range(NUM_EACH)
    ]
    for number in range(NUM_EACH):
        assert add(folder, absent(f"own {name} {number}"), f"own {name} {number}")
    (folder / f"{name}.txt").write_text(str(sum(new)))


def test_processes_write_at_the_same_time_and_repeat_each_other(folder: Path) -> None:
    """As replicas do when a request is sent again, and arrives at another one."""
    context = multiprocessing.get_context("spawn")
    names = [f"p{number}" for number in range(NUM_PROCESSES)]
    processes = [context.Process(target=_write_shared_and_own, args=(folder, n)) for n in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    shared = [f"shared {number}" for number in range(NUM_EACH)]
    own = [f"own {name} {number}" for name in names for number in range(NUM_EACH)]
    assert sorted(texts(folder)) == sorted(shared + own)
    assert sum(int((folder / f"{name}.txt").read_text()) for name in names) == NUM_EACH


KILLED = """
import sys
from itertools import count
from pathlib import Path
from reir.operations.feedback import Feedback, add_feedback
from reir.operations.feedback.records import submission
folder, first = Path(sys.argv[1]), int(sys.argv[2])
for number in count(first):
    said = Feedback(expression=str(number), verdict="absent")
    add_feedback(folder, "photos", said, submission({}, str(number)))
    print(number, flush=True)
"""


def test_what_was_confirmed_survives_a_kill(folder: Path) -> None:
    confirmed = 0
    for _ in range(3):
        command = [sys.executable, "-c", KILLED, str(folder), str(confirmed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{confirmed}\n"
            time.sleep(0.05)
            os.kill(process.pid, signal.SIGKILL)
            last = [int(text) for text in process.stdout.read().split()]
        confirmed = (last[-1] if last else confirmed) + 1
        # The process may have been killed after the commit and before the confirmation. It is
        # repeated by the next process, with the same key.
        found = sorted(map(int, texts(folder)))
        assert found in ([*range(confirmed)], [*range(confirmed + 1)])
