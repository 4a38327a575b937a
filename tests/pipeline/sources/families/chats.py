"""Random chats of marker words, and the check that the targets of a chat are the assistant's own text and nothing else.

The first letter of a marker word names its author: `u` user, `s` system, `t` tool, `a` assistant, `k` thinking.
"""

from __future__ import annotations

import random
import re
from typing import Any, Literal

from coldstill.common.errors import ColdstillError
from coldstill.pipeline.source_config import SourceConfig
from coldstill.pipeline.sources.conversation import Conversation
from coldstill.pipeline.sources.files import SourceRow
from coldstill.pipeline.sources.sequence_maker import SequenceMaker
from coldstill.pipeline.teachers.protocol import TokenSequence

from .styles import Family

Kind = Literal[
    "one turn",
    "system",
    "several turns",
    "tools",
    "tools, later turns",
    "thinking",
    "thinking, later turns",
    "list content",
]
KINDS: tuple[Kind, ...] = (
    "one turn",
    "system",
    "several turns",
    "tools",
    "tools, later turns",
    "thinking",
    "thinking, later turns",
    "list content",
)
_WORD = re.compile(r"[ustak]w\d+")
_JOINS = (" ", " ", " ", ", ", "\n", "\n\n", " 你好 ", " 👍 ", " é ")
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "sw900", "parameters": {"type": "object", "properties": {}}},
    }
]


class Chats:
    """A source of random chats; no marker word comes twice."""

    def __init__(self, seed: int):
        self._rng, self._words = random.Random(seed), 0

    def row(self, kind: Kind) -> dict[str, Any]:
        """The columns of a row."""
        messages: list[dict[str, Any]] = []
        if kind == "system":
            messages.append({"role": "system", "content": self._text("s")})
        turns = 3 if kind in ("several turns", "thinking, later turns") else 1 + (kind == "tools, later turns")
        for _ in range(turns):
            messages.append({"role": "user", "content": self._text("u")})
            if kind.startswith("tools"):
                call = {"name": "add", "arguments": {"a": self._text("a"), "b": 2}}
                calls = [{"type": "function", "id": "abcdefghi", "function": call}]
                messages.append({"role": "assistant", "content": None, "tool_calls": calls})
                result = {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": self._text("t")}
                messages.append(result)
            thinking = {"reasoning_content": self._text("k")} if kind.startswith("thinking") else {}
            messages.append({"role": "assistant", "content": self._text("a"), **thinking})
        if kind == "list content":
            for message in messages:
                message["content"] = [{"type": "text", "text": message["content"]}]
        return {"messages": messages, **({"tools": TOOLS} if kind.startswith("tools") else {})}

    def _text(self, author: str) -> str:
        words = []
        for _ in range(self._rng.randint(1, 4)):
            self._words += 1
            words += [f"{author}w{self._words}", self._rng.choice(_JOINS)]
        return "".join(words[:-1]) + self._rng.choice(("", "", ".", " 👍", "!"))


def maker_of(family: Family, tokenizer: Any = None, **settings: Any) -> SequenceMaker:
    """The maker of a capture with this family's teacher."""
    tokenizer = tokenizer or family.tokenizer()
    stops = [id_ for id_ in tokenizer.convert_tokens_to_ids(list(family.stops)) if isinstance(id_, int)]
    source = SourceConfig.model_validate({"path": "x.jsonl", "template_arguments": family.arguments, **settings})
    return SequenceMaker(tokenizer, source=source, max_length=1 << 16, stops=stops)


def outcome(maker: SequenceMaker, family: Family, row: dict[str, Any]) -> tuple[str, str]:
    """`right`; or `refused` with the reason; or `wrong` with what is wrong."""
    try:
        made = maker.make(SourceRow(0, row))
    except ColdstillError as error:
        return "refused", f"template_cannot_mark: {error.found}"
    if not isinstance(made, TokenSequence):
        return "refused", f"{made.reason}: {made.detail}"
    problem = _problem(maker, family, row["messages"], made)
    return ("wrong", problem) if problem else ("right", "")


def _problem(maker: SequenceMaker, family: Family, messages: list[dict[str, Any]], made: TokenSequence) -> str:
    runs = [made.token_ids[start + 1 : stop + 1].tolist() for start, stop in made.target_spans]
    texts = [maker.tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]
    answers = [message for message in messages if message["role"] == "assistant"]
    if len(runs) != len(answers):
        return f"{len(runs)} runs of targets for {len(answers)} turns: {texts}"
    ends = set(maker.end_token_ids or ())
    opening = _opening(maker)
    for number, (run, text, answer) in enumerate(zip(runs, texts, answers, strict=True)):
        is_last = number == len(answers) - 1
        said = _WORD.findall(text)
        if others := [word for word in said if word[0] in "ust"]:
            return f"words of others {others} in {text!r}"
        if [word for word in said if word[0] == "a"] != _own_words(answer):
            return f"not the turn's own words: {text!r}"
        if is_last and answer.get("reasoning_content") and not any(word[0] == "k" for word in said):
            return f"the last turn's thinking is not learned: {text!r}"
        if opening and text.startswith(opening):
            return f"the generation prompt is learned: {text!r}"
        if any(token in ends for token in run[:-1]):
            return f"targets after an end token: {text!r}"
        if not (answer.get("tool_calls") or answer.get("reasoning_content")):
            says = family.says if is_last else family.says_before or family.says
            wanted = says.format(_plain(answer))
            if _spaced(text, family) not in {_spaced(wanted, family), _spaced(wanted, family, strip="\n")}:
                return f"{text!r}, not {wanted!r}"
    return ""


def _own_words(answer: dict[str, Any]) -> list[str]:
    calls = [call["function"]["arguments"]["a"] for call in answer.get("tool_calls") or ()]
    return _WORD.findall(" ".join([_plain(answer), *calls]))


def _plain(answer: dict[str, Any]) -> str:
    content = answer["content"]
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _spaced(text: str, family: Family, strip: str = "") -> str:
    """SentencePiece's decoder drops the space before the first word."""
    return text.strip() if family.pieces else text.rstrip(strip) if strip else text


def _opening(maker: SequenceMaker) -> str:
    question = Conversation([{"role": "user", "content": "uw0"}], None, ())
    try:
        history, prompt = (
            maker.template.render(question.messages, question, prompted=asked) for asked in (False, True)
        )
    except Exception:
        return ""
    return prompt[len(history) :] if prompt.startswith(history) else ""


def cell(family: Family, kind: Kind, *, chats: int, tokenizer: Any = None) -> tuple[str, str]:
    """The worst outcome of some random chats; `right` only if all are."""
    maker, source = maker_of(family, tokenizer), Chats(seed=len(family.name) * 31 + KINDS.index(kind))
    outcomes = [outcome(maker, family, source.row(kind)) for _ in range(chats)]
    return max(outcomes, key=lambda result: ("right", "refused", "wrong").index(result[0]))
