"""A row's page in a real browser: it loads and logs nothing, reacts to mouse and keys, and text stays text.

Skipped where Chromium is not installed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from coldstill.tools.inspect.page import write_page
from coldstill.tools.inspect.row_facts import open_row
from tests.tools.inspect import strange_tokens
from tests.tools.vision_data import CAT, PHOTO, SMALL, vision_dataset

DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}

Open = Callable[..., Page]

BELOW = """(number) => {
    const boxes = [...document.querySelectorAll('.token')].map((token) => token.getClientRects()[0]);
    const from = boxes[number];
    const next = Math.min(...boxes.map((box) => box.top).filter((top) => top > from.top + 1));
    const gap = (box) => Math.abs(box.left + box.width / 2 - from.left - from.width / 2);
    const line = [...boxes.keys()].filter((i) => Math.abs(boxes[i].top - next) < 1);
    const least = Math.min(...line.map((i) => gap(boxes[i])));
    return line.filter((i) => gap(boxes[i]) < least + 1);
}"""
"""The numbers of the tokens that are nearest to a token on the next line; two, if it is between them."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = (
        "chromium-headless-shell",
        "chromium",
        "chromium-browser",
        "google-chrome",
        "google-chrome-stable",
        "chrome",
    )
    program = next((found for found in map(shutil.which, names) if found), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Opens a page; after the test it must have loaded nothing but itself, and have logged nothing."""
    contexts, loaded, said = [], [], []

    def visit_page(path: Path, **settings: object) -> Page:
        context = browser.new_context(**{"viewport": DESKTOP, **settings})
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: loaded.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(path.as_uri())
        loaded.remove(path.as_uri())
        return page

    yield visit_page
    for context in contexts:
        context.close()
    assert loaded == []
    assert said == []


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long row")
    return write_page(strange_tokens.long_dataset(folder), 0, folder / "page.html")


@pytest.fixture
def page_file(tiny_dataset: Path, tmp_path: Path) -> Path:
    return write_page(tiny_dataset, 5, tmp_path / "page.html")


def bar_sum(page: Page) -> float:
    """What the bars of the panel sum to."""
    shares = "[...document.querySelectorAll('.bar[data-share]')].map((bar) => Number(bar.dataset.share))"
    return float(sum(page.evaluate(shares)))


def active(page: Page) -> int:
    """Number of the token that the panel shows."""
    (number,) = page.evaluate("[...document.querySelectorAll('.token.active')].map((t) => Number(t.id.slice(1)))")
    return int(number)


def colors(page: Page) -> list[str]:
    return list(page.evaluate("[...document.querySelectorAll('.token')].map((t) => getComputedStyle(t).background)"))


def test_hovering_shows_bars_that_sum_to_one_and_mark_the_real_token(
    visit: Open, page_file: Path, tiny_dataset: Path
) -> None:
    one = open_row(tiny_dataset, 5)
    page = visit(page_file)
    for n, position in enumerate(one.facts.positions.tolist()):
        page.locator(f"#t{position + 1}").hover()
        assert active(page) == position + 1
        assert bar_sum(page) == pytest.approx(1, abs=1e-4)
        assert page.locator("#bars .bar").count() == 8
        words = page.locator("#bars .bar .word").all_text_contents()
        assert words == [one.text.label(i) for i in one.facts.ids[n].tolist()]
        real = page.locator(".bar.real .word").first.text_content() or ""
        assert real.removesuffix(" in the tail") == one.text.label(int(one.facts.labels[n]))
        assert f"{one.facts.surprise[n]:.2f}" in (page.locator("#figures").text_content() or "")


def test_a_token_without_target_shows_no_bars(visit: Open, page_file: Path, tiny_dataset: Path) -> None:
    one = open_row(tiny_dataset, 5)
    context = next(i for i in range(one.row.token_ids.size) if i - 1 not in one.facts.positions)
    page = visit(page_file)
    page.locator(f"#t{context}").hover()
    assert page.locator("#none").is_visible()
    assert not page.locator("#bars").is_visible()


def test_the_keyboard_walks_and_switches(visit: Open, long_page: Path) -> None:
    page = visit(long_page)
    top = "document.querySelector('.token.active').getClientRects()[0].top + scrollY"
    assert active(page) == 1
    page.keyboard.press("ArrowRight")
    assert active(page) == 2
    page.keyboard.press("ArrowLeft")
    assert active(page) == 1
    first = page.evaluate(top)
    page.keyboard.press("ArrowDown")
    assert page.evaluate(top) > first
    # Fonts differ between machines, and with them the line breaks: the page itself shows which token is below.
    assert active(page) in page.evaluate(BELOW, 1)
    page.keyboard.press("ArrowUp")
    assert page.evaluate(top) == pytest.approx(first)
    assert active(page) == 1
    page.keyboard.press("End")
    assert active(page) == 4095
    assert bar_sum(page) == pytest.approx(1, abs=1e-4)
    page.keyboard.press("ArrowRight")
    assert active(page) == 4095
    page.keyboard.press("Home")
    assert active(page) == 0
    by_surprise = colors(page)
    page.keyboard.press("e")
    assert page.locator("input[value=entropy]").is_checked()
    by_entropy = colors(page)
    assert by_entropy != by_surprise
    page.keyboard.press("s")
    assert colors(page) == by_surprise
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#keys").is_visible()


def test_a_row_of_4096_tokens_at_k_64_is_whole_and_the_token_stays_in_view(visit: Open, long_page: Path) -> None:
    page = visit(long_page)
    assert page.locator(".token").count() == 4096
    for key in ("End", "ArrowUp", "ArrowUp", "Home", *["ArrowDown"] * 30):
        page.keyboard.press(key)
        box = page.locator(".token.active").bounding_box()
        assert box is not None
        assert 0 <= box["y"] <= DESKTOP["height"] - box["height"]
        assert bar_sum(page) == pytest.approx(1, abs=1e-4) or active(page) == 0
    assert page.locator("#bars .bar").count() == 64


def test_a_pinned_token_stays_until_it_is_unpinned(visit: Open, long_page: Path) -> None:
    page = visit(long_page)
    page.locator("#t40").click()
    page.locator("#t60").hover()
    assert active(page) == 40
    page.keyboard.press("Escape")
    page.locator("#t61").hover()
    assert active(page) == 61


def test_text_of_the_dataset_stays_text(visit: Open, tmp_path: Path) -> None:
    root = strange_tokens.hostile_dataset(tmp_path / "dataset", tmp_path / "tokenizer")
    page = visit(write_page(root, 0, tmp_path / "page.html"))
    one = open_row(root, 0)
    for i in range(one.row.token_ids.size):
        page.locator(f"#t{i}").hover()
    page.locator("#metadata summary").click()
    assert page.evaluate("document.scripts.length") == 2
    assert page.evaluate("document.querySelectorAll('img, iframe, object, link').length") == 0
    assert not page.title().startswith("taken")
    shown = page.locator("body").inner_text()
    assert strange_tokens.hidden_characters(shown) == set()
    assert shown.count(strange_tokens.SCRIPT) >= 5
    text = page.locator("#text").text_content()
    assert text == "".join(one.text.pieces(one.row.token_ids.tolist()))


def test_the_policy_stops_what_an_escape_that_failed_would_let_in(browser: Browser, page_file: Path) -> None:
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(page_file.as_uri())
    title = page.title()
    page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "document.title = 'taken'";
      const style = document.createElement("style");
      style.textContent = "body { opacity: 0 }";
      const image = document.createElement("img");
      image.src = "http://127.0.0.1:9/x.png";
      document.body.append(script, style, image);
      document.body.insertAdjacentHTML("beforeend", "<p id=added onclick='document.title = 1'>x</p>");
      document.getElementById("added").click();
    }""")
    assert page.title() == title
    assert page.evaluate("getComputedStyle(document.body).opacity") == "1"
    assert page.evaluate("fetch('http://127.0.0.1:9/x').catch((error) => 'refused')") == "refused"
    for directive in ("script-src", "style-src", "img-src", "default-src"):
        assert any("Content Security Policy" in text and directive in text for text in said), directive
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_both_render_with_text_that_can_be_read(visit: Open, page_file: Path, scheme: str) -> None:
    page = visit(page_file, color_scheme=scheme)
    assert is_dark(page) == (scheme == "dark")
    assert least_contrast(page) >= 4.5
    page.keyboard.press("e")
    assert least_contrast(page) >= 4.5
    page.locator("#theme").click()
    assert is_dark(page) == (scheme == "light")
    assert least_contrast(page) >= 4.5


def is_dark(page: Page) -> bool:
    return float(page.evaluate(f"({LUMINANCE})(getComputedStyle(document.body).backgroundColor)")) < 0.2


LUMINANCE = """(color, under) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  for (const layer of [under, color]) if (layer) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
  const part = (v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
  return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
}"""
"""Relative luminance of a CSS color, painted over another (WCAG 2.2, "relative luminance")."""


def least_contrast(page: Page) -> float:
    """The least contrast of text in the heat map and the panel, with one token at each end of the scale."""
    return float(
        page.evaluate(f"""() => {{
          const luminance = {LUMINANCE};
          const tokens = [...document.querySelectorAll(".token:not(.context):not(.blank)")];
          tokens[0].style.setProperty("--h", 100);
          tokens[1].style.setProperty("--h", 5);
          const pairs = [...tokens, ...document.querySelectorAll(".token.context")].map((token) =>
            [token, getComputedStyle(document.body).backgroundColor]);
          const card = getComputedStyle(document.querySelector(".panel")).backgroundColor;
          for (const element of document.querySelectorAll(".panel :is(.word, .share, .sign, dt, dd, p)"))
            pairs.push([element, card]);
          const ratios = pairs.map(([element, under]) => {{
            const style = getComputedStyle(element);
            const back = luminance(style.backgroundColor, under);
            const ink = luminance(style.color);
            return (Math.max(back, ink) + 0.05) / (Math.min(back, ink) + 0.05);
          }});
          return Math.min(...ratios);
        }}""")
    )


def test_on_a_phone_the_panel_never_covers_the_tapped_token(visit: Open, long_page: Path) -> None:
    page = visit(long_page, viewport=PHONE, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for i in (30, 200, 4000, 4095):
        page.locator(f"#t{i}").tap()
        assert active(page) == i
        token, panel = page.locator(f"#t{i}").bounding_box(), page.locator("#panel").bounding_box()
        assert token is not None
        assert panel is not None
        assert token["y"] + token["height"] <= panel["y"]
        assert bar_sum(page) == pytest.approx(1, abs=1e-4)
    page.locator("#close").tap()
    assert not page.locator("#panel").is_visible()


def test_every_control_can_be_reached_and_has_a_name(visit: Open, page_file: Path) -> None:
    page = visit(page_file)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.value"))
    assert {"surprise", "theme", "help", "text", "bars"} <= set(reached)
    assert page.get_by_role("listbox", name="The row, token by token").count() == 1
    assert page.get_by_role("option").count() == page.locator(".token").count()
    assert page.get_by_role("radio", name="Entropy").count() == 1
    page.locator("#text").focus()
    page.keyboard.press("End")
    assert page.locator("#text").get_attribute("aria-activedescendant") == f"t{active(page)}"
    assert "surprise" in (page.locator("#status").text_content() or "")


def test_without_scripts_the_text_of_the_row_is_there(visit: Open, page_file: Path, tiny_dataset: Path) -> None:
    page = visit(page_file, java_script_enabled=False)
    one = open_row(tiny_dataset, 5)
    assert one.text.row(one.row.token_ids.tolist()) in page.locator("noscript").inner_text()


def test_images_stand_at_their_placeholders_and_come_from_the_page_alone(
    visit: Open, tmp_path: Path, tokenizer_folder: Path
) -> None:
    made = vision_dataset(tmp_path / "dataset", tokenizer_folder, [[[SMALL, PHOTO, CAT]]])
    page = visit(write_page(made.store.url, 0, tmp_path / "page.html"))
    sizes = "[...document.querySelectorAll('.medium img')].map((image) => [image.naturalWidth, image.naturalHeight])"
    assert page.evaluate(sizes) == [[4, 4], [60, 40], [30, 20]]
    before = "[...document.querySelectorAll('.medium')].map((box) => box.previousElementSibling.id)"
    assert page.evaluate(before) == ["t1", "t3", "t5"]
    assert (page.locator(".medium").first.text_content() or "").startswith("[image 1: png, ")
    phone = visit(tmp_path / "page.html", viewport=PHONE)
    assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth")
