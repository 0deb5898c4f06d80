"""A real browser, Debian's Chromium, that notes everything that a page does wrong."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Page,
    Response,
    expect,
    sync_playwright,
)

CHROMIUM = "/usr/bin/chromium"
WIDTHS = (360, 1600)
TIMEOUT_MS = 60_000
expect.set_options(timeout=TIMEOUT_MS)
_HEIGHT = 900
_GRAVE = ("serious", "critical")
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
_SHOTS = os.environ.get("PAGE_SHOTS", "")
"""A folder for pictures of what is looked at, for people; empty = none."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run the browser; nothing is downloaded, and it speaks to the loopback interface only."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Tab:
    """A page of one window, and what went wrong in it."""

    page: Page
    address: str
    faults: list[str] = field(default_factory=list)

    def open(self, path: str) -> None:
        """Go to a page; it must be answered."""
        answer = self.page.goto(self.address + path)
        assert answer is not None
        assert answer.status == 200, f"{path}: {answer.status}"

    def findings(self, *rules: str) -> list[str]:
        """Return what axe takes for serious or critical, by all of its rules or by some."""
        options: dict[str, Any] = {"resultTypes": ["violations"]}
        if rules:
            options["runOnly"] = list(rules)
        found = Axe().run(self.page, options=options).response["violations"]
        return [
            f"{self.page.url}: {rule['id']}: {node['html']}: {node.get('failureSummary')}"
            for rule in found
            if rule["impact"] in _GRAVE
            for node in rule["nodes"]
        ]

    def look(self, width: int, theme: Any) -> None:
        """Be as wide as a screen, by day or by night."""
        self.page.emulate_media(color_scheme=theme)
        self.page.set_viewport_size({"width": width, "height": _HEIGHT})

    def shoot(self, name: str) -> None:
        """Keep a picture, where somebody wants pictures."""
        if _SHOTS:
            self.page.screenshot(path=Path(_SHOTS) / f"{name}.png", full_page=True)


@contextmanager
def tab(browser: Browser, address: str, **options: Any) -> Iterator[Tab]:
    """Open a window of its own, with its own cookies; fails when a page did something wrong."""
    context = browser.new_context(viewport={"width": 1600, "height": _HEIGHT}, **options)
    context.set_default_timeout(TIMEOUT_MS)
    opened = Tab(context.new_page(), address)

    def note_message(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            opened.faults.append(f"{opened.page.url}: {message.text}")

    def note_answer(answer: Response) -> None:
        if answer.status >= 500:
            opened.faults.append(f"{answer.url}: {answer.status}")

    opened.page.on("console", note_message)
    opened.page.on("pageerror", lambda error: opened.faults.append(str(error)))
    opened.page.on("response", note_answer)
    try:
        yield opened
        assert opened.faults == [], opened.faults
    finally:
        context.close()
