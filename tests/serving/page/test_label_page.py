"""The label page in a browser: answered with the keyboard, and recorded as feedback."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect

import reir
from reir.checkpoint import save_checkpoint
from reir.errors import DataError, QueryError
from reir.operations.feedback import read_feedback
from reir.query.search import Gallery
from reir.store import open_store
from reir_serving.labeling.server import (
    label_app,
    questions_about,
    read_sentences,
    run_label_page,
)
from reir_testing import FakeEncoder
from reir_testing.serving import index_photos
from reir_testing.tiny import tiny_model, tiny_tokenizer

from .conftest import GALLERY, SCENES, Tab, png

COLORS = ("red", "blue", "green", "yellow", "cyan")
SENTENCES = [f"the {color} one, number {n}" for n in range(12) for color in COLORS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "searches"
    made.mkdir()
    return made


@pytest.fixture
def address(request: pytest.FixtureRequest, tmp_path: Path, folder: Path) -> Iterator[str]:
    """Serve the page about the scenes; the parameter replaces the sentences."""
    with label_server(tmp_path, folder, getattr(request, "param", SENTENCES)) as address:
        yield address


@contextmanager
def label_server(
    tmp_path: Path, folder: Path, sentences: Sequence[str], port: int = 0
) -> Iterator[str]:
    for name in SCENES:
        (tmp_path / name).write_bytes(png(name))
    with closing(open_store("memory:")) as store:
        index_photos(store, GALLERY, [tmp_path / name for name in SCENES])
        gallery = Gallery(GALLERY, store, FakeEncoder())
        app = label_app(store, GALLERY, questions_about(gallery, sentences, folder), folder)
        served = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        thread = threading.Thread(target=served.run)
        thread.start()
        while not served.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{served.servers[0].sockets[0].getsockname()[1]}"
        finally:
            served.should_exit = True
            thread.join(10)


@pytest.fixture
def tab(browser: Browser, address: str) -> Iterator[Tab]:
    made = Tab(browser, address, viewport={"width": 1280, "height": 800})
    made.page.goto("/label/")
    yield made
    made.close()


def shown(page: Page) -> tuple[str, int]:
    """Return the sentence and the number of photos, once these are shown."""
    expect(page.locator("#shown .frame[data-state=shown] .mark").first).to_be_visible()
    expect(page.locator("#expression")).to_be_visible()
    return page.locator("#expression").inner_text(), page.locator("#shown .frame").count()


def test_fifty_questions_are_answered_with_the_keyboard(tab: Tab, folder: Path) -> None:
    page = tab.page
    expected: list[tuple[str, int]] = []
    for number in range(50):
        sentence, photos = shown(page)
        expect(page.locator("#ask")).to_have_text(
            "Is this the object?" if photos == 1 else "Which of these two is the object?"
        )
        keys = "yns" if photos == 1 else "120s"
        key = keys[number % len(keys)]
        expected.append((sentence, 0 if key == "s" else photos))
        page.keyboard.press(key)
        expect(page.locator("#progress")).to_contain_text(f"{number + 1} answer")
    expect(page.locator("#progress")).not_to_contain_text("not saved")
    recorded = read_feedback(folder, GALLERY)
    for sentence in {text for text, _ in expected}:
        told = [each for each in recorded if each.expression == sentence]
        assert len(told) == sum(number for text, number in expected if text == sentence)
    assert {each.verdict for each in recorded} == {"right", "wrong"}


def test_a_reply_says_what_the_user_means(tab: Tab, folder: Path) -> None:
    page = tab.page
    sentence, photos = shown(page)
    first, second = ("1", "2") if photos == 2 else ("y", "n")
    page.keyboard.press(first)
    expect(page.locator("#progress")).to_contain_text("1 answer")
    page.keyboard.press("u")
    expect(page.locator("#expression")).to_have_text(sentence)
    expect(page.locator("#progress")).to_contain_text("0 answers")
    page.keyboard.press(second)
    page.keyboard.press("x")  # no reply has this key
    expect(page.locator("#progress")).to_contain_text("1 answer,")
    expect(page.locator("#progress")).not_to_contain_text("not saved")
    said = [each for each in read_feedback(folder, GALLERY) if each.expression == sentence]
    expected = ["right", "wrong", "wrong", "right"] if photos == 2 else ["right", "wrong"]
    assert [each.verdict for each in said] == expected
    page.get_by_role("button", name="Skip").click()
    expect(page.locator("#progress")).to_contain_text("2 answers")


def verdicts(folder: Path, sentence: str) -> list[str]:
    return [each.verdict for each in read_feedback(folder, GALLERY) if each.expression == sentence]


def test_skip_takes_the_earlier_reply_back(tab: Tab, folder: Path) -> None:
    page = tab.page
    first, photos = shown(page)
    page.keyboard.press("1" if photos == 2 else "y")
    expect(page.locator("#expression")).not_to_have_text(first)
    other, more = shown(page)
    page.keyboard.press("1" if more == 2 else "y")
    expect(page.locator("#progress")).to_contain_text("2 answers")
    for _ in range(2):
        page.keyboard.press("u")
    expect(page.locator("#expression")).to_have_text(first)
    page.keyboard.press("s")
    expect(page.locator("#progress")).to_contain_text("1 answer,")
    expect(page.locator("#progress")).not_to_contain_text("not saved")
    assert verdicts(folder, first) == []
    assert len(verdicts(folder, other)) == more


@pytest.mark.parametrize("address", [["the red one"]], indirect=True)
def test_a_question_that_is_withdrawn_is_no_longer_shown(tab: Tab, folder: Path) -> None:
    """The second reply to the first question says that there is nothing more to ask."""
    page = tab.page
    sentence, _ = shown(page)
    page.keyboard.press("n")
    expect(page.locator("#progress")).to_have_text("1 answer, 1 question left.")
    page.keyboard.press("u")
    page.keyboard.press("y")
    expect(page.locator("#expression")).to_have_text("No questions are left. Thank you.")
    expect(page.locator("#progress")).to_have_text("1 answer, 0 questions left.")
    assert verdicts(folder, sentence) == ["wrong", "right"]
    page.keyboard.press("u")
    page.keyboard.press("n")
    expect(page.locator("#progress")).to_have_text("1 answer, 1 question left.")
    assert shown(page)[0] == sentence


@pytest.mark.parametrize("address", [["the red one", "the blue one"]], indirect=True)
def test_a_reply_that_is_refused_does_not_hold_up_the_others(tab: Tab, folder: Path) -> None:
    """A question is answered while the reply that withdraws it is on its way."""
    page, held = tab.page, list[Any]()
    first, photos = shown(page)
    page.keyboard.press("0" if photos == 2 else "n")
    expect(page.locator("#progress")).to_contain_text("1 answer, 2 questions left.")
    page.keyboard.press("u")
    page.route("**/v1/label/answers", lambda route: held.append(route), times=1)
    page.keyboard.press("1" if photos == 2 else "y")
    for number in (2, 3):  # one of them is the next question about the first sentence
        _, photos = shown(page)
        page.keyboard.press("1" if photos == 2 else "y")
        expect(page.locator("#progress")).to_contain_text(f"{number} answers")
    expect(page.locator("#expression")).to_have_text("Saving \u2026")
    held[0].continue_()
    expect(page.locator("#expression")).to_have_text("No questions are left. Thank you.")
    expect(page.locator("#progress")).to_have_text("2 answers, 0 questions left.")
    (other,) = {"the red one", "the blue one"} - {first}
    assert "right" in verdicts(folder, other)
    assert len(tab.bodies_sent_to("/v1/label/answers")) == 4


def test_a_reply_is_sent_until_it_is_recorded(tab: Tab, folder: Path) -> None:
    """The first answer of the server is lost after the reply was recorded."""
    page = tab.page

    def lose(route: Any) -> None:
        route.fetch()
        route.abort()

    page.route("**/v1/label/answers", lose, times=1)
    sentence, photos = shown(page)
    page.keyboard.press("1" if photos == 2 else "y")
    expect(page.locator("#problem")).to_contain_text("it is sent again")
    assert page.locator("#expression").inner_text() != sentence, "the next question is shown"
    expect(page.locator("#problem")).to_be_hidden()
    expect(page.locator("#progress")).not_to_contain_text("not saved")
    assert len(read_feedback(folder, GALLERY)) == photos
    assert len(tab.bodies_sent_to("/v1/label/answers")) == 2


def test_an_answer_to_a_question_of_an_earlier_run_is_refused(
    browser: Browser, tmp_path: Path, folder: Path
) -> None:
    """The command is ended, and started again on the same port, while a page is open."""
    with ExitStack() as ending:
        with label_server(tmp_path, folder, ["the red one", "the green one"]) as address:
            tab = ending.enter_context(closing(Tab(browser, address)))
            page = tab.page
            page.goto("/label/")
            shown(page)
        page.keyboard.press("s")
        problem = page.locator("#problem")
        expect(problem).to_contain_text("it is sent again")
        port = urlsplit(address).port
        assert port is not None
        with label_server(tmp_path, folder, ["the blue one"], port):
            expect(problem).to_contain_text("was refused and is not saved")
            expect(problem).to_contain_text("reload the page")
            expect(page.locator("#expression")).to_contain_text("Reload the page")
            for key in "us":  # neither an earlier question can be answered, nor the next one
                page.keyboard.press(key)
            expect(page.locator("#shown")).to_be_empty()
            expect(page.locator("#replies")).to_be_empty()
            expect(page.locator("#progress")).to_be_empty()
            assert read_feedback(folder, GALLERY) == []
            page.reload()
            assert shown(page)[0] == "the blue one"
            page.keyboard.press("y")
            expect(page.locator("#progress")).to_have_text("1 answer, 0 questions left.")
            assert verdicts(folder, "the blue one") == ["right"]


def run_of(address: str) -> str:
    """Return the name of the run whose questions a server asks."""
    with urllib.request.urlopen(f"{address}/v1/label/questions", timeout=20) as opened:
        run: str = json.load(opened)["run"]
    return run


def test_the_end_and_wrong_replies(tab: Tab, address: str, folder: Path) -> None:
    page = tab.page
    for number in range(len(SENTENCES)):
        shown(page)
        page.keyboard.press("s")
        expect(page.locator("#progress")).to_contain_text(f"{number + 1} answer")
    expect(page.locator("#expression")).to_have_text("No questions are left. Thank you.")
    assert read_feedback(folder, GALLERY) == []
    run = run_of(address)
    for body, origin, status in (
        ({"run": run, "question": 999, "reply": "yes"}, address, 422),
        ({"run": run, "question": 0, "reply": "maybe"}, address, 422),
        ({"run": run, "question": 0, "reply": "skip"}, "http://evil.example", 403),
        ({"run": run, "question": 0, "reply": "skip"}, address, 200),
    ):
        request = urllib.request.Request(
            f"{address}/v1/label/answers",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Origin": origin},
        )
        try:
            answered = urllib.request.urlopen(request).status
        except urllib.error.HTTPError as refused:
            answered = refused.code
        assert answered == status


def test_the_command_serves_the_page_until_it_is_interrupted(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "red.png").write_bytes(png("red left.png"))
    save_checkpoint(tmp_path / "checkpoint", tiny_model(num_candidates=4), tiny_tokenizer(), {})
    store = str(tmp_path / "store")
    reir.index(
        tmp_path / "photos",
        gallery=GALLERY,
        store=store,
        checkpoint=tmp_path / "checkpoint",
        progress=False,
    )
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("the red one\n")
    command = [
        *(sys.executable, "-c", "from reir.cli.main import main; main()"),
        *("label-page", GALLERY, "--sentences", str(sentences)),
        *("--store", store, "--search-log", str(folder)),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        found = re.search(r"open (\S+) in a browser", first)
        assert found, first + process.stderr.read()
        page = found[1]
        with urllib.request.urlopen(page, timeout=20) as opened:
            assert b"which object is meant?" in opened.read()
        run = run_of(page.removesuffix("/label/"))
        body = json.dumps({"run": run, "question": 0, "reply": "yes"}).encode()
        place = page.replace("/label/", "/v1/label/answers")
        request = urllib.request.Request(place, body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=20).close()
        process.send_signal(signal.SIGINT)
        assert "1 question answered" in process.stderr.read()
    assert process.returncode == 0
    assert [each.verdict for each in read_feedback(folder, GALLERY)] == ["right"]
    with pytest.raises(DataError, match="answers all of these 1 sentences"):
        run_label_page(GALLERY, ["the red one"], store=store, folder=folder)


def test_sentences_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sentences.txt"
    path.write_text("the mug\n\n  the dog \nthe mug\n")
    assert read_sentences(path) == ["the mug", "the dog"]
    path.write_text("\n")
    with pytest.raises(DataError, match="has no sentences"):
        read_sentences(path)
    with pytest.raises(DataError, match="cannot read the sentences"):
        read_sentences(tmp_path / "none")
    path.write_text("x" * 600)
    with pytest.raises(QueryError):
        read_sentences(path)
