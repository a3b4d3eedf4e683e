"""The web page in a real browser, over the real application and a gallery of drawn scenes."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Request, Route, expect, sync_playwright

from reir.testing import draw_scene

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")

GALLERY = "scenes"
SIZE, WIDE = (640, 480), (960, 320)
HOSTILE = "<img src=x onerror=alert(1)>.png"
RED_LEFT, RED_RIGHT, RED_WIDE = (40, 120, 200, 400), (420, 100, 600, 300), (700, 60, 900, 200)
NUM_ORANGE = 15
"""More than a page of hits."""

Scene = tuple[tuple[int, int], list[tuple[str, tuple[int, int, int, int]]]]
SCENES: dict[str, Scene] = {
    "red left.png": (SIZE, [("red", RED_LEFT), ("blue", (400, 150, 600, 380))]),
    "red right.png": (SIZE, [("red", RED_RIGHT), ("green", (60, 200, 180, 420))]),
    "red wide.png": (WIDE, [("red", RED_WIDE), ("yellow", (50, 50, 150, 200))]),
    "cyan one.png": (SIZE, [("cyan", (100, 100, 260, 260))]),
    "cyan two.png": (SIZE, [("cyan", (100, 100, 260, 260)), ("red", (500, 300, 540, 340))]),
    HOSTILE: (SIZE, [("magenta", (200, 100, 460, 380))]),
} | {
    f"orange {n:02d}.png": (SIZE, [("orange", (40 + 20 * n, 100, 140 + 20 * n, 220))])
    for n in range(NUM_ORANGE)
}


def png(name: str) -> bytes:
    size, shapes = SCENES[name]
    out = io.BytesIO()
    Image.fromarray(draw_scene(size, shapes)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """A tab of the page, and what its console said."""

    def __init__(self, browser: Browser, address: str, **context: Any) -> None:
        self.context = browser.new_context(base_url=address, **context)
        self.context.set_default_timeout(5000)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.sent: list[Request] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog {dialog.message}"))
        self.page.on("request", self.sent.append)

    def close(self) -> None:
        """End the tab; apart from failed requests that a test wanted, nothing went wrong in it."""
        self.context.close()
        wrong = [text for text in self.said if not text.startswith("Failed to load resource")]
        assert wrong == []

    def asked(self, path: str) -> list[dict[str, Any]]:
        """JSON bodies of the requests to one endpoint."""
        return [r.post_data_json for r in self.sent if urlsplit(r.url).path == path]


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Opened]:
    tab = Opened(browser, address, viewport={"width": 1280, "height": 860})
    yield tab
    tab.close()


@pytest.fixture
def page(opened: Opened) -> Page:
    opened.page.goto("/")
    expect(opened.page.locator("#gallery")).to_have_value(GALLERY)
    return opened.page


def search(page: Page, sentence: str) -> Locator:
    """Ask a sentence and return the cards, once their photos are there."""
    page.fill("#sentence", sentence)
    page.press("#sentence", "Enter")
    return answered(page)


def answered(page: Page) -> Locator:
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
    expect(page.locator(".card:not(.skeleton) .frame[data-state=loading]")).to_have_count(0)
    return page.locator(".card")


def names(page: Page) -> list[str]:
    return page.locator(".card .name").all_inner_texts()


def drawn_box(frame: Locator, mark: str = ".mark") -> list[float]:
    """Where a mark lies on its picture, xyxy in [0, 1], measured on the screen."""
    found: list[float] = frame.evaluate(
        """(frame, mark) => {
            const photo = frame.querySelector("img").getBoundingClientRect();
            const box = frame.querySelector(mark).getBoundingClientRect();
            const x = (side) => (side - photo.left) / photo.width;
            const y = (side) => (side - photo.top) / photo.height;
            return [x(box.left), y(box.top), x(box.right), y(box.bottom)];
        }""",
        mark,
    )
    return found


def shares(box_px: tuple[int, int, int, int], size: tuple[int, int]) -> list[float]:
    return [side / of for side, of in zip(box_px, size * 2, strict=True)]


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
    # the photo keeps its sides, and all of the box is within the frame
    shape = frame.locator("img").evaluate("i => [i.clientWidth, i.clientHeight]")
    assert shape[0] / shape[1] == pytest.approx(size[0] / size[1], rel=0.02)
    inside = frame.evaluate(
        """frame => { const [f, b] = [frame, frame.querySelector(".mark")]
            .map((e) => e.getBoundingClientRect());
            return b.left >= f.left && b.top >= f.top && b.right <= f.right
                && b.bottom <= f.bottom; }"""
    )
    assert inside


def test_a_search_says_what_it_found(page: Page) -> None:
    cards = search(page, "the red one on the left")
    assert names(page)[0] == "red left.png"
    expect(cards.first.locator(".likely")).to_have_text("Very likely")
    expect(cards.first.locator(".rank")).to_have_text("1")
    expect(page.locator("#summary")).to_contain_text(re.compile(r"^\d+ hits .* ms: reading"))
    assert page.locator("#summary").get_attribute("aria-live") == "polite"


def test_an_example_and_the_way_back(page: Page) -> None:
    page.get_by_role("button", name="the blue one").click()
    answered(page)
    assert names(page)[0] == "red left.png"
    assert parse_qs(urlsplit(page.url).fragment)["sentence"] == ["the blue one"]
    search(page, "the green one")
    assert names(page)[0] == "red right.png"
    page.go_back()
    expect(page.locator("#sentence")).to_have_value("the blue one")
    expect(page.locator(".name").first).to_have_text("red left.png")
    page.reload()
    expect(page.locator(".name").first).to_have_text("red left.png")


def test_typing_searches_and_only_the_last_answer_counts(opened: Opened, page: Page) -> None:
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
    assert [each["expression"] for each in opened.asked("/v1/search")] == [
        "the green one",
        "the blue one",
    ]
    assert held[0].request.failure == "net::ERR_ABORTED"


def test_a_hit_opens_with_all_that_is_in_its_photo(opened: Opened, page: Page) -> None:
    search(page, "the red one on the left").first.locator(".open").click()
    viewer = page.get_by_role("dialog", name="red left.png")
    marks = viewer.locator(".mark")
    expect(marks).to_have_count(2)
    stage = viewer.locator(".frame")
    assert drawn_box(stage, ".mark.hit") == pytest.approx(shares(RED_LEFT, SIZE), abs=0.01)
    other = shares((400, 150, 600, 380), SIZE)
    assert drawn_box(stage, ".mark.other") == pytest.approx(other, abs=0.01)
    expect(viewer.locator("#viewer-side")).to_contain_text("Very likely")
    viewer.locator(".mark.other").hover()
    expect(viewer.locator("#viewer-side")).to_contain_text("Another object")
    viewer.locator(".mark.other").click()
    expect(viewer).to_be_hidden()
    expect(page.locator(".chip")).to_contain_text("like red left.png")
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
    (asked,) = opened.asked("/v1/search/similar")
    assert asked["instance_id"].endswith("#1")
    assert asked["expression"] == "the red one on the left"


def test_more_like_this_and_not_this(opened: Opened, page: Page) -> None:
    cards = search(page, "the red one")
    first, second = (cards.nth(n).get_attribute("data-instance") for n in (0, 1))
    cards.nth(1).get_by_role("button", name="Not this").click()
    expect(page.locator(f'.card[data-instance="{second}"]')).to_have_count(0)
    cards = answered(page)
    page.locator(f'.card[data-instance="{first}"]').get_by_role("button", name="More like").click()
    expect(page.locator(".chip")).to_have_count(2)
    answered(page)
    last = opened.asked("/v1/search/similar")[-1]
    assert last["instance_id"] == first
    assert last["also"] == [{"instance_id": second, "weight": -0.5}]
    page.reload()
    expect(page.locator(".chip.not .frame")).to_have_attribute("data-state", "shown")
    for chip in page.get_by_role("button", name=re.compile("^Remove")).all()[::-1]:
        chip.click()
    expect(page.locator(".chip")).to_have_count(0)
    expect(page.locator(f'.card[data-instance="{second}"]')).to_have_count(1)


def test_filters(opened: Opened, page: Page) -> None:
    search(page, "the red one")
    page.get_by_text("Filters", exact=True).click()
    page.get_by_text("Right", exact=True).click()
    expect(page.locator("#num-filters")).to_have_text("(1)")
    answered(page)
    assert "red left.png" not in names(page)[:2]
    page.fill("#where", "area < 0.02")
    page.press("#where", "Enter")
    expect(page.locator("#num-filters")).to_have_text("(2)")
    answered(page)
    assert names(page)[0] == "cyan two.png"
    assert opened.asked("/v1/search")[-1]["where"] == "(cx > 0.5) and (area < 0.02)"
    page.get_by_role("button", name="Drop the filters").click()
    answered(page)
    assert opened.asked("/v1/search")[-1]["where"] is None


def test_a_wrong_condition_is_explained(page: Page) -> None:
    search(page, "the red one")
    page.get_by_text("Filters", exact=True).click()
    page.fill("#where", "colour = red")
    page.press("#where", "Enter")
    notice = page.get_by_role("alert")
    expect(notice).to_contain_text("The server cannot work with that")
    expect(notice).to_contain_text("colour")
    page.fill("#where", "")
    page.press("#where", "Enter")
    answered(page)
    assert names(page)


def test_what_is_not_there(page: Page) -> None:
    search(page, "the zeppelin")
    expect(page.locator("#notice")).to_contain_text("Probably not in \u201cscenes\u201d")
    expect(page.locator("#grid")).to_be_hidden()
    page.get_by_role("button", name="Show the nearest anyway").click()
    expect(page.locator("#grid.nearest .card").first).to_be_visible()
    search(page, "the blue one")
    expect(page.locator("#notice")).to_be_empty()
    expect(page.locator("#grid")).not_to_have_class("nearest")


def test_equally_good_answers(page: Page) -> None:
    cards = search(page, "the cyan one")
    expect(page.locator("#notice")).to_contain_text("2 equally good")
    expect(cards.locator(".tied")).to_have_count(2)


def test_the_next_page(page: Page) -> None:
    cards = search(page, "the orange one")
    assert cards.count() == 12
    page.get_by_role("button", name="Show more").click()
    expect(page.locator(".card .open").nth(12)).to_be_focused()
    answered(page)
    assert cards.nth(12).locator(".rank").inner_text() == "13"
    ids = [card.get_attribute("data-instance") for card in cards.all()]
    assert len(set(ids)) == len(ids)


DROP = """([name, data]) => {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const dragged = new DataTransfer();
    dragged.items.add(new File([bytes], name, { type: "image/png" }));
    for (const type of ["dragenter", "dragover", "drop"]) {
        document.body.dispatchEvent(new DragEvent(type, {
            bubbles: true, cancelable: true, dataTransfer: dragged }));
    }
}"""


def drop(page: Page, name: str) -> None:
    page.evaluate(DROP, [name, base64.b64encode(png(name)).decode()])
    expect(page.locator("#local .frame")).to_have_attribute("data-state", "shown")


def test_a_photo_dropped_in(page: Page) -> None:
    drop(page, "red left.png")
    expect(page.locator("#local")).to_contain_text("describe one object in it")
    page.fill("#sentence", "the red one")
    page.press("#sentence", "Enter")
    expect(page.locator("#local .mark")).to_have_count(2)
    frame = page.locator("#local .frame")
    assert drawn_box(frame, ".mark.hit") == pytest.approx(shares(RED_LEFT, SIZE), abs=0.01)
    expect(page.locator("#local-list li").first).to_contain_text("Very likely")
    page.fill("#sentence", "the zeppelin")
    page.press("#sentence", "Enter")
    expect(page.locator("#local")).to_contain_text("Nothing in it fits")
    expect(page.locator("#local .mark.hit")).to_have_count(0)
    page.fill("#sentence", "the red one")
    page.press("#sentence", "Enter")
    page.get_by_role("button", name="Find in the gallery").first.click()
    expect(page.locator(".card .name").first).to_have_text("red left.png")
    page.get_by_role("button", name=re.compile("^Remove: like")).click()
    expect(page.locator(".chip")).to_have_count(0)


def test_the_server_is_down(opened: Opened, page: Page) -> None:
    search(page, "the red one")
    opened.context.set_offline(True)
    page.fill("#sentence", "the blue one")
    page.press("#sentence", "Enter")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    opened.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".name").first).to_have_text("red left.png")


def refusing(status: int, **headers: str) -> Callable[[Route], None]:
    """Answer the first request with a problem, the others as the server does."""
    left = [status]

    def answer(route: Route) -> None:
        if not left:
            route.continue_()
            return
        body = {"type": "/problems/x", "title": "Refused", "detail": "said <b>so</b>"}
        route.fulfill(status=left.pop(), headers=headers, json={**body, "status": status})

    return answer


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_said(page: Page, status: int) -> None:
    page.route("**/v1/search", refusing(status, **{"Retry-After": "1"}))
    page.fill("#sentence", "the blue one")
    page.press("#sentence", "Enter")
    expect(page.get_by_role("alert")).to_contain_text("Trying again in 1 s")
    expect(page.locator(".name").first).to_have_text("red left.png")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_failing_server_is_asked_again_by_hand(page: Page) -> None:
    page.route("**/v1/search", refusing(500))
    search(page, "the blue one")
    expect(page.get_by_role("alert")).to_contain_text("Something went wrong")
    expect(page.get_by_role("alert")).to_contain_text("Said <b>so</b>.")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".name").first).to_have_text("red left.png")


def test_a_key_is_asked_for_and_sent(opened: Opened) -> None:
    page = opened.page
    page.route("**/v1/galleries", refusing(401))
    page.goto("/")
    page.get_by_label("API key").fill("let-me-in")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#gallery")).to_have_value(GALLERY)
    search(page, "the blue one")
    expect(page.locator(".card .frame[data-state=shown]").first).to_be_visible()
    late = [r for r in opened.sent if "/v1/images/" in r.url or r.url.endswith("/v1/search")]
    assert late
    assert {r.headers.get("authorization") for r in late} == {"Bearer let-me-in"}
    assert page.evaluate("localStorage.length") == 0


def test_a_slow_answer_is_announced(page: Page) -> None:
    held: list[Route] = []
    page.route("**/v1/search", held.append)
    page.fill("#sentence", "the blue one")
    page.press("#sentence", "Enter")
    expect(page.locator(".skeleton").first).to_be_visible()
    expect(page.locator(".notice.slow")).to_be_visible()
    held[0].continue_()
    expect(page.locator(".name").first).to_have_text("red left.png")
    expect(page.locator(".notice.slow")).to_have_count(0)


def test_the_keyboard_is_enough(page: Page) -> None:
    page.locator("body").press("/")
    expect(page.locator("#sentence")).to_be_focused()
    page.keyboard.type("the orange one")
    page.keyboard.press("Enter")
    cards = answered(page)
    page.keyboard.press("ArrowDown")
    expect(cards.nth(0).locator(".open")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(cards.nth(1).locator(".open")).to_be_focused()
    page.keyboard.press("ArrowDown")
    columns = page.evaluate("getComputedStyle(grid).gridTemplateColumns.split(' ').length")
    expect(cards.nth(1 + columns).locator(".open")).to_be_focused()
    page.keyboard.press("Enter")
    viewer = page.locator("#viewer")
    expect(viewer).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(viewer.locator("#viewer-place")).to_have_text(f"Hit {3 + columns} of 12")
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    expect(cards.nth(2 + columns).locator(".open")).to_be_focused()
    page.keyboard.press("n")
    expect(page.locator(".chip.not")).to_have_count(1)
    answered(page)
    expect(cards.first.locator(".open")).to_be_focused()
    page.keyboard.press("m")
    expect(page.locator(".chip.more")).to_have_count(1)


def test_every_control_has_a_name(page: Page) -> None:
    search(page, "the red one")
    page.get_by_text("Filters", exact=True).click()
    for scope in ("body", "#viewer"):
        if scope == "#viewer":
            page.locator(".card .open").first.click()
            expect(page.locator("#viewer .mark")).not_to_have_count(0)
        nameless = page.locator(scope).evaluate(
            """scope => [...scope.querySelectorAll("button, input:not([type=radio]), select, a")]
                .filter((e) => e.checkVisibility())
                .filter((e) => !(e.ariaLabel || e.innerText || e.labels?.length || e.title))
                .map((e) => e.outerHTML)"""
        )
        assert nameless == []


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_wider_than_the_screen(browser: Browser, address: str, width: int) -> None:
    tab = Opened(browser, address, viewport={"width": width, "height": 740}, has_touch=True)
    page = tab.page

    def check(what: str) -> None:
        page_width = page.evaluate("document.documentElement.scrollWidth")
        assert page_width <= width, f"{what} is {page_width} px wide"

    page.goto("/")
    expect(page.locator("#gallery")).to_have_value(GALLERY)
    check("the start")
    search(page, "the magenta one")
    page.get_by_text("Filters", exact=True).click()
    check("the answer")
    page.get_by_role("button", name="Not this").first.click()
    expect(page.locator(".chip")).to_have_count(1)
    check("the chips")
    page.locator(".card .open").first.click()
    expect(page.locator("#viewer .mark")).not_to_have_count(0)
    check("the viewer")
    wide = page.locator("#viewer").evaluate("v => v.scrollWidth - v.clientWidth")
    assert wide <= 0
    page.keyboard.press("Escape")
    drop(page, "red left.png")
    check("the photo")
    tab.close()


def test_hostile_names_are_only_text(page: Page) -> None:
    cards = search(page, "the magenta one")
    expect(cards.first.locator(".name")).to_have_text(HOSTILE)
    cards.first.locator(".open").click()
    viewer = page.locator("#viewer")
    expect(viewer.locator("#viewer-title")).to_have_text(HOSTILE)
    expect(viewer.locator("dd", has_text="<script>alert(2)</script>")).to_be_visible()
    page.keyboard.press("m")
    expect(page.locator(".chip")).to_contain_text(HOSTILE)
    page.goto(
        "/#gallery=%3Cb%3Enone&sentence=%3Cimg%20src%3Dx%20onerror%3Dalert(3)%3E&size=%3Cb%3E"
    )
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("<b>none")
    assert page.locator("img[onerror], main b b, .notice script").count() == 0


def test_photos_are_added_and_deleted(page: Page) -> None:
    out = io.BytesIO()
    Image.fromarray(draw_scene(SIZE, [("purple", (100, 100, 300, 300))])).save(out, "PNG")
    added = {"name": "new purple.png", "mimeType": "image/png", "buffer": out.getvalue()}
    broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"no picture"}
    page.set_input_files("#add-file", [added, broken])  # type: ignore[list-item]
    expect(page.locator("#notice")).to_contain_text(
        "1 photo added to \u201cscenes\u201d, with 1 object"
    )
    expect(page.locator("#notice")).to_contain_text("broken.png: ")
    cards = search(page, "the purple one")
    expect(cards.first.locator(".name")).to_have_text("new purple.png")
    cards.first.locator(".open").click()
    page.get_by_role("button", name="Delete photo").click()
    expect(page.locator("#viewer")).to_be_visible()
    page.get_by_role("button", name="Really delete it?").click()
    expect(page.locator(".name", has_text="new purple.png")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Browser, address: str, scheme: str) -> None:
    """WCAG 2.2 AA: a contrast of 4.5 for the pairs of colours that text is written in."""
    tab = Opened(browser, address, color_scheme=scheme)
    tab.page.goto("/")
    pairs = [
        (ink, on) for ink in ("ink", "faint", "accent", "good", "fair") for on in ("paper", "card")
    ]
    pairs += [("on-accent", "accent"), ("accent", "wash"), ("faint", "ground")]
    for ink, on in pairs:
        contrast = tab.page.evaluate(
            """([ink, on]) => {
                const light = (name) => {
                    const hex = getComputedStyle(document.documentElement)
                        .getPropertyValue(`--${name}`).trim().slice(1);
                    const [r, g, b] = [0, 2, 4]
                        .map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
                        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
                    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
                };
                const [a, b] = [light(ink), light(on)].sort((x, y) => y - x);
                return (a + 0.05) / (b + 0.05);
            }""",
            [ink, on],
        )
        assert contrast >= 4.5, f"{ink} on {on}: {contrast:.2f}"
    tab.close()
