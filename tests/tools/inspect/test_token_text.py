"""The text of tokens: every kind of vocabulary gives the right bytes, and no hidden characters."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from coldstill.common.packages import PackagesMissing
from coldstill.storage_schema.dataset import open_dataset
from coldstill.tools.errors import TokenizerUnreadable
from coldstill.tools.inspect.token_text import MAX_SHOWN, TokenText
from tests import making
from tests.tools.inspect import strange_tokens
from tests.tools.inspect.strange_tokens import HOSTILE, hidden_characters

LANGUAGES = "Grüße, 你好 мир 🙂👩‍🚀\n\tनमस्ते"


def text_of(tokenizer: Tokenizer, folder: Path) -> TokenText:
    """The texts of a dataset with this tokenizer."""
    size = tokenizer.get_vocab_size()
    files = strange_tokens.folder_of(tokenizer, folder / "tokenizer")
    row = strange_tokens.row_of(np.arange(size), vocabulary=size, top_k=2)
    header = making.tiny_header(files, top_k=2, draw_logprobs=True, max_length=2 * size)
    making.write_dataset(folder / "dataset", [[row]], header=header, tokenizer=files)
    return TokenText(open_dataset(folder / "dataset"))


def test_byte_level_tokens_give_their_own_bytes_and_rows_whole_characters(tmp_path: Path) -> None:
    tokenizer = strange_tokens.byte_tokenizer()
    text = text_of(tokenizer, tmp_path)
    ids = tokenizer.encode(LANGUAGES).ids
    assert b"".join(text.raw(token_id) or b"?" for token_id in ids) == LANGUAGES.encode()
    assert text.row(ids) == LANGUAGES.replace("\t", "␉").replace("\u200d", "\\u200d")
    euro = tokenizer.encode("€").ids
    assert [text.label(token_id) for token_id in euro] == ["\\xe2", "\\x82", "\\xac"]
    assert text.pieces(euro) == ["⋯", "⋯", "€"]
    assert text.pieces([*euro[:2], *tokenizer.encode("a").ids]) == ["⋯", "⋯", "\\xe2\\x82a"]


def test_special_tokens_are_their_own_text(tmp_path: Path) -> None:
    tokenizer = strange_tokens.byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<|end of ü|>", special=True)])
    text = text_of(tokenizer, tmp_path)
    assert text.label(256) == "<|end␣of␣ü|>"
    assert text.row([256]) == "<|end of ü|>"


def test_sentencepiece_tokens_have_spaces_and_bytes(tmp_path: Path) -> None:
    tokens = ["<unk>", "▁a", "b▁", "<0xE4>", "<0xBD>", "<0xA0>", "<0x0A>"]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    text = text_of(tokenizer, tmp_path)
    assert text.row(range(7)) == "<unk> ab 你\n"
    assert [text.label(i) for i in range(7)] == ["<unk>", "␣a", "b␣", "\\xe4", "\\xbd", "\\xa0", "⏎"]


def test_word_pieces_and_word_ends(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "walk": 1, "##ing": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    assert text_of(tokenizer, tmp_path / "pieces").row([1, 2, 1]) == " walking walk"
    tokenizer = Tokenizer(models.BPE(vocab={"walk": 0, "ing</w>": 1, "on</w>": 2}, merges=[]))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    assert text_of(tokenizer, tmp_path / "ends").row([0, 1, 2]) == "walking on "


def test_no_token_text_is_hidden_or_endless(tmp_path: Path) -> None:
    text = TokenText(open_dataset(strange_tokens.hostile_dataset(tmp_path / "dataset", tmp_path / "tokenizer")))
    ids = list(range(len(HOSTILE)))
    for token_id, piece in zip(ids, text.pieces(ids), strict=True):
        for shown in (text.label(token_id), piece):
            assert hidden_characters(shown) == set()
            assert 0 < len(shown) < 10 * MAX_SHOWN
    assert hidden_characters(text.row(ids)) == set()
    assert "\n" not in "".join(text.label(token_id) for token_id in ids)


def test_a_dataset_without_tokenizer_files_shows_numbers(tokenizer_folder: Path, tmp_path: Path) -> None:
    row = making.random_row(np.random.default_rng(0), "row")
    root = strange_tokens.without_tokenizer(tmp_path / "dataset", [row], tokenizer=tokenizer_folder)
    text = TokenText(open_dataset(root))
    assert text.label(17) == "#17"
    assert text.row([1, 2]) == "#1 #2 "
    assert text.pieces([1, 2]) == ["#1 ", "#2 "]


def test_an_id_that_the_tokenizer_does_not_know_is_a_number(tiny_dataset: Path) -> None:
    assert TokenText(open_dataset(tiny_dataset)).label(10_000) == "#10000"


ENDLESS_STRIP = '{"type": "Strip", "content": "x", "start": 1000000000000, "stop": 1000000000000}'
UNREADABLE = (
    "no",
    "{}",
    "[]",
    '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
    f'{{"model": {{"type": "WordLevel", "vocab": {{"a": 0}}, "unk_token": "a"}}, "decoder": {ENDLESS_STRIP}}}',
)


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_tokenizer_that_cannot_be_loaded_has_a_name(content: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(content)
    rows = [making.random_row(np.random.default_rng(0), "row")]
    header = making.tiny_header(tokenizer_folder)
    making.write_dataset(tmp_path / "dataset", [rows], header=header, tokenizer=folder)
    with pytest.raises(TokenizerUnreadable, match=r"tokenizer/tokenizer\.json"):
        TokenText(open_dataset(tmp_path / "dataset"))


def test_without_the_library_the_error_names_what_to_install(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(PackagesMissing, match=r"coldstill\[share\]"):
        TokenText(open_dataset(tiny_dataset))
