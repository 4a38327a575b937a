"""`coldstill card`: writes README.md, a plot of the stats and a preview into a sealed dataset.

The manifest does not list them: someone may edit the card, and the dataset's id stays the same. The metadata follows
the Hub's documentation, "Dataset Cards" and "Repository licenses".
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from coldstill.common.packages import require_packages
from coldstill.common.visible import shortened, visible
from coldstill.storage_schema.dataset import Dataset, open_dataset
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.store import RUN_FOLDER, Store
from coldstill.storage_schema.verified_files import SHARDS_FOLDER
from coldstill.tools.card_text import (
    CARD_NAME,
    MAX_CARD_BYTES,
    PLOT_NAME,
    PREVIEW_CONFIG,
    PREVIEW_NAME,
    ROWS_CONFIG,
    is_unedited,
    marked_card,
)
from coldstill.tools.errors import CardExists
from coldstill.tools.reject_reasons import count_reasons
from coldstill.tools.stats.measure import measure_stats
from coldstill.tools.stats.plot import plot_png

from .faithfulness import measure_faithfulness
from .markdown import card_sections, title
from .preview import preview_parquet

HUB_LICENSES = frozenset(
    {
        *("afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m"),
        *("bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause"),
        *("bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
        *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
        *("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0"),
        *("cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0"),
        *("creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0"),
        *("eupl-1.1", "eupl-1.2", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1"),
        *("lgpl-3.0", "lgpl-lr", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c"),
        *("mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail", "openrail++", "osl-3.0"),
        *("pddl", "postgresql", "unlicense", "wtfpl", "zlib"),
    }
)
"""License identifiers that the Hub accepts. It rejects a card with any other in `license`."""

_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
"""The edges of the Hub's size brackets, each ten times the one before."""


def write_card(root: str | Path, *, replace: bool = False, progress: bool = True) -> str:
    """Write the card, its plot and the preview into the dataset at `root`, local or remote; the card's URL or path.

    A card that nobody edited since it was generated is written anew; `replace` also overwrites an edited one.

    Raises `CardExists`, `StorageFailed` and what `make_card` raises. All but `StorageFailed` are raised before anything
    is written.
    """
    require_packages("share", "matplotlib", "tokenizers")
    dataset = open_dataset(root)
    store = dataset.store
    if not replace and _is_edited(store):
        raise CardExists(
            f"{store.url}/{CARD_NAME}",
            found="a card that someone edited or wrote, or that an earlier release made",
            wanted="no card, or one as `coldstill card` wrote it",
            fix="pass --replace to overwrite it, or move it away",
        )
    for name, data in make_card(dataset, progress=progress).items():
        store.put(name, data)
    if store.is_local:
        store.delete_folder(RUN_FOLDER)
    return f"{store.url}/{CARD_NAME}"


def make_card(dataset: Dataset, *, progress: bool = True) -> dict[str, bytes]:
    """The files of a dataset's card by name: the plot, the preview, and last the card. Nothing is written.

    Raises `PackagesMissing`, and what `measure_stats`, `measure_faithfulness`, `count_reasons` and `preview_parquet`
    raise.
    """
    require_packages("share", "matplotlib", "tokenizers")
    faithfulness = measure_faithfulness(dataset)
    reasons = count_reasons(dataset)
    preview = preview_parquet(dataset) if len(dataset) else None
    stats = measure_stats(dataset.store.url, progress=progress)
    sections = card_sections(dataset, stats=stats, faithfulness=faithfulness, reasons=reasons, plot=PLOT_NAME)
    card = marked_card(front_matter(dataset.header, rows=stats.rows, preview=preview is not None) + "\n" + sections)
    return {PLOT_NAME: plot_png(stats), **({PREVIEW_NAME: preview} if preview else {}), CARD_NAME: card}


def _is_edited(store: Store) -> bool:
    try:
        there = store.read(CARD_NAME, at_most=MAX_CARD_BYTES)
    except FileNotFoundError:
        return False
    return not is_unedited(there)


def front_matter(header: DatasetHeader, *, rows: int, preview: bool) -> str:
    """The YAML between two `---` lines, these included, that the Hub and `datasets` read.

    The Hub's viewer shows the configuration with `default: true` first, and `load_dataset` loads it if none is named.
    The YAML library quotes text that comes from the dataset.
    """
    shown = [{"split": PREVIEW_CONFIG, "path": PREVIEW_NAME}]
    first = {"config_name": PREVIEW_CONFIG, "data_files": shown, "default": True}
    fields = {
        **license_fields(header.about.license),
        "pretty_name": shortened(visible(title(header))),
        "task_categories": ["image-text-to-text" if header.about.processor else "text-generation"],
        "size_categories": [size_category(rows)],
        "tags": ["coldstill", "knowledge-distillation", "logits", "log-probs"],
        "configs": [
            *([first] if preview else []),
            {"config_name": ROWS_CONFIG, "data_files": f"{SHARDS_FOLDER}/*.parquet"},
        ],
    }
    # No folding: the second half of a folded line could begin with anything.
    body = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1 << 20)
    return f"---\n{body}---\n"


def license_fields(license: str | None) -> dict[str, str]:
    """`license` as the Hub spells it; `other` and `license_name` for a license that the Hub does not list."""
    if license is None:
        return {"license": "unknown"}
    name = license.strip().lower()
    if name in HUB_LICENSES:
        return {"license": name}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", name[:64]).strip("-.") or "other"}


def size_category(rows: int) -> str:
    """The Hub's size bracket for a number of rows."""
    above = sum(rows >= 10 ** (3 + power) for power in range(len(_SIZES)))
    if above == 0:
        return f"n<{_SIZES[0]}"
    return f"n>{_SIZES[-1]}" if above == len(_SIZES) else f"{_SIZES[above - 1]}<n<{_SIZES[above]}"
