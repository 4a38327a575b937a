"""Sections of a dataset card as Markdown, with text from the dataset escaped.

All text of the dataset passes `plain`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from coldstill.common.visible import MAX_SHOWN, counted, plain
from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE, TOKENIZER_FOLDER
from coldstill.tools.card_text import PREVIEW_NAME
from coldstill.tools.reject_reasons import OTHER_REASONS
from coldstill.tools.stats.measure import Stats
from coldstill.tools.stats.table import (
    FIGURES,
    bytes_per_target,
    figure,
    figures_of,
    images_in_words,
    rank_shares,
    shown_names,
)

from .faithfulness import Faithfulness
from .preview import COLUMNS, ROWS, TARGETS

_IN_OTHER_FACTS = ("processor", "imported")
"""Facts of `about` that the card says in words."""

_MOST_LISTED = 12
"""Maximum number of reject reasons, and of parent datasets, in a list."""

_SIZES = (
    *("size", "crop_size", "max_image_size", "do_image_splitting", "min_pixels", "max_pixels", "patch_size"),
    *("merge_size", "image_seq_len", "image_seq_length", "num_additional_image_tokens", "crop_to_patches"),
    *("max_patches", "do_pan_and_scan", "max_dynamic_tiles"),
)
"""Of the processor's settings, those that decide how many tokens an image becomes."""

_LOAD = """## Load it

`PATH` is this folder, or an `s3://`, `gs://` or `hf://datasets/ORG/NAME` URL. Coldstill reads a row with its teacher
values:

```python
from coldstill import open_dataset

dataset = open_dataset("PATH")
row = dataset.row(0)
row.token_ids, row.positions, row.labels  # position t is the distribution of token t + 1
row.targets.ids, row.targets.logprobs, row.targets.log_tail  # [N, K], [N, K], [N]
```

Without Coldstill, each shard is a Parquet file: sample ids, tokens, target spans and metadata are plain columns, and
the teacher values are binary columns. `datasets` and DuckDB read the plain columns. `"rows"` names the configuration
of the shards; without it, `datasets` loads the preview:

```python
from datasets import load_dataset

rows = load_dataset("PATH", "rows", split="train")
rows = rows.select_columns(["sample_id", "token_ids", "target_spans", "metadata"])
```

```sql
SELECT sample_id, len(token_ids) AS tokens FROM 'PATH/shards/*.parquet' ORDER BY tokens DESC LIMIT 10;
```
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown cells: text of the dataset must pass `plain` first.

    The first column is aligned left, and the others right if there are more than two.
    """
    others = "---" if len(head) == 2 else "--:"
    lines = [head, ["---", *[others] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def card_sections(
    dataset: Dataset, *, stats: Stats, faithfulness: Faithfulness | None, reasons: Counter[str], plot: str
) -> str:
    """The `README.md` below its metadata; `plot` is the relative path of the plot of the stats."""
    header = dataset.header
    sections = [
        f"# {plain(title(header))}\n",
        _summary(header, stats),
        table(["", ""], _facts(dataset, stats).items()) + "\n",
        *([_preview()] if len(dataset) else []),
        _LOAD,
        _verify(dataset),
        _faithfulness(dataset, faithfulness),
        _contents(stats, plot),
        _rejected(stats, reasons),
        _origin(dataset),
        _license(header.about.license),
    ]
    return "\n".join(sections)


def title(header: DatasetHeader) -> str:
    """The title of a dataset's card, not escaped. That of an import does not claim the teacher."""
    name, origin = header.teacher.name[:MAX_SHOWN], header.about.imported
    if header.mode != "imported":
        return f"Log-probs of {name}"
    return f"Log-probs imported from {origin.tool if origin else 'another tool'}, said to be of {name}"


def _summary(header: DatasetHeader, stats: Stats) -> str:
    content = "text and images" if stats.media else "text"
    if header.mode == "imported":
        return (
            f"Log-probs of {header.top_k:,} tokens at {stats.targets:,} target tokens of {stats.rows:,} rows of "
            f"{content}, imported from {_tool(header)} files. The importer named the teacher; nothing here was "
            "compared with it.\n"
        )
    named = header.about.score_ids
    which = (
        f"{header.top_k:,} most probable tokens"
        if header.kept_ids == "top_k"
        else f"{f'{named.top_k:,} ' if named else ''}most probable tokens, and those that the source named,"
    )
    return (
        f"A teacher model's predictions at {stats.targets:,} target tokens of {stats.rows:,} rows of {content}: the "
        f"{which} with their log-probs, and the log of the probability outside them. A "
        "student can be trained from them without running the teacher.\n"
    )


def _tool(header: DatasetHeader) -> str:
    return plain(header.about.imported.tool) if header.about.imported else "another tool's"


def _facts(dataset: Dataset, stats: Stats) -> dict[str, str]:
    header, teacher, codec = dataset.header, dataset.header.teacher, dataset.header.codec
    names = {file.name for file in dataset.manifest.files}
    included = "included" if f"{TOKENIZER_FOLDER}/{TOKENIZER_FILE}" in names else "not included"
    floor = f", none below probability {header.min_prob:g}" if header.min_prob else ""
    grid = f" (a = {codec.a}, b = {codec.b})" if codec.name == "grid" else ""
    quantized = f", {plain(teacher.quantization)}" if teacher.quantization else ""
    imported = header.mode == "imported"
    kept = header.kept_in_words
    over_long = {"reject": "rejected", "cut": "cut", "split": "split"}[header.over_long]
    return {
        "Teacher": plain(teacher.name)
        + (f" at revision {plain(teacher.revision)}" if teacher.revision else "")
        + (", as the importer named it" if imported else ""),
        **_import_facts(header),
        "Weights": "not known: neither their data type nor a fingerprint"
        if imported
        else f"{plain(teacher.dtype)}{quantized}; head in {plain(teacher.head_dtype)}; "
        f"fingerprint {plain(teacher.weights_fingerprint)}",
        "Targets": f"mode {header.mode}, loss on {header.loss_on}",
        "Kept per target": f"K = {header.top_k:,} ids; how many the teacher has is not known"
        if imported
        else f"{kept} of {header.vocab_size:,} ids{floor}",
        "Tail mass": _tail(header),
        "Tail draws": header.draws_in_words,
        "Storage": f"format {header.format_version}, codec {codec.name}{grid}, fidelity {codec.fidelity}: "
        f"mean KL of {'the imported values to the stored ones' if imported else 'the stored values'} below "
        f"{codec.mean_kl:g} nats",
        "Rows": f"{stats.rows:,} of at most {header.max_length:,} tokens (longer ones {over_long}); "
        f"{stats.tokens:,} tokens, {stats.targets:,} targets",
        "Size": f"{stats.bytes:,} bytes in {counted(stats.shards, 'shard')}, "
        f"{figure(stats.bytes_per_target)} per target",
        **_images(header, stats),
        "Tokenizer": f"{header.token_count:,} ids, {included}; fingerprint {header.tokenizer_fingerprint}",
        "License": plain(header.about.license) if header.about.license else "not given",
        **_optional_facts(header),
        "Dataset id": dataset.dataset_id,
    }


def _import_facts(header: DatasetHeader) -> dict[str, str]:
    origin = header.about.imported
    return {"Imported from": plain(origin.in_words)} if header.mode == "imported" and origin else {}


def _images(header: DatasetHeader, stats: Stats) -> dict[str, str]:
    """The images, and how the teacher's processor read them."""
    facts = {"Images": images_in_words(stats)} if stats.media else {}
    if processor := header.about.processor:
        facts["Image processor"] = f"{plain(processor.name)}; digest of its settings {processor.settings_sha256}"
        sizes = {name: value for name, value in processor.settings.items() if name in _SIZES}
        facts["Image sizes"] = plain(json.dumps(sizes, ensure_ascii=False))
    return facts


def _tail(header: DatasetHeader) -> str:
    if header.about.normalized_over == "kept":
        return "not known: the log-probs were renormalized over the kept ids, so that their tail is lost"
    return "computed by the teacher" if header.tail == "exact" else "not stored by the teacher: 1 minus the kept mass"


def _optional_facts(header: DatasetHeader) -> dict[str, str]:
    """Facts that few datasets have, and all those that a reader may ignore."""
    teacher, facts = header.teacher, {}
    if teacher.adapter:
        facts["Adapter"] = f"{plain(teacher.adapter.name)}; fingerprint {plain(teacher.adapter.weights_fingerprint)}"
    if teacher.engine_args:
        facts["Engine arguments"] = plain(json.dumps(teacher.engine_args, ensure_ascii=False))
    if header.teacher_prompt:
        facts["Prompt"] = f"the teacher saw {plain(str(header.teacher_saw))}, digest {header.teacher_prompt.sha256}"
    if header.kept_ids != "top_k":
        facts["Kept ids"] = "the most probable ones, and those that the source named"
    about = {name: value for name, value in header.about_in_words.items() if name not in _IN_OTHER_FACTS}
    return facts | {plain(name): plain(value) for name, value in about.items()}


def _preview() -> str:
    rows = [[", ".join(f"`{name}`" for name in names.split(", ")), what] for names, what in COLUMNS.items()]
    return f"""## What the preview shows

`{PREVIEW_NAME}` is for people: the first {TARGETS} target tokens of {ROWS} rows or fewer, spread over the dataset. The
viewer of the Hub shows it first. Invisible characters are written out, and long texts are cut.

{table(["column", "content"], rows)}
"""


def _verify(dataset: Dataset) -> str:
    return f"""## Verify it

`coldstill verify --deep PATH` compares every file with its digest, decodes every target and checks its values. The
dataset's id is the sha256 of `manifest.json`, which lists all its files. It does not list this card, its plot and its
preview: you may edit them, and nothing verifies them.

```
{dataset.dataset_id}
```
"""


def _faithfulness(dataset: Dataset, faithfulness: Faithfulness | None) -> str:
    head, guarantee = "## How faithful it is\n", f"{dataset.header.codec.mean_kl:g} nats"
    if dataset.header.mode == "imported":
        return f"{head}\n{_faithfulness_of_import(dataset.header)}"
    if faithfulness is None:
        return (
            f"{head}\nThe dataset holds no sample of unquantized positions. Its codec guarantees a mean KL below "
            f"{guarantee}.\n"
        )
    kl = {
        "mean": faithfulness.mean_kl,
        "p50": faithfulness.p50_kl,
        "p90": faithfulness.p90_kl,
        "p99": faithfulness.p99_kl,
        "max": faithfulness.max_kl,
    }
    holds = "holds" if faithfulness.holds else "DOES NOT HOLD"
    return f"""{head}
At {faithfulness.positions:,} positions, spread over the dataset, the capture also kept the unquantized teacher values
(`faithfulness.parquet`). KL(teacher || stored) over the kept ids and the tail, in nats:

{table(["", *kl], [["KL", *(f"{value:.2g}" for value in kl.values())]])}

The guarantee, a mean below {guarantee}, {holds} on this sample. The most probable id is the same at
{faithfulness.top1_agreement:.2%} of the positions; the mean absolute error of its log-prob is
{faithfulness.top1_error:.2g} nats.
"""


def _faithfulness_of_import(header: DatasetHeader) -> str:
    """What can be known of imported values, and what cannot."""
    origin = header.about.imported
    layout = f" ({plain(origin.layout)})" if origin else ""
    assumed = (
        "The importer stated that the values were renormalized over the kept ids."
        if header.about.normalized_over == "kept"
        else "The importer stated that the values are of the full softmax."
        if header.about.normalized_over == "vocabulary"
        else "Their sums showed at the import that they were not renormalized over the kept ids."
    )
    return f"""This is not known. The importer kept no sample of exact values, and did not run the teacher.

What is known:

- The storage is bounded: the mean KL from the imported to the stored values is below {header.codec.mean_kl:g} nats.
- The values have the form of log-probs: within rounding, none is above 0 and no position sums to more
  than 1.
- {assumed}

What is not known:

- The teacher: its name and revision are the importer's words. Its weights, its numeric types and the temperature of its
  softmax are in no file.
- The loss before the import: what the tool's layout{layout} rounded or left out is not recorded.
- Whether the kept ids are the teacher's most probable ones.
- The tail: its mass is 1 minus the kept mass, with all errors of the kept values, and no draws are from it.
- The log-prob of a label that is not kept, unless the files hold it: an even share of the tail stands for it.
"""


def _contents(stats: Stats, plot: str) -> str:
    figures = [[title, *figures_of(getattr(stats, key))] for key, title in shown_names(stats).items()]
    ranks = [[name, f"{share:.2%}"] for name, share in rank_shares(stats).items()]
    sizes = [[f"`{name}`", f"{size:,.2f}"] for name, size in bytes_per_target(stats).items()]
    return f"""## What it contains

![Entropy, tail mass, rank and log-prob of the label, row lengths, bytes per target]({plot})

{table(["", *FIGURES], figures)}

Entropy counts the kept ids and one bucket for the rest. It is a lower bound, because the distribution within the tail
is not stored. The label is the token that follows in the text. Percentiles are exact to one histogram bin.

{table(["rank of the label", "share of targets"], ranks)}

{table(["column", "bytes per target"], sizes)}
"""


def _rejected(stats: Stats, reasons: Counter[str]) -> str:
    title = "## Rejected rows\n"
    if not stats.rejected:
        return f"{title}\nNone.\n"
    listed = reasons.most_common(_MOST_LISTED)
    rows = [[plain(reason), f"{count:,}"] for reason, count in listed]
    if rest := reasons.total() - sum(count for _, count in listed):
        rows.append([OTHER_REASONS, f"{rest:,}"])
    counted = f"\n{table(['reason', 'rows'], rows)}\n" if rows else ""
    return f"""{title}
{stats.rejected:,} source rows were rejected; `rejects/` lists them.
{counted}"""


def _origin(dataset: Dataset) -> str:
    header, parents = dataset.header, dataset.manifest.derived_from
    lines = ["## Where it comes from\n", f"- digest of the source: {header.source_sha256}"]
    if header.chat_template_sha256:
        lines.append(f"- digest of the chat template: {plain(header.chat_template_sha256)}")
    if header.documents:
        lines.append(f"- documents: {header.documents}")
    if header.sampling:
        lines.append(f"- sampling settings of the teacher's answers: {plain(json.dumps(header.sampling))}")
    if header.mode == "imported":
        lines.append(
            f"- imported from {_tool(header)} files, which the digest of the source covers; the teacher was not run "
            "again, and its name and revision are those that the importer gave"
        )
    for parent in parents[:_MOST_LISTED]:
        lines.append(f"- made from dataset {plain(parent)}")
    if len(parents) > _MOST_LISTED:
        lines.append(f"- and from {len(parents) - _MOST_LISTED:,} more, listed in `manifest.json`")
    return "\n".join(lines) + "\n"


def _license(license: str | None) -> str:
    terms = f"License of this dataset: {plain(license)}." if license else "No license was given for this dataset."
    return f"""## License

{terms} The licenses of the teacher and of the source text apply too.
"""
