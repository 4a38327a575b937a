"""The plot of the stats: a PNG 1,200 pixels wide for any dataset, without pyplot."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from coldstill.common.packages import PackagesMissing
from coldstill.tools.stats.histogram import Tally
from coldstill.tools.stats.measure import FOOTERS, SCALES, Stats, measure_stats
from coldstill.tools.stats.plot import plot_png, write_plot
from tests import making


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(imread(io.BytesIO(png)))


def test_the_picture_is_a_png_of_1200_pixels_width_with_something_in_each_panel(tiny_dataset: Path) -> None:
    image = pixels(plot_png(measure_stats(tiny_dataset, progress=False)))

    height, width, _ = image.shape
    assert width == 1200
    assert 1000 <= height <= 1600
    fill = np.abs(image[..., :3] - np.array([0x4A, 0x7B, 0xA6]) / 255).max(-1) < 0.02
    for row in range(3):
        for column in range(2):
            panel = fill[row * height // 3 : (row + 1) * height // 3, column * 600 : (column + 1) * 600]
            assert panel.mean() > 0.003, (row, column)


def test_equal_stats_give_equal_pictures(tiny_dataset: Path, tmp_path: Path) -> None:
    stats = measure_stats(tiny_dataset, progress=False)

    write_plot(stats, tmp_path / "stats.png")

    assert (tmp_path / "stats.png").read_bytes() == plot_png(stats)


def test_a_dataset_without_rows_and_one_with_a_single_target_have_pictures(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    nothing = Stats(
        dataset_ids=(),
        column_bytes={FOOTERS: 4000},
        **{name: Tally(scale).histogram() for name, scale in SCALES.items()},
    )
    row = making.random_row(np.random.default_rng(0), "one", length=2)
    making.write_dataset(
        tmp_path / "one", [[row]], header=making.tiny_header(tokenizer_folder), tokenizer=tokenizer_folder
    )

    for stats in (nothing, measure_stats(tmp_path / "one", progress=False)):
        assert pixels(plot_png(stats)).shape[1] == 1200


def test_drawing_leaves_pyplot_and_the_settings_of_matplotlib_alone(tiny_dataset: Path) -> None:
    code = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy()\n"
        "from coldstill.tools.stats.measure import measure_stats\n"
        "from coldstill.tools.stats.plot import plot_png\n"
        f"plot_png(measure_stats({str(tiny_dataset)!r}, progress=False))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.rcParams.copy() == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_without_matplotlib_the_error_names_what_to_install(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = measure_stats(tiny_dataset, progress=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(PackagesMissing, match=r"no matplotlib(.|\n)*coldstill\[share\]"):
        plot_png(stats)
