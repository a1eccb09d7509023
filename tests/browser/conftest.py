"""A browser for tests: Debian's Chromium, driven by Playwright, with what a page did wrong kept."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class Opened:
    """A page, the errors it raised or logged, and the addresses off this machine that it asked for and got."""

    page: Any
    errors: list[str] = field(default_factory=list)
    abroad: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need the PyPI package playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("browser tests need Chromium (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Any]:
    """Return a function that opens an address and returns what it Opened."""
    pages = []

    def open_(address: str, **context: Any) -> Opened:
        page = chromium.new_page(viewport={"width": 1280, "height": 900}, **context)
        pages.append(page)
        found = Opened(page)
        page.on("pageerror", lambda error: found.errors.append(str(error)))
        page.on("console", lambda said: found.errors.append(said.text) if said.type == "error" else None)
        page.on("requestfinished", lambda one: found.abroad.append(one.url) if _abroad(one.url) else None)
        page.goto(address, wait_until="load", timeout=120_000)
        return found

    yield open_
    for page in pages:
        page.close()


def _abroad(url: str) -> bool:
    return not url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:"))


@pytest.fixture
def serving() -> Any:
    """Return a context in which a server answers."""

    @contextmanager
    def serve(server: Any) -> Iterator[Any]:
        with server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield server
            server.shutdown()

    return serve
