"""The web page when its user does something else before the server has answered."""

from __future__ import annotations

import base64
import re
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Page, Route, expect

from .conftest import (
    DROP,
    GALLERY,
    IN_OTHER,
    OTHER,
    Tab,
    answered,
    drop,
    enter,
    hit_names,
    png,
    search,
)


def hold(page: Page, pattern: str) -> list[Route]:
    """Hold back the requests to an endpoint; the list gets them."""
    held: list[Route] = []
    page.route(pattern, lambda route: held.append(route))
    return held


def choose_other_gallery(page: Page) -> Route:
    """Choose the other gallery, whose search is held back."""
    held = hold(page, "**/v1/search")
    with page.expect_request("**/v1/search"):
        page.select_option("#gallery", OTHER)
    expect(page.locator("#results")).to_have_attribute("aria-busy", "true")
    return held[0]


def test_a_hit_belongs_to_the_gallery_that_was_searched(tab: Tab, page: Page) -> None:
    """The two galleries have the same photo under the same id."""
    card = search(page, "the yellow one").first
    image_id = (card.get_attribute("data-instance") or "").partition("#")[0]
    places = [f"/v1/galleries/{name}/images/{image_id}" for name in (GALLERY, OTHER)]
    assert [page.request.get(place).status for place in places] == [200, 200]
    choose_other_gallery(page)
    card.locator(".open").click()
    page.get_by_role("button", name="Right", exact=True).click()
    expect(page.locator("#viewer-feedback")).to_contain_text("Recorded as right")
    page.get_by_role("button", name="Delete photo").click()
    page.get_by_role("button", name="Really delete it?").click()
    expect(page.locator("#viewer")).to_be_hidden()
    assert [page.request.get(place).status for place in places] == [404, 200]
    assert [body["gallery"] for body in tab.bodies_sent_to("/v1/feedback")] == [GALLERY]
    looked_up = [r for r in tab.requests if r.method == "GET" and r.url.endswith(image_id)]
    assert [urlsplit(r.url).path for r in looked_up] == places[:1]


def test_more_like_a_hit_searches_the_gallery_of_the_hit(tab: Tab, page: Page) -> None:
    card = search(page, "the cyan one").first
    wanted = card.get_attribute("data-instance")
    choose_other_gallery(page)
    card.get_by_role("button", name="More like this").click()
    expect(page.locator(".chip.more")).to_have_count(1)
    expect(page.locator("#gallery")).to_have_value(GALLERY)
    (body,) = tab.bodies_sent_to("/v1/search/similar")
    assert (body["gallery"], body["instance_id"]) == (GALLERY, wanted)


def test_the_viewer_searches_the_gallery_that_it_shows(tab: Tab, page: Page) -> None:
    """The hits of the other gallery arrive while the viewer shows one of the first."""
    card = search(page, "the cyan one").first
    held = choose_other_gallery(page)
    card.locator(".open").click()
    held.continue_()
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
    page.keyboard.press("m")
    expect(page.locator(".chip.more")).to_have_count(1)
    expect(page.locator("#gallery")).to_have_value(GALLERY)
    assert tab.bodies_sent_to("/v1/search/similar")[-1]["gallery"] == GALLERY


def test_a_term_leaves_those_of_another_gallery_behind(tab: Tab, page: Page) -> None:
    """The user goes back to the first gallery, and clicks before the hits of the other are gone."""
    cards = search(page, "the cyan one")
    cards.first.get_by_role("button", name="More like this").click()
    answered(page)
    page.select_option("#gallery", OTHER)
    expect(page.locator(".chip")).to_have_count(0)
    answered(page)
    excluded = cards.first.get_attribute("data-instance")
    hold(page, "**/v1/search/similar")
    page.go_back()
    expect(page.locator(".chip.more")).to_have_count(1)
    cards.first.get_by_role("button", name="Not this").click()
    expect(page.locator(".chip.not")).to_have_count(1)
    expect(page.locator(".chip.more")).to_have_count(0)
    answered(page)
    body = tab.bodies_sent_to("/v1/search")[-1]
    assert body["gallery"] == OTHER
    assert [each["instance_id"] for each in body["also"]] == [excluded]


def drop_next(page: Page, name: str) -> None:
    """Drop a photo without waiting until it is shown."""
    page.evaluate(DROP, [name, base64.b64encode(png(name)).decode()])
    expect(page.locator(".chip")).to_contain_text(f"in photo {name}")


@pytest.mark.parametrize("status", [None, 500], ids=["slow", "an error"])
def test_another_photo_replaces_the_first_one_at_once(page: Page, status: int | None) -> None:
    drop(page, "red left.png")
    enter(page, "the red one")
    expect(page.locator("#local .mark")).to_have_count(2)
    held = hold(page, "**/v1/localize")
    with page.expect_request("**/v1/localize"):
        drop_next(page, "red wide.png")
    expect(page.locator("#local .frame")).to_have_count(0)
    expect(page.locator("#summary")).to_be_empty()
    if status is not None:
        held[0].fulfill(status=status, json={"title": "Refused"})
        expect(page.get_by_role("alert")).to_be_visible()
        expect(page.locator("#local .frame")).to_have_count(0)
    else:
        held[0].continue_()
        expect(page.locator("#local .frame img")).to_have_attribute(
            "alt", "Your photo red wide.png"
        )


def test_a_failed_sentence_leaves_no_boxes_of_the_one_before(page: Page) -> None:
    drop(page, "red left.png")
    enter(page, "the red one")
    expect(page.locator("#local .mark")).to_have_count(2)
    page.route("**/v1/localize", lambda route: route.fulfill(status=500, json={"title": "Refused"}))
    enter(page, "the blue one")
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.locator("#local .mark")).to_have_count(0)


def test_a_box_is_sent_with_the_photo_that_it_is_in(page: Page) -> None:
    """The click on the button comes right after the drop, before the page has changed."""
    drop(page, "red left.png")
    enter(page, "the red one")
    expect(page.locator("#local .mark")).to_have_count(2)
    page.evaluate("() => { window.button = document.querySelector('#local-list button'); }")
    hold(page, "**/v1/localize")
    drop_next(page, "red wide.png")
    with page.expect_request("**/v1/search/similar") as sent:
        page.evaluate("() => window.button.click()")
    body = sent.value.post_data_buffer or b""
    assert b'filename="red left.png"' in body
    assert b"red wide.png" not in body


def test_a_photo_without_a_sentence_ends_the_search_that_it_overtakes(page: Page) -> None:
    hold(page, "**/v1/search/similar")
    cards, results = search(page, "the red one"), page.locator("#results")
    cards.first.get_by_role("button", name="More like this").click()
    enter(page, "")
    expect(results).to_have_attribute("aria-busy", "true")
    drop(page, "red left.png")
    expect(page.locator("#local")).to_contain_text("describe one object in it")
    expect(results).to_have_attribute("aria-busy", "false")


def open_slowly(tab: Tab, link: str) -> tuple[Page, list[Route]]:
    """Open the page, whose request for the galleries is held back; the list gets it."""
    galleries = hold(tab.page, "**/v1/galleries")
    tab.page.goto(f"/{link}")
    return tab.page, galleries


@pytest.mark.parametrize("link", ["", "#sentence=the+blue+one"], ids=["no link", "a link"])
def test_what_is_typed_while_the_page_loads_is_kept(tab: Tab, link: str) -> None:
    page, galleries = open_slowly(tab, link)
    page.locator("#sentence").press_sequentially("the green one")
    page.wait_for_timeout(500)  # longer than the pause in typing after which the page searches
    assert tab.bodies_sent_to("/v1/search") == []
    galleries[0].continue_()
    expect(page.locator(".name").first).to_have_text("red right.png")
    expect(page.locator("#sentence")).to_have_value("the green one")
    expect(page.locator("#gallery")).to_have_value(GALLERY)
    assert parse_qs(urlsplit(page.url).fragment)["sentence"] == ["the green one"]
    assert {body["expression"] for body in tab.bodies_sent_to("/v1/search")} == {"the green one"}


def test_a_letter_that_is_typed_while_the_page_loads_does_not_replace_the_link(tab: Tab) -> None:
    """Nor does a search for the empty field, which does not have the sentence of the link yet."""
    page, galleries = open_slowly(tab, "#sentence=the+blue+one")
    page.locator("#sentence").press("Enter")
    page.locator("#sentence").press("t")
    galleries[0].continue_()
    expect(page.locator(".name").first).to_have_text("red left.png")
    expect(page.locator("#sentence")).to_have_value("t")
    assert parse_qs(urlsplit(page.url).fragment)["sentence"] == ["the blue one"]
    assert {body["expression"] for body in tab.bodies_sent_to("/v1/search")} == {"the blue one"}


def test_home_leads_to_the_start_page_while_the_page_loads(tab: Tab) -> None:
    page, galleries = open_slowly(tab, f"#gallery={OTHER}&sentence=the+red+one")
    page.get_by_role("link", name=re.compile("REIR")).click()
    galleries[0].continue_()
    expect(page.locator("#photo-list li")).to_have_count(len(IN_OTHER))
    expect(page.locator("body")).to_have_attribute("data-view", "start")
    expect(page.locator("#gallery")).to_have_value(OTHER)
    expect(page.locator("#sentence")).to_have_value("")
    assert tab.bodies_sent_to("/v1/search") == []


def test_a_letter_that_is_submitted_while_the_page_loads_is_searched_for(tab: Tab) -> None:
    page, galleries = open_slowly(tab, "#sentence=the+blue+one")
    page.locator("#sentence").press("t")
    page.locator("#sentence").press("Enter")
    galleries[0].continue_()
    answered(page)
    expect(page.locator("#sentence")).to_have_value("t")
    expect(page).to_have_title(re.compile("^t "))
    assert {body["expression"] for body in tab.bodies_sent_to("/v1/search")} == {"t"}


def test_a_photo_that_is_dropped_while_the_page_cannot_load_is_shown_once_it_has(tab: Tab) -> None:
    page = tab.page
    page.route("**/v1/galleries", lambda route: route.fulfill(status=500, json={}), times=1)
    page.goto("/")
    again = page.get_by_role("button", name="Try again")
    expect(again).to_be_visible()
    page.evaluate(DROP, ["red left.png", base64.b64encode(png("red left.png")).decode()])
    page.fill("#sentence", "the red one")
    again.click()
    expect(page.locator("#local .mark")).to_have_count(2)


def test_what_is_typed_stays_when_something_else_is_searched_for(page: Page) -> None:
    search(page, "the red one")
    page.fill("#sentence", "th")  # too short to be searched for
    page.get_by_text("Filters", exact=True).click()
    page.get_by_text("Right", exact=True).click()
    expect(page.locator("#num-filters")).to_have_text("(1)")
    answered(page)
    expect(page.locator("#sentence")).to_have_value("th")
    page.get_by_role("button", name="Clear filters").click()
    answered(page)
    expect(page.locator("#sentence")).to_have_value("th")
    page.get_by_role("link", name=re.compile("REIR")).click()
    expect(page.locator("#sentence")).to_have_value("")


@pytest.mark.parametrize("typed", ["th", "the green one"], ids=["too short", "not searched yet"])
def test_back_replaces_what_is_typed(tab: Tab, page: Page, typed: str) -> None:
    search(page, "the red one")
    page.locator("#zoom").check()
    answered(page)
    page.evaluate(
        """async (typed) => {
            sentence.value = typed;
            sentence.dispatchEvent(new InputEvent("input", { bubbles: true }));
            const gone = new Promise((resolve) => addEventListener("popstate", resolve));
            history.back();
            await gone;
        }""",
        typed,
    )
    page.wait_for_timeout(500)  # longer than the pause in typing after which the page searches
    answered(page)
    expect(page.locator("#sentence")).to_have_value("the red one")
    expect(page.locator("#zoom")).not_to_be_checked()
    assert parse_qs(urlsplit(page.url).fragment)["sentence"] == ["the red one"]
    assert {body["expression"] for body in tab.bodies_sent_to("/v1/search")} == {"the red one"}


def test_what_is_typed_is_searched_for_after_another_change(page: Page) -> None:
    """The user ticks a box before the pause in typing is over."""
    search(page, "the red one")
    page.evaluate(
        """() => {
            sentence.value = "the green one";
            sentence.dispatchEvent(new InputEvent("input", { bubbles: true }));
            zoom.click();
        }"""
    )
    expect(page.locator("#zoom")).to_be_checked()
    expect(page.locator("#sentence")).to_have_value("the green one")
    expect(page).to_have_url(re.compile(r"sentence=the\+green\+one&zoom=true$"))
    answered(page)
    assert hit_names(page)[0] == "red right.png"
    page.go_back()
    expect(page.locator("#zoom")).not_to_be_checked()
    expect(page.locator("#sentence")).to_have_value("the red one")
    answered(page)
    assert hit_names(page)
