"""The web page when something is wrong: no match, ties, errors, a slow server, hostile names."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from PIL import Image
from playwright.sync_api import FilePayload, Page, Route, expect

from reir.models.nano.encoder import cpu_path
from reir_testing import draw_scene

from .conftest import GALLERY, HOSTILE, SCENES, SIZE, Tab, answered, enter, hit_names, search


def refusing(status: int, **headers: str) -> Callable[[Route], None]:
    """Return a handler that answers the first request with a problem, and passes the others on."""
    left = [status]

    def answer(route: Route) -> None:
        if not left:
            route.continue_()
            return
        body = {"type": "/problems/x", "title": "Refused", "detail": "bad <b>input</b>"}
        route.fulfill(status=left.pop(), headers=headers, json={**body, "status": status})

    return answer


def test_an_invalid_condition_is_explained(page: Page) -> None:
    search(page, "the red one")
    page.get_by_text("Filters", exact=True).click()
    page.fill("#where", "color = red")
    page.press("#where", "Enter")
    notice = page.get_by_role("alert")
    expect(notice).to_contain_text("The server rejected the request")
    expect(notice).to_contain_text("color")
    page.fill("#where", "")
    page.press("#where", "Enter")
    answered(page)
    assert hit_names(page)


def test_an_object_that_is_not_in_the_gallery(page: Page) -> None:
    cards = search(page, "the purple one")
    notice = page.locator("#notice h2")
    expect(notice).to_have_text("Probably not in this gallery. The nearest misses:")
    expect(notice).to_have_attribute("title", re.compile(r"in this gallery is \d|under 1%"))
    expect(page.locator("#grid.absent .card").first).to_be_visible()
    expect(cards.first.locator(".likely")).to_have_text("Unlikely")
    # The first card is the one that comes nearest to purple, so its color may be in doubt.
    differing = cards.filter(has=page.locator(".differs")).first
    expect(differing.locator(".differs")).to_have_text(re.compile(r"^\w+, not purple$"))
    differing.locator(".open").click()
    expect(page.locator("#viewer-side")).to_contain_text(", not purple")
    page.keyboard.press("Escape")
    cards = search(page, "the blue one")
    expect(page.locator("#notice")).to_be_empty()
    expect(page.locator("#grid.absent")).to_have_count(0)
    expect(cards.first.locator(".differs")).to_have_count(0)


def test_a_sentence_that_does_not_read_like_english(page: Page) -> None:
    search(page, "das rote neben dem blauen")
    expect(page.locator("#summary")).to_contain_text("does not look like English")
    search(page, "the red one")
    expect(page.locator("#summary")).not_to_contain_text("English")


def test_an_answer_that_is_only_possible_is_shown_as_doubtful(page: Page) -> None:
    def doubting(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "likelihood": "possible"})

    page.route("**/v1/search", doubting)
    search(page, "the red one")
    expect(page.locator("#summary")).to_contain_text("the object may not be there")


def test_the_page_shows_the_number_format_of_the_models(page: Page) -> None:
    expect(page.locator("#release")).to_contain_text(f"compute in {cpu_path()}")


def test_hits_that_match_equally_well(page: Page) -> None:
    cards = search(page, "the cyan one")
    expect(page.locator("#notice")).to_contain_text("2 photos fit equally well")
    expect(cards.locator(".tied")).to_have_count(2)


def test_a_server_that_does_not_answer(tab: Tab, page: Page) -> None:
    search(page, "the red one")
    tab.context.set_offline(True)
    enter(page, "the blue one")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    tab.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".name").first).to_have_text("red left.png")


@pytest.mark.parametrize("status", [429, 503])
def test_the_page_retries_when_a_busy_server_said_to(page: Page, status: int) -> None:
    page.route("**/v1/search", refusing(status, **{"Retry-After": "1"}))
    enter(page, "the blue one")
    expect(page.get_by_role("alert")).to_contain_text("Trying again in 1 s")
    expect(page.locator(".name").first).to_have_text("red left.png")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_the_user_can_retry_after_an_error_of_the_server(page: Page) -> None:
    page.route("**/v1/search", refusing(500))
    search(page, "the blue one")
    expect(page.get_by_role("alert")).to_contain_text("Something went wrong")
    expect(page.get_by_role("alert")).to_contain_text("Bad <b>input</b>.")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".name").first).to_have_text("red left.png")


KEY = f"reir_0123abcd_{'5' * 64}"


def use_key(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Use this key").click()


def test_a_key_is_asked_for_and_sent(tab: Tab) -> None:
    page = tab.page
    page.route("**/v1/galleries", refusing(401))
    page.goto("/")
    use_key(page, KEY)
    expect(page.locator("#gallery")).to_have_value(GALLERY)
    search(page, "the blue one")
    expect(page.locator(".card .frame[data-state=shown]").first).to_be_visible()
    late = [r for r in tab.requests if "/v1/images/" in r.url or r.url.endswith("/v1/search")]
    assert late
    assert {r.headers.get("authorization") for r in late} == {f"Bearer {KEY}"}
    assert page.evaluate("localStorage.length") == 0


@pytest.mark.parametrize("odd", ["\u2013", "-", "\u00e9"])
def test_a_key_with_a_character_that_no_key_has_is_not_kept(tab: Tab, odd: str) -> None:
    page = tab.page
    page.route("**/v1/galleries", refusing(401))
    page.goto("/")
    use_key(page, KEY.replace("_", odd))
    expect(page.get_by_role("alert")).to_contain_text(f"contains \u201c{odd}\u201d")
    assert page.evaluate("sessionStorage.length") == 0
    use_key(page, KEY)
    expect(page.locator("#gallery")).to_have_value(GALLERY)


@pytest.mark.parametrize("body", ["<h1>Log in to this network</h1>", '{"hits": ['])
def test_an_answer_that_cannot_be_read(page: Page, body: str) -> None:
    """A page of something in between, or a connection that ended too early."""
    page.route("**/v1/search", lambda route: route.fulfill(status=200, body=body), times=1)
    enter(page, "the blue one")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The answer of the server cannot be read")
    expect(alert).to_contain_text("that you are connected")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".name").first).to_have_text("red left.png")


def test_a_slow_answer_is_announced(page: Page) -> None:
    held: list[Route] = []
    page.route("**/v1/search", lambda route: held.append(route))
    enter(page, "the blue one")
    expect(page.locator(".skeleton").first).to_be_visible()
    expect(page.locator(".notice.slow")).to_be_visible()
    held[0].continue_()
    expect(page.locator(".name").first).to_have_text("red left.png")
    expect(page.locator(".notice.slow")).to_have_count(0)


def test_hostile_names_are_only_text(page: Page) -> None:
    cards = search(page, "the magenta one")
    expect(cards.first.locator(".name")).to_have_text(HOSTILE)
    cards.first.locator(".open").click()
    viewer = page.locator("#viewer")
    expect(viewer.locator("#viewer-title")).to_have_text(HOSTILE)
    expect(viewer.locator("dd", has_text=HOSTILE.removesuffix(".png"))).to_be_visible()
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
    added = FilePayload(name="new purple.png", mimeType="image/png", buffer=out.getvalue())
    broken = FilePayload(name="broken.png", mimeType="image/png", buffer=b"no picture")
    expect(page.locator("#holds")).to_contain_text(f"{len(SCENES)} photos")
    page.set_input_files("#add-file", [added, broken])
    expect(page.locator("#notice")).to_contain_text(
        "1 photo added to \u201cscenes\u201d, with 1 object"
    )
    expect(page.locator("#notice")).to_contain_text("broken.png: ")
    expect(page.locator("#holds")).to_contain_text(f"{len(SCENES) + 1} photos")
    cards = search(page, "the purple one")
    expect(cards.first.locator(".name")).to_have_text("new purple.png")
    cards.first.locator(".open").click()
    page.get_by_role("button", name="Delete photo").click()
    expect(page.locator("#viewer")).to_be_visible()
    page.get_by_role("button", name="Really delete it?").click()
    expect(page.locator(".name", has_text="new purple.png")).to_have_count(0)
