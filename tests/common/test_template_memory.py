"""A chat template that a stranger wrote takes bounded memory: what it would make is counted before it is made."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from coldstill.common import template_memory
from coldstill.common.template_limits import TemplateTooLong, limited
from coldstill.common.template_memory import TemplateTooLarge

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
MORE_MEMORY = 1 << 29
LARGE = {
    "a repeated text": "{{ 'a' * 10 ** 10 }}",
    "a repeated list": "{% set x = [1] * 10 ** 9 %}",
    "doubling by plus": "{% set n = namespace(x='ab') %}{% for a in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by tilde": "{% set n = namespace(x='ab') %}{% for a in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling of a list": "{% set n = namespace(x=[1]) %}{% for a in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by a block of set": """
        {%- set n = namespace(x='ab') %}{% for a in range(40) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}
        {%- set n.x = y %}{% endfor %}""",
    "doubling by a macro": """
        {%- macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='ab') %}
        {%- for a in range(40) %}{% set n.x = f(n.x) %}{% endfor %}""",
    "lists of the same list": """
        {%- set n = namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}""",
    "namespaces of the same namespace": """
        {%- set n = namespace(x=namespace()) %}
        {%- for a in range(60) %}{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}""",
    "a message of the same list": """
        {%- set n = namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}
        {{- raise_exception(n.x) }}""",
    "an unknown key": """
        {%- set n = namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}
        {{- {}[n.x].y }}""",
    "an unknown filter": """
        {%- set n = namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}
        {{- [1] | map(n.x) | list }}""",
    "the text of the same list": """
        {%- set n = namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}
        {{- n.x | string | length }}""",
    "JSON of the same list": """
        {%- set n = namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}
        {{- n.x | tojson | length }}""",
    "an indent of JSON": "{{ [1] | tojson(indent=10 ** 10) }}",
    "a separator of JSON": "{{ (range(9999) | list) | tojson(separators=['x' * 10 ** 6, '']) }}",
    "a width of percent": "{{ '%1000000000d' % 1 }}",
    "a width of percent by its name": "{{ '%(a(b)c)1000000000d' % {'a(b)c': 1} }}",
    "a width of percent among the values": "{{ '%*d' % (10 ** 10, 1) }}",
    "the same value of percent": "{{ ('%(a)s' * 9999) % {'a': 'x' * 10 ** 7} }}",
    "a width of the filter format": "{{ '%1000000000d' | format(1) }}",
    "a width of the method format": "{{ '{:1000000000}'.format(1) }}",
    "a computed width of the method format": "{{ '{:{w}}'.format(1, w=10 ** 10) }}",
    "the same field of the method format": "{{ ('{0}' * 9999).format('x' * 10 ** 7) }}",
    "a filter center": "{{ 'x' | center(10 ** 10) }}",
    "many filters center": """
        {%- set n = namespace(x=[]) %}{% for a in range(99999) %}
        {%- set n.x = [n.x, 'x' | center(9999)] %}{% endfor %}""",
    "a method center": "{{ 'x'.center(10 ** 10) }}",
    "a method ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "a method zfill": "{{ 'x'.zfill(10 ** 10) }}",
    "bytes of a number": "{{ (1).to_bytes(10 ** 10, 'big') | length }}",
    "tabulators": "{{ ('\\t' * 9).expandtabs(10 ** 9) }}",
    "a filter indent": "{{ ('\\n' * 10 ** 7) | indent(9999) }}",
    "a filter indent by text": "{{ ('x\\n' * 10 ** 4) | indent('y' * 10 ** 6) }}",
    "a filter replace": "{{ ('a' * 10 ** 5) | replace('a', 'b' * 10 ** 6) }}",
    "a method replace": "{{ ('a' * 10 ** 5).replace('a', 'b' * 10 ** 6) }}",
    "a method translate": "{{ ('a' * 10 ** 5).translate({97: 'b' * 10 ** 6}) }}",
    "a filter join": "{{ range(99999) | join('b' * 10 ** 6) }}",
    "a method join": "{{ ('b' * 10 ** 6).join('a' * 10 ** 5) }}",
    "a filter wordwrap": "{{ ('a ' * 10 ** 5) | wordwrap(1, wrapstring='b' * 10 ** 6) }}",
    "a filter urlize": "{{ ('a.com ' * 10 ** 5) | urlize(target='b' * 10 ** 6) }}",
    "a filter pprint": "{{ {'a' * 10 ** 6: range(9999) | list} | pprint }}",
    "characters as a list": "{{ ('ab' * 10 ** 8) | list | length }}",
    "words as a list": "{{ ('a ' * 10 ** 8).split() | length }}",
    "copies of a list": """
        {%- set y = range(99999) | list %}{% set n = namespace(x=[]) %}
        {%- for a in range(9999) %}{% set n.x = [n.x, y[1:]] %}{% endfor %}""",
    "copies of a text": """
        {%- set y = 'x' * 10 ** 7 %}{% set n = namespace(x=[]) %}
        {%- for a in range(9999) %}{% set n.x = [n.x, y[1:]] %}{% endfor %}""",
    "copies of a dict": """
        {%- set y = dict(range(99998) | batch(2)) %}{% set n = namespace(x=[]) %}
        {%- for a in range(9999) %}{% set n.x = [n.x, y.copy(), dict(y)] %}{% endfor %}""",
    "the same value again and again": "{% set y = 'x' * 10 ** 7 %}{% for a in range(9999) %}{{ y }}{% endfor %}",
    "long text in a loop": "{% for a in range(99999) %}" + "x" * 10**6 + "{% endfor %}",
    "a block that calls itself": """
        {%- set n = namespace(d=0) %}{% block b %}{% set n.d = n.d + 1 %}""" + "x" * 10**5 + """
        {%- if n.d < 40 %}{{ self.b() }}{{ self.b() }}{% endif %}{% set n.d = n.d - 1 %}{% endblock %}""",
}  # fmt: skip


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A quarter of the characters; more than `MORE_MEMORY` raises a MemoryError, and not what the tests wait for."""
    monkeypatch.setattr(template_memory, "MAX_CHARACTERS", template_memory.MAX_CHARACTERS // 4)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def rendered(template: str, **options: Any) -> tuple[str, Any]:
    with limited(template, chat_template_utils):
        texts, marks = chat_template_utils.render_jinja_template([MESSAGES], chat_template=template, **options)
    return texts[0], marks


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("kind", LARGE)
def test_a_template_that_makes_much_of_little_is_stopped_before_memory_is_taken(kind: str) -> None:
    with pytest.raises((TemplateTooLarge, TemplateTooLong), match="the chat template"):
        rendered(LARGE[kind])


@pytest.mark.usefixtures("little_memory")
def test_the_parts_of_a_text_with_marks_are_counted() -> None:
    template = (
        "{% generation %}x{% endgeneration %}{% set y = 'x' * 10 ** 7 %}{% for a in range(9999) %}{{ y }}{% endfor %}"
    )
    with pytest.raises(TemplateTooLarge, match="the chat template"):
        rendered(template, return_assistant_tokens_mask=True)


def test_operators_filters_and_methods_give_what_they_gave() -> None:
    template = (
        "{{ 'a' ~ 1 ~ none ~ [2] }} {{ 'ab' * 2 }} {{ [1] + [2] }} {{ 7 % 4 }} {{ 2 ** 3 }} {{ '%s-%03d' % ('a', 7) }} "
        "{{ '%s' | format('b') }} {{ '{:>4}|{a[0]}'.format('c', a=['d']) }} {{ 'abc'[1:] }} {{ [1, 2, 3][::-1] }} "
        "{{ 'abc'[-2:-1] }} {{ messages[:1] | tojson }} {{ messages | tojson(indent=2) | length }} "
        "{{ 'a,b'.split(',') }} "
        "{{ 'a'.replace('a', 'b') }} {{ '-'.join(['x', 'y']) }} {{ ['x', 'y'] | join('+') }} {{ 'x'.ljust(3) }}| "
        "{{ 'a\\nb' | indent(2) }} {{ 'x' | center(3) }} {{ {'a': 1}.items() | list }} {{ 'ab' | list }}"
    )
    wanted = (
        "a1None[2] abab [1, 2] 3 8 a-007 b    c|d bc [3, 2, 1] "
        'b [{"role": "user", "content": "hi"}] 108 [\'a\', \'b\'] b x-y x+y x  | '
        "a\n  b  x  [('a', 1)] ['a', 'b']"
    )
    assert rendered(template)[0] == wanted


def test_a_long_chat_is_rendered_and_each_rendering_may_make_as_much() -> None:
    """A template that takes parts of all messages makes a few characters for each one of the chat."""
    template = (
        "{% set n = namespace(t='') %}{% for m in messages %}{% set c = m['content'] | trim %}"
        "{% if '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{% set n.t = c %}{{ '<|' + m.role + '|>' ~ c + '\\n' }}{% endfor %}{{ messages[1:] | length }}"
    )
    long = [{"role": "user", "content": "<think>a</think> " + "word " * 2_000}] * 200  # 2 million characters
    for _ in range(2):
        with limited(template, chat_template_utils):
            text = chat_template_utils.render_jinja_template([long], chat_template=template)[0][0]
            spent = template_memory.MAX_CHARACTERS - (template_memory._ALLOWANCE.left or 0)
    assert text.count("word") == 400_000
    assert spent < 20 * len(text)
