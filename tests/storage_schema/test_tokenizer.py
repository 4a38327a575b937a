"""Laws of a tokenizer's digests, and of the check of a loaded tokenizer against its own file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from coldstill.storage_schema.errors import TokenizerUnfaithful
from coldstill.storage_schema.tokenizer import (
    TOKENIZER_FILE,
    TokenizerFacts,
    fingerprint,
    fingerprint_bytes,
    first_difference,
    load_faithfully,
    splits_alike,
)
from tests import making


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer beside the `config.json` of a Llama, as DeepSeek-V3's files beside such a one."""
    return making.misnamed_tokenizer(tmp_path)


def _changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> TokenizerFacts:
    document = json.loads((folder / TOKENIZER_FILE).read_bytes())
    change(document)
    return fingerprint_bytes(json.dumps(document).encode(), where="a test")


PIPELINES: dict[str, Callable[[dict[str, Any]], object]] = {
    "pre-tokenizer": lambda document: document.update(pre_tokenizer={"type": "Whitespace"}),
    "no pre-tokenizer": lambda document: document.update(pre_tokenizer=None),
    "prefix space": lambda document: document["pre_tokenizer"].update(add_prefix_space=True),
    "no regex": lambda document: document["pre_tokenizer"].update(use_regex=False),
    "normalizer": lambda document: document.update(normalizer={"type": "NFC"}),
    "decoder": lambda document: document.update(decoder={"type": "Metaspace", "replacement": "_"}),
    "model's flags": lambda document: document["model"].update(ignore_merges=True),
}


@pytest.mark.parametrize("what", PIPELINES)
def test_the_second_digest_changes_with_each_step_between_text_and_tokens_and_the_first_does_not(
    folder: Path, what: str
) -> None:
    facts, changed = fingerprint(folder), _changed(folder, PIPELINES[what])
    assert changed.fingerprint == facts.fingerprint
    assert changed.pipeline_sha256 != facts.pipeline_sha256


def test_the_second_digest_is_that_of_the_same_steps_in_another_spelling(folder: Path) -> None:
    facts = fingerprint(folder)
    for change in (
        lambda document: document["pre_tokenizer"].pop("use_regex", None),
        lambda document: document["pre_tokenizer"].update(trim_offsets=False),
        lambda document: document["model"].pop("ignore_merges", None),
        lambda document: document.update(post_processor=None),
        lambda document: document.update(truncation={"max_length": 3}, version="9.9"),
    ):
        assert _changed(folder, change) == facts  # type: ignore[arg-type]


def test_steps_are_alike_if_only_flags_that_decoding_does_not_read_differ(folder: Path) -> None:
    """transformers rebuilds the tokenizer of each Qwen with other flags in its decoder than the file has."""
    data = (folder / TOKENIZER_FILE).read_bytes()
    document = json.loads(data)
    assert document["decoder"]["type"] == "ByteLevel"
    document["decoder"].update(add_prefix_space=False, use_regex=False, trim_offsets=False)
    assert splits_alike(data, json.dumps(document).encode())
    for change in PIPELINES.values():
        document = json.loads(data)
        change(document)
        assert not splits_alike(data, json.dumps(document).encode())


def test_both_digests_are_those_of_earlier_releases(tokenizer_folder: Path) -> None:
    """They stand in headers: a change would refuse students and restarts of existing datasets."""
    assert fingerprint(tokenizer_folder) == TokenizerFacts(
        "2ebd4e6a7c168567af7902d678e5374bedbc69025240607293f2982a91da44fb",
        making.VOCABULARY,
        "a48e99d4dc4af6ffea85b848c4bb234e30bb313ad9cfc45ddbb85e33f80a7550",
    )


def test_transformers_loses_the_spaces_of_a_tokenizer_of_another_class_and_the_check_finds_it(folder: Path) -> None:
    data = (folder / TOKENIZER_FILE).read_bytes()
    wrong, right = AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    text = "Hello world, so it is."
    assert wrong.decode(wrong(text).input_ids) != text, "transformers does it right: the test proves nothing"
    assert "Hello world" in first_difference(wrong, data)
    assert first_difference(right, data) == ""


def test_the_loader_that_does_what_the_file_says_is_taken_and_the_difference_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = (folder / TOKENIZER_FILE).read_bytes()
    loaders = [lambda kind=kind: kind.from_pretrained(folder) for kind in (AutoTokenizer, PreTrainedTokenizerFast)]
    with caplog.at_level(logging.WARNING):
        tokenizer = load_faithfully(loaders, data, where="here")
    text = "Hello world, so it is. 你好"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "The file decides" in caplog.text
    caplog.clear()
    assert load_faithfully(loaders[1:], data, where="here").is_fast
    assert load_faithfully(loaders[:1], None, where="here").is_fast  # nothing to compare with
    assert caplog.text == ""
    with pytest.raises(TokenizerUnfaithful, match=r"(?s)tokenizer of here.*Hello world.*save_pretrained"):
        load_faithfully(loaders[:1], data, where="here")


def test_a_decoder_that_loses_text_is_found_too(folder: Path) -> None:
    document = json.loads((folder / TOKENIZER_FILE).read_bytes())
    document["decoder"] = None
    assert "the ids of" in first_difference(
        PreTrainedTokenizerFast.from_pretrained(folder), json.dumps(document).encode()
    )
