"""The page shows where a search looked, as a row of small pictures."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Page, expect

from .conftest import Tab, answered, drawn_box, enter, search

SENTENCE = "the red one on the left"


def test_looking_closer_shows_each_look_with_its_frame(page: Page, tab: Tab) -> None:
    expect(page.locator("#zoom-choice")).to_be_hidden()
    search(page, SENTENCE)
    expect(page.locator(".looks")).to_have_count(0)
    with page.expect_response("**/v1/search") as answer:
        page.get_by_label("Look closer").check()
    steps = answer.value.json()["hits"][0]["zoom"]["steps"]
    assert len(steps) > 1
    card = answered(page).first
    looks = card.locator(".looks .frame[data-state=shown]")
    expect(looks).to_have_count(len(steps))
    expect(looks.first.locator("img")).to_have_attribute(
        "alt", f"Look 1 of {len(steps)}: the whole photo"
    )
    assert drawn_box(looks.first) == pytest.approx(steps[0]["box"], abs=0.03)
    # Pictures of the frames, not the whole photo again.
    pictures = [parse_qs(urlsplit(r.url).query) for r in tab.requests if "frame=" in r.url]
    frames = [[float(side) for side in each["frame"]] for each in pictures]
    assert steps[1]["frame"] in frames
    assert all(each["width"] == ["160"] for each in pictures)
    expect(page.locator("#summary")).to_contain_text("zooming in")
    # Five photos at most are searched, and the pictures stand still.
    expect(page.locator(".card:has(.looks)")).to_have_count(5)
    assert parse_qs(urlsplit(page.url).fragment)["zoom"] == ["true"]
    assert [body["zoom"] for body in tab.bodies_sent_to("/v1/search")] == [False, True]


def test_the_choice_survives_a_reload_and_the_viewer_shows_the_looks(page: Page) -> None:
    search(page, SENTENCE)
    page.get_by_label("Look closer").check()
    answered(page)
    page.reload()
    answered(page)
    expect(page.get_by_label("Look closer")).to_be_checked()
    page.locator(".card .open").first.click()
    side = page.locator("#viewer-side .looks")
    expect(side).to_contain_text("Where it looked")
    expect(side.locator(".frame[data-state=shown]").first).to_be_visible()


def test_without_a_sentence_there_is_nothing_to_look_for(page: Page, tab: Tab) -> None:
    search(page, SENTENCE)
    page.get_by_label("Look closer").check()
    answered(page).first.get_by_role("button", name="More like this").click()
    answered(page)
    enter(page, "")
    answered(page)
    expect(page.locator("#zoom-choice")).to_be_hidden()
    assert tab.bodies_sent_to("/v1/search/similar")[-1]["zoom"] is False
