"""Bounds the work of a chat template: a template comes with a model, and a stranger may have written it.

The sandbox of Jinja bounds the length of `range`, not that of nested loops: three of them run for years. transformers
compiles each template in an environment of its own, and keeps it. Here these environments make programs that count:
each pass through the body of a loop, a macro or a block spends as many steps as the body has nodes.

`library` is `transformers.utils.chat_template_utils`: this folder imports no library of models.

Filters that call a function for each item spend a step on each. What else one expression does is bounded by its
operands, whose sizes `template_memory` bounds. Refused are sums of lists, and large arguments of some filters. Not
bounded is one comparison of lists that hold the same lists many times.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import template_memory

MAX_STEPS = 20_000_000
"""Steps of one rendering: a few seconds. A usual template spends 500 on a message."""

MAX_SECONDS = 60.0
"""A second bound, for steps that are slow. Only a hostile template reaches it, so that results do not depend on it."""

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

    Raises `jinja2.TemplateSyntaxError` for a template that does not compile. Rendering raises `TemplateTooLong` and
    `TemplateTooLarge`.
    """
    _require_counted(chat_template, library)
    _METER.left, _METER.until = MAX_STEPS, time.monotonic() + MAX_SECONDS
    template_memory.start()
    try:
        yield
    finally:
        _METER.left = None
        template_memory.stop()


def _require_counted(chat_template: str, library: Any) -> None:
    """Have transformers compile this template in an environment that counts, and keep it."""
    _install(library)
    if _STEP not in library._compile_jinja_template(chat_template).environment.filters:
        library._compile_jinja_template.cache_clear()  # it was compiled before
        library._compile_jinja_template(chat_template)


@functools.cache
def _install(library: Any) -> None:
    """Compile all later templates of this process so that they count."""
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

    template_memory.bound_memory(environment)

    @jinja2.pass_context  # else the compiler would compute it once
    def step(_: Any, steps: int, characters: int) -> None:
        _METER.spend(steps)
        template_memory.spend(characters)

    environment.filters[_STEP] = step
    for name in _GUARDED_FILTERS:
        environment.filters[name] = _guarded(environment.filters[name], name)
    for name in _COUNTED_FILTERS:
        environment.filters[name] = _counted(environment.filters[name])
    environment.filters["sum"] = _sum_of_numbers(environment.filters["sum"])
    environment.code_generator_class = _counting_generator()


@functools.cache
def _counting_generator() -> type[Any]:
    """The compiler of Jinja that puts a step at the start of each body that can run again."""
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator, Frame

    repeated = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)  # each has a `body` of statements

    def own(node: nodes.Node) -> Iterator[nodes.Node]:
        """Nodes below `node`, without those of the bodies that spend steps of their own."""
        for child in node.iter_child_nodes():
            if not isinstance(child, repeated):
                yield child
                yield from own(child)

    def spend(node: nodes.Node) -> nodes.Expr:
        inside = list(own(node))
        characters = sum(len(one.data) for one in inside if isinstance(one, nodes.TemplateData))
        given: list[nodes.Expr] = [nodes.Const(characters)]
        return nodes.Filter(nodes.Const(1 + len(inside)), _STEP, given, [], None, None)

    class CountingGenerator(CodeGenerator):
        def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
            found: list[Any] = list(node.find_all(repeated))
            for each, spent in [(each, spend(each)) for each in found]:
                each.body.insert(0, nodes.ExprStmt(spent, lineno=each.lineno).set_environment(self.environment))
            super().visit_Template(node, frame)

        def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
            self.write("(markup_join if context.eval_ctx.autoescape else str_join)(environment.spend_concat((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write(")))")

        def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
            if not isinstance(node.arg, nodes.Slice):
                super().visit_Getitem(node, frame)
                return
            self.write("environment.spend_slice(")
            self.visit(node.node, frame)
            self.write(", slice(")
            for bound in (node.arg.start, node.arg.stop, node.arg.step):
                self.visit(bound or nodes.Const(None), frame)
                self.write(", ")
            self.write("))")

    return CountingGenerator


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
