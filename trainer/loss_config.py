"""What a run can be told of its loss: a mapping comes in, a checked `LossConfig` goes out. Only pydantic is imported.

Which loss has which options, with the defaults of its paper, is one table; docs/papers.md says where each comes from.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from coldstill.common.models import FrozenModel

LossName = Literal[
    "taid",
    "forward_kl",
    "reverse_kl",
    "js",
    "tvd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "adaptive_kl",
    "dkd",
    "ctkd",
    "cross_entropy",
]
TailName = Literal["auto", "mixture", "bucket", "mass_corrected", "renormalise", "zero", "uniform"]

TAILS: dict[str, tuple[str, ...]] = {
    "taid": ("mixture", "bucket", "mass_corrected", "renormalise", "zero", "uniform"),
    "forward_kl": ("mixture", "bucket", "renormalise", "zero", "uniform"),
    **dict.fromkeys(("reverse_kl", "js", "tvd", "skew_forward_kl", "skew_reverse_kl"), ("bucket", "renormalise")),
    **dict.fromkeys(("adaptive_kl", "dkd"), ("bucket",)),
    **dict.fromkeys(("ctkd", "cross_entropy"), ()),
}
"""Treatments of the tail that each loss has, besides `auto`."""


class Option(NamedTuple):
    """What an option of a loss is where it is left out, and the interval of the numbers that it may be."""

    default: float | str
    least: float = 0.0
    most: float = 1.0
    brackets: Literal["[]", "[)", "()"] = "[]"

    def admits(self, value: Any) -> bool:
        """Whether `value` is a number inside."""
        if not isinstance(value, float):
            return False
        above = self.least < value if self.brackets[0] == "(" else self.least <= value
        return above and (value < self.most if self.brackets[1] == ")" else value <= self.most)

    def interval(self) -> str:
        """The interval as people write it."""
        return f"{self.brackets[0]}{self.least:g}, {self.most:g}{self.brackets[1]}"


OPTIONS: dict[str, dict[str, Option]] = {
    "taid": {
        "schedule": Option("adaptive"),
        "t_start": Option(0.4),
        "t_end": Option(1.0),
        "alpha": Option("auto"),
        "beta": Option(0.99, brackets="[)"),
    },
    "forward_kl": {},
    "reverse_kl": {},
    "js": {"beta": Option(0.1, brackets="()")},
    "tvd": {},
    "skew_forward_kl": {"alpha": Option(0.1, brackets="[)")},
    "skew_reverse_kl": {"alpha": Option(0.1, brackets="[)")},
    "adaptive_kl": {"mu": Option(0.5, brackets="()")},
    "dkd": {"alpha": Option(1.0, most=100.0), "beta": Option(0.5, most=100.0)},
    "ctkd": {},
    "cross_entropy": {},
}
"""Options of each loss, besides `tail` and `cross_entropy_share`."""


class LossConfig(FrozenModel):
    """What the student learns from the cache. An option left out is that of the loss's paper."""

    name: LossName = Field(
        "taid",
        description="taid, forward_kl (taid held at t = 1), another divergence, or cross_entropy: plain fine-tuning.",
    )
    tail: TailName = Field(
        "auto",
        description="Tail outside the top K: mixture uses the cached draws, bucket its mass alone, mass_corrected also "
        "the draws' log-probs; renormalise, zero and uniform are for comparison; auto is mixture where the dataset has "
        "draws, else bucket.",
    )
    cross_entropy_share: float = Field(
        0.0, ge=0, le=1, description="Weight s of the labels' cross-entropy: (1 - s) loss + s cross-entropy."
    )
    schedule: Literal["adaptive", "linear"] | None = Field(
        None, description="taid: how t moves, by the paper's adaptive rule (the default) or the straight line alone."
    )
    t_start: float | None = Field(
        None, description="taid: t of the first step, 0.4; the paper uses 0.2 to 0.4, more for a larger gap."
    )
    t_end: float | None = Field(
        None, description="taid: t at the end of the run; 1, the default, is the teacher itself."
    )
    alpha: Literal["auto"] | float | None = Field(
        None,
        description="taid: speed of the adaptive rule, auto keeps the paper's curve at any number of steps; "
        "skew losses: share of the first distribution in the mixture, 0.1; dkd: weight of the label's part, 1.",
    )
    beta: float | None = Field(
        None,
        description="taid: memory of the adaptive rule's momentum, 0.99; js: the teacher's share in the mixture, 0.1; "
        "dkd: weight of the other ids' part, 0.5.",
    )
    mu: float | None = Field(None, description="adaptive_kl: the teacher's mass that is the head, 0.5.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_paper(cls, given: Any) -> Any:
        name = given.get("name", "taid") if isinstance(given, dict) else None
        if not isinstance(name, str) or name not in OPTIONS:
            return given
        has = OPTIONS[name]
        chosen = {option: value for option, value in given.items() if value is not None}
        for option in chosen:
            if option not in has and any(option in options for options in OPTIONS.values()):
                raise ValueError(f"{name} has no {option}; its options: {', '.join(_all_options(name)) or 'none'}")
        return {option: has[option].default for option in has} | chosen

    @model_validator(mode="after")
    def _possible(self) -> LossConfig:
        if self.tail != "auto" and self.tail not in TAILS[self.name]:
            raise ValueError(f"{self.name} has no tail {self.tail}; it has {', '.join(('auto', *TAILS[self.name]))}")
        if self.name == "cross_entropy" and self.cross_entropy_share:
            raise ValueError("cross_entropy has no cross_entropy_share: it is nothing else")
        for name, option in OPTIONS[self.name].items():
            value = getattr(self, name)
            if name == "schedule" or value == option.default or option.admits(value):
                continue
            auto = "auto or " if option.default == "auto" else ""
            raise ValueError(f"{name} of {self.name} must be {auto}in {option.interval()}, not {value}")
        if self.name == "taid" and self.options["t_start"] > self.options["t_end"]:
            raise ValueError(f"t_start ({self.t_start}) must not be above t_end ({self.t_end})")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The options that the loss has, without tail and share: its paper's, and what was chosen."""
        return {name: getattr(self, name) for name in OPTIONS[self.name]}


def _all_options(name: str) -> list[str]:
    shared = (["tail"] if TAILS[name] else []) + (["cross_entropy_share"] if name != "cross_entropy" else [])
    return [*OPTIONS[name], *shared]
