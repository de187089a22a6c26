"""Where a stranger's template runs: jinja2's sandbox, for no longer and with no more than a prompt takes.

The sandbox keeps a template away from Python, but lets it run for ever and fill the memory. Here every turn
of its loops is counted, and whatever an expression makes is measured before the next one doubles it.
Operations that make much of little (a width, a product, a replacement) are refused before they begin.
"""

# ruff: noqa: N802, N815 - jinja2 names the visitors of its nodes

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_TURNS = 200_000
"""Of all loops of one rendering together."""
MOST_ELEMENTS = 8 << 20
"""Characters of a text, or elements of a list."""
_MOST_WIDTH = 100_000
"""The largest number that a function may be given: it may be a width, or how often."""

_turns: ContextVar[list[int]] = ContextVar("turns")


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment whose templates come to an end; they are rendered inside `bounded()`."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters |= {"bounded turns": _count, "measured": _measure, "argument": _check_argument}
        for name in ("replace", "join", "format"):
            self.filters[name] = _foreseen(name)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Bounds().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator, unless it could be out of all proportion."""
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                _check_size(_size(many) * times if isinstance(times, int) else 0)
        if operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise SecurityError(f"it raises to the power of {right}")
        if operator == "%" and isinstance(left, str):
            _check_form(left)
        if operator in ("*", "**") and any(
            isinstance(x, int) and x.bit_length() > 64 for x in (left, right)
        ):
            raise SecurityError("it computes with a number of more than 64 bits")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **names: Any) -> Any:  # noqa: N805
        """What a method or a function returns."""
        receiver, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(receiver, str):
            _foresee(name, receiver, args)
        return super().call(__context, __obj, *args, **names)


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, templates of a sandbox are rendered; together they may do what one may."""
    token = _turns.set([MOST_TURNS])
    try:
        yield
    finally:
        _turns.reset(token)


class _Bounds(NodeTransformer):
    """Puts the checks where a template could go on, or grow."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through("bounded turns", node.iter)
        return node

    def visit_Concat(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _through("measured", node)

    visit_Add = visit_Concat

    def visit_Call(self, node: nodes.Call | nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        node.args = [_through("argument", argument) for argument in node.args]
        for keyword in node.kwargs:
            keyword.value = _through("argument", keyword.value)
        return _through("measured", node)

    visit_Filter = visit_Call


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


# These ask for the context so that jinja2 does not compute constants with them when it compiles.
@pass_context
def _count(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    left = _turns.get()
    for value in values:
        left[0] -= 1
        if left[0] < 0:
            raise SecurityError(f"its loops turn more than {MOST_TURNS:,} times")
        yield value


@pass_context
def _measure(context: Context, value: Any) -> Any:
    _check_size(_size(value))
    return value


@pass_context
def _check_argument(context: Context, value: Any) -> Any:
    if isinstance(value, int) and abs(value) > _MOST_WIDTH:
        raise SecurityError(f"it calls a function with the number {value}")
    return value


def _foreseen(name: str) -> Any:
    """jinja2's filter of this name, behind `_foresee`."""
    filter_: Any = FILTERS[name]
    takes_context = hasattr(filter_, "jinja_pass_arg")

    @pass_context
    def checked(context: Context, value: Any, *args: Any, **names: Any) -> Any:
        if isinstance(value, Iterator):
            value = list(value)
        _foresee(name, value, [*args, *names.values()])
        first = [context.eval_ctx] if takes_context else []
        return filter_(*first, value, *args, **names)

    return checked


def _foresee(name: str, value: Any, args: Sequence[Any]) -> None:
    """Refuse a filter, or a method of a text, that could make much of little."""
    if name == "replace":
        _check_size((_size(value) + 1) * max(map(_size, args), default=0))
    elif name == "join":
        parts = [part for x in (value, *args) if not isinstance(x, str) for part in x]
        between = max((len(x) for x in (value, *args) if isinstance(x, str)), default=0)
        _check_size(sum(map(_size, parts)) + between * (len(parts) + _size(value)))
    elif name == "format":
        _check_form(str(value))


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 0


def _check_size(size: int) -> None:
    if size > MOST_ELEMENTS:
        raise SecurityError(f"it makes something of {size:,} elements")


def _check_form(form: str) -> None:
    if re.search(r"\d{5}|%[^a-zA-Z]*\*", form):
        raise SecurityError(f"it formats with a width of {form!r:.60}")
