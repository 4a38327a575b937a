"""Pages of runs and comparisons: all runs are shown, text stays text, folders that are no run have named errors."""

from __future__ import annotations

import html.parser
import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from coldstill.cli.main import main
from coldstill.common.charts import COLORS, figure, thinned, ticks
from coldstill.trainer.errors import EvaluationNotOfRun, RunDamaged, RunNotFound
from coldstill.trainer.run_report.compare import comparison_page, read_runs
from coldstill.trainer.run_report.pace import EndTimeBar, Pace
from coldstill.trainer.run_report.page import run_page
from coldstill.trainer.run_report.plot import comparison_png
from coldstill.trainer.run_report.record import RECORD_NAME, RunRecord, read_run, spread, without_password

NOW = datetime(2026, 11, 29, 14, 2)
HOSTILE = "</title><script>alert(1)</script>\x1b[31m\u202e$x_"
TAGS = (
    set("html head meta title style body main header section p h1 h2 h3 dl dt dd div small span figure".split())  # noqa: SIM905
    | set("figcaption b svg path text circle g details summary ul li table thead tbody tr th td".split())  # noqa: SIM905
)


def record(**changes: object) -> RunRecord:
    log = [
        {"step": n, "loss": 3 - n / 50, "bucket_kl": 1 / n, "taid_t": n / 40, "targets_per_s": 900.0}
        for n in range(1, 41)
    ]
    fields = {"state": "running", "step": 40, "max_steps": 80, "time_left_s": 1800.0, "log": log} | changes
    return RunRecord.model_validate(fields)


def put(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True)
    (folder / RECORD_NAME).write_text(record(**changes).model_dump_json())
    return folder


class Tags(html.parser.HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.names: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "style", "onload"}


def test_a_running_page_says_when_the_run_ends_and_reads_itself_again() -> None:
    page = run_page(record(), name="run", now=NOW)
    assert "about 14:32 today" in page
    assert 'http-equiv="refresh"' in page
    assert "about" not in run_page(record(state="finished"), name="run", now=NOW)


def test_what_a_killed_run_left_says_when_it_was_written_and_what_to_do(tmp_path: Path) -> None:
    """After a SIGKILL, page and comparison say `running` for ever."""
    assert "it was killed: re-run its command" in run_page(record(), name="run", now=NOW)
    assert "killed" not in run_page(record(state="finished"), name="run", now=NOW)
    assert "at most 40 s between two writes" in run_page(record(longest_gap_s=40.0), name="run", now=NOW)
    killed = put(tmp_path / "killed", written=NOW.timestamp(), longest_gap_s=40.0)
    done = put(tmp_path / "done", state="finished", written=NOW.timestamp())
    assert read_runs([killed, done]).figures()["last written"] == ["2026-11-29 14:02", None]
    assert read_runs([killed, done]).figures()["longest time between writes"] == ["40 s", None]
    assert "last written" not in read_runs([done]).figures()
    assert "last written" not in read_runs([put(tmp_path / "odd", written=1e300)]).figures()


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    log = [{"step": n, "loss": 1.0, f"eval_{HOSTILE}": 1.0} for n in range(3)]
    hostile = {
        "facts": {HOSTILE: {HOSTILE: HOSTILE}},
        "settings": {HOSTILE: HOSTILE},
        "changed": [HOSTILE],
        "error": HOSTILE,
        "state": "failed",
        "log": log,
    }
    page = run_page(record(**hostile), name=HOSTILE, now=NOW)
    both = read_runs([put(tmp_path / "a", **hostile), put(tmp_path / "b")])
    for text in (page, comparison_page(both, now=NOW)):
        assert Tags(text).names <= TAGS
        assert not {"\x1b", "\u202e"} & set(text)


def test_values_that_are_not_finite_are_left_out() -> None:
    log = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": None}, {"loss": 1.0}]
    assert record(log=log).points("loss") == [(2.0, 2.0)]
    assert "nan" not in run_page(record(log=log), name="run", now=NOW).lower()


@pytest.mark.parametrize(
    "values",
    [(1e308, -1e308), (5e-324, 1e-323), (1e15, 1e15 + 0.125), (0.0, -0.0), (10**400, 1), (-1e99, 1e-99), (True, "x")],
    ids=str,
)
def test_every_number_has_a_drawing(tmp_path: Path, values: tuple[float, float]) -> None:
    log = [{"step": n, "loss": value, "eval_loss": value} for n, value in enumerate(values)]
    log.append({"step": values[0], "loss": 1.0})
    found = record(log=log, time_left_s=1e300, summary={"wall_s": 1e300}, state="running", max_steps=0)
    page = run_page(found, name="run", now=NOW)
    assert "nan" not in page
    assert "inf" not in page.replace("information", "")
    assert comparison_page(read_runs([put(tmp_path / "run", log=log)]), now=NOW)


def test_a_comparison_shows_what_differs_and_what_was_reached(tmp_path: Path, capsys, monkeypatch) -> None:
    one = put(tmp_path / "x" / "run", settings={"loss.name": "taid", "data.seed": 0}, state="finished")
    two = put(tmp_path / "y" / "run", settings={"loss.name": "forward_kl", "data.seed": 0}, log=[], step=0)
    (one / "evaluation.json").write_text(json.dumps({"student": "s", "forward_kl": 0.25, "calibration": []}))
    given = tmp_path / "given.json"
    given.write_text(json.dumps({"student": str(two / "student"), "forward_kl": 0.5}))
    found = read_runs([one, two], evaluations=[given])
    assert list(found.runs) == ["x/run", "y/run"]
    assert found.differing_settings() == {"loss.name": ["taid", "forward_kl"]}
    assert found.figures()["evaluate: forward kl"] == [0.25, 0.5]
    assert found.figures()["loss"][1] is None
    assert comparison_png(found).startswith(b"\x89PNG")
    page = tmp_path / "page.html"
    run_main(monkeypatch, "compare", one, two, "--evaluation", given, "--json", "--html", page)
    document = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in document["runs"]] == ["x/run", "y/run"]
    assert "x/run" in page.read_text()
    for elsewhere in ("elsewhere", "\0", "x" * 5000, [], None):
        given.write_text(json.dumps({"student": elsewhere}))
        with pytest.raises(EvaluationNotOfRun):
            read_runs([one, two], evaluations=[given])


def test_a_comparison_needs_no_torch(tmp_path: Path) -> None:
    program = "import sys, coldstill.cli.compare; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_folder_without_a_run_has_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in (".", "file", "absent", "loop", "x" * 300):
        with pytest.raises(RunNotFound):
            read_runs([tmp_path / name])


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["coldstill", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


@pytest.mark.parametrize("name", [RECORD_NAME, "evaluation.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "dense"])
def test_a_file_that_never_ends_or_needs_much_memory_is_not_read(tmp_path: Path, name: str, kind: str) -> None:
    folder = put(tmp_path / "run")
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).write_text('{"a": [' + "[]," * 100_000 + "[]]}")
    with pytest.raises(RunDamaged, match=r"pipe|lists"):
        read_runs([folder])


def test_many_and_long_names_of_a_report_cost_little_and_are_cut(tmp_path: Path, monkeypatch, capsys) -> None:
    log = [{"step": n, f"eval_{n}": n} for n in range(5_000)]
    settings = {f"loss.{n}": "x" * 300_000 if n == 0 else n for n in range(20_000)}
    runs = [put(tmp_path / "a", log=log, settings=settings), put(tmp_path / "b", log=log)]
    (runs[0] / "evaluation.json").write_text(json.dumps({f"figure {n}": n for n in range(20_000)}))
    began = time.process_time()
    page = comparison_page(read_runs(runs), now=NOW)
    run_main(monkeypatch, "compare", *runs)
    assert time.process_time() - began < 10
    assert len(page) < 200_000
    assert len(capsys.readouterr().out) < 200_000
    assert "and 19,840 more" in page


def test_numbers_that_json_lacks_are_compared_too(tmp_path: Path, monkeypatch, capsys) -> None:
    for name, value in (("a", "Infinity"), ("b", "NaN"), ("c", "1e999")):
        put(tmp_path / name, settings={"training.max_grad_norm": 12345})
        path = tmp_path / name / RECORD_NAME
        path.write_text(path.read_text().replace("12345", value))
    runs = [tmp_path / name for name in "abc"]
    run_main(monkeypatch, "compare", *runs, "--json", "--html", tmp_path / "page.html")
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["differing_settings"] == {"training.max_grad_norm": [None, None, None]}


def test_settings_are_shown_with_all_their_digits(tmp_path: Path) -> None:
    rates = (1.00001e-4, 1.00002e-4)
    runs = [put(tmp_path / str(rate), settings={"rate": rate, "seed": 1234567}) for rate in rates]
    rows = read_runs(runs).tables()["Settings that differ"]
    assert rows == {"rate": ["0.000100001", "0.000100002"]}
    assert "<dt>seed</dt><dd>1234567</dd>" in run_page(read_run(runs[0]), name="run", now=NOW)


def test_a_report_holds_no_password_of_an_address() -> None:
    settings = {"dataset": ["https://me:secret@host/a", "s3://bucket/a"], "eval_dataset": "ftp://me:s%40x@host/a@b"}
    assert without_password(settings) == {
        "dataset": ["https://…@host/a", "s3://bucket/a"],
        "eval_dataset": "ftp://…@host/a@b",
    }
    for kept in ("hf://datasets/ORG/NAME@main", "a:b@c", None, 1, "gs://a/b:c@d"):
        assert without_password(kept) == kept


def test_runs_with_equal_beginnings_are_told_apart_in_the_picture(tmp_path: Path, monkeypatch) -> None:
    legends: list[list[str]] = []
    monkeypatch.setattr(Figure, "legend", lambda _, handles, names, **__: legends.append(list(names)))
    comparison_png(read_runs([put(tmp_path / name) for name in ("x" * 80 + "1", "x" * 80 + "2", "_$", "$")]))
    (names,) = legends
    assert len(set(names)) == 4
    assert not any(name.startswith("_") for name in names)


def test_of_a_long_log_so_many_lines_are_kept_as_are_read_again() -> None:
    log = [{"step": n, "loss": 1.0} for n in range(1, 10_001)]
    log[4_321]["eval_loss"] = 2.0
    kept = [line["step"] for line in spread(log, 100)]
    assert kept == sorted({*range(100, 10_001, 100), 4_322})
    assert spread(log, 10_000) == log
    assert list(spread([], 1)) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"state": "running", "step": -1, "max_steps": 1}', "[" * 100_000])
@pytest.mark.parametrize("name", [RECORD_NAME, "trainer_state.json"])
def test_a_damaged_run_has_a_named_error(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RunDamaged):
        read_run(tmp_path)


def test_the_bar_says_when_the_run_ends_and_counts_its_own_steps(tmp_path: Path) -> None:
    seconds = iter([100.0, 100.0, 110.0, 110.0])
    bar = EndTimeBar(Pace(lambda: next(seconds)), now=lambda: NOW)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=1000, global_step=400)
    bar.on_train_begin(None, state, None)
    assert (bar.training_bar.n, bar.training_bar.initial) == (400, 400)
    for step in (401, 402):
        state.global_step = step
        next(seconds) if step == 402 else None
        bar.on_step_end(None, state, None)
    assert bar.training_bar.postfix == "ends about 15:41 today"
    assert bar.training_bar.n == 402
    closed = bar.training_bar
    bar.on_train_end(None, state, None)
    assert not closed.postfix, "a bar that is closed ends at no other time"


def test_pace_counts_neither_earlier_starts_nor_the_first_step() -> None:
    seconds = iter([50.0, 52.0, 56.0])
    pace = Pace(lambda: next(seconds))
    assert pace.left_s(101, 200) is None
    assert pace.left_s(102, 200) == 98 * 2
    assert pace.left_s(103, 200) == 97 * 3


def test_ticks_are_round_and_enclose_the_values() -> None:
    for low, high in ((0, 1), (2.9871, 3.7), (0, 12_345), (5, 5), (-3, -1), (0, 0), (0, 3e-7)):
        found = ticks(low, high)
        assert found[0] <= low + 1e-9
        assert found[-1] >= high - 1e-9
        assert 2 <= len(found) <= 8
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def test_a_long_line_is_thinned_to_means_and_keeps_its_end() -> None:
    points = [(float(x), float(x % 2)) for x in range(10_000)]
    found = thinned(points, 100)
    assert len(found) == 100
    assert found[-1] == points[-1]
    assert all(abs(y - 0.5) < 0.02 for _, y in found[:-1])


def test_figures_are_short() -> None:
    assert [figure(x) for x in (0, 1234.5, 0.12345, 2e-5, 1.5e9)] == ["0", "1,234", "0.1235", "2e-5", "1.5e9"]


def test_more_runs_than_colors_are_told_apart(tmp_path: Path) -> None:
    page = comparison_page(read_runs([put(tmp_path / str(n)) for n in range(COLORS + 1)]), now=NOW)
    assert "line-0 dashed" in page
