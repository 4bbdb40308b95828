"""A real browser for pages: Playwright driving the system's Chromium, which never reaches a network."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
_SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost",
)


def chromium() -> str:
    """The path of a Chromium, or skip."""
    for name in CHROMIUMS:
        if found := shutil.which(name):
            return found
    pytest.skip("needs a Chromium on the PATH")


@contextmanager
def browser() -> Iterator[Any]:
    """A headless browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium(), args=list(_SWITCHES))
        try:
            yield made
        finally:
            made.close()


class Heard:
    """What a page said while it was open: console errors, uncaught exceptions, requests that leave it."""

    def __init__(self, page: Any, *allowed: str):
        self.errors: list[str] = []
        self.left: list[str] = []
        inside = ("file:", "data:", "blob:", "about:", *allowed)
        page.on("console", lambda m: m.type in ("error", "warning") and self.errors.append(m.text))
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.on("request", lambda r: r.url.startswith(inside) or self.left.append(r.url))
