"""Bounds the work of a chat template: a template comes with a model, and a stranger may have written it.

The sandbox of Jinja bounds the length of `range`, not that of nested loops: three of them run for years. transformers
compiles each template in an environment of its own, and keeps it. Here these environments make programs that count:
each pass through the body of a loop, a macro or a block spends as many steps as the body has nodes.

`library` is `transformers.utils.chat_template_utils`: this folder imports no library of models.

Filters that call a function for each item spend a step on each. What else one expression does is bounded by its
operands. Those that make much of little are refused: powers and products of large numbers, long repetitions, sums of
lists, `lipsum`, and large arguments of some filters. Not bounded are memory, and one comparison of lists that hold the
same lists many times.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

MAX_STEPS = 20_000_000
"""Steps of one rendering: a few seconds. A usual template spends 500 on a message."""

MAX_SECONDS = 60.0
"""A second bound, for steps that are slow. Only a hostile template reaches it, so that results do not depend on it."""

_MAX_BITS = 4096
_MAX_REPEATED = 10_000_000
_MAX_ARGUMENT = 10_000
_STEP = "coldstill_step"
_GUARDED_FILTERS = ("slice", "round", "batch", "center", "indent")
"""Filters whose result can be large, or slow to make, by a number that is an argument."""
_COUNTED_FILTERS = ("map", "select", "reject", "selectattr", "rejectattr")
"""Filters that apply another filter or test, which can be slow, to each item."""


class TemplateTooLong(RuntimeError):
    """A chat template does more work than `MAX_STEPS`, or an expression in it may."""


class _Meter(threading.local):
    """What is left of the rendering that runs in this thread; nothing is counted outside `limited`."""

    left: int | None = None
    until: float = 0.0

    def spend(self, steps: int) -> None:
        if self.left is None:
            return
        self.left -= steps
        if self.left < 0:
            raise TemplateTooLong(f"the chat template does more than {MAX_STEPS:,} steps on one chat")
        if time.monotonic() > self.until:
            raise TemplateTooLong(f"the chat template takes more than {MAX_SECONDS:.0f} s on one chat")


_METER = _Meter()


@contextmanager
def limited(chat_template: str, library: Any) -> Iterator[None]:
    """Bound what transformers' `apply_chat_template` does with this template within the `with` block.

    Raises `jinja2.TemplateSyntaxError` for a template that does not compile. Rendering raises `TemplateTooLong`.
    """
    _require_counted(chat_template, library)
    _METER.left, _METER.until = MAX_STEPS, time.monotonic() + MAX_SECONDS
    try:
        yield
    finally:
        _METER.left = None


def _require_counted(chat_template: str, library: Any) -> None:
    """Have transformers compile this template in an environment that counts, and keep it."""
    _install(library)
    if _STEP not in library._compile_jinja_template(chat_template).environment.filters:
        library._compile_jinja_template.cache_clear()  # it was compiled before
        library._compile_jinja_template(chat_template)


@functools.cache
def _install(library: Any) -> None:
    """Compile all later templates of this process so that they count.

    Compiling computes constant expressions, so that the environment must be bounded before the template is compiled.
    """
    compiler = library._cached_compile_jinja_template
    make = getattr(compiler, "__wrapped__", compiler)  # each call gives a new environment

    def compiled(chat_template: str) -> Any:
        environment = make("").environment
        _bound(environment)
        return environment.from_string(chat_template)

    library._cached_compile_jinja_template = compiled


def _bound(environment: Any) -> None:
    """Make all programs of a sandboxed environment of Jinja count their steps, and refuse large operands."""
    import jinja2

    @jinja2.pass_context  # else the compiler would compute it once
    def step(_: Any, steps: int) -> None:
        _METER.spend(steps)

    environment.filters[_STEP] = step
    for name in _GUARDED_FILTERS:
        environment.filters[name] = _guarded(environment.filters[name], name)
    for name in _COUNTED_FILTERS:
        environment.filters[name] = _counted(environment.filters[name])
    environment.filters["sum"] = _sum_of_numbers(environment.filters["sum"])
    environment.globals.pop("lipsum", None)
    environment.intercepted_binops = frozenset({"*", "**"})
    environment.binop_table |= {"*": _product, "**": _power}
    environment.code_generator_class = _counting_generator()


@functools.cache
def _counting_generator() -> type[Any]:
    """The compiler of Jinja that puts a step at the start of each body that can run again."""
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator, Frame

    repeated = (nodes.For, nodes.Macro, nodes.CallBlock)  # each has a `body` of statements

    def size(node: nodes.Node) -> int:
        """Nodes below `node`, without those of the bodies that spend steps of their own."""
        children = [child for child in node.iter_child_nodes() if not isinstance(child, repeated)]
        return len(children) + sum(map(size, children))

    class CountingGenerator(CodeGenerator):
        def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
            found: list[Any] = list(node.find_all(repeated))
            for each, steps in [(each, 1 + size(each)) for each in found]:
                spend = nodes.Filter(nodes.Const(steps), _STEP, [], [], None, None)
                each.body.insert(0, nodes.ExprStmt(spend, lineno=each.lineno).set_environment(self.environment))
            super().visit_Template(node, frame)

    return CountingGenerator


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > _MAX_BITS:
        raise TemplateTooLong(f"the chat template computes a power of more than {_MAX_BITS} bits")
    return base**exponent


def _product(left: Any, right: Any) -> Any:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, int) and hasattr(other, "__len__") and len(other) * one > _MAX_REPEATED:
            raise TemplateTooLong(f"the chat template repeats to a length of more than {_MAX_REPEATED:,}")
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MAX_BITS:
        raise TemplateTooLong(f"the chat template computes a product of more than {_MAX_BITS} bits")
    return left * right


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja whose first arguments are the context and what it goes through."""

    def items(value: Any) -> Iterator[Any]:
        for item in value:
            _METER.spend(1)
            yield item

    @functools.wraps(function)
    def counted(context: Any, value: Any, *arguments: Any, **options: Any) -> Any:
        return function(context, items(value) if value else value, *arguments, **options)

    return counted


def _sum_of_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter `sum` for numbers alone: a sum of lists copies all that came before with each of them."""

    @functools.wraps(function)
    def summed(environment: Any, value: Any, attribute: Any = None, start: Any = 0) -> Any:
        if not isinstance(start, int | float):
            raise TemplateTooLong(f"the chat template adds up values of the type {type(start).__name__}")
        return function(environment, value, attribute, start)

    return summed


def _guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The filter, refused with a large number as an argument. The value that is filtered may be one."""
    first = 2 if hasattr(function, "jinja_pass_arg") else 1

    @functools.wraps(function)  # also whether Jinja passes its context
    def guarded(*arguments: Any, **options: Any) -> Any:
        numbers = [given for given in (*arguments[first:], *options.values()) if isinstance(given, int)]
        if any(abs(number) > _MAX_ARGUMENT for number in numbers):
            raise TemplateTooLong(f"the chat template calls {name} with a number above {_MAX_ARGUMENT:,}")
        return function(*arguments, **options)

    return guarded
