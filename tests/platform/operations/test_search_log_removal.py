"""Events of the search log are removed while processes write others."""

from __future__ import annotations

import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from reir.operations.search_log import (
    Event,
    SearchLog,
    remove_events,
)
from reir_testing.operations.search_logs import TODAY, G, event, files, line, put, texts, write


def test_events_are_removed_and_empty_files_deleted(log: SearchLog, folder: Path) -> None:
    write(log, event("keep 1"), event("drop 1"), event("keep 2"))
    put(folder, line(expression="drop 2"), "2024-01-01-host-1.jsonl")
    same = put(folder, line(expression="keep 3"), "2024-01-02-host-1.jsonl")
    before = same.stat()
    write(log, event("drop 3"), gallery="other")
    assert remove_events(folder, G, lambda each: "drop" in each["expression"]) == 2
    assert texts(folder) == ["keep 3", "keep 1", "keep 2"]
    assert len(files(folder)) == 3
    assert (same.stat().st_ino, same.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert texts(folder, "other") == ["drop 3"]
    write(log, event("keep 4"), event("drop 4"))
    assert texts(folder)[-2:] == ["keep 4", "drop 4"]
    for path in (folder / G).iterdir():
        path.chmod(0o640)
    assert remove_events(folder, G, lambda each: "drop" in each["expression"]) == 1
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder / G).iterdir()} == {0o640}
    assert remove_events(folder, G, lambda _: True) == 4
    assert [path for path in (folder / G).iterdir()] == []
    assert remove_events(folder, "none", lambda _: True) == 0


def test_what_killed_processes_left_is_removed_too(folder: Path) -> None:
    put(folder, line(expression="keep") + line(expression="about Ann")[:-5])
    put(folder, b"about Ann", f"{TODAY}-host-1.jsonl.tmp")
    put(folder, b"about Ann", f"{TODAY}-host-2.jsonl.tmp")
    assert remove_events(folder, G, lambda each: "Ann" in each["expression"]) == 0
    (left,) = (folder / G).iterdir()
    assert left.read_bytes() == line(expression="keep")


def test_a_failed_removal_leaves_the_file(folder: Path) -> None:
    path = put(folder, line() * 3)

    def fails(_: Event) -> bool:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        remove_events(folder, G, fails)
    assert path.read_bytes() == line() * 3
    assert files(folder) == [f"{G}/{path.name}"]


WRITER = """
import sys, time
from pathlib import Path
from reir.operations.search_log import SearchLog
from reir_testing.operations.search_logs import event, submit
folder, name, stop = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
log, n = SearchLog(folder), 0
while not stop.exists():
    text = f"{'keep' if n % 3 else 'drop'} {name} {n}"
    assert submit(log, event(text)).result(60)
    n += 1
    time.sleep(0.0005)  # or the files grow so fast that few removals fit in
log.close()
print(n)
"""
NUM_WRITERS, NUM_REMOVALS = 3, 25


class Writer:
    """A process that writes events, a third of which is to be removed, until it is told to stop."""

    def __init__(self, folder: Path, name: str, code: str = WRITER) -> None:
        self.name, self._stop = name, folder.parent / f"stop-{name}"
        command = [sys.executable, "-c", code, str(folder), name, str(self._stop)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def stop(self) -> list[str]:
        """Return the expressions of its events that are not to be removed."""
        self._stop.touch()
        written, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return [f"keep {self.name} {n}" for n in range(int(written)) if n % 3]


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Writer]]:
    started: list[Writer] = []

    def start_writer(name: str, code: str = WRITER) -> Writer:
        started.append(Writer(folder, name, code))
        return started[-1]

    yield start_writer
    for each in started:
        with each.process:
            each.process.kill()


def wait_for_events(folder: Path, names: Iterable[str]) -> None:
    deadline_s = time.monotonic() + 60
    while not set(names) <= {text.split()[1] for text in texts(folder)}:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def is_dropped(event: Event) -> bool:
    return bool(event["expression"].startswith("drop"))


def test_events_that_are_written_during_removals_survive(
    folder: Path, start: Callable[..., Writer]
) -> None:
    writers = [start(f"w{n}") for n in range(NUM_WRITERS)]
    wait_for_events(folder, [each.name for each in writers])
    removed = []
    for _ in range(NUM_REMOVALS):
        removed.append(remove_events(folder, G, is_dropped))
        texts(folder)  # reading never sees a damaged line
    assert sum(number > 0 for number in removed) > NUM_REMOVALS // 2
    kept = [each.stop() for each in writers]
    removed.append(remove_events(folder, G, is_dropped))
    found = texts(folder)
    for writer, expected in zip(writers, kept, strict=True):
        # All of them, and in the order of time.
        assert [each for each in found if f" {writer.name} " in each] == expected
    assert len(found) == sum(map(len, kept))
    assert sum(removed) == pytest.approx(sum(map(len, kept)) / 2, abs=NUM_WRITERS)
    assert len(files(folder)) == NUM_WRITERS
    assert all(name.endswith(".jsonl") for name in files(folder))


def test_processes_that_share_a_file_write_whole_lines(
    folder: Path, start: Callable[..., Writer]
) -> None:
    """Two containers with the same host name and process id, on a shared volume."""
    same = WRITER.replace("import sys, time", "import os, sys, time\nos.getpid = lambda: 1")
    writers = [start(name, same) for name in ("a", "b")]
    wait_for_events(folder, ["a", "b"])
    for _ in range(NUM_REMOVALS):
        remove_events(folder, G, is_dropped)
    kept = [each.stop() for each in writers]
    remove_events(folder, G, is_dropped)
    assert len(files(folder)) == 1
    assert sorted(texts(folder)) == sorted(kept[0] + kept[1])


def test_a_killed_writer_leaves_a_log_that_can_be_read(
    folder: Path, start: Callable[..., Writer]
) -> None:
    writer = start("w")
    wait_for_events(folder, ["w"])
    time.sleep(0.1)
    writer.process.kill()
    writer.process.wait()
    found = texts(folder)
    assert found == [f"{'keep' if n % 3 else 'drop'} w {n}" for n in range(len(found))]
