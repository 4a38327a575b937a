"""Tokenizers that are trained here, datasets of text and chats with a random teacher, and students of other ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from coldstill.storage_schema.commits import commit_unit
from coldstill.storage_schema.manifest import seal
from coldstill.storage_schema.rows import CachedRow, span_positions, spans_from_mask
from coldstill.storage_schema.tokenizer import TOKENIZER_FILES, TOKENIZER_FOLDER
from tests import making

TEXTS = [
    "The cat sat on the mat, and the dog sat by the door of the house.",
    "  two leading spaces,  two inside, a trailing one ",
    "line one\nline two\n\n\tindented\r\nwindows line\r\n",
    "Привет, naïve café Straße мир 你好，世界。 こんにちは",
    "smile 🙂 and 👩‍💻 and 🇫🇷 flags",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]}  # it's code",
    "the other day the weather was better than the weather of the day before",
    "12345 3.14159 0x1F 1,000,000",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}SYSTEM {{ m['content'] }} "
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)


def byte_level(folder: Path, *, vocabulary: int = 320, template: str | None = CHATML, begin: bool = False) -> Path:
    """Byte-level BPE as of GPT-2 and Qwen."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", backend.token_to_id("<|endoftext|>"))]
        )
    return _saved(backend, folder, template, bos="<|endoftext|>" if begin else None, eos="<|endoftext|>")


def sentencepiece_bpe(folder: Path, *, vocabulary: int = 420, template: str | None = INST) -> Path:
    """BPE with byte fallback as of Llama 2: the normalizer puts a space before each run of text."""
    return _sentencepiece(folder, models.BPE(byte_fallback=True, fuse_unk=True), vocabulary, template, prepend=True)


def unigram(folder: Path, *, vocabulary: int = 430, template: str | None = INST) -> Path:
    """Unigram with byte fallback; no space is put before the text, as in Gemma's."""
    learned = Tokenizer(models.Unigram())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary - 256, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    ascii_texts = [text.encode("ascii", "ignore").decode() for text in TEXTS for _ in range(4)]
    learned.train_from_iterator(ascii_texts, trainer)
    pieces = [(token, -float(rank) / 50) for token, rank in sorted(learned.get_vocab().items(), key=lambda it: it[1])]
    pieces = [piece for piece in pieces if piece[0] != "<unk>"]
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), *pieces]
    backend = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>", "</s>"])
    return _saved(backend, folder, template, bos="<s>", eos="</s>")


def _sentencepiece(folder: Path, model: models.Model, vocabulary: int, template: str | None, *, prepend: bool) -> Path:
    backend = Tokenizer(model)
    steps = [normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), *steps] if prepend else steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, limit_alphabet=60, show_progress=False)
    ascii_texts = [text.encode("ascii", "ignore").decode() for text in TEXTS]
    backend.train_from_iterator(ascii_texts, trainer)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    written = _with_special(backend, {"<unk>", "<s>", "</s>"})
    written.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", written.token_to_id("<s>"))]
    )
    return _saved(written, folder, template, bos="<s>", eos="</s>")


def _with_special(backend: Tokenizer, special: set[str]) -> Tokenizer:
    """The tokenizer with these added tokens alone: the trainer makes the bytes special too."""
    document = json.loads(backend.to_str())
    document["added_tokens"] = [added for added in document["added_tokens"] if added["content"] in special]
    return Tokenizer.from_str(json.dumps(document))


def word_piece(folder: Path) -> Path:
    """Of BERT: spaces and case are lost."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    )
    return _saved(backend, folder, None, bos=None, eos="[UNK]")


def _saved(backend: Tokenizer, folder: Path, template: str | None, *, bos: str | None, eos: str) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=AddedToken(eos, special=True), **({"bos_token": bos} if bos else {})
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def text_row(number: int, ids: list[int], is_target: np.ndarray, *, vocabulary: int, draws: int = 8) -> CachedRow:
    """A row of `ids` with a random teacher of `vocabulary` ids at the tokens of `is_target`, as in a `making` row."""
    rng = np.random.default_rng(number)
    tokens = np.array(ids, np.int32)
    spans = spans_from_mask(is_target)
    at = span_positions(spans)
    probs = making.random_probs(rng, at.size, vocabulary)
    targets = making.targets_of(probs, tokens[at + 1], top_k=16, draws=draws, seed=number)
    return CachedRow(sample_id=f"row-{number}", token_ids=tokens, target_spans=spans, targets=targets, metadata={})


def text_rows(tokenizer: Path, count: int = 16) -> list[CachedRow]:
    """Rows of raw text: begin, text, end."""
    loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    rows = []
    for number in range(count):
        ids = [*loaded(TEXTS[number % len(TEXTS)])["input_ids"], loaded.eos_token_id]
        rows.append(text_row(number, ids, np.arange(len(ids)) > 0, vocabulary=len(loaded)))
    return rows


def chats(count: int = 16) -> list[list[dict[str, str]]]:
    """Chats of one or two turns, every third with a system message."""
    found = []
    for number in range(count):
        texts = [TEXTS[(number + step) % len(TEXTS)].strip() for step in range(5)]
        system = [{"role": "system", "content": texts[4]}] if number % 3 == 0 else []
        turns = [
            {"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts[:4], strict=True)
        ]
        found.append([*system, *turns[: 2 + 2 * (number % 2)]])
    return found


def chat_rows(tokenizer: Path, count: int = 16) -> list[CachedRow]:
    """Rows of chats: the answers and their end tokens are targets."""
    loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    rows = []
    for number, messages in enumerate(chats(count)):
        text = loaded.apply_chat_template(messages, tokenize=False)
        encoded = loaded(text, add_special_tokens=False, return_offsets_mapping=True)
        end = loaded.eos_token if "<|im_end|>" not in loaded.get_vocab() else "<|im_end|>"
        is_target, start = np.zeros(len(encoded["input_ids"]), bool), 0
        for message in messages:
            begin = text.index(message["content"], start)
            start = begin + len(message["content"])
            if message["role"] == "assistant":
                offsets = encoded["offset_mapping"]
                stop = start + len(end)
                is_target |= np.array([begin <= first and begin < last <= stop for first, last in offsets])
        rows.append(text_row(number, encoded["input_ids"], is_target, vocabulary=len(loaded)))
    return rows


def write(root: Path, rows: list[CachedRow], tokenizer: Path, *, chat: bool = False, **changes: object) -> Path:
    """A sealed dataset with all files of the tokenizer; `changes` are of the header."""
    changes |= {"chat_template_sha256": "0" * 64} if chat else {}
    header = making.tiny_header(tokenizer, top_k=16, draws=8, max_length=1024, **changes)
    halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    store = making.begin_dataset(root, header, tokenizer, [len(half) for half in halves])
    for name in TOKENIZER_FILES[1:]:
        if (tokenizer / name).exists():
            store.put(f"{TOKENIZER_FOLDER}/{name}", (tokenizer / name).read_bytes())
    for unit, half in enumerate(halves):
        commit_unit(store, unit, rows=half, rejects=[], header=header, environment={})
    seal(store)
    return root


def student(folder: Path, tokenizer: Path, *, seed: int = 0) -> Path:
    """A random Llama with this tokenizer."""
    vocabulary = len(PreTrainedTokenizerFast.from_pretrained(tokenizer))
    making.tiny_llama(folder, vocabulary=vocabulary, seed=seed, max_position_embeddings=512)
    for file in folder.glob("*token*"):
        file.unlink()
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
