"""Draws the pictures of README and site into `docs/pictures/`.

- `demo.svg`: the terminal of the stored run of `make demo`, line by line.
- `losses.svg`: losses of one position by the probability that the student gives to a token.
- `first_screen.png`: one row of `examples/tiny` as `coldstill inspect --html` shows it, beside the KL that a student
  reaches by the bytes of its cache. It needs a browser (`apt-get install chromium-headless-shell`).
"""

from __future__ import annotations

import io
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.common.command import new_parser
from benchmarks.common.report import RESULTS, stored

REPOSITORY = Path(__file__).parents[1]
PICTURES = REPOSITORY / "docs/pictures"
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
GREEN, ORANGE, INK, QUIET, PAPER = "#14735c", "#d4642f", "#22201d", "#66625a", "#fbfaf7"
ROW = 226
"""A row of `examples/tiny` whose answer fills the screen."""
LINE_HEIGHT, CHARACTER = 17, 7.83
"""Pixels of a line and of a character of 13 px in the usual monospace fonts."""


# ---- the demo's terminal ---------------------------------------------------------------------------------------------


def terminal(text: str) -> str:
    """An animated SVG of a terminal: stages appear one by one, then the tables. It stands still if asked for it."""
    lines = text.rstrip("\n").splitlines()
    width = round(max(map(len, lines)) * CHARACTER + 48)
    height = len(lines) * LINE_HEIGHT + 56
    rows, seconds = [], 0.4
    for number, line in enumerate(lines):
        is_stage = "/11 " in line[:8]
        seconds += 0.5 if is_stage else 0.06
        kind = "g" if line.startswith("$") else "q" if is_stage else "t"
        rows.append(
            f'<text class="{kind}" x="24" y="{54 + number * LINE_HEIGHT}" style="animation-delay:{seconds:.2f}s" '
            f'xml:space="preserve">{escape(line)}</text>'
        )
    dots = "".join(f'<circle cx="{24 + 16 * n}" cy="20" r="5" fill="{c}"/>' for n, c in enumerate(_DOTS))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>The terminal of make demo</title><style>{_TERMINAL}</style>'
        f'<rect width="{width}" height="{height}" rx="10" fill="#1f1e1b"/>{dots}\n' + "\n".join(rows) + "\n</svg>\n"
    )


_DOTS = ("#e2703a", "#d9b44a", "#5fc2a4")
_TERMINAL = (
    'text{font:13px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;opacity:0;animation:show .2s forwards}'
    ".t{fill:#ebe8e2}.q{fill:#a9a499}.g{fill:#5fc2a4}@keyframes show{to{opacity:1}}"
    "@media(prefers-reduced-motion:reduce){text{animation:none;opacity:1}}"
)


# ---- curves of losses ------------------------------------------------------------------------------------------------

TEACHER = 0.2
"""The teacher's probability of the token; the other symbol stands for all other tokens."""


def _kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def _js(p: float, q: float) -> float:
    middle = (p + q) / 2
    return (_kl(p, middle) + _kl(q, middle)) / 2


def _taid(p: float, q: float, t: float = 0.4) -> float:
    """KL of the intermediate distribution, whose logits are interpolated, to the student."""
    logit = (1 - t) * math.log(q / (1 - q)) + t * math.log(p / (1 - p))
    return _kl(1 / (1 + math.exp(-logit)), q)


CURVES: dict[str, tuple[str, Callable[[float, float], float]]] = {
    "forward_kl": ("#14735c", _kl),
    "reverse_kl": ("#d4642f", lambda p, q: _kl(q, p)),
    "js, beta 0.5": ("#5b6fc0", _js),
    "tvd": ("#a8518a", lambda p, q: abs(p - q)),
    "taid, t = 0.4": ("#b28a1d", _taid),
}


def curves() -> str:
    """An SVG of the losses of `CURVES`, over the student's probability of a token that the teacher gives 0.2."""
    left, top, width, height, most = 56, 24, 440, 250, 1.4
    parts = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
        x = left + tick * width
        parts.append(f'<path class="l" d="M{x:.0f},{top}V{top + height}"/>')
        parts.append(f'<text class="q" x="{x:.0f}" y="{top + height + 20}" text-anchor="middle">{tick:g}</text>')
    for tick in (0, 0.5, 1.0):
        y = top + height * (1 - tick / most)
        parts.append(f'<path class="l" d="M{left},{y:.0f}h{width}"/>')
        parts.append(f'<text class="q" x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{tick:g}</text>')
    for number, (name, (color, loss)) in enumerate(CURVES.items()):
        points = []
        for step in range(1, 400):
            q = step / 400
            value = loss(TEACHER, q)
            if value <= most:
                points.append(f"{left + q * width:.1f},{top + height * (1 - value / most):.1f}")
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" stroke-width="2.2"/>')
        y = top + 22 + 24 * number
        parts.append(f'<path d="M{left + width + 24},{y}h22" stroke="{color}" stroke-width="3"/>')
        parts.append(f'<text class="t" x="{left + width + 54}" y="{y + 5}">{escape(name)}</text>')
    label = "the student's probability of a token that the teacher gives 0.2"
    parts.append(f'<text class="q" x="{left + width / 2}" y="{top + height + 42}" text-anchor="middle">{label}</text>')
    parts.append(f'<text class="q" x="16" y="{top - 8}">nats</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 330" width="680" height="330" role="img">'
        f"<title>Five losses of one position</title><style>{_CURVES}</style>"
        '<rect class="p" width="680" height="330" rx="10"/>' + "\n".join(parts) + "\n</svg>\n"
    )


_CURVES = (
    'text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}'
    ".p{fill:#fbfaf7}.t{fill:#22201d}.q{fill:#66625a}.l{stroke:#e7e3da;fill:none}"
    "@media(prefers-color-scheme:dark){.p{fill:#1f1e1b}.t{fill:#ebe8e2}.q{fill:#a9a499}.l{stroke:#3a3833}}"
)


# ---- the first screen ------------------------------------------------------------------------------------------------


def first_screen(path: Path, dataset: Path, *, row: int = ROW) -> None:
    """One row of a dataset beside the KL by bytes, as one PNG. Raises `RuntimeError` without a browser."""
    from PIL import Image

    page = Image.open(io.BytesIO(_row_page(dataset, row)))
    plot = Image.open(io.BytesIO(_kl_by_bytes(height=page.height)))
    whole = Image.new("RGB", (page.width + plot.width, page.height), PAPER)
    whole.paste(page, (0, 0))
    whole.paste(plot, (page.width, 0))
    # 160 colors keep text and shades sharp at a quarter of the bytes.
    whole.quantize(160, dither=Image.Dither.NONE).save(path, optimize=True)


def _row_page(dataset: Path, row: int) -> bytes:
    """A screenshot of the heat map of a row, in light colors, 1,160 pixels wide."""
    from playwright.sync_api import sync_playwright

    from coldstill.tools.inspect.page import write_page

    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise RuntimeError(f"no browser of {', '.join(BROWSERS)}: apt-get install chromium-headless-shell")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "row.html"
        write_page(dataset, row, file)
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        sheet = opened.new_page(viewport={"width": 1160, "height": 660}, color_scheme="light")
        sheet.goto(file.as_uri())
        return sheet.screenshot()


def _kl_by_bytes(*, height: int) -> bytes:
    """KL of a student to its flat teacher by the bytes of its cache: the top K alone, and with 64 draws."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kl = json.loads(stored("quality").read_text(encoding="utf-8"))["kl"]["as trained"]
    sizes = json.loads(stored("draws_bytes").read_text(encoding="utf-8"))["flat"]
    figure = Figure(figsize=(5.2, height / 100), dpi=100, layout="constrained", facecolor=PAPER)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_facecolor(PAPER)
    for label, draws, number, color in (("top K alone", "none", 0, ORANGE), ("top K and 64 draws", "iid", 64, GREEN)):
        points = _points(kl, sizes, draws, number)
        axes.plot([at for _, at, _ in points], [mean for *_, mean in points], "o-", color=color, label=label)
        for top_k, at, mean in points:
            axes.annotate(f"K = {top_k}", (at, mean), (3, 9), textcoords="offset points", ha="left", color=QUIET)
    for name, label, shift in (("plain fine-tuning", "no teacher", 4), ("dense TAID", "the whole teacher", -14)):
        mean = statistics.mean(kl[name])
        axes.axhline(mean, color=QUIET, linewidth=1, linestyle="--")
        axes.annotate(
            label,
            (0.985, mean),
            (0, shift),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            color=QUIET,
        )
    axes.set(xlabel="bytes per target position", ylim=(0.15, 1.05), xlim=(10, 100))
    axes.set_title("KL of the student to its teacher, nats", fontsize=12, color=INK, loc="left", pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=QUIET)
    axes.legend(frameon=False, loc="upper right")
    sink = io.BytesIO()
    canvas.print_png(sink)
    return sink.getvalue()


def _points(
    kl: dict[str, list[float]], sizes: Sequence[dict[str, Any]], draws: str, number: int
) -> list[tuple[int, float, float]]:
    """(K, bytes, mean KL) of the sides that both results have."""
    points = []
    for size in sizes:
        side = f"K={size['top_k']}, D={number}"
        if size["draws"] == draws and side in kl:
            points.append((size["top_k"], size["bytes"], statistics.mean(kl[side])))
    return points


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the named pictures, by default all."""
    names = ("demo.svg", "losses.svg", "first_screen.png")
    parser = new_parser("site_pictures", __doc__, make="plots, which draws the first two", takes="seconds", result=None)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names)}; by default all")
    chosen = parser.parse_args(arguments).names or names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"no picture {', '.join(unknown)}; there are {', '.join(names)}")
    for name in chosen:
        if name == "demo.svg":
            text = (RESULTS / "demo_2_cores.txt").read_text(encoding="utf-8")
            (PICTURES / name).write_text(terminal(text), encoding="utf-8")
        elif name == "losses.svg":
            (PICTURES / name).write_text(curves(), encoding="utf-8")
        else:
            first_screen(PICTURES / name, REPOSITORY / "examples/tiny")
        print(PICTURES / name, file=sys.stderr)


if __name__ == "__main__":
    main()
