"""Bounds the memory of a chat template: what an expression would make is counted before it is made.

A number such as a width, and lists that hold the same list many times, turn a short template into any amount of text.
So each operator, filter, call and output of a template first spends the size of its result, or a bound of it. What is
thrown away again counts too. `template_limits` bounds the work, and compiles templates so that these functions run.

Sizes are in characters; an item of a list counts as `_ITEM` of them. A Python object takes several times that at most.
"""

from __future__ import annotations

import functools
import re
import string
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import date
from types import BuiltinMethodType, FunctionType
from typing import Any

MAX_CHARACTERS = 1 << 28
"""Characters that one rendering may make, of which a usual template makes some twenty for each one of the chat."""

_ITEM = 16
_SEEN = 128
"""What a value costs that is looked at to find the size of its text: 2 million of them take a second or two."""
_MAX_BITS = 4096
_NESTED_ESCAPE = 10
"""Characters of one that Python or JSON escapes, as in `\\U0001f600`."""
_DATE_WIDTH = 256
"""Python gives up on a date that is this many times as long as its format."""

_FACTORS = {"e": 6, "escape": 6, "forceescape": 6, "urlencode": 12, "xmlattr": 6, "upper": 3, "title": 3}
_LIST_FILTERS = {"list": 1, "sort": 1, "dictsort": 8, "unique": 4, "groupby": 16, "batch": 8, "slice": 1, "reverse": 1}
"""Filters whose result holds the items of their input, and what an item of it takes, in `_ITEM`s."""
_TEXT_FILTERS = (
    *("attr", "capitalize", "center", "format", "indent", "join", "lower", "pprint", "replace", "string", "striptags"),
    *("tojson", "trim", "truncate", "urlize", "wordcount", "wordwrap", *_FACTORS),
)
"""Filters that make text of their input, or its Python form first."""
_MAKES_NOTHING = frozenset(
    ("count", "endswith", "find", "get", "index", "items", "keys", "rfind", "rindex", "startswith", "values")
)
_WIDTH_METHODS = ("center", "ljust", "rjust", "zfill", "to_bytes")


class TemplateTooLarge(RuntimeError):
    """A chat template makes more text or longer lists than `MAX_CHARACTERS`."""


class _Allowance(threading.local):
    """What the rendering that runs in this thread may still make; nothing is counted without one."""

    left: int | None = None


_ALLOWANCE = _Allowance()


def start() -> None:
    """Begin to count in this thread."""
    _ALLOWANCE.left = MAX_CHARACTERS


def stop() -> None:
    """End what `start` began."""
    _ALLOWANCE.left = None


def spend(characters: int) -> None:
    """Count what is about to be made. Raises `TemplateTooLarge` if it is too much."""
    if _ALLOWANCE.left is None:
        return
    _ALLOWANCE.left -= characters
    if _ALLOWANCE.left < 0:
        raise TemplateTooLarge(f"the chat template makes more than {MAX_CHARACTERS:,} characters of one chat")


def bound_memory(environment: Any) -> None:
    """Make all programs of a sandboxed environment of Jinja count what they make.

    Its compiler must write `spend_slice` and `spend_concat`, see `template_limits`.
    """
    import jinja2

    @jinja2.pass_context  # else the compiler would make the text of constants
    def output(_: Any, value: Any) -> Any:
        spend(len(value) if isinstance(value, str) else _text_size(value))
        return value

    environment.optimized = False  # the compiler computes no constant expression, which nothing would count
    environment.finalize = output
    environment.concat = _concat
    environment.spend_concat = _parts
    environment.spend_slice = _slice
    environment.intercepted_binops = frozenset({"+", "*", "**", "%"})
    environment.binop_table |= {"+": _sum, "*": _product, "**": _power, "%": _modulo}
    environment.globals.pop("lipsum", None)
    for name, function in environment.filters.items():
        environment.filters[name] = _counted_filter(function, name)
    environment.wrap_str_format = functools.partial(_wrapped_format, environment.wrap_str_format)
    environment.call = functools.partial(_call, environment.call)
    environment.getitem = functools.partial(_getitem, environment.getitem)


def _text_size(value: Any, *, per_level: int = 0) -> int:
    """Most characters of `value` as text. It is not counted to its end if that is more than may be made.

    `per_level`: characters before each item of a list, for each list around it.
    """
    allowed = _ALLOWANCE.left
    if allowed is None:
        return 0
    size, found = 0, [(value, 0)]
    while found and size <= allowed:
        one, level = found.pop()
        size += _SEEN + per_level * level
        if isinstance(one, str | bytes):
            plain = not level or (isinstance(one, str) and one.isascii() and one.isprintable())
            size += len(one) if plain else _NESTED_ESCAPE * len(one)
        elif isinstance(one, int):
            size += one.bit_length() // 3
        elif type(one).__name__ == "Namespace":  # of Jinja: its text shows what it holds
            found.append((getattr(one, "_Namespace__attrs", None), level + 1))
        elif isinstance(one, Collection) and not isinstance(one, range):
            size += _ITEM * len(one)
            if size <= allowed:
                inner = (part for pair in one.items() for part in pair) if isinstance(one, Mapping) else one
                found.extend((part, level + 1) for part in inner)
    return size


def _shallow_size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return _ITEM * len(value) if isinstance(value, Collection) else _ITEM


def _concat(parts: Iterable[str]) -> str:
    """The text of an output, a macro or a block."""
    kept = []
    for part in parts:
        spend(len(part))
        kept.append(part)
    return "".join(kept)


def _parts(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    spend(sum(len(part) if isinstance(part, str) else _text_size(part) for part in parts))
    return parts


def _slice(value: Any, taken: slice) -> Any:
    if isinstance(value, Collection) and hasattr(value, "__getitem__"):
        count = len(range(*taken.indices(len(value))))
        spend(count if isinstance(value, str | bytes) else _ITEM * count)
    return value[taken]


def _getitem(getitem: Callable[..., Any], value: Any, key: Any) -> Any:
    if not isinstance(key, str | int):
        spend(_text_size(key))  # the message of an undefined item shows its key
    return getitem(value, key)


def _sum(left: Any, right: Any) -> Any:
    if isinstance(left, Collection):
        spend(_shallow_size(left) + _shallow_size(right))
    return left + right


def _product(left: Any, right: Any) -> Any:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, int) and isinstance(other, Collection):
            spend(max(one, 0) * _shallow_size(other))
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MAX_BITS:
        raise TemplateTooLarge(f"the chat template computes a product of more than {_MAX_BITS} bits")
    return left * right


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > _MAX_BITS:
        raise TemplateTooLarge(f"the chat template computes a power of more than {_MAX_BITS} bits")
    return base**exponent


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str | bytes):
        _spend_printf(left, right)
    return left % right


def _spend_printf(pattern: Any, given: Any) -> None:
    """Count what `%` makes of a pattern. Any number in it may be a width; `*` takes one from the values."""
    text = pattern if isinstance(pattern, str) else str(pattern) if isinstance(pattern, int) else repr(pattern)
    size = len(text) + text.count("%") * _text_size([given]) + _numbers_in(text)
    if "*" in text:
        size += sum(abs(one) for one in (given if isinstance(given, tuple) else (given,)) if isinstance(one, int))
    spend(size)


def _numbers_in(text: str) -> int:
    return sum(int(digits[:12]) for digits in re.findall(r"\d+", text))


def _wrapped_format(wrap: Callable[..., Any], method: Any) -> Any:
    """What Jinja returns for the methods `format` and `format_map` of text: a function that is sandboxed."""
    wrapped = wrap(method)
    if wrapped is None:
        return None

    @functools.wraps(wrapped)
    def formatted(*arguments: Any, **options: Any) -> Any:
        fields = [field for field in string.Formatter().parse(method.__self__) if field[1] is not None]
        if any("{" in (spec or "") for _, _, spec, _ in fields):
            raise TemplateTooLarge("the chat template computes a width of `format`")
        widths = sum(_numbers_in(spec or "") for _, _, spec, _ in fields)
        spend(len(method.__self__) + len(fields) * _text_size([arguments, options]) + widths)
        return wrapped(*arguments, **options)

    return formatted


def _call(call: Callable[..., Any], context: Any, function: Any, *arguments: Any, **options: Any) -> Any:
    if isinstance(function, BuiltinMethodType | FunctionType):
        if getattr(function, "__name__", "") == "join" and arguments and not isinstance(arguments[0], Collection):
            arguments = (list(_spent_items(arguments[0])), *arguments[1:])
        spend(_size_of_call(function, [*arguments, *options.values()]))
    else:  # a macro, a class such as `namespace`, and what else keeps its arguments as they are
        spend(sum(map(_shallow_size, (*arguments, *options.values()))))
    return call(context, function, *arguments, **options)


def _size_of_call(function: Any, given: list[Any]) -> int:
    """Most characters that a function or a method of a Python type makes."""
    owner, name = getattr(function, "__self__", None), function.__name__
    size = _text_size(given)
    if isinstance(owner, date) or name == "strftime_now":
        return _DATE_WIDTH * size
    if name in _WIDTH_METHODS:
        size += sum(abs(one) for one in given if isinstance(one, int))
    if not isinstance(owner, Collection) or name in _MAKES_NOTHING or name.startswith("is"):
        return size
    if not isinstance(owner, str | bytes):
        return size + _shallow_size(owner)
    size += len(owner)
    if name in ("split", "rsplit", "splitlines"):
        size += 4 * len(owner)
    elif name == "replace" and len(given) > 1:
        size += _size_of_replaced(owner, given[0], given[1])
    elif name == "join" and given and isinstance(given[0], Collection):
        size += len(owner) * len(given[0])
    elif name == "expandtabs":
        size += len(owner) * (given[0] if given and isinstance(given[0], int) else 8)
    elif name == "translate":
        size *= 1 + len(owner)
    return size


def _size_of_replaced(text: Any, old: Any, new: Any) -> int:
    return len(text) + text.count(old) * len(new) if type(text) is type(old) is type(new) else 0


def _spent_items(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        spend(_ITEM)
        yield value


def _counted_filter(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter of Jinja that first spends the size of what it makes."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)  # also whether Jinja passes its context
    def counted(*arguments: Any, **options: Any) -> Any:
        if _ALLOWANCE.left is None or len(arguments) <= first:
            return function(*arguments, **options)
        value, given = arguments[first], [*arguments[first + 1 :], *options.values()]
        is_listed = name in _LIST_FILTERS or name == "join"
        if is_listed and isinstance(value, Iterator):
            value = list(_spent_items(value))
        if name in _LIST_FILTERS and isinstance(value, Collection):
            spend(_LIST_FILTERS[name] * _ITEM * len(value))
        if name in _TEXT_FILTERS:
            spend(_size_of_text(name, value, given))
        elif name not in ("default", "d"):
            spend(_text_size(given))  # the message for a name that is none shows it
        return function(*arguments[:first], value, *arguments[first + 1 :], **options)

    return counted


def _size_of_text(name: str, value: Any, given: list[Any]) -> int:
    """Most characters of the text that a filter makes of `value`."""
    texts = sum(len(one) for one in given if isinstance(one, str))
    numbers = sum(abs(one) for one in given if isinstance(one, int))
    if name == "tojson":
        separators = sum(len(text) for one in given if isinstance(one, list | tuple) for text in one)
        return _text_size([value], per_level=texts + numbers) * (1 + separators)
    size = _text_size(value) * _FACTORS.get(name, 1) + _text_size(given)
    if name == "format":
        _spend_printf(value, given)
    elif name == "replace" and isinstance(value, str) and len(given) > 1:
        size += _size_of_replaced(value, *given[:2])
    elif name in ("indent", "join", "replace", "urlize", "wordwrap"):
        lines = value.count("\n") + 1 if name == "indent" and isinstance(value, str) else size
        pieces = len(value) if name == "join" and isinstance(value, Collection) else lines
        size += pieces * (texts + (numbers if name == "indent" else 0))
    elif name == "pprint":
        size += size * size // 64  # the lines of an item are indented by the width of its key
    return size + numbers
