"""A chat template that a stranger wrote ends, whatever it loops over, and a usual one renders as before."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from coldstill.common import template_limits
from coldstill.common.template_limits import TemplateTooLong, limited
from tests.pipeline.sources import templates

REPOSITORY = Path(__file__).parents[2]
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}] * 3
ENDLESS = {
    "nested loops": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "loops over the chat": "{% for a in messages %}" * 20 + "{% endfor %}" * 20,
    "a loop over text": "{% set t = 'ab' * 4000 %}" + "{% for a in t %}" * 3 + "x" + "{% endfor %}" * 3,
    "a loop that calls itself": """
        {%- for a in [1, 1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}""",
    "a macro that calls itself": """
        {%- macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}""",
    "a block that is called": """
        {%- macro f(n) %}{% if n %}{% call f(n - 1) %}{% endcall %}{% call f(n - 1) %}{% endcall %}{% endif %}
        {{- caller() }}{% endmacro %}{% call f(60) %}{% endcall %}""",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "products in a chain": "{% set n = namespace(x=7) %}{% for a in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a repetition": "{{ 'x' * 10 ** 12 }}",
    "much text": "{{ lipsum(n=1000000000) }}",
    "many slices": "{{ [1] | slice(1000000000000) | list | length }}",
    "a sum of lists": "{{ ([[0] * 100] * 100000) | sum(start=[]) | length }}",
    "a slow filter of many items": "{{ (['ab' * 1000] * 300000) | map('replace', 'a', 'b') | map('length') | sum }}",
    "a slow test of many items": "{{ (range(99999) | list * 9) | select('in', [1.5] * 500) | list | length }}",
    "a slow test of attributes": """
        {{- ([{'a': 1}] * 300000) | rejectattr('a', 'in', [1] + [2.5] * 500) | list | length }}""",
    "a fine rounding": "{{ 1.5 | round(1000000000, 'ceil') }}",
}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_STEPS", 200_000)


def rendered(template: str, **options: Any) -> str:
    with limited(template, chat_template_utils):
        return str(chat_template_utils.render_jinja_template([MESSAGES], chat_template=template, **options)[0][0])


def test_filters_that_count_give_what_they_gave() -> None:
    template = (
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join }}"
        "{{ messages | rejectattr('content', 'equalto', 'hi') | list | length }}{{ none | map('upper') | list }}"
        "{{ [3, 4] | select('odd') | sum }}{{ [3, 4] | reject('odd') | sum(start=0.5) }}{{ [] | map('upper') | list }}"
    )
    assert rendered(template) == "hihihi3[]34.5[]"


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_without_an_end_is_stopped(kind: str) -> None:
    began = time.process_time()
    with pytest.raises(Exception, match=r"the chat template|'lipsum' is undefined"):
        rendered(ENDLESS[kind])
    assert time.process_time() - began < 20


def known_templates() -> Iterator[str]:
    for folder in ("examples/chat_templates", "tests/pipeline/sources/families"):
        yield from (path.read_text("utf-8") for path in sorted((REPOSITORY / folder).glob("*.jinja")))
    yield from (value for name, value in vars(templates).items() if name.isupper() and isinstance(value, str))


def without_limits() -> ModuleType:
    """A second copy of the module of transformers, which nothing of ours has changed."""
    spec = importlib.util.spec_from_file_location("transformers.utils.unchanged", chat_template_utils.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_known_templates_render_as_without_the_limits() -> None:
    plain, found = without_limits(), 0
    for template in known_templates():
        try:
            wanted = plain.render_jinja_template([MESSAGES], chat_template=template)[0][0]
        except Exception:  # of another form of chats
            continue
        assert rendered(template) == wanted
        found += 1
    assert found >= 6


def test_each_rendering_has_all_steps_and_others_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread, and a program that renders the same template without limits, lose none."""
    template = "{% for a in range(3000) %}{{ loop.index if loop.last }}{% endfor %}"
    monkeypatch.setattr(template_limits, "MAX_STEPS", 60_000)
    assert [rendered(template) for _ in range(3)] == ["3000"] * 3
    monkeypatch.setattr(template_limits, "MAX_STEPS", 10)
    assert chat_template_utils.render_jinja_template([MESSAGES], chat_template=template)[0] == ["3000"]
    with limited(template, chat_template_utils):
        texts: list[str] = []
        thread = threading.Thread(
            target=lambda: texts.append(
                chat_template_utils.render_jinja_template([MESSAGES], chat_template=template)[0][0]
            )
        )
        thread.start()
        thread.join()
    assert texts == ["3000"]
    with pytest.raises(TemplateTooLong, match="more than 10 steps"):
        rendered(template)


def test_slow_steps_have_a_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.05)
    with pytest.raises(TemplateTooLong, match="takes more than"):
        rendered("{% for a in range(1000) %}{% set x = range(99999) | list | sort | length %}{% endfor %}")


def test_marks_of_the_assistants_text_are_kept() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with limited(template, chat_template_utils):
        text, marks = chat_template_utils.render_jinja_template(
            [MESSAGES], chat_template=template, return_assistant_tokens_mask=True
        )
    assert [text[0][start:stop] for start, stop in marks[0]] == ["hello"] * 3
