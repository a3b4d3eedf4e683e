"""The search log: what is written, by whom, for how long, and how it is removed."""

from __future__ import annotations

import queue
import shutil
import stat
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from reir.errors import ConfigError, DataError
from reir.operations import search_log
from reir.operations.search_log import (
    Event,
    SearchLog,
    read_events,
    remove_events,
    search_event,
)
from reir.operations.search_log_files import path_of
from reir.results import Hit, SearchResult
from reir.store.embedded.locks import exclusive
from reir_testing.operations.search_logs import (
    TODAY,
    G,
    event,
    files,
    line,
    put,
    submit,
    texts,
    write,
)

# ----------------------------------------------------------------------------------------- writing


def test_events_have_the_documented_fields(log: SearchLog, folder: Path) -> None:
    hits = tuple(
        Hit(
            instance_id=f"i#{n}",
            image_id="i",
            uri="file:///a%20b.jpg",
            box=(0.123456, 0.2, 0.3, 0.98765432),
            score=0.5,
            objectness=0.9,
            presence=0.25,
        )
        for n in range(5)
    )
    result = SearchResult(
        expression="l'été \U0001f9f2\n",
        gallery=G,
        version="v1",
        hits=hits,
        timings_ms={},
        presence=0.75,
        found=True,
    )
    write(log, search_event(result, k=7, where="area > 0", request_id="r1", tenant="acme"))
    (search,) = read_events(folder, G)
    assert datetime.fromisoformat(search.pop("time")).utcoffset() == timedelta(0)
    assert search == {
        "event": "search",
        "request_id": "r1",
        "version": "v1",
        "tenant": "acme",
        "expression": "l'été \U0001f9f2\n",
        "k": 7,
        "where": "area > 0",
        "presence": 0.75,
        "found": True,
        "hits": [
            {
                "instance_id": f"i#{n}",
                "image_id": "i",
                "uri": "file:///a%20b.jpg",
                "box": [0.1235, 0.2, 0.3, 0.9877],
                "score": 0.5,
                "presence": 0.25,
            }
            for n in range(3)
        ],
    }


def test_each_gallery_and_day_has_a_file_that_only_its_owner_can_read(
    log: SearchLog, folder: Path
) -> None:
    next_day = (datetime.now(UTC).date() + timedelta(days=1)).isoformat()
    assert all(write(log, event("one"), event("two"), event("three", next_day)))
    write(log, event("four"), gallery="other")
    own = path_of(folder, G, "").name
    assert files(folder) == [f"other/{TODAY}{own}", f"{G}/{TODAY}{own}", f"{G}/{next_day}{own}"]
    for path in (folder / G).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / G).stat().st_mode) == 0o700
    assert texts(folder) == ["one", "two", "three"]
    assert texts(folder, "other") == ["four"]
    assert texts(folder, "never-searched") == []


def test_a_gallery_name_cannot_name_another_folder(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"gallery name '\.\./x' is not allowed"):
        list(read_events(folder, "../x"))


def test_few_files_stay_open(log: SearchLog, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_log, "MAX_OPEN", 3)
    for turn in range(2):
        for number in range(8):
            write(log, event(f"turn {turn}"), gallery=f"g{number}")
            assert len(log._files) <= 3
    assert all(texts(folder, f"g{number}") == ["turn 0", "turn 1"] for number in range(8))


def test_closing_writes_what_is_waiting(folder: Path) -> None:
    log = SearchLog(folder)
    futures = [submit(log, event(str(n))) for n in range(500)]
    log.close()
    assert all(future.result(0) for future in futures)
    assert texts(folder) == [str(n) for n in range(500)]
    log.close()
    assert write(log, event("late")) == [False]
    assert len(texts(folder)) == 500


def test_an_event_that_comes_while_the_log_is_closed_is_written_or_dropped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is closed just when an event is about to be queued."""
    closing: list[threading.Thread] = []

    class Slow(queue.SimpleQueue[object]):
        def qsize(self) -> int:
            closing.append(threading.Thread(target=log.close))
            closing[0].start()
            closing[0].join(0.3)
            return super().qsize()

    monkeypatch.setattr(queue, "SimpleQueue", Slow)
    log = SearchLog(folder)
    written = submit(log, event("now"))
    closing[0].join()
    assert written.result(5)
    assert texts(folder) == ["now"]


def test_an_event_waits_in_no_thread_of_the_caller(log: SearchLog, folder: Path) -> None:
    write(log, event("first"))
    (path,) = (folder / G).iterdir()
    with exclusive(path):
        started_s = time.monotonic()
        waiting = submit(log, event("second"))
        assert time.monotonic() - started_s < 0.5
        time.sleep(0.1)
        assert not waiting.done()
    assert waiting.result(20)
    assert texts(folder) == ["first", "second"]


def test_the_time_is_that_of_the_event_and_not_of_its_writing(log: SearchLog, folder: Path) -> None:
    def without_time(expression: str) -> Event:
        return {name: value for name, value in event(expression).items() if name != "time"}

    write(log, event("first"))
    (path,) = (folder / G).iterdir()
    before = datetime.now(UTC)
    with exclusive(path):
        log.append(G, lambda: without_time("second"))
        later = submit(log, without_time("third"))
        between = datetime.now(UTC)
        time.sleep(0.3)
    assert later.result(20)
    _, second, third = read_events(folder, G)
    for each in (second, third):
        assert next(iter(each)) == "time"
        happened = datetime.fromisoformat(each["time"]) + timedelta(milliseconds=1)
        assert before <= happened <= between + timedelta(milliseconds=1)


def test_a_bug_in_one_event_does_not_stop_the_log(
    log: SearchLog, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert write(log, {**event(), "k": object()}) == [False]
    assert "is not JSON serializable" in caplog.text
    assert write(log, event("next")) == [True]
    assert texts(folder) == ["next"]


def test_the_log_survives_that_old_files_cannot_be_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = SearchLog(folder, keep_days=1_000_000)  # before the year 1
    assert write(log, event()) == [False]
    assert "a bug prevents that old searches are deleted" in caplog.text
    log.keep_days = 30
    assert write(log, event("next")) == [True]
    log.close()


def test_more_events_than_may_wait_are_dropped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(search_log, "MAX_WAITING", 3)
    drops: list[None] = []
    log = SearchLog(folder, on_drop=lambda: drops.append(None))
    write(log, event("first"))
    (path,) = (folder / G).iterdir()
    with exclusive(path):
        submit(log, event("in the hands of the writer"))
        while not log._waiting.empty():
            time.sleep(0.01)
        futures = [submit(log, event(str(n))) for n in range(5)]
        assert [future.result(0) for future in futures[3:]] == [False, False]
    assert [future.result(20) for future in futures] == [True] * 3 + [False] * 2
    assert len(drops) == 2
    assert len(caplog.records) == 1
    assert "3 events are waiting" in caplog.text
    log.close()


# ------------------------------------------------------------------------------------ when it fails


def test_a_folder_that_disappears_drops_events_until_it_is_back(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drops: list[None] = []
    log = SearchLog(folder, on_drop=lambda: drops.append(None))
    assert write(log, event("one")) == [True]
    shutil.rmtree(folder)
    assert write(log, event("two"), event("three")) == [False, False]
    assert not folder.exists()
    assert len(drops) == 2
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert f"not logged in {folder}: [Errno 2]" in warning.getMessage()
    folder.mkdir()
    assert write(log, event("four")) == [True]
    assert texts(folder) == ["four"]
    shutil.rmtree(folder)
    write(log, event("five"))
    assert len(caplog.records) == 2, "the next series of drops is logged again"
    log.close()


def test_the_folder_of_a_gallery_can_be_deleted_to_erase_its_log(
    log: SearchLog, folder: Path
) -> None:
    write(log, event("one"))
    shutil.rmtree(folder / G)
    assert write(log, event("two")) == [True]
    assert texts(folder) == ["two"]


FULL = """
import resource, signal, sys
from pathlib import Path
from reir.operations.search_log import SearchLog
from reir_testing.operations.search_logs import event, submit
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = SearchLog(Path(sys.argv[1]))
def write(text):
    return submit(log, event(text)).result(20)
assert write("first")
(file,) = Path(sys.argv[1], "photos").iterdir()
# There is room for a part of the next line.
resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 20, resource.RLIM_INFINITY))
assert not write("second")
assert file.read_bytes().count(b"\\n") == 1 and file.read_bytes().endswith(b"}\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert write("third")
log.close()
"""


def test_a_line_that_is_written_only_in_part_is_taken_back(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stderr
    assert texts(folder) == ["first", "third"]


def test_a_folder_that_cannot_be_used_drops_everything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    log = SearchLog(tmp_path / "file")
    assert write(log, event()) == [False]
    assert "cannot be used" in caplog.text
    log.close()


# ------------------------------------------------------------------------------------- how long


def test_old_files_of_all_galleries_are_deleted_when_another_file_is_opened(folder: Path) -> None:
    def day(age: int) -> str:
        return (datetime.now(UTC).date() - timedelta(days=age)).isoformat()

    (folder / "other").mkdir(parents=True)
    for age in (0, 6, 7, 8, 400):
        (folder / "other" / f"{day(age)}-host-1.jsonl").write_text("")
    (folder / "other" / f"{day(9)}-host-1.jsonl.tmp").write_text("left by a killed process")
    (folder / "other" / "2001-notes.jsonl").write_text("not ours")
    log = SearchLog(folder, keep_days=7)
    write(log, event())
    left = [name.removeprefix("other/") for name in files(folder) if name.startswith("other/")]
    assert left == ["2001-notes.jsonl", *sorted(f"{day(n)}-host-1.jsonl" for n in (0, 6, 7))]
    tomorrow = (datetime.now(UTC).date() + timedelta(days=1)).isoformat()
    write(log, event(day=tomorrow))
    assert f"other/{day(7)}-host-1.jsonl" not in files(folder)
    log.close()


# ----------------------------------------------------------------------------------------- reading


def test_the_partial_last_line_of_a_killed_writer_is_left_out(folder: Path) -> None:
    put(folder, line(expression="one") + line(expression="two")[:-9])
    put(folder, line(expression="three")[:40], f"{TODAY}-host-2.jsonl")
    put(folder, line(expression="four"), f"{TODAY}-host-3.jsonl")
    assert texts(folder) == ["one", "four"]


def test_a_process_with_the_id_of_a_killed_one_continues_its_file(
    log: SearchLog, folder: Path
) -> None:
    name = path_of(folder, G, TODAY).name
    put(folder, line(expression="one") + line(expression="two")[:-9], name)
    write(log, event("three"))
    assert texts(folder) == ["one", "three"]


@pytest.mark.parametrize(
    ("damaged", "problem"),
    [
        (b"{\n", "Expecting property name"),
        (b"\0\0\0\n", "Expecting value"),
        (b"\xff\xfe\n", "codec can't decode"),
        (b"[1]\n", "must be a JSON object"),
        (b"\n", "Expecting value"),
        (line(event="visit"), "'event' must be one of search, feedback, got 'visit'"),
        (line(event=["search"]), "'event' must be one of"),
        (line(event="feedback"), "lacks 'verdict'"),
        (line(expression=7), "must be texts"),
        (
            line(event="feedback", verdict="right", instance_id="", image_id="", uri="", box=None),
            "'right' does not go with box None",
        ),
    ],
)
def test_other_damage_is_an_error_that_names_the_line(
    folder: Path, damaged: bytes, problem: str
) -> None:
    path = put(folder, line() + damaged + line())
    expected = rf"{path.name}, line 2: .*{problem}.*remove this line, or delete the file"
    with pytest.raises(DataError, match=expected):
        texts(folder)
    with pytest.raises(DataError, match=expected):
        remove_events(folder, G, lambda _: True)
    assert path.read_bytes() == line() + damaged + line()
    assert files(folder) == [f"{G}/{path.name}"]


def test_a_folder_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / G).write_text("")
    with pytest.raises(DataError, match=r"cannot read the search log .*photos: Not a directory"):
        texts(tmp_path)
