"""An import states where its values came from, and neither card nor page claims what the files do not hold."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.errors import InvalidHeader
from coldstill.storage_schema.header_facts import ImportFacts
from coldstill.tools.card.card import write_card
from coldstill.tools.derive.merge import merge
from coldstill.tools.exchange.axolotl_import import import_axolotl
from coldstill.tools.exchange.distillkit_import import import_distillkit
from coldstill.tools.exchange.input_files import import_facts, input_files
from coldstill.tools.exchange.settings import AxolotlSettings, DistillKitSettings
from coldstill.tools.inspect.page import page_data
from coldstill.tools.inspect.row_facts import open_row
from coldstill.tools.inspect.terminal import show_dataset
from tests.tools.exchange import peers

pytestmark = pytest.mark.usefixtures("quick_plot")


def distillkit(folder: Path, output: Path, tokenizer: Path, *, config: dict | None, version: str | None) -> None:
    rows = [peers.distillkit_row(one, config or peers.ALL_EXACT) for one in peers.sequences(6)]
    peers.write_distillkit(folder, rows, config or peers.ALL_EXACT, per_file=3)
    fields = {"tokenizer": tokenizer, "teacher": "peer/teacher", "normalized_over": "vocabulary"}
    settings = DistillKitSettings.model_validate({**fields, "tool_version": version})
    import_distillkit(folder, output, settings, progress=False)


def axolotl(folder: Path, output: Path, tokenizer: Path, *, raw: bool) -> None:
    texts = peers.sequences(6)
    rows = [peers.raw_row(one, 8, version=2, answer=20) if raw else peers.prepared_row(one, 8) for one in texts]
    peers.write_jsonl(folder / "kd.jsonl", rows)
    settings = AxolotlSettings(tokenizer=tokenizer, teacher="peer/teacher")
    import_axolotl(folder / "kd.jsonl", output, settings, progress=False)


KINDS: dict[str, tuple[Callable[[Path, Path, Path], None], ImportFacts]] = {
    "DistillKit": (
        lambda *paths: distillkit(*paths, config=peers.ARCEE_128, version="a61c2e7"),
        ImportFacts(
            tool="DistillKit",
            tool_version="a61c2e7",
            layout="lossy compression by logprob_compressor",
            first_file="data_0.parquet",
            files=2,
        ),
    ),
    "DistillKit, earlier": (
        lambda *paths: distillkit(*paths, config=peers.LEGACY, version=None),
        ImportFacts(
            tool="DistillKit",
            layout="lossy compression by legacy_logit_compression",
            first_file="data_0.parquet",
            files=2,
        ),
    ),
    "axolotl, prepared": (
        lambda *paths: axolotl(*paths, raw=False),
        ImportFacts(tool="axolotl KD", layout="columns as after its preprocessing", first_file="kd.jsonl", files=1),
    ),
    "axolotl, raw": (
        lambda *paths: axolotl(*paths, raw=True),
        ImportFacts(tool="axolotl KD", layout="raw lists of log-probs", first_file="kd.jsonl", files=1),
    ),
}


def imported(kind: str, folder: Path, tokenizer: Path) -> Dataset:
    (folder / "in").mkdir(parents=True)
    KINDS[kind][0](folder / "in", folder / "out", tokenizer)
    return open_dataset(folder / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_header_card_and_pages_name_the_origin_and_claim_no_teacher(
    kind: str, tmp_path: Path, wide_tokenizer: Path
) -> None:
    dataset = imported(kind, tmp_path, wide_tokenizer)
    facts = dataset.header.about.imported
    assert facts == KINDS[kind][1]
    write_card(tmp_path / "out", progress=False)
    card = (tmp_path / "out" / "README.md").read_text()
    words = " ".join(card.replace("&#39;", "'").replace("&#95;", "_").replace("&#58;", ":").split())
    for said in (
        f"Log-probs imported from {facts.tool}, said to be of peer/teacher",
        f"version {facts.tool_version or 'not known'}",
        f"layout; {facts.layout}".replace(";", ":"),
        "This is not known.",
        "What is not known:",
        "The storage is bounded",
        "The loss before the import",
        "as the importer named it",
    ):
        assert said in words, said
    claims = ("A teacher model", "guarantee", "computed by the teacher", "KL(teacher", "# Log-probs of", "t unknown")
    for claim in claims:
        assert claim not in card, claim
    teacher = page_data(open_row(tmp_path / "out", 0))["dataset"]["teacher"]
    screen = io.StringIO()
    show_dataset(tmp_path / "out", console=Console(file=screen, width=300))
    for shown in (teacher, screen.getvalue()):
        assert facts.tool in shown
        assert "peer/teacher, as" in shown
    assert "imported values to the stored ones" in screen.getvalue()
    assert str(tmp_path) not in card + teacher + screen.getvalue().replace(dataset.store.url, "")


def test_equal_files_give_equal_datasets_wherever_they_lie(tmp_path: Path, wide_tokenizer: Path) -> None:
    """Another version of the tool that the importer states is no obstacle to a resume or a merge."""
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.mkdir()
    peers.write_jsonl(original / "kd.jsonl", [peers.prepared_row(one, 8) for one in peers.sequences(6)])
    shutil.copytree(original, copy)
    settings = AxolotlSettings(tokenizer=wide_tokenizer, teacher="peer/teacher")
    stated = settings.model_copy(update={"tool_version": "0.13"})
    for source, output, used in ((original, "a", settings), (copy, "b", settings), (copy, "a", stated)):
        import_axolotl(source, tmp_path / output, used, progress=False)
    assert open_dataset(tmp_path / "a").dataset_id == open_dataset(tmp_path / "b").dataset_id
    import_axolotl(copy, tmp_path / "c", stated, progress=False)
    merge([str(tmp_path / "a"), str(tmp_path / "c")], tmp_path / "both", progress=False)
    assert open_dataset(tmp_path / "both").header.about.imported is None


def test_a_version_that_is_too_long_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    files = input_files(tmp_path, endings=(".jsonl",))
    with pytest.raises(InvalidHeader, match="tool_version"):
        import_facts(files, tool="t", version="v" * 129, layout="l")
