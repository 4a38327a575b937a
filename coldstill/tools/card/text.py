"""The text of a dataset card: what is known of a dataset in, Markdown out. All text of the dataset passes `plain`."""

from __future__ import annotations

import json
from collections import Counter

from coldstill.storage_schema.dataset import Dataset
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.tokenizer import TOKENIZER_FILE, TOKENIZER_FOLDER
from coldstill.tools.card.faithfulness import Faithfulness
from coldstill.tools.card.markdown import plain, table
from coldstill.tools.card.metadata import front_matter
from coldstill.tools.stats.measure import Stats
from coldstill.tools.stats.table import FIGURES, NAMES, bytes_per_target, figure, figures_of, rank_shares

_MOST_LISTED = 12

_LOAD = """## Load it

`PATH` is this folder, or `s3://`, `gs://` or `hf://datasets/ORG/NAME`. With Coldstill, one row and its teacher:

```python
from coldstill import open_dataset

dataset = open_dataset("PATH")
row = dataset.row(0)
row.token_ids, row.positions, row.labels  # position t is the distribution of token t + 1
row.targets.ids, row.targets.logprobs, row.targets.log_tail  # [N, K], [N, K], [N]
```

Without it, each shard is a Parquet file with sample ids, tokens, target spans and metadata in plain columns; the
teacher's part is in binary columns. With `datasets`, and with DuckDB:

```python
from datasets import load_dataset

rows = load_dataset("PATH", split="train").select_columns(["sample_id", "token_ids", "target_spans", "metadata"])
```

```sql
SELECT sample_id, len(token_ids) AS tokens FROM 'PATH/shards/*.parquet' ORDER BY tokens DESC LIMIT 10;
```
"""


def card_text(
    dataset: Dataset, *, stats: Stats, faithfulness: Faithfulness | None, reasons: Counter[str], plot: str
) -> str:
    """The whole `README.md`; `plot` is the relative name of the picture of the stats."""
    header = dataset.header
    sections = [
        front_matter(header, rows=stats.rows),
        f"# Log-probs of {plain(header.teacher.name)}\n",
        _opening(header, stats),
        table(["", ""], _facts(dataset, stats).items()) + "\n",
        _LOAD,
        _verify(dataset),
        _faithful(dataset, faithfulness),
        _contents(stats, plot),
        _rejected(stats, reasons),
        _origin(dataset),
        _licence(header.licence),
    ]
    return "\n".join(sections)


def _opening(header: DatasetHeader, stats: Stats) -> str:
    return (
        f"What a teacher model expects next, at {stats.targets:,} target tokens of {stats.rows:,} rows of text: its "
        f"{header.top_k:,} most probable tokens with their log-probs, and the log of the mass outside them. With it a "
        "student is trained without the teacher.\n"
    )


def _facts(dataset: Dataset, stats: Stats) -> dict[str, str]:
    header, teacher, codec = dataset.header, dataset.header.teacher, dataset.header.codec
    names = {file.name for file in dataset.manifest.files}
    inside = "inside" if f"{TOKENIZER_FOLDER}/{TOKENIZER_FILE}" in names else "not inside"
    floor = f", none below probability {header.min_prob:g}" if header.min_prob else ""
    grid = f" (a = {codec.a}, b = {codec.b})" if codec.name == "grid" else ""
    quantised = f", {plain(teacher.quantization)}" if teacher.quantization else ""
    over_long = {"reject": "rejected", "cut": "cut", "split": "split"}[header.over_long]
    return {
        "Teacher": plain(teacher.name) + (f" at revision {plain(teacher.revision)}" if teacher.revision else ""),
        "Weights": f"{plain(teacher.dtype)}{quantised}; head in {plain(teacher.head_dtype)}; "
        f"fingerprint {plain(teacher.weights_fingerprint)}",
        "Targets": f"mode {header.mode}, loss on {header.loss_on}",
        "Kept at each target": f"K = {header.top_k:,} of {header.vocab_size:,} ids{floor}",
        "Tail mass": "the teacher's own" if header.tail == "exact" else "1 - the kept mass",
        "Tail draws": f"D = {header.draws:,} from the full softmax, at most {header.kept_draws:,} in the tail kept"
        if header.draws
        else "none",
        "Stored": f"format {header.format_version}, codec {codec.name}{grid}, fidelity {codec.fidelity}: "
        f"mean KL of what is stored below {codec.mean_kl:g} nats",
        "Rows": f"{stats.rows:,} of at most {header.max_length:,} tokens (longer ones {over_long}); "
        f"{stats.tokens:,} tokens, {stats.targets:,} targets",
        "Size": f"{stats.bytes:,} bytes in {stats.shards:,} shards, {figure(stats.bytes_per_target)} a target",
        "Tokenizer": f"{header.token_count:,} ids, {inside}; fingerprint {header.tokenizer_fingerprint}",
        "Licence": plain(header.licence) if header.licence else "none named",
        "Dataset id": dataset.dataset_id,
    }


def _verify(dataset: Dataset) -> str:
    return f"""## Verify it

`coldstill verify --deep PATH` compares every file with its digest, decodes every target and checks its laws. The
dataset's id is the sha256 of `manifest.json`, which names all its files. This card and its picture are none of them:
people may edit them.

```
{dataset.dataset_id}
```
"""


def _faithful(dataset: Dataset, faithfulness: Faithfulness | None) -> str:
    title, guarantee = "## How faithful it is\n", f"{dataset.header.codec.mean_kl:g} nats"
    if faithfulness is None:
        return (
            f"{title}\nThe dataset holds no sample of unquantised positions. Its codec's guarantee is a mean KL below "
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
    return f"""{title}
At {faithfulness.positions:,} positions, spread over the dataset, the capture kept the teacher's values unquantised too
(`faithfulness.parquet`). KL(teacher || stored) over the kept ids and the tail, in nats:

{table(["", *kl], [["KL", *(f"{value:.2g}" for value in kl.values())]])}

The guarantee, a mean below {guarantee}, {holds} on this sample. The most probable id is the same at
{faithfulness.top1_agreement:.2%} of the positions; its log-prob is off by {faithfulness.top1_error:.2g} nats on
average.
"""


def _contents(stats: Stats, plot: str) -> str:
    figures = [[title, *figures_of(getattr(stats, key))] for key, title in NAMES.items()]
    ranks = [[name, f"{share:.2%}"] for name, share in rank_shares(stats).items()]
    sizes = [[f"`{name}`", f"{size:,.2f}"] for name, size in bytes_per_target(stats).items()]
    return f"""## What is in it

![Entropy, tail mass, rank and log-prob of the label, row lengths, bytes per target]({plot})

{table(["", *FIGURES], figures)}

Entropy is that of the kept ids and one bucket for all the rest: a lower bound, for how the tail is spread is not known.
The label is the token that really follows. Percentiles are at most one bin off.

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
        rows.append(["other reasons", f"{rest:,}"])
    counted = f"\n{table(['reason', 'rows'], rows)}\n" if rows else ""
    return f"""{title}
{stats.rejected:,} source rows could not be used; `rejects/` names each.
{counted}"""


def _origin(dataset: Dataset) -> str:
    header, parents = dataset.header, dataset.manifest.derived_from
    lines = ["## Where it comes from\n", f"- digest of the source: {header.source_sha256}"]
    if header.chat_template_sha256:
        lines.append(f"- digest of the chat template: {plain(header.chat_template_sha256)}")
    if header.documents:
        lines.append(f"- documents: {header.documents}")
    if header.sampling:
        lines.append(f"- the teacher's answers were sampled with {plain(json.dumps(header.sampling))}")
    if header.mode == "imported":
        lines.append("- imported from another tool's dataset: the teacher was not asked again")
    for parent in parents[:_MOST_LISTED]:
        lines.append(f"- made of dataset {plain(parent)}")
    if len(parents) > _MOST_LISTED:
        lines.append(f"- and of {len(parents) - _MOST_LISTED:,} more, which `manifest.json` names")
    return "\n".join(lines) + "\n"


def _licence(licence: str | None) -> str:
    named = f"Terms of this dataset: {plain(licence)}." if licence else "The capture named no licence for this dataset."
    return f"""## Licence

{named} The licences of the teacher and of the source text hold too.
"""
