"""The card of a push: the dataset's own, a generated one if it has none, and never one in place of somebody's text."""

from __future__ import annotations

import logging
from collections.abc import Callable

from coldstill.common.errors import ColdstillError, type_and_line
from coldstill.common.packages import PackagesMissing
from coldstill.storage_schema.dataset import Dataset
from coldstill.tools.card_text import CARD_NAME, PREVIEW_NAME, card_taken, is_unedited, short_card, with_shards

from .card import front_matter, make_card
from .preview import preview_parquet

logger = logging.getLogger(__name__)


def made_card(dataset: Dataset, *, progress: bool) -> dict[str, bytes]:
    """The files of a generated card for a dataset without one; empty where it cannot be made: the copy is worth more.

    Raises the `ColdstillError`s that `make_card` raises, except `PackagesMissing`.
    """
    try:
        files = make_card(dataset, progress=progress)
    except PackagesMissing as missing:
        logger.warning("%s has no card, and none is made: %s. %s", dataset.store.url, missing.found, missing.fix)
        return {}
    except ColdstillError:
        raise
    except Exception as error:
        logger.warning("%s has no card, and none is made: %s", dataset.store.url, type_and_line(error))
        return {}
    logger.warning("%s has no card: the copy gets a generated one", dataset.store.url)
    return files


def card_on_hub(
    dataset: Dataset,
    own: dict[str, bytes],
    there: Callable[[], bytes] | None,
    *,
    same: bool,
    replace: bool,
    where: str,
    progress: bool,
) -> dict[str, bytes]:
    """The unlisted files that a branch of the Hub shall have, made of `own`, those of the dataset.

    `there` reads the branch's card, if it has one; `same`: it equals the dataset's. A card that someone edited on the
    Hub is replaced only on request. Where the dataset has no card, such a text stays, and the metadata added to it
    names the preview and the shards; a generated card of another dataset is made anew.

    Raises `CardExists`, and what `made_card` raises.
    """
    if CARD_NAME in own and (there is None or replace or same):
        return own
    text = b"" if there is None or replace else there()
    generated = is_unedited(text) or not text.strip()
    if CARD_NAME in own:
        if generated:
            return own
        raise card_taken(where)
    if not generated:
        return {**own, **_with_configs(dataset, text)}
    if dataset.dataset_id.encode() in text:  # to make it again would decode the whole dataset
        return own
    short = front_matter(dataset.header, rows=len(dataset), preview=False)
    return {**own, **(made_card(dataset, progress=progress) or {CARD_NAME: short_card(short)})}


def _with_configs(dataset: Dataset, text: bytes) -> dict[str, bytes]:
    """The card `text` with the metadata that it lacks, and the preview if that names it."""
    preview = _preview_of(dataset)
    card = with_shards(text, front_matter(dataset.header, rows=len(dataset), preview=preview is not None))
    return {CARD_NAME: card, **({PREVIEW_NAME: preview} if preview and PREVIEW_NAME.encode() in card else {})}


def _preview_of(dataset: Dataset) -> bytes | None:
    try:
        return preview_parquet(dataset) if len(dataset) else None
    except PackagesMissing:
        return None
    except ColdstillError:
        raise
    except Exception as error:
        logger.warning("%s gets no preview: %s", dataset.store.url, type_and_line(error))
        return None
