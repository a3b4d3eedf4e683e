"""The web page in a real browser: searches, hits, the viewer, terms, filters, own photos."""

from __future__ import annotations

import base64
import re
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Page, Route, expect

from .conftest import (
    RED_LEFT,
    RED_WIDE,
    SIZE,
    WIDE,
    Tab,
    answered,
    drawn_box,
    drop,
    enter,
    hit_names,
    png,
    search,
    shares,
)


@pytest.mark.parametrize(
    ("sentence", "name", "box_px", "size"),
    [
        ("the red one on the left", "red left.png", RED_LEFT, SIZE),
        ("the red one on the right", "red wide.png", RED_WIDE, WIDE),
    ],
)
def test_the_box_is_drawn_where_the_object_is(
    page: Page, sentence: str, name: str, box_px: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    cards = search(page, sentence)
    card = cards.filter(has_text=name)
    frame = card.locator(".frame")
    assert drawn_box(frame) == pytest.approx(shares(box_px, size), abs=0.01)
    # the photo keeps its aspect ratio, and the whole box is within the frame
    shape = frame.locator("img").evaluate("i => [i.clientWidth, i.clientHeight]")
    assert shape[0] / shape[1] == pytest.approx(size[0] / size[1], rel=0.02)
    inside = frame.evaluate(
        """frame => { const [f, b] = [frame, frame.querySelector(".mark")]
            .map((e) => e.getBoundingClientRect());
            return b.left >= f.left && b.top >= f.top && b.right <= f.right
                && b.bottom <= f.bottom; }"""
    )
    assert inside


def test_a_search_shows_a_summary_of_its_hits(page: Page) -> None:
    cards = search(page, "the red one on the left")
    assert hit_names(page)[0] == "red left.png"
    likely = cards.first.locator(".likely")
    expect(likely).to_have_text("Likely")
    expect(likely).to_have_attribute("title", re.compile(r"shows the object is \d+%"))
    expect(cards.first.locator(".rank")).to_have_text("1")
    expect(page.locator("#summary")).to_contain_text(re.compile(r"^\d+ hits, .* ms: text encoding"))
    assert page.locator("#summary").get_attribute("aria-live") == "polite"


def test_masks_and_skipped_stages_are_shown(page: Page) -> None:
    """The fake encoder has no masks, so the test adds them to the answer."""

    def change(route: Route) -> None:
        answer = route.fetch().json()
        polygons = [[[0.1, 0.2], [0.3, 0.2], [0.3, 0.8]]]
        answer["hits"][0]["mask"] = {"size": SIZE, "counts": "runs", "polygons": polygons}
        answer["degraded"] = ["rerank"]
        route.fulfill(json=answer)

    page.route("**/v1/search", change)
    frame = search(page, "the red one on the left").first.locator(".frame")
    expect(frame.locator(".masks")).to_be_hidden()
    page.locator("#draw").get_by_text("Masks").click()
    assert drawn_box(frame, ".masks") == pytest.approx([0, 0, 1, 1], abs=0.005)
    shape = frame.locator(".masks path").evaluate(
        "p => { const b = p.getBBox(); return [b.x, b.y, b.x + b.width, b.y + b.height]; }"
    )
    assert shape == pytest.approx([0.1, 0.2, 0.3, 0.8])
    expect(page.locator("#summary")).to_contain_text("The server skipped these stages: re-ranking.")

    # with masks, a hit that has one has no box
    color = "e => getComputedStyle(e).borderTopColor"
    transparent = "rgba(0, 0, 0, 0)"
    assert frame.locator(".mark").evaluate(color) == transparent
    assert page.locator(".card").nth(1).locator(".mark").evaluate(color) != transparent
    assert parse_qs(urlsplit(page.url).fragment)["draw"] == ["masks"]
    page.reload()
    answered(page)
    expect(page.get_by_role("radio", name="Masks")).to_be_checked()
    expect(page.locator(".card").first.locator(".masks")).to_be_visible()
    page.locator("#draw").get_by_text("Boxes").click()
    expect(page.locator(".card").first.locator(".masks")).to_be_hidden()


def test_masks_are_asked_for_only_when_they_are_shown(page: Page, tab: Tab) -> None:
    expect(page.locator("#draw")).to_be_hidden()
    search(page, "the red one on the left")
    page.locator("#draw").get_by_text("Masks").click()
    answered(page)
    sent = [body["localize"] for body in tab.bodies_sent_to("/v1/search")]
    assert sent == [False, True]
    # The fake encoder has none, and the page says so.
    expect(page.locator("#summary")).to_contain_text("No masks: the model of this gallery has")


def test_the_start_page_shows_photos_of_the_gallery(page: Page) -> None:
    photos = page.locator("#photo-list .frame[data-state=shown]")
    expect(photos).to_have_count(12)
    expect(page.locator("#photo-list img").first).to_have_attribute("alt", re.compile(r"\.png$"))
    search(page, "the red one")
    expect(page.locator("#photos")).to_be_hidden()
    page.fill("#sentence", "")
    expect(page.locator("#photos")).to_be_visible()


def test_the_start_page_says_that_it_cannot_show_photos(tab: Tab) -> None:
    tab.page.route("**/images?limit=*", lambda route: route.fulfill(status=500, json={}))
    tab.page.goto("/")
    expect(tab.page.locator("#photos")).to_contain_text("The photos cannot be shown")


def test_examples_and_the_back_button(page: Page) -> None:
    page.get_by_role("button", name="the blue one").click()
    answered(page)
    assert hit_names(page)[0] == "red left.png"
    assert parse_qs(urlsplit(page.url).fragment)["sentence"] == ["the blue one"]
    search(page, "the green one")
    assert hit_names(page)[0] == "red right.png"
    page.go_back()
    expect(page.locator("#sentence")).to_have_value("the blue one")
    expect(page.locator(".name").first).to_have_text("red left.png")
    page.reload()
    expect(page.locator(".name").first).to_have_text("red left.png")


def test_enter_does_not_repeat_the_search_of_what_was_typed(tab: Tab, page: Page) -> None:
    held: list[Route] = []
    page.route("**/v1/search", lambda route: held.append(route))
    with page.expect_request("**/v1/search"):
        page.fill("#sentence", "the green one")
    page.press("#sentence", "Enter")
    held[0].continue_()
    expect(page.locator(".name").first).to_have_text("red right.png")
    assert len(tab.bodies_sent_to("/v1/search")) == 1
    # Once it is answered, Enter searches again.
    page.unroute("**/v1/search")
    with page.expect_request("**/v1/search"):
        page.press("#sentence", "Enter")
    answered(page)


def test_typing_searches_and_only_the_last_answer_is_shown(tab: Tab, page: Page) -> None:
    held: list[Route] = []

    def hold_first(route: Route) -> None:
        held.append(route)
        if len(held) > 1:
            route.continue_()

    page.route("**/v1/search", hold_first)
    page.locator("#sentence").press_sequentially("the green one", delay=1)
    expect(page.locator("#results")).to_have_attribute("aria-busy", "true")
    page.locator("#sentence").fill("the blue one")
    expect(page.locator(".name").first).to_have_text("red left.png")
    assert tab.bodies_sent_to("/v1/search")[-1]["expression"] == "the blue one"
    assert held[0].request.failure == "net::ERR_ABORTED"


def test_the_viewer_shows_all_instances_of_a_photo(tab: Tab, page: Page) -> None:
    search(page, "the red one on the left").first.locator(".open").click()
    viewer = page.get_by_role("dialog", name="red left.png")
    marks = viewer.locator(".mark")
    expect(marks).to_have_count(2)
    stage = viewer.locator(".frame")
    assert drawn_box(stage, ".mark.hit") == pytest.approx(shares(RED_LEFT, SIZE), abs=0.01)
    other = shares((400, 150, 600, 380), SIZE)
    assert drawn_box(stage, ".mark.other") == pytest.approx(other, abs=0.01)
    side = viewer.locator("#viewer-side")
    expect(side).to_contain_text("Likely")
    expect(side).to_contain_text("Photo shows it")
    viewer.locator(".mark.other").hover()
    expect(viewer.locator("#viewer-side")).to_contain_text("Another object")
    viewer.locator(".mark.other").click()
    expect(viewer).to_be_hidden()
    expect(page.locator(".chip")).to_contain_text("like red left.png")
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
    (body,) = tab.bodies_sent_to("/v1/search/similar")
    assert body["instance_id"].endswith("#0")
    assert body["expression"] == "the red one on the left"


def test_a_box_that_appears_under_the_pointer_is_not_chosen(page: Page) -> None:
    """The pointer rests where the user clicked the card; the viewer is about the hit."""
    card = search(page, "the red one on the left").first.locator(".open")
    card.click()
    viewer = page.get_by_role("dialog", name="red left.png")
    other = viewer.locator(".mark.other").bounding_box()
    assert other is not None
    page.mouse.move(other["x"] + other["width"] / 2, other["y"] + other["height"] / 2)
    expect(viewer.locator("#viewer-side")).to_contain_text("Another object")
    page.keyboard.press("Escape")
    page.keyboard.press("Enter")  # the card has the focus again
    expect(viewer.locator(".mark.other")).to_have_count(1)
    page.wait_for_timeout(300)  # until the browser has noticed what lies under the pointer
    expect(viewer.locator("#viewer-side")).to_contain_text("Photo shows it")


def test_more_like_this_and_not_this(tab: Tab, page: Page) -> None:
    cards = search(page, "the red one")
    first, second = (cards.nth(n).get_attribute("data-instance") for n in (0, 1))
    cards.nth(1).get_by_role("button", name="Not this").click()
    expect(page.locator(f'.card[data-instance="{second}"]')).to_have_count(0)
    cards = answered(page)
    page.locator(f'.card[data-instance="{first}"]').get_by_role("button", name="More like").click()
    expect(page.locator(".chip")).to_have_count(2)
    answered(page)
    last = tab.bodies_sent_to("/v1/search/similar")[-1]
    assert last["instance_id"] == first
    assert last["also"] == [{"instance_id": second, "weight": -0.5}]
    page.reload()
    expect(page.locator(".chip.not .frame")).to_have_attribute("data-state", "shown")
    for chip in page.get_by_role("button", name=re.compile("^Remove")).all()[::-1]:
        chip.click()
    expect(page.locator(".chip")).to_have_count(0)
    expect(page.locator(f'.card[data-instance="{second}"]')).to_have_count(1)


def test_filters(tab: Tab, page: Page) -> None:
    search(page, "the red one")
    page.get_by_text("Filters", exact=True).click()
    page.get_by_text("Right", exact=True).click()
    expect(page.locator("#num-filters")).to_have_text("(1)")
    answered(page)
    assert "red left.png" not in hit_names(page)[:2]
    page.fill("#where", "area < 0.02")
    page.press("#where", "Enter")
    expect(page.locator("#num-filters")).to_have_text("(2)")
    answered(page)
    assert hit_names(page)[0] == "cyan two.png"
    assert tab.bodies_sent_to("/v1/search")[-1]["where"] == "(cx > 0.5) and (area < 0.02)"
    page.get_by_role("button", name="Clear filters").click()
    answered(page)
    assert tab.bodies_sent_to("/v1/search")[-1]["where"] is None


def test_the_next_page(page: Page) -> None:
    cards = search(page, "the orange one")
    assert cards.count() == 12
    page.get_by_role("button", name="Show more").click()
    expect(page.locator(".card .open").nth(12)).to_be_focused()
    answered(page)
    assert cards.nth(12).locator(".rank").inner_text() == "13"
    ids = [card.get_attribute("data-instance") for card in cards.all()]
    assert len(set(ids)) == len(ids)


PASTE = """([place, data, text]) => {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const copied = new DataTransfer();
    copied.items.add(new File([bytes], "copied.png", { type: "image/png" }));
    if (text) copied.setData("text/plain", text);
    return document.querySelector(place).dispatchEvent(new ClipboardEvent("paste", {
        bubbles: true, cancelable: true, clipboardData: copied }));
}"""


@pytest.mark.parametrize(
    ("place", "text", "is_photo"),
    [
        ("#sentence", "", True),
        ("#sentence", "the red one", False),  # cells of a spreadsheet come with their picture
        ("#sentence", "copied.png", True),  # file managers put the name of the file next to it
        ("[name=size]", "the red one", True),  # a radio button takes no text
        ("#zoom", "the red one", True),
        ("#presence", "the red one", True),
        ("body", "the red one", True),
    ],
)
def test_a_pasted_photo(page: Page, place: str, text: str, is_photo: bool) -> None:
    inserts_text = page.evaluate(
        PASTE, [place, base64.b64encode(png("red left.png")).decode(), text]
    )
    assert inserts_text is not is_photo
    expect(page.locator(".chip")).to_have_count(int(is_photo))
    expect(page.locator("body")).to_have_attribute("data-view", "local" if is_photo else "start")


def test_searching_in_a_dropped_photo(page: Page) -> None:
    drop(page, "red left.png")
    expect(page.locator("#local")).to_contain_text("describe one object in it")
    enter(page, "the red one")
    expect(page.locator("#local .mark")).to_have_count(2)
    frame = page.locator("#local .frame")
    assert drawn_box(frame, ".mark.hit") == pytest.approx(shares(RED_LEFT, SIZE), abs=0.01)
    expect(page.locator("#local-list li").first).to_contain_text("Likely")
    enter(page, "the zeppelin")
    expect(page.locator("#local")).to_contain_text("Probably not in this photo")
    expect(page.locator("#local .mark.hit")).to_have_count(0)
    enter(page, "the red one")
    expect(page.locator("#local .mark.hit")).to_have_count(1)
    page.get_by_role("button", name="Find similar").first.click()
    expect(page.locator(".card .name").first).to_have_text("red left.png")
    page.get_by_role("button", name=re.compile("^Remove: like")).click()
    expect(page.locator(".chip")).to_have_count(0)
