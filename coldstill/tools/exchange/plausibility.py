"""Checks that an import's log-probs are of the full softmax, and that each predicts the next token.

Shape letters: `N` target positions of a row, `W` entries at a position, `M` sampled positions of many rows, `V` ids of
the tokenizer.

Other tools' files state neither. A student trained from renormalized or shifted log-probs is wrong without any error.

MASS. The sum of a position's kept probabilities has a bound of its rounding error, `b`. A sum below `1 - b` cannot be
renormalized: the position is OPEN. A sum within `b` of 1 is CLOSED if a full softmax would show a tail there: one of at
least `2 b` if the log-probs keep falling as they do in the second half of the list. That is less than most tails,
because log-probs fall ever more slowly with the rank. Open positions must be the majority of both kinds. One in 20 of
all positions must be open too, so that a few positions that were written otherwise do not decide.

ALIGNMENT. Two offsets are compared at each position by the log-prob of the two tokens. Equal tokens, and two tokens
that are not kept, give no vote. If neither offset fits better, votes are as tosses of a coin, so that the difference
divided by the square root of their number is a standard normal value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from coldstill.storage_schema.rows import CachedRow
from coldstill.tools.errors import AlignmentDoubtful, NotFullSoftmax, UnusableRow

from .derived_targets import ABSENT_LOGPROB
from .input_files import rounding_of

OFFSETS = np.arange(-4, 6)
"""Offsets that are compared: position `t` is about token `t + offset`, and 1 is right."""

RIGHT = int(np.flatnonzero(OFFSETS == 1)[0])

CLEAR = 4.0
"""Standard deviations by which the right offset must lead: by chance once in 30,000. Takes 17 votes of 17."""

CONTRADICTED = 6.0
"""The same for another offset within one row of an import: by chance once in 1e9 rows."""

SUSPICIOUS = 3.0
"""The same for a row that is only counted: by chance, one in 741."""

CHANCE = 1 / 741

MIN_OPEN_SHARE = 1 / 20

MIN_CLOSED = 64
"""Closed positions of one unit, without an open majority, that end an import whose sample passed."""

POSITIONS_PER_ROW = 1024
"""At most this many positions of a row of the first rows are judged, evenly spread: a longer row costs no more."""

LATER_POSITIONS = 256
"""The same for the alignment of each other row, and a quarter of it for its mass."""

FLOAT32_EPSILON = 2.0**-24


@dataclass
class MassSample:
    """Log-probs at positions of many rows, before an import drops or scales any: `float64 [N, W]`, -inf if absent.

    `errors`: bounds of their errors, where the layout states more than `rounding_of` finds. `first`: whether the most
    probable id is the next token.
    """

    token_count: int
    positions_per_row: int = POSITIONS_PER_ROW
    values: list[np.ndarray] = field(default_factory=list)
    errors: list[np.ndarray] = field(default_factory=list)
    first: list[np.ndarray] = field(default_factory=list)

    def add(self, values: np.ndarray, errors: np.ndarray | None, row: CachedRow | None = None) -> None:
        """Keep some positions of a row."""
        step = -(-len(values) // self.positions_per_row) or 1
        if row is not None:
            best = np.where(row.targets.kept, row.targets.logprobs, -np.inf).argmax(axis=1)
            ids = np.take_along_axis(row.targets.ids, best[:, None], axis=1)[:, 0]
            self.first.append((ids == row.token_ids[row.positions + 1])[::step])
        self.values.append(np.where(values[::step] > ABSENT_LOGPROB, values[::step], -np.inf))
        if errors is not None:
            self.errors.append(errors[::step])

    def verdict(self) -> Mass:
        """What the sums show."""
        width = max((part.shape[1] for part in self.values), default=1)
        values = _joined(self.values, width, -np.inf)
        counts = np.isfinite(values).sum(axis=1)
        errors = rounding_of(values[np.isfinite(values)]).of(values)
        if self.errors:
            errors = np.maximum(errors, _joined(self.errors, width, 0.0))
        judged = (counts > 0) & (counts < self.token_count)
        values, errors, counts = values[judged], errors[judged], counts[judged]
        if not values.size:
            return Mass(0, 0, 0, 0.0, 0)
        probs = np.exp(values)
        sums = probs.sum(axis=1)
        # The teacher's log-softmax and the scaling are float32 sums of at most W terms, and one subtraction.
        computed = (counts + 2) * sums + (probs * np.where(np.isfinite(values), -values, 0)).sum(axis=1)
        with np.errstate(over="ignore", invalid="ignore"):
            bound = (probs * np.expm1(errors)).sum(axis=1, where=np.isfinite(values)) + FLOAT32_EPSILON * computed
        bound *= max(1.0, float(np.quantile((sums - 1) / bound, 0.99)))  # sums above 1 show errors of any other origin
        is_open = 1 - sums > bound
        expected = expected_tail(values, counts, self.token_count)
        is_closed = ~is_open & (expected > 2 * bound)
        too_small = int((sums < counts / self.token_count * (1 - 1e-6) - bound).sum())
        return Mass(len(sums), int(is_open.sum()), int(is_closed.sum()), float(np.median(bound)), too_small)

    def fits_base_2(self) -> bool:
        """Whether the values are log-probs to base 2.

        Powers of 2 then sum to 1 at most, where those of natural log-probs sum to more: `p ** 0.69` is far above a
        small `p`. And the most probable id is the next token clearly more often than the powers of e say.
        """
        width = max((part.shape[1] for part in self.values), default=1)
        values = _joined(self.values, width, -np.inf)
        if width == 1 or not self.first:
            return False
        sums, best = np.exp2(values).sum(axis=1), np.exp(values.max(axis=1))
        lead = (np.concatenate(self.first) - best).sum() / np.sqrt((best * (1 - best)).sum() + 1)
        return bool(np.quantile(sums, 0.99) < 1 + 1e-3 and sums.max() > 0.9 and lead > CLEAR)


class Mass(NamedTuple):
    """Positions that can have a tail, open and closed ones among them, and the median bound of a sum's error."""

    positions: int
    open: int
    closed: int
    bound: float
    too_small: int

    @property
    def kind(self) -> Literal["full", "renormalized", "unknown"]:
        """`full` if no position can have a tail."""
        if (self.open > self.closed and self.open >= MIN_OPEN_SHARE * self.positions) or not self.positions:
            return "full"
        return "renormalized" if self.closed > 0 and self.open < MIN_OPEN_SHARE * self.positions else "unknown"


def expected_tail(values: np.ndarray, counts: np.ndarray, token_count: int) -> np.ndarray:
    """The mass of a tail that keeps falling as the second half of a position's log-probs does."""
    ordered = -np.sort(-values, axis=1)
    places = np.arange(len(values))
    last, half = ordered[places, counts - 1], ordered[places, (counts - 1) // 2]
    steps = counts - 1 - (counts - 1) // 2
    slope = np.where(steps > 0, (half - last) / np.maximum(steps, 1), np.log(2))
    slope = np.maximum(slope, 1e-9)
    return np.exp(last) * -np.expm1(-slope * (token_count - counts)) / np.expm1(slope)


def _joined(parts: list[np.ndarray], width: int, fill: float) -> np.ndarray:
    padded = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=fill) for part in parts]
    return np.concatenate(padded) if padded else np.empty((0, width))


def require_full_softmax(sample: MassSample, normalized_over: str | None, *, fix: str) -> None:
    """Raise `NotFullSoftmax` unless the sums show what `normalized_over` states, or a full softmax if it is None."""
    mass = sample.verdict()
    wanted = "log-probs of the full softmax, whose sum over the kept ids is below 1"
    open_share = f"{mass.open} of {mass.positions} positions sum to less than 1 within the error of {mass.bound:.2g}"
    if normalized_over == "kept":
        if mass.kind == "full" and mass.positions:
            raise NotFullSoftmax(
                "normalized_over",
                found=open_share,
                wanted="a sum of 1 over the kept ids, as normalized_over='kept' states",
                fix="leave out normalized_over (--normalized-over)",
            )
        return
    if mass.too_small > mass.positions * MIN_OPEN_SHARE:
        raise NotFullSoftmax(
            "log-probs",
            found=f"a sum of less than K / {sample.token_count} at {mass.too_small} of {mass.positions} positions",
            wanted="the K most probable ids, whose probabilities cannot sum to less",
            fix="check that these are log-probs, not logits, and that the tokenizer is the teacher's",
        )
    if normalized_over is None and sample.fits_base_2():
        raise NotFullSoftmax(
            "log-probs",
            found="values whose powers of 2 sum to nearly 1 and never to more, and whose powers of e are too small for "
            "how often the most probable id is the next token",
            wanted="natural logarithms",
            fix="multiply log-probs to base 2 by 0.693147; if these are natural ones, state "
            "normalized_over='vocabulary' (--normalized-over vocabulary)",
        )
    if normalized_over == "vocabulary" or mass.kind == "full":
        return
    stated = "; in Python normalized_over, on the command line --normalized-over: vocabulary if the teacher was so sure"
    if mass.kind == "renormalized":
        raise NotFullSoftmax(
            "log-probs",
            found=f"a sum of 1 over the kept ids at {mass.closed} of {mass.positions} positions that would show a tail",
            wanted=wanted,
            fix=f"{fix}{stated}, kept to import the log-probs without a tail",
        )
    raise NotFullSoftmax(
        "log-probs",
        found=f"{open_share}, and {mass.closed} to 1 where a tail would show: a full softmax and one that was "
        "renormalized over the kept ids cannot be told apart",
        wanted=wanted,
        fix=f"import values of higher precision, or state what they are{stated} or the log-probs are known to be "
        "of the full softmax, kept if they were renormalized",
    )


@dataclass
class Votes:
    """For each of `OFFSETS`: the positions where the next token fits better, those where the other does, and both."""

    right: np.ndarray
    other: np.ndarray
    compared: np.ndarray
    hits: np.ndarray
    positions: int

    @classmethod
    def none(cls) -> Votes:
        """No positions."""
        zero = np.zeros(len(OFFSETS), np.int64)
        return cls(right=zero.copy(), other=zero.copy(), compared=zero.copy(), hits=zero.copy(), positions=0)

    def add(self, more: Votes) -> None:
        """Count the positions of `more` too."""
        self.right, self.other = self.right + more.right, self.other + more.other
        self.compared, self.hits = self.compared + more.compared, self.hits + more.hits
        self.positions += more.positions

    @property
    def against(self) -> np.ndarray:
        """Standard deviations by which each other offset leads the right one."""
        return (self.other - self.right) / np.sqrt(np.maximum(self.other + self.right, 1))

    @property
    def best_other(self) -> int:
        """The other offset that leads the most, by its place in `OFFSETS`."""
        return int(np.where(np.arange(len(OFFSETS)) == RIGHT, -np.inf, self.against).argmax())

    @property
    def is_clear(self) -> bool:
        """Whether the right offset leads each other one clearly.

        An offset that leaves the row at more than half of the positions is not among them: if it were right, most
        distributions would be of no token of their row.
        """
        rivals = self.compared * 2 >= self.positions
        rivals[RIGHT] = False
        lead = np.maximum(-self.against, self._lead_in_hits)
        return bool(rivals.any() and (lead[rivals] >= CLEAR).all() and self.against.max() < CLEAR)

    @property
    def _lead_in_hits(self) -> np.ndarray:
        """The same for how often the tokens are kept: a test of two shares, which also uses the ends of rows."""
        ours, theirs = max(int(self.compared[RIGHT]), 1), np.maximum(self.compared, 1)
        both = (self.hits[RIGHT] + self.hits) / (ours + theirs)
        error = np.sqrt(both * (1 - both) * (1 / ours + 1 / theirs))
        return (self.hits[RIGHT] / ours - self.hits / theirs) / np.maximum(error, 1e-12)

    def share(self, place: int) -> str:
        """How often the token at an offset is among the kept ids."""
        return f"{self.hits[place] / max(self.compared[place], 1):.0%}"


def votes_of(row: CachedRow, *, center: int = 1, most: int = POSITIONS_PER_ROW) -> Votes:
    """The votes of at most `most` positions of one row; `center`: the offset that stands for the right one."""
    votes = Votes.none()
    step = -(-row.positions.size // most) or 1
    positions = row.positions[::step]
    ids, logprobs = row.targets.ids[::step], np.where(row.targets.kept, row.targets.logprobs, -np.inf)[::step]
    tokens, scores = [], []
    for offset in OFFSETS + (center - 1):
        place = positions + offset
        inside = (place >= 0) & (place < row.token_ids.size)
        token = np.where(inside, row.token_ids[place.clip(0, row.token_ids.size - 1)], -1)
        tokens.append(token)
        scores.append(np.where(ids == token[:, None], logprobs, -np.inf).max(axis=1, initial=-np.inf))
    votes.positions = positions.size
    for place, (token, score) in enumerate(zip(tokens, scores, strict=True)):
        both = (token >= 0) & (tokens[RIGHT] >= 0)
        differ = both & (token != tokens[RIGHT])
        votes.compared[place] = both.sum()
        votes.hits[place] = (both & np.isfinite(score)).sum()
        votes.right[place] = (differ & (scores[RIGHT] > score)).sum()
        votes.other[place] = (differ & (score > scores[RIGHT])).sum()
    return votes


def votes_of_all(rows: Iterable[CachedRow], *, center: int = 1) -> Votes:
    """The votes of all positions of `rows`."""
    total = Votes.none()
    for row in rows:
        total.add(votes_of(row, center=center))
    return total


def _token_at(offset: int) -> str:
    return "token t, the token itself," if offset == 0 else f"token t {'+' if offset > 0 else '-'} {abs(offset)}"


class Plausibility:
    """Checks the rows of an import as it goes: a file may change in the middle, and rows may differ."""

    def __init__(self, *, token_count: int, normalized_over: str | None, mass_fix: str):
        self._token_count, self._normalized_over, self._mass_fix = token_count, normalized_over, mass_fix
        self._rows = 0
        self._suspicious = np.zeros(len(OFFSETS), np.int64)

    def check_row(self, row: CachedRow) -> None:
        """Raise `UnusableRow` for a row whose distributions clearly predict another token."""
        votes = votes_of(row, most=LATER_POSITIONS)
        against = votes.against
        self._rows += 1
        self._suspicious += against > SUSPICIOUS
        if against.max() > CONTRADICTED:
            place = votes.best_other
            raise UnusableRow(
                f"{row.sample_id}: alignment",
                found=f"the kept ids hold {_token_at(int(OFFSETS[place]))} at {votes.share(place)} of the positions, "
                f"token t + 1 at {votes.share(RIGHT)}",
                wanted="at position t, the distribution of token t + 1",
                fix="reject such rows with bad_rows='reject' (--bad-rows reject)",
            )

    def check_rows(self, sample: MassSample) -> None:
        """Raise `AlignmentDoubtful` or `NotFullSoftmax` if the rows so far, or those of `sample`, show another kind."""
        expected, log_odds = self._rows * CHANCE, np.log(1e9)
        # Bernstein's bound: chance passes it once in 1e9 imports.
        limit = expected + log_odds / 3 + np.sqrt(log_odds**2 / 9 + 2 * expected * log_odds)
        if self._suspicious.max() > limit:
            place = int(self._suspicious.argmax())
            raise AlignmentDoubtful(
                "alignment",
                found=f"{self._suspicious[place]} of {self._rows} rows predict {_token_at(int(OFFSETS[place]))}",
                wanted="at position t of each row, the distribution of token t + 1",
                fix="check how these rows were made; the first offset that fits is not that of all rows",
            )
        mass = sample.verdict() if self._normalized_over is None else None
        if mass is not None and mass.kind == "renormalized" and mass.closed >= MIN_CLOSED:
            require_full_softmax(sample, None, fix=self._mass_fix)

    def new_sample(self) -> MassSample:
        """An empty sample for the rows of a unit."""
        return MassSample(self._token_count, positions_per_row=LATER_POSITIONS // 4)


def require_aligned(rows: list[CachedRow], *, assume: bool, advice: str) -> None:
    """Raise `AlignmentDoubtful` unless token `t + 1` is clearly what position `t` predicts.

    `assume`: the user states that it is, which replaces the proof but no contradiction. `advice`: a setting that was
    tried and found right, or the empty string.
    """
    votes = votes_of_all(rows)
    if votes.is_clear:
        return
    place = votes.best_other
    shift = int(OFFSETS[place]) - 1
    contradicted = votes.against[place] > CLEAR
    if assume and not contradicted:
        return
    if contradicted:
        how = "later" if shift > 0 else "earlier"
        found = (
            f"the kept ids hold {_token_at(shift + 1)} at {votes.share(place)} of {votes.positions} positions, "
            f"token t + 1 at {votes.share(RIGHT)}"
        )
        fits = votes_of_all(rows, center=shift + 1).is_clear
        fix = advice or (
            f"write the file again with each list {abs(shift)} token{'s' * (abs(shift) > 1)} {how}: there it fits. "
            "Tokens that were added to a row, or cut from it, after it was scored shift its lists"
            if fits
            else "check how the file was made, and with which tokenizer: no offset from -4 to 5 fits clearly"
        )
    else:
        found = (
            f"token t + 1 among the kept ids at {votes.share(RIGHT)} of {votes.positions} positions, and "
            f"{_token_at(shift + 1)} at {votes.share(place)}: no clear difference"
        )
        fix = (
            f"{advice or 'check how the file was made, and with which tokenizer'}; if you know that position t is "
            "about token t + 1, state it with assume_aligned=True (--assume-aligned)"
        )
    raise AlignmentDoubtful("alignment", found=found, wanted="at position t, the distribution of token t + 1", fix=fix)
