"""The head of a dataset card: header and counts in, the YAML that the Hub and `datasets` read out.

Hub documentation, "Dataset Cards" and "Repository licenses".
"""

from __future__ import annotations

import re

import yaml

from coldstill.common.visible import visible
from coldstill.storage_schema.header import DatasetHeader
from coldstill.storage_schema.verified_files import SHARDS_FOLDER
from coldstill.tools.card.markdown import cut

HUB_LICENCES = frozenset(
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
"""Identifiers that the Hub knows; it refuses a card that names another one in `license`."""

_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
"""The edges of the Hub's brackets, each ten times the one before."""


def front_matter(header: DatasetHeader, *, rows: int) -> str:
    """The YAML between the two `---` lines, these included. Text of strangers is quoted by the YAML library."""
    fields = {
        **licence_fields(header.licence),
        "pretty_name": cut(visible(f"Log-probs of {header.teacher.name[:200]}")),
        "task_categories": ["text-generation"],
        "size_categories": [size_category(rows)],
        "tags": ["coldstill", "knowledge-distillation", "logits", "log-probs"],
        "configs": [{"config_name": "default", "data_files": f"{SHARDS_FOLDER}/*.parquet"}],
    }
    # A line that is folded could begin with anything.
    body = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1 << 20)
    return f"---\n{body}---\n"


def licence_fields(licence: str | None) -> dict[str, str]:
    """`license`, and `license_name` for one that the Hub does not know."""
    if licence is None:
        return {"license": "unknown"}
    name = licence.strip().lower()
    if name in HUB_LICENCES:
        return {"license": name}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", name[:64]).strip("-.") or "other"}


def size_category(rows: int) -> str:
    """The Hub's bracket for a number of rows."""
    above = sum(rows >= 10 ** (3 + power) for power in range(len(_SIZES)))
    if above == 0:
        return f"n<{_SIZES[0]}"
    return f"n>{_SIZES[-1]}" if above == len(_SIZES) else f"{_SIZES[above - 1]}<n<{_SIZES[above]}"
