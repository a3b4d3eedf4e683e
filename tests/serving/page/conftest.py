"""A browser and a server for the tests of the page: the real service with drawn scenes.

Both stop at the end of a test module, because Playwright keeps an event loop running in the thread
that drives the browser, and other tests could not start their own loop in that thread.
"""

from __future__ import annotations

import asyncio
import base64
import io
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Request, expect, sync_playwright

from reir.checkpoint import load_color_reader
from reir.models.nano.color_reader import ColorReader
from reir.query.search import CheckpointExtras
from reir.query.verify.photos import PixelVerifier
from reir.store import open_store
from reir_serving.backend.models import LoadedModel, ModelCache
from reir_serving.backend.service import Service
from reir_serving.backend.workers import SearchWorkers
from reir_serving.config import ServeConfig
from reir_serving.http.app import create_app
from reir_testing import FakeEncoder, draw_scene
from reir_testing.evaluation.calibrations import score_calibration
from reir_testing.serving import index_photos

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
GALLERY, OTHER = "scenes", "twins"
EXAMPLES = ("the blue one", "the red one on the left")
SIZE, WIDE = (640, 480), (960, 320)
HOSTILE = "<img src=x onerror=alert(1)>.png"
RED_LEFT, RED_RIGHT, RED_WIDE = (40, 120, 200, 400), (420, 100, 600, 300), (700, 60, 900, 200)
NUM_ORANGE = 15
"""More hits than one page has."""

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


IN_OTHER = ("red left.png", "red wide.png")
"""Scenes that the other gallery has, too."""


def png(name: str) -> bytes:
    size, shapes = SCENES[name]
    out = io.BytesIO()
    Image.fromarray(draw_scene(size, shapes)).save(out, "PNG")
    return out.getvalue()


"""Gives 0.998 for a score of 0.9, and 0.002 for a score of 0.3."""

CALIBRATION = score_calibration(FakeEncoder().digest, 20, -12, tie_margin=1e-4)


@cache
def color_reader() -> ColorReader:
    """Return the shipped color reader, ready to read: otherwise, the first search is too slow."""
    reader = load_color_reader()
    assert reader is not None
    reader.read(draw_scene(SIZE, []), [(np.array([0, 0, 1, 1], np.float32), "red")])
    return reader


@pytest.fixture(scope="module")
def search_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the server's search log, in which feedback is recorded."""
    return tmp_path_factory.mktemp("searches")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, search_log: Path) -> Iterator[str]:
    """Address of a server on a free port."""
    with page_server(tmp_path_factory.mktemp("scenes"), search_log) as address:
        yield address


@contextmanager
def page_server(folder: Path, search_log: Path | None) -> Iterator[str]:
    """Serve the scenes, whose photos are drawn into a folder; yields the address."""
    for name in SCENES:
        (folder / name).write_bytes(png(name))
    store = open_store("memory:")
    index_photos(store, GALLERY, [folder / name for name in SCENES])
    index_photos(store, OTHER, [folder / name for name in IN_OTHER])
    config = ServeConfig(
        store="memory:", galleries=(GALLERY, OTHER), examples=EXAMPLES, search_log=search_log
    )
    extras = CheckpointExtras(calibration=CALIBRATION, verifier=PixelVerifier(color_reader))
    loaded = LoadedModel(FakeEncoder(), extras)
    color_reader()
    workers = SearchWorkers(store, ModelCache(lambda _: loaded), config.limits)
    service = Service(config, store, workers, folder / "uploads")
    server = uvicorn.Server(
        uvicorn.Config(create_app(service, config), port=0, log_level="warning")
    )

    async def serve() -> None:
        await service.warm_up()
        await server.serve()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        store.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not on the PATH; `apt-get install chromium` installs it")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Tab:
    """A browser tab with the page; records console messages and requests."""

    def __init__(self, browser: Browser, address: str, **context: Any) -> None:
        self.context = browser.new_context(base_url=address, **context)
        self.context.set_default_timeout(5000)
        self.page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[Request] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: self.messages.append(f"dialog {dialog.message}"))
        self.page.on("request", lambda request: self.requests.append(request))

    def close(self) -> None:
        """Close the tab, and check that its console has only errors that the tests provoked."""
        self.context.close()
        errors = [text for text in self.messages if not text.startswith("Failed to load resource")]
        assert errors == []

    def bodies_sent_to(self, path: str) -> list[dict[str, Any]]:
        """Return the JSON bodies of the requests to one endpoint."""
        return [r.post_data_json or {} for r in self.requests if urlsplit(r.url).path == path]


@pytest.fixture
def tab(browser: Browser, address: str) -> Iterator[Tab]:
    tab = Tab(browser, address, viewport={"width": 1280, "height": 860})
    yield tab
    tab.close()


@pytest.fixture
def page(tab: Tab) -> Page:
    tab.page.goto("/")
    expect(tab.page.locator("#gallery")).to_have_value(GALLERY)
    return tab.page


def search(page: Page, sentence: str) -> Locator:
    """Search for a sentence and return the cards once their photos are shown."""
    enter(page, sentence)
    return answered(page)


def enter(page: Page, sentence: str) -> None:
    """Enter a sentence in one step, so that even a slow machine sends one search.

    The page also searches for a sentence that is typed, after a pause.
    """
    page.locator("#search").evaluate(
        """(form, sentence) => {
            form.querySelector("#sentence").value = sentence;
            form.requestSubmit();
        }""",
        sentence,
    )


def answered(page: Page) -> Locator:
    # A search that looks closer takes seconds on a busy machine.
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false", timeout=30_000)
    expect(page.locator(".card:not(.skeleton) .frame[data-state=loading]")).to_have_count(0)
    return page.locator(".card")


def hit_names(page: Page) -> list[str]:
    return page.locator(".card .name").all_inner_texts()


def drawn_box(frame: Locator, mark: str = ".mark") -> list[float]:
    """Return the position of a mark on its photo, xyxy in [0, 1], measured on the screen."""
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
