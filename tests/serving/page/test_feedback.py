"""Feedback on the web page: what is offered, what is recorded, and how it is confirmed."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from reir.operations.feedback import read_feedback

from .conftest import GALLERY, Tab, answered, drawn_box, drop, enter, page_server, search

NOT_HERE = "It is not in this gallery"


@pytest.fixture
def verdicts(search_log: Path) -> Any:
    """Return the verdicts that were recorded during the test, as (verdict, expression, photo)."""

    def read() -> list[tuple[str, str, str]]:
        return [
            (said.verdict, said.expression, said.uri.rpartition("/")[2])
            for said in read_feedback(search_log, GALLERY)
        ]

    before = len(read())
    return lambda: read()[before:]


def open_first(page: Page, sentence: str) -> Locator:
    search(page, sentence).first.locator(".open").click()
    viewer = page.locator("#viewer")
    expect(viewer.locator(".mark")).not_to_have_count(0)
    return viewer


def choice(viewer: Locator, name: str) -> Locator:
    """Return a button; the names of other boxes contain their position, such as "right"."""
    return viewer.get_by_role("button", name=name, exact=True)


def test_a_hit_is_right_or_wrong(page: Page, verdicts: Any) -> None:
    viewer = open_first(page, "the red one on the left")
    group = viewer.get_by_role("group", name="Is hit 1 what you described?")
    right, wrong = choice(viewer, "Right"), choice(viewer, "Wrong")
    status = group.get_by_role("status")
    expect(status).to_be_empty()
    assert status.get_attribute("aria-live") == "polite"
    right.click()
    expect(status).to_have_text("Thank you. Recorded as right.")
    expect(right).to_have_attribute("aria-pressed", "true")
    assert verdicts() == [("right", "the red one on the left", "red%20left.png")]
    wrong.click()
    expect(status).to_have_text("Thank you. Recorded as wrong.")
    expect(right).to_have_attribute("aria-pressed", "false")
    expect(wrong).to_have_attribute("aria-pressed", "true")
    assert [verdict for verdict, *_ in verdicts()] == ["right", "wrong"]


def test_the_buttons_stay_while_other_objects_are_looked_at(page: Page, verdicts: Any) -> None:
    """The pointer crosses other boxes on its way from the hit to the buttons."""
    viewer = open_first(page, "the yellow one")
    viewer.locator(".mark.other").first.hover()
    expect(viewer.locator("#viewer-side")).to_contain_text("Another object")
    choice(viewer, "Right").click()
    expect(choice(viewer, "Right")).to_have_attribute("aria-pressed", "true")
    viewer.locator(".mark.other").first.hover()
    expect(choice(viewer, "Right")).to_be_focused()
    (verdict,) = verdicts()
    assert verdict == ("right", "the yellow one", "red%20wide.png")


def test_a_verdict_is_still_shown_when_its_hit_is_shown_again(page: Page, verdicts: Any) -> None:
    viewer = open_first(page, "the red one on the right")
    status = viewer.locator("#viewer-feedback").get_by_role("status")
    choice(viewer, "Right").click()
    expect(status).to_contain_text("Recorded as right")
    page.keyboard.press("ArrowRight")
    expect(viewer.get_by_role("group", name="Is hit 2 what you described?")).to_be_visible()
    expect(status).to_be_empty()
    expect(choice(viewer, "Right")).to_have_attribute("aria-pressed", "false")
    expect(choice(viewer, "Right")).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(status).to_contain_text("Recorded as right")
    page.keyboard.press("Escape")
    open_first(page, "the red one")  # another expression is another question
    expect(status).to_be_empty()
    assert len(verdicts()) == 1


def test_feedback_with_the_keyboard(page: Page, verdicts: Any) -> None:
    viewer = open_first(page, "the blue one")
    for _ in range(30):
        if choice(viewer, "Right").evaluate("each => each === document.activeElement"):
            break
        page.keyboard.press("Tab")
    expect(choice(viewer, "Right")).to_be_focused()
    page.keyboard.press("Tab")
    expect(choice(viewer, "Wrong")).to_be_focused()
    page.keyboard.press("Enter")
    expect(viewer.locator("#viewer-feedback").get_by_role("status")).to_contain_text("as wrong")
    expect(choice(viewer, "Wrong")).to_be_focused()
    assert verdicts() == [("wrong", "the blue one", "red%20left.png")]


def test_an_object_that_is_not_in_the_gallery(page: Page, verdicts: Any) -> None:
    expect(page.get_by_role("button", name=NOT_HERE)).to_have_count(0)
    search(page, "the zeppelin")
    expect(page.locator("#notice")).to_contain_text("Probably not")
    button = page.get_by_role("button", name=NOT_HERE)
    button.click()
    status = page.locator("#absent").get_by_role("status")
    expect(status).to_have_text("Thank you. Recorded as not in this gallery.")
    expect(button).to_be_focused()
    assert verdicts() == [("absent", "the zeppelin", "")]
    search(page, "the red one")
    expect(page.get_by_role("button", name=NOT_HERE)).to_have_attribute("aria-pressed", "false")
    expect(status).to_be_empty()
    enter(page, "")
    expect(page.get_by_role("button", name=NOT_HERE)).to_have_count(0)


def test_feedback_needs_a_sentence_that_says_what_is_meant(page: Page) -> None:
    not_here = page.get_by_role("button", name=NOT_HERE)
    cards = search(page, "the red one")
    expect(not_here).to_be_visible()
    page.get_by_text("Filters", exact=True).click()
    page.get_by_text("Right", exact=True).click()
    expect(page.locator("#num-filters")).to_have_text("(1)")
    answered(page)
    # A filter may have left the object out, but a hit can be right.
    expect(not_here).to_have_count(0)
    cards.first.locator(".open").click()
    expect(page.locator("#viewer .feedback")).to_be_visible()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Clear filters").click()
    expect(not_here).to_be_visible()
    cards.first.get_by_role("button", name="Not this").click()
    answered(page)
    expect(not_here).to_be_visible()
    cards.first.get_by_role("button", name="More like this").click()
    expect(page.locator(".chip.more")).to_have_count(1)
    answered(page)
    expect(not_here).to_have_count(0)
    cards.first.locator(".open").click()
    expect(page.locator("#viewer-side dl").first).to_be_visible()
    expect(page.locator("#viewer .feedback")).to_have_count(0)
    page.keyboard.press("Escape")
    drop(page, "red left.png")
    enter(page, "the red one")
    expect(page.locator("#local .mark").first).to_be_visible()
    expect(not_here).to_have_count(0)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"json": {"recorded": False}}, "The server could not record this. Try again later."),
        (
            {"status": 503, "json": {"title": "Busy", "detail": "too <b>busy</b>"}},
            "This was not recorded. The server is busy. Too <b>busy</b>.",
        ),
    ],
    ids=["not written", "an error"],
)
def test_feedback_that_is_not_recorded(
    page: Page, verdicts: Any, answer: dict[str, Any], text: str
) -> None:
    page.route("**/v1/feedback", lambda route: route.fulfill(**answer))
    viewer = open_first(page, "the green one")
    right = choice(viewer, "Right")
    right.click()
    expect(viewer.locator("#viewer-feedback").get_by_role("status")).to_have_text(text)
    expect(right).to_have_attribute("aria-pressed", "false")
    page.unroute("**/v1/feedback")
    right.click()
    expect(right).to_have_attribute("aria-pressed", "true")
    assert len(verdicts()) == 1


def test_without_a_search_log_nothing_is_offered(browser: Browser, tmp_path: Path) -> None:
    with page_server(tmp_path, None) as address, closing(Tab(browser, address)) as tab:
        tab.page.goto("/")
        viewer = open_first(tab.page, "the red one on the left")
        expect(viewer.locator("#viewer-side .actions")).to_be_visible()
        names = re.compile(f"^(Right|Wrong|{NOT_HERE})$")
        expect(tab.page.get_by_role("button", name=names, include_hidden=True)).to_have_count(0)


# ------------------------------------------------------------------------------------ drawing a box


@pytest.fixture
def boxes(search_log: Path) -> Any:
    """Return the boxes that were recorded during the test, as (photo, box)."""

    def read() -> list[tuple[str, Any]]:
        return [
            (said.uri.rpartition("/")[2], said.box)
            for said in read_feedback(search_log, GALLERY)
            if said.verdict == "box"
        ]

    before = len(read())
    return lambda: read()[before:]


def start_drawing(page: Page, sentence: str) -> Locator:
    viewer = open_first(page, sentence)
    choice(viewer, "Draw the right box").click()
    expect(viewer.locator(".drawing .mark")).to_be_visible()
    return viewer


def test_a_box_is_drawn_with_the_mouse(page: Page, boxes: Any, tab: Tab) -> None:
    viewer = start_drawing(page, "the red one on the left")
    sheet = viewer.locator(".drawing").bounding_box()
    assert sheet is not None

    def move(x: float, y: float) -> None:
        page.mouse.move(sheet["x"] + x * sheet["width"], sheet["y"] + y * sheet["height"])

    move(0.75, 0.8)
    page.mouse.down()
    move(0.6, 0.5)
    move(0.5, 0.4)  # from the lower right corner to the upper left one
    page.mouse.up()
    move(0.1, 0.1)  # the button of the mouse is up
    expected = [0.5, 0.4, 0.75, 0.8]
    frame = viewer.locator(".frame")
    assert drawn_box(frame, ".drawing .mark") == pytest.approx(expected, abs=0.01)
    viewer.get_by_role("button", name="Record this box").click()
    status = viewer.locator("#viewer-feedback").get_by_role("status")
    expect(status).to_have_text("Thank you. Your box is recorded.")
    expect(choice(viewer, "Draw the right box")).to_have_attribute("aria-pressed", "true")
    expect(viewer.locator(".drawing")).to_have_count(0)
    ((photo, box),) = boxes()
    assert photo == "red%20left.png"
    assert list(box) == pytest.approx(expected, abs=0.01)
    (body,) = tab.bodies_sent_to("/v1/feedback")
    assert sorted(body) == ["box", "expression", "gallery", "image_id", "verdict"]


def test_a_box_is_entered_with_the_keyboard(page: Page, boxes: Any) -> None:
    viewer = open_first(page, "the green one")
    choice(viewer, "Draw the right box").focus()
    page.keyboard.press("Enter")
    expect(viewer.get_by_label("Left", exact=True)).to_be_focused()
    for value in ("12.5", "20", "60", "90"):
        page.keyboard.press("Control+A")
        page.keyboard.type(value)
        page.keyboard.press("ArrowLeft")  # moves the cursor, and not to another hit
        page.keyboard.press("Tab")
    expect(viewer.locator("#viewer-place")).to_contain_text("Hit 1")
    frame = viewer.locator(".frame")
    assert drawn_box(frame, ".drawing .mark") == pytest.approx([0.125, 0.2, 0.6, 0.9], abs=0.01)
    expect(viewer.get_by_role("button", name="Record this box")).to_be_focused()
    page.keyboard.press("Enter")
    expect(choice(viewer, "Draw the right box")).to_be_focused()
    expect(choice(viewer, "Draw the right box")).to_have_attribute("aria-pressed", "true")
    assert boxes() == [("red%20right.png", (0.125, 0.2, 0.6, 0.9))]


def test_a_drawing_can_be_left(page: Page, boxes: Any) -> None:
    viewer = start_drawing(page, "the yellow one")
    page.keyboard.press("Escape")
    expect(viewer.locator(".drawing, .box-form")).to_have_count(0)
    expect(viewer).to_be_visible()
    expect(choice(viewer, "Draw the right box")).to_be_focused()
    page.keyboard.press("Enter")
    viewer.get_by_role("button", name="Cancel").click()
    expect(choice(viewer, "Right")).to_be_enabled()
    choice(viewer, "Draw the right box").click()
    viewer.get_by_label("Right", exact=True).fill("0")
    expect(viewer.get_by_role("button", name="Record this box")).to_be_disabled()
    viewer.get_by_role("button", name="Next hit").click()
    expect(viewer.locator(".drawing, .box-form")).to_have_count(0)
    assert boxes() == []


def test_feedback_without_an_answer_is_sent_again_with_the_same_key(
    page: Page, verdicts: Any, tab: Tab
) -> None:
    """The answer is lost on its way, after the server has recorded the feedback."""
    lost: list[int] = []

    def lose(route: Any) -> None:
        lost.append(route.fetch().status)
        route.abort()

    page.route("**/v1/feedback", lose, times=1)
    viewer = open_first(page, "the magenta one")
    right = choice(viewer, "Right")
    right.click()
    status = viewer.locator("#viewer-feedback").get_by_role("status")
    expect(status).to_contain_text("This was not recorded. The server does not answer.")
    right.click()
    expect(right).to_have_attribute("aria-pressed", "true")
    assert lost == [200]
    assert [verdict for verdict, *_ in verdicts()] == ["right"]
    sent = [r for r in tab.requests if r.url.endswith("/v1/feedback")]
    assert len({request.headers["idempotency-key"] for request in sent}) == 1
    choice(viewer, "Wrong").click()
    expect(choice(viewer, "Wrong")).to_have_attribute("aria-pressed", "true")
    assert len(verdicts()) == 2
