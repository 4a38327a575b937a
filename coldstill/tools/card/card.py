"""`coldstill card`: the README.md of a sealed dataset, made from what is in it. A path in, a card and a picture out.

The manifest does not name them: people may edit the card, and the dataset stays the same.
"""

from __future__ import annotations

from pathlib import Path

from coldstill.common.errors import ColdstillError
from coldstill.storage_schema.dataset import open_dataset
from coldstill.storage_schema.store import RUN_FOLDER
from coldstill.tools.card.faithfulness import measure_faithfulness
from coldstill.tools.card.reject_reasons import count_reasons
from coldstill.tools.card.text import card_text
from coldstill.tools.hub.copying import CARD_FILES
from coldstill.tools.stats.measure import measure_stats
from coldstill.tools.stats.plot import plot_png, require_plotting

CARD_NAME, PLOT_NAME = CARD_FILES


class CardExists(ColdstillError):
    """The dataset has a card already, and people may have edited it."""


def write_card(root: str | Path, *, replace: bool = False, progress: bool = True) -> str:
    """Write the card and its picture into the dataset at `root`, local or remote; the card's full name.

    Raises `CardExists` unless it may `replace` one, `PlottingUnavailable`, `StorageFailed`, and what `measure_stats`,
    `measure_faithfulness` and `count_reasons` raise: of these, before anything is written.
    """
    require_plotting()
    dataset = open_dataset(root)
    store = dataset.store
    if not replace and store.exists(CARD_NAME):
        raise CardExists(
            f"{store.url}/{CARD_NAME}",
            found="a card",
            wanted="none yet",
            fix="move it away, or ask for a new one in its place with --replace",
        )
    faithfulness = measure_faithfulness(dataset)
    reasons = count_reasons(dataset)
    stats = measure_stats(root, progress=progress)
    text = card_text(dataset, stats=stats, faithfulness=faithfulness, reasons=reasons, plot=PLOT_NAME)
    store.put(PLOT_NAME, plot_png(stats))
    store.put(CARD_NAME, text.encode())
    if store.is_local:
        store.delete_folder(RUN_FOLDER)
    return f"{store.url}/{CARD_NAME}"
