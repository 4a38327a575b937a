"""`coldstill card`: writes README.md and a plot of the stats into a sealed dataset.

The manifest does not list them: someone may edit the card, and the dataset's id stays the same. The metadata follows
the Hub's documentation, "Dataset Cards" and "Repository licenses".
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from coldstill.common.packages import require_packages
from coldstill.common.visible import visible
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.store import RUN_FOLDER
from coldstill.storage_schema.verified_files import SHARDS_FOLDER
from coldstill.tools.card_text import marked_card
from coldstill.tools.errors import CardExists
from coldstill.tools.pull import CARD_FILES
from coldstill.tools.reject_reasons import count_reasons
from coldstill.tools.stats.measure import measure_stats
from coldstill.tools.stats.plot import plot_png

from .faithfulness import measure_faithfulness
from .markdown import card_sections, shortened

CARD_NAME, PLOT_NAME = CARD_FILES

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
    """Write the card and its plot into the dataset at `root`, local or remote; the URL or path of the card.

    Raises `CardExists` unless `replace`, `PackagesMissing`, `StorageFailed`, and what `measure_stats`,
    `measure_faithfulness` and `count_reasons` raise. All but `StorageFailed` are raised before anything is written.
    """
    require_packages("share", "matplotlib")
    dataset = open_dataset(root)
    store = dataset.store
    if not replace and store.exists(CARD_NAME):
        raise CardExists(
            f"{store.url}/{CARD_NAME}",
            found="a card",
            wanted="no card",
            fix="pass --replace to overwrite it, or move it away",
        )
    faithfulness = measure_faithfulness(dataset)
    reasons = count_reasons(dataset)
    stats = measure_stats(root, progress=progress)
    sections = card_sections(dataset, stats=stats, faithfulness=faithfulness, reasons=reasons, plot=PLOT_NAME)
    card = marked_card(front_matter(dataset.header, rows=stats.rows) + "\n" + sections)
    store.put(PLOT_NAME, plot_png(stats))
    store.put(CARD_NAME, card)
    if store.is_local:
        store.delete_folder(RUN_FOLDER)
    return f"{store.url}/{CARD_NAME}"


def front_matter(header: DatasetHeader, *, rows: int) -> str:
    """The YAML between two `---` lines, these included, that the Hub and `datasets` read.

    The YAML library quotes text that comes from the dataset.
    """
    fields = {
        **license_fields(header.about.license),
        "pretty_name": shortened(visible(f"Log-probs of {header.teacher.name[:200]}")),
        "task_categories": ["image-text-to-text" if header.about.processor else "text-generation"],
        "size_categories": [size_category(rows)],
        "tags": ["coldstill", "knowledge-distillation", "logits", "log-probs"],
        "configs": [{"config_name": "default", "data_files": f"{SHARDS_FOLDER}/*.parquet"}],
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
