"""The dataset card: other programs can read it, its facts are right, and text of the dataset is never markup."""

from __future__ import annotations

import json
import re
import sys
import uuid
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt

from coldstill.common.packages import PackagesMissing
from coldstill.storage_schema.commits import Reject, commit_unit
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.errors import DatasetNotSealed
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.header_facts import TeacherFacts
from coldstill.storage_schema.manifest import MANIFEST_NAME, seal
from coldstill.storage_schema.store import Store
from coldstill.tools.card.card import HUB_LICENSES, license_fields, size_category, write_card
from coldstill.tools.card_text import CARD_NAME, PLOT_NAME
from coldstill.tools.errors import CardExists
from coldstill.tools.verify import verify
from tests import making

HOSTILE = (
    "<script>alert(1)</script>",
    "x]( javascript:alert(1) ) ![y](https://a.example/pixel.png)",
    "x\n---\nlicense: mit\nconfigs: [{config_name: a, data_files: /etc/passwd}]\n---\n# b",
    "'\"]}: !!python/object/apply:os.system ['true'] # &a *a | > %",
    "\u2028\u202e\x00\x1b[2J\ud7ff \U000e0001",
    "a | b | c `d` <!-- e",
)


def captured(root: Path | str, tokenizer: Path, *, reasons: tuple[str, ...] = (), **changes: object) -> DatasetHeader:
    """A sealed dataset of two shards with rejects and a faithfulness sample."""
    rng = np.random.default_rng(2)
    header = making.tiny_header(tokenizer, **changes)
    store = making.begin_dataset(root, header, tokenizer, [4, 4])
    for unit in range(2):
        rows = [making.random_row(rng, f"{unit}-{n}") for n in range(4)]
        rejects = [Reject(n, f"bad-{n}", reason, "") for n, reason in enumerate(reasons)]
        commit_unit(store, unit, rows=rows, rejects=rejects, header=header, environment={}, faithful_positions=20)
    seal(store)
    return header


def front_matter(text: str) -> dict[str, Any]:
    """As the Hub finds it: from the first line to the next line of three dashes."""
    match = re.match(r"---\n(.*?)\n---\n", text, flags=re.S)
    assert match is not None
    document = yaml.safe_load(match[1])
    assert isinstance(document, dict)
    return document


def body(text: str) -> str:
    return text.split("\n---\n", 1)[1]


def page_of(text: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(body(text))


@pytest.fixture(scope="module")
def carded(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Root of a dataset with its card, to read only."""
    root = tmp_path_factory.mktemp("carded") / "d"
    captured(root, tokenizer_folder, reasons=("too_long", "too_long", "no_target"))
    write_card(root, progress=False)
    return root


def test_a_card_leaves_the_dataset_as_it_was(tmp_path: Path, tokenizer_folder: Path) -> None:
    captured(tmp_path / "d", tokenizer_folder)
    before = open_dataset(tmp_path / "d").dataset_id
    files = {path.name for path in (tmp_path / "d").iterdir()}

    where = write_card(tmp_path / "d", progress=False)

    assert Path(where) == tmp_path / "d" / CARD_NAME
    assert verify(tmp_path / "d", deep=True, progress=False) == []
    assert open_dataset(tmp_path / "d").dataset_id == before
    assert {path.name for path in (tmp_path / "d").iterdir()} == {*files, CARD_NAME, "card"}
    assert {path.name for path in (tmp_path / "d" / "card").iterdir()} == {"stats.png", "preview.parquet"}


def test_the_published_folder_loads_with_datasets(carded: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    loaded = load_dataset(str(carded), "rows", split="train", cache_dir=str(tmp_path / "cache"))

    rows = list(open_dataset(carded).rows())
    assert loaded["sample_id"] == [row.sample_id for row in rows]
    assert list(loaded["token_ids"]) == [row.token_ids.tolist() for row in rows]
    assert [np.reshape(spans, (-1, 2)).tolist() for spans in loaded["target_spans"]] == [
        row.target_spans.tolist() for row in rows
    ]
    assert [json.loads(text) for text in loaded["metadata"]] == [row.metadata for row in rows]


def test_the_query_in_the_card_runs_in_duckdb(carded: Path) -> None:
    query = re.search(r"```sql\n(.*?)```", (carded / CARD_NAME).read_text(), flags=re.S)
    assert query is not None

    found = duckdb.sql(query[1].replace("PATH", str(carded))).fetchall()

    rows = sorted(open_dataset(carded).rows(), key=lambda row: -row.token_ids.size)
    assert [tokens for _, tokens in found] == [row.token_ids.size for row in rows]


def test_the_python_in_the_card_runs(carded: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (carded / CARD_NAME).read_text(), flags=re.S)

    for block in blocks:
        exec(compile(block.replace("PATH", str(carded)), "card", "exec"), {})
    assert len(blocks) == 2


def test_the_head_of_the_card_has_the_hub_s_metadata(carded: Path) -> None:
    assert front_matter((carded / CARD_NAME).read_text()) == {
        "license": "cc0-1.0",
        "pretty_name": "Log-probs of tiny",
        "task_categories": ["text-generation"],
        "size_categories": ["n<1K"],
        "tags": ["coldstill", "knowledge-distillation", "logits", "log-probs"],
        "configs": [
            {
                "config_name": "preview",
                "data_files": [{"split": "preview", "path": "card/preview.parquet"}],
                "default": True,
            },
            {"config_name": "rows", "data_files": "shards/*.parquet"},
        ],
    }


def test_the_card_describes_the_dataset(carded: Path) -> None:
    dataset, text = open_dataset(carded), (carded / CARD_NAME).read_text()

    for part in (
        dataset.dataset_id,
        "K = 8 of 64 ids",
        "D = 4 independent draws from the full softmax",
        "fidelity fine: mean KL of the stored values below 1e-05 nats",
        "At 40 positions",
        "The guarantee, a mean below 1e-05 nats, holds on this sample.",
        f"{dataset.manifest.targets:,} targets",
        "| too&#95;long | 4 |",
        "| no&#95;target | 2 |",
        "6 source rows were rejected",
        "License of this dataset: CC0-1.0.",
        dataset.header.source_sha256,
        "coldstill verify --deep PATH",
        f"]({PLOT_NAME})",
    ):
        assert part in text, part
    assert "None." not in text
    assert page_of(text).count("<table>") == 7


def test_the_card_names_the_datasets_that_this_one_was_made_of(tiny_dataset: Path) -> None:
    document = json.loads((tiny_dataset / MANIFEST_NAME).read_text())
    document["derived_from"] = ["ab" * 32, "<b>x</b>"]
    (tiny_dataset / MANIFEST_NAME).write_text(json.dumps(document))

    write_card(tiny_dataset, progress=False)

    text = (tiny_dataset / CARD_NAME).read_text()
    assert f"- made from dataset {'ab' * 32}\n- made from dataset &#60;b&#62;x&#60;/b&#62;\n" in text
    assert "holds no sample of unquantized positions" in text


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_the_dataset_is_markup_or_yaml(
    carded: Path, tmp_path: Path, tokenizer_folder: Path, text: str
) -> None:
    teacher = TeacherFacts(
        name=text, revision=text, weights_fingerprint=text, dtype=text, head_dtype=text, quantization=text
    )
    about = {"license": text, text: text}
    changes = {"teacher": teacher, "about": about, "sampling": {text: text}, "chat_template_sha256": text}
    captured(tmp_path / "d", tokenizer_folder, reasons=(text,), **changes)

    write_card(tmp_path / "d", progress=False)

    card, plain_card = (tmp_path / "d" / CARD_NAME).read_text(), (carded / CARD_NAME).read_text()
    head, usual = front_matter(card), front_matter(plain_card)
    assert head["license"] == "other"
    assert re.fullmatch("[a-z0-9.-]+", head["license_name"])
    assert {key: value for key, value in head.items() if key not in ("license", "license_name", "pretty_name")} == {
        key: value for key, value in usual.items() if key not in ("license", "pretty_name")
    }
    assert "<" not in body(card)
    assert "javascript:" not in card.replace(head["pretty_name"], "")
    page, plain_page = page_of(card), page_of(plain_card)
    tags = [re.findall(r"<(\w+)", html) for html in (page, plain_page)]
    assert sorted(set(tags[0])) == sorted(set(tags[1]))
    assert tags[0].count("img") == 1
    assert tags[0].count("table") == tags[1].count("table")
    assert tags[0].count("h1") == tags[1].count("h1")
    assert re.findall(r'(?:src|href)="(.*?)"', page) == [PLOT_NAME]
    assert all(sign.isprintable() or sign == "\n" for sign in card)


def test_no_entity_of_a_card_is_shown_as_its_code(carded: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    """Markdown does not replace entities within backticks."""
    captured(tmp_path / "d", tokenizer_folder, reasons=(), about={"end_token_ids": [1]})
    write_card(tmp_path / "d", progress=False)
    page = page_of((tmp_path / "d" / CARD_NAME).read_text())
    assert "end_token_ids" in page
    assert "&amp;#" not in page + page_of((carded / CARD_NAME).read_text())


def test_a_card_that_people_may_have_edited_is_not_overwritten_unasked(tiny_dataset: Path) -> None:
    (tiny_dataset / CARD_NAME).write_text("mine")

    with pytest.raises(CardExists, match="--replace"):
        write_card(tiny_dataset, progress=False)

    assert (tiny_dataset / CARD_NAME).read_text() == "mine"
    assert not (tiny_dataset / PLOT_NAME).exists()
    write_card(tiny_dataset, replace=True, progress=False)
    assert (tiny_dataset / CARD_NAME).read_text().startswith("---\nlicense: cc0-1.0\n")


def test_equal_datasets_have_equal_cards(tiny_dataset: Path) -> None:
    write_card(tiny_dataset, progress=False)
    first = (tiny_dataset / CARD_NAME).read_bytes()
    write_card(tiny_dataset, replace=True, progress=False)

    assert (tiny_dataset / CARD_NAME).read_bytes() == first


def test_a_remote_dataset_gets_its_card_in_place(tokenizer_folder: Path) -> None:
    root = f"memory://card-{uuid.uuid4().hex}/d"
    captured(root, tokenizer_folder)

    where = write_card(root, progress=False)

    store = Store(root)
    assert where == f"{root}/{CARD_NAME}"
    assert store.read(CARD_NAME).startswith(b"---\n")
    assert store.read(PLOT_NAME).startswith(b"\x89PNG")
    assert verify(root, progress=False) == []


def test_without_matplotlib_nothing_is_written(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(PackagesMissing, match="no matplotlib"):
        write_card(tiny_dataset, progress=False)
    assert not (tiny_dataset / CARD_NAME).exists()


def test_a_capture_that_has_not_ended_has_no_card(tmp_path: Path, tokenizer_folder: Path) -> None:
    making.begin_dataset(tmp_path / "d", making.tiny_header(tokenizer_folder), tokenizer_folder, [1])

    with pytest.raises(DatasetNotSealed):
        write_card(tmp_path / "d", progress=False)


@pytest.mark.parametrize(
    ("license", "fields"),
    [
        (None, {"license": "unknown"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("openrail++", {"license": "openrail++"}),
        ("Qwen Research License", {"license": "other", "license_name": "qwen-research-license"}),
        ("!?", {"license": "other", "license_name": "other"}),
        ("", {"license": "other", "license_name": "other"}),
    ],
)
def test_a_license_that_the_hub_does_not_know_is_other(license: str | None, fields: dict[str, str]) -> None:
    assert license_fields(license) == fields


def test_licenses_of_the_hub_are_written_as_the_hub_writes_them() -> None:
    assert all(re.fullmatch(r"[a-z0-9.+-]+", name) for name in HUB_LICENSES)


@pytest.mark.parametrize(
    ("rows", "category"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (99_999, "10K<n<100K"),
        (10**6, "1M<n<10M"),
        (10**9, "1B<n<10B"),
        (10**12 - 1, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_size_categories_are_the_hubs(rows: int, category: str) -> None:
    assert size_category(rows) == category


def test_the_card_of_an_import_claims_nothing_about_its_teacher(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Not its weights, nor a tail that it computed, nor that the stored values are near to it."""
    teacher = TeacherFacts(
        name="peer/teacher", revision="r1", weights_fingerprint="unknown", dtype="unknown", head_dtype="unknown"
    )
    captured(tmp_path, tokenizer_folder, mode="imported", tail="derived", teacher=teacher)
    write_card(tmp_path, progress=False)
    card = body((tmp_path / "README.md").read_text())
    for claim in ("A teacher model", "guarantee", "computed by the teacher", "KL(teacher", "fingerprint unknown"):
        assert claim not in card
    for said in ("as the importer named it", "This is not known.", "nothing here was compared with it"):
        assert said in " ".join(card.split())
