"""The pages in a real browser: nothing is loaded or refused, and nothing is wider than a phone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from coldstill.trainer.run_report.compare import comparison_page, read_runs
from coldstill.trainer.run_report.page import run_page
from tests.trainer.run_report.test_compare import NOW, put, record


@pytest.mark.slow
def test_a_browser_shows_the_pages_on_a_phone_and_loads_nothing(tmp_path: Path) -> None:
    program = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    if program is None:
        pytest.skip("no browser is installed")
    settings = {"loss.name": "taid", "dataset": "/very/long" * 40}
    runs = [put(tmp_path / ("run" * 30 + str(n)), settings={**settings, "data.seed": n}) for n in range(5)]
    pages = {
        "run.html": run_page(record(settings=settings, resumed=[20]), name="name" * 30, now=NOW),
        "compare.html": comparison_page(read_runs(runs), now=NOW),
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for name, text in pages.items():
            (tmp_path / name).write_text(text)
            view = browser.new_page(viewport={"width": 390, "height": 844})
            said: list[str] = []
            loaded: list[str] = []
            view.on("console", lambda message, said=said: said.append(message.text))
            view.on("request", lambda request, loaded=loaded: loaded.append(request.url))
            view.goto((tmp_path / name).as_uri())
            assert view.evaluate("document.documentElement.scrollWidth") <= 390
            assert view.locator("svg").count() >= 4
            assert (said, len(loaded)) == ([], 1)
        browser.close()
