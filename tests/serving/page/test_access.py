"""Accessibility of the web page: keyboard, screen reader, phone, light and dark colors."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser, Page, expect

from .conftest import GALLERY, Tab, answered, drop, search


def test_the_page_works_with_the_keyboard_alone(page: Page) -> None:
    expect(page.locator("#sentence")).to_be_focused()
    page.locator("#sentence").blur()
    page.keyboard.press("/")
    expect(page.locator("#sentence")).to_be_focused()
    expect(page.locator("#sentence")).to_have_value("")
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
    tab = Tab(browser, address, viewport={"width": width, "height": 740}, has_touch=True)
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(browser: Browser, address: str, scheme: str) -> None:
    """WCAG 2.2 AA requires a contrast of 4.5 between text and its background."""
    tab = Tab(browser, address, color_scheme=scheme)
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
