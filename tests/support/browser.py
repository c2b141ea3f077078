"""Chromium without a window, on pages that lie in files."""

import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from playwright.sync_api import Browser, Page, Playwright, sync_playwright

# By name: width and height, and whether it is touched.
SIZES = {"phone": (390, 844, True), "desktop": (1280, 900, False)}
WHERE_FROM = "no Chromium: install the system's package `chromium`, or run `playwright install chromium`"


class Opened(NamedTuple):
    """A page, and what it has said or asked for that it should not."""

    page: Page
    said: list[str]
    asked: list[str]


def executable(playwright: Playwright) -> str | None:
    """Playwright's own Chromium, or else the system's."""
    own = playwright.chromium.executable_path
    return own if Path(own).exists() else shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def chromium() -> Iterator[Browser | None]:
    """A browser, or None if there is no Chromium."""
    with sync_playwright() as playwright:
        path = executable(playwright)
        if path is None:
            yield None
            return
        # Its sandbox is not to be had as root or in containers; the pages are our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, file: Path, size: str = "desktop", scheme: Any = "light") -> Generator[Opened]:
    """The page in `file`, in a window of one of SIZES."""
    width, height, touched = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=touched)
    page = context.new_page()
    found = Opened(page, [], [])
    page.on("console", lambda message: found.said.append(message.text))
    page.on("pageerror", lambda error: found.said.append(str(error)))
    page.on("request", lambda request: found.asked.append(request.url))
    page.goto(file.as_uri())
    yield found
    context.close()


def loading_ms(page: Page) -> float:
    """From the start of opening a page until it is loaded and drawn."""
    painted = "performance.getEntriesByName('first-contentful-paint')"
    while not page.evaluate(f"{painted}.length"):  # The page's policy keeps wait_for_function out.
        page.wait_for_timeout(20)
    return page.evaluate(
        f"Math.max({painted}[0].startTime, performance.getEntriesByType('navigation')[0].loadEventEnd)"
    )
