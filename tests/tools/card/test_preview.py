"""The preview: what a card's viewer shows is what the dataset holds, in text that is safe to show, within bounds."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.rows import CachedRow
from coldstill.tools.card import preview
from coldstill.tools.card.card import write_card
from coldstill.tools.card.preview import COLUMNS, ROWS, SCHEMA, TARGETS, preview_parquet
from coldstill.tools.card_text import CARD_NAME, PREVIEW_NAME
from coldstill.tools.errors import CardExists
from coldstill.tools.inspect.row_facts import open_row
from coldstill.tools.inspect.token_text import TokenText
from coldstill.tools.verify import verify
from tests import making
from tests.tools import vision_data
from tests.tools.inspect import strange_tokens

pytestmark = pytest.mark.usefixtures("quick_plot")


def lines_of(dataset: Dataset) -> list[dict[str, Any]]:
    table = pq.read_table(io.BytesIO(preview_parquet(dataset)))
    assert table.schema.equals(SCHEMA)
    return table.to_pylist()


def test_each_line_is_a_target_of_the_dataset(tiny_dataset: Path) -> None:
    """Compared with a plain computation from the row: probabilities, entropy, rank, and where the target is."""
    dataset = open_dataset(tiny_dataset)
    text, lines = TokenText(dataset), lines_of(dataset)
    assert lines
    for line in lines:
        row = dataset.row(line["row"])
        targets, token = row.targets, int(row.token_ids[line["position"]])
        n = int(np.flatnonzero(row.positions == line["position"] - 1)[0])
        kept = sorted(
            (-float(logprob), int(token_id))
            for token_id, logprob, used in zip(targets.ids[n], targets.logprobs[n], targets.kept[n], strict=True)
            if used
        )
        assert line["top_5_ids"] == [token_id for _, token_id in kept[:5]]
        np.testing.assert_allclose(line["top_5_logprobs"], [-value for value, _ in kept[:5]], atol=2e-6)
        shown = line["top_5"].split("  |  ")
        assert [entry.rpartition(" ")[0] for entry in shown] == [text.label(token_id) for _, token_id in kept[:5]]
        assert line["token_id"] == token
        assert line["token"] == text.label(token)
        ids = [token_id for _, token_id in kept]
        assert line["label_rank"] == (ids.index(token) + 1 if token in ids else None)
        tail = float(targets.log_tail[n])
        entropy = sum(np.exp(-value) * value for value, _ in kept) - np.exp(tail) * tail
        np.testing.assert_allclose(line["entropy"], max(entropy, 0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(line["tail_mass"], np.exp(tail), rtol=1e-5)
        np.testing.assert_allclose(line["label_logprob"], min(float(targets.label_logprob[n]), 0), rtol=1e-6)
        assert line["context"].endswith(text.row(row.token_ids[line["position"] - 1 : line["position"]].tolist())[-4:])


def test_the_lines_are_spread_over_the_dataset_and_bounded(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [making.random_row(np.random.default_rng(n), f"row-{n}", length=90) for n in range(40)]
    header = making.tiny_header(tokenizer_folder, max_length=128)
    making.write_dataset(tmp_path / "d", [rows[:20], rows[20:]], header=header, tokenizer=tokenizer_folder)
    lines = lines_of(open_dataset(tmp_path / "d"))
    assert len(lines) == ROWS * TARGETS
    assert sorted({line["row"] for line in lines}) == list(range(0, 40, 4))


def test_equal_datasets_have_equal_previews(tiny_dataset: Path) -> None:
    assert preview_parquet(open_dataset(tiny_dataset)) == preview_parquet(open_dataset(tiny_dataset))


def test_text_of_strangers_is_visible_on_one_line_and_short(tmp_path: Path) -> None:
    dataset = open_dataset(strange_tokens.hostile_dataset(tmp_path / "d", tmp_path / "tokenizer"))
    lines = lines_of(dataset)
    assert strange_tokens.SCRIPT in lines[0]["context"]
    for line in lines:
        texts = [value for value in line.values() if isinstance(value, str)]
        assert all(not strange_tokens.hidden_characters(text) and "\n" not in text for text in texts)
        assert len(line["context"]) <= preview.CONTEXT_CHARS + 1
        assert len(line["token"]) <= preview.TOKEN_CHARS + 1
        assert len(line["top_5"]) <= 5 * (preview.TOKEN_CHARS + 12)
        assert len(line["sample_id"]) <= preview.ID_CHARS + 1
    assert len(preview_parquet(dataset)) < 200_000


def test_images_are_noted(tmp_path: Path, tokenizer_folder: Path) -> None:
    images = [vision_data.SMALL, vision_data.PHOTO]
    lines = lines_of(vision_data.vision_dataset(tmp_path / "d", tokenizer_folder, [[images, []]]))
    assert [{line["images"] for line in lines if line["row"] == row} for row in (0, 1)] == [{2}, {0}]
    assert "[image 1]" in lines[0]["context"]
    assert "[image 2]" in lines[0]["context"]


@pytest.mark.parametrize("kind", ["none", "damaged"])
def test_without_a_readable_tokenizer_tokens_are_shown_by_id(tmp_path: Path, tokenizer_folder: Path, kind: str) -> None:
    rows = [making.random_row(np.random.default_rng(4), "row")]
    if kind == "none":
        root = strange_tokens.without_tokenizer(tmp_path / "d", rows, tokenizer=tokenizer_folder)
    else:
        root, folder = tmp_path / "d", tmp_path / "tokenizer"
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")
        making.write_dataset(root, [rows], header=making.tiny_header(tokenizer_folder), tokenizer=folder)
    assert {line["token"] for line in lines_of(open_dataset(root))} <= {f"#{n}" for n in range(making.VOCABULARY)}


def test_datasets_loads_the_preview_first_and_the_shards_by_name(tiny_dataset: Path, tmp_path: Path) -> None:
    """And the Hub's viewer shows the default configuration first, as `datasets` finds it."""
    datasets = pytest.importorskip("datasets")
    write_card(tiny_dataset, progress=False)
    loaded = datasets.load_dataset(str(tiny_dataset), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["preview"]
    assert loaded["preview"].to_list() == lines_of(open_dataset(tiny_dataset))
    page = (Path(__file__).parents[3] / "docs" / "hub.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("ORG/NAME", str(tiny_dataset)), names)
    assert len(names["preview"]) == len(loaded["preview"])
    assert len(names["rows"]) == len(open_dataset(tiny_dataset))
    assert datasets.get_dataset_default_config_name(str(tiny_dataset)) == "preview"
    assert datasets.get_dataset_config_names(str(tiny_dataset)) == ["preview", "rows"]


def test_the_card_explains_each_column(tiny_dataset: Path) -> None:
    assert [name for names in COLUMNS for name in names.split(", ")] == SCHEMA.names
    write_card(tiny_dataset, progress=False)
    card = (tiny_dataset / CARD_NAME).read_text()
    assert all(f"`{name}`" in card for name in SCHEMA.names)


def test_a_generated_card_is_written_anew_and_an_edited_one_is_not(tiny_dataset: Path) -> None:
    write_card(tiny_dataset, progress=False)
    first = {name: (tiny_dataset / name).read_bytes() for name in (CARD_NAME, PREVIEW_NAME)}
    (tiny_dataset / PREVIEW_NAME).unlink()
    write_card(tiny_dataset, progress=False)
    assert {name: (tiny_dataset / name).read_bytes() for name in first} == first
    edited = first[CARD_NAME].replace(b"# Log-probs", b"# My log-probs")
    (tiny_dataset / CARD_NAME).write_bytes(edited)
    with pytest.raises(CardExists, match="--replace"):
        write_card(tiny_dataset, progress=False)
    assert (tiny_dataset / CARD_NAME).read_bytes() == edited


def test_a_label_that_is_the_whole_tail_is_shown_after_its_rounding(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Log-prob and log tail are rounded apart, so that the stored one may be the larger by a step of the grid."""
    tails = np.geomspace(1e-6, 0.2, 40)
    tokens = np.full(41, 63, np.int32)
    probs = np.zeros((40, making.VOCABULARY))
    probs[:, :8] = (1 - tails[:, None]) / 8
    probs[:, 63] = tails
    spans = np.array([[0, 40]], np.int32)
    targets = making.targets_of(np.maximum(probs, 1e-300), tokens[1:], top_k=8)
    row = CachedRow(sample_id="row", token_ids=tokens, target_spans=spans, targets=targets, metadata={})
    header = making.tiny_header(tokenizer_folder, draws=0)
    making.write_dataset(tmp_path / "d", [[row]], header=header, tokenizer=tokenizer_folder)
    assert verify(tmp_path / "d", deep=True, progress=False) == []
    lines = lines_of(open_dataset(tmp_path / "d"))
    np.testing.assert_allclose([line["label_logprob"] for line in lines], np.log(tails[:TARGETS]), atol=0.3)
    assert open_row(tmp_path / "d", 0).facts.positions.size == 40
