"""Every dataset command, as a user types it: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from coldstill.cli.main import main
from coldstill.storage_schema.dataset import open_dataset
from coldstill.tools.verify import verify


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["coldstill", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    """Runs a command that must end well; what it printed."""

    def said(*words: object) -> str:
        code = run(monkeypatch, *words)
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return said


def test_verify_ends_well_on_a_good_dataset(say, tiny_dataset: Path) -> None:
    printed = say("verify", "--deep", tiny_dataset)
    assert open_dataset(tiny_dataset).dataset_id[:32] in printed
    assert "every value" in printed


def test_verify_prints_one_line_per_damaged_row_and_ends_with_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_dataset: Path
) -> None:
    shard = open_dataset(tiny_dataset).shards[1].file.name
    data = (tiny_dataset / shard).read_bytes()
    (tiny_dataset / shard).write_bytes(data[:-100] + b"\x1b" + data[-99:])
    assert run(monkeypatch, "verify", "--deep", tiny_dataset) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("ShardDamaged: ")
    assert shard in line


def test_inspect_shows_the_dataset_and_a_row_and_writes_a_page(say, tiny_dataset: Path, tmp_path: Path) -> None:
    assert "tiny" in say("inspect", tiny_dataset)
    assert "row-1-0" in say("inspect", tiny_dataset, 8)
    say("inspect", tiny_dataset, 8, "--html", tmp_path / "row.html")
    assert "row-1-0" in (tmp_path / "row.html").read_text(encoding="utf-8")


def test_inspect_shows_the_dataset_where_tokenizers_is_not_installed(
    say, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_dataset: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "tiny" in say("inspect", tiny_dataset)
    assert run(monkeypatch, "inspect", tiny_dataset, 8) == 1
    assert 'pip install "coldstill[share]"' in capsys.readouterr().err


def test_stats_are_printed_and_written(say, tiny_dataset: Path, tmp_path: Path) -> None:
    say("stats", tiny_dataset, "--json", tmp_path / "stats.json", "--png", tmp_path / "stats.png")
    assert json.loads((tmp_path / "stats.json").read_text())["rows"] == 24
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")


def test_a_card_that_someone_edited_is_replaced_on_request_only(
    say, monkeypatch: pytest.MonkeyPatch, tiny_dataset: Path
) -> None:
    monkeypatch.setattr("coldstill.tools.card.card.plot_png", lambda _: b"\x89PNG")
    card = tiny_dataset / "README.md"
    for _ in range(2):  # nobody edited the first one
        say("card", tiny_dataset)
    generated = card.read_text(encoding="utf-8")
    assert "configs:" in generated
    for flag in ("--replace", "--force"):
        card.write_text(f"{generated}A line.\n", encoding="utf-8")
        assert run(monkeypatch, "card", tiny_dataset) == 1
        assert card.read_text(encoding="utf-8") == f"{generated}A line.\n"
        say("card", flag, tiny_dataset)
        assert card.read_text(encoding="utf-8") == generated
    assert verify(tiny_dataset, progress=False) == []


def test_a_dataset_is_split_and_merged_again(say, tiny_dataset: Path, tmp_path: Path) -> None:
    say("split", tiny_dataset, tmp_path / "parts", "--part", "a=0.5", "--part", "b=0.5")
    say("merge", tmp_path / "parts" / "a", tmp_path / "parts" / "b", "--output", tmp_path / "whole")
    ids = [row.sample_id for row in open_dataset(tmp_path / "whole").rows()]
    assert sorted(ids) == sorted(row.sample_id for row in open_dataset(tiny_dataset).rows())


def test_a_subset_holds_what_the_filters_let_through(say, tiny_dataset: Path, tmp_path: Path) -> None:
    say("subset", tiny_dataset, tmp_path / "some", "--filter", "sample_id ~ ^row-1", "--limit", 5)
    assert [row.sample_id for row in open_dataset(tmp_path / "some").rows()] == [f"row-1-{i}" for i in range(5)]


def test_a_dataset_is_pushed_and_pulled(say, tiny_dataset: Path, tmp_path: Path) -> None:
    dataset_id = open_dataset(tiny_dataset).dataset_id
    say("push", tiny_dataset, tmp_path / "there")
    say("pull", tmp_path / "there", tmp_path / "back")
    assert open_dataset(tmp_path / "back").dataset_id == dataset_id


def test_axolotl_s_layout_goes_out_and_comes_in(
    say, tiny_dataset: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    say("export", "axolotl", tiny_dataset, tmp_path / "axolotl")
    say(
        "import",
        "axolotl",
        tmp_path / "axolotl",
        tmp_path / "in",
        "--tokenizer",
        tokenizer_folder,
        "--teacher",
        "t",
        "--assume-aligned",
    )
    assert len(open_dataset(tmp_path / "in")) == 24


def test_the_plain_form_is_written(say, tiny_dataset: Path, tmp_path: Path) -> None:
    say("export", "plain", tiny_dataset, tmp_path / "plain")
    assert len(list((tmp_path / "plain").glob("*.parquet"))) == 3


@pytest.mark.parametrize(
    "words",
    [
        ["verify", "nowhere"],
        ["inspect", "nowhere"],
        ["stats", "nowhere"],
        ["card", "nowhere"],
        ["push", "nowhere", "somewhere"],
        ["pull", "nowhere", "somewhere"],
        ["merge", "nowhere", "nowhere-else", "--output", "x"],
        ["split", "nowhere", "x", "--part", "a=0.5", "--part", "b=0.5"],
        ["subset", "nowhere", "x"],
        ["export", "plain", "nowhere", "x"],
        ["export", "axolotl", "nowhere", "x"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_what_is_no_dataset_is_named_by_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 1
    error = capsys.readouterr().err
    assert "DatasetNotFound" in error
    assert "Traceback" not in error
    assert not (tmp_path / "x").exists()


def test_an_error_that_quotes_a_stranger_cannot_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_dataset: Path
) -> None:
    (tiny_dataset / "manifest.json").write_text('{"format_version": "\\u001b[31mred"}')
    assert run(monkeypatch, "inspect", tiny_dataset) == 1
    assert "\x1b[31mred" not in capsys.readouterr().err
