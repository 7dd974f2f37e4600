"""Chat templates are programs by strangers: an environment in which they cannot reach out and cannot run away.

Jinja's sandbox closes the way to Python's internals and to changing what it is given. It does not bound work: loops in
loops, `'x' * 10**10`, a list that holds itself twice, twenty times over. Here everything that repeats or makes
something large is charged to a budget before it is done: iterations, characters, elements. What is left over is an
error, never a process that hangs or takes the machine's memory.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

LONGEST = 1 << 18
"""Characters of a template's source; published ones have up to 30,000."""
SECONDS = 10.0
BASE_BUDGET, PER_CHARACTER = 1 << 24, 100
"""Characters that may be made: so many, and so many for each one of the conversation."""
_LARGEST, _LARGEST_BITS = 10**6, 4096
"""Of a number that a function is called with, and of one that is computed."""


class TooCostly(Exception):
    """The budget is spent."""


class Budget:
    """What one rendering may cost."""

    def __init__(self, characters: int, seconds: float) -> None:
        self._left = characters
        self._deadline = time.monotonic() + seconds

    def charge(self, amount: int) -> None:
        """Raises: TooCostly."""
        self._left -= amount
        if self._left < 0:
            raise TooCostly("it computes far more than this conversation needs")
        if time.monotonic() > self._deadline:
            raise TooCostly(f"it takes longer than {SECONDS:g} seconds")

    def charge_all(self, value: Any, factor: int = 1) -> int:
        """Charge every character and element below a value, as writing or comparing it would visit them.

        Returns:
            What it came to, without the factor.
        """
        stack, total = [value], 0
        while stack:
            one = stack.pop()
            size = 1 + _size(one)
            total += size
            self.charge(size * factor)
            stack.extend(_elements(one))
        return total


def _size(value: Any) -> int:
    """Characters of a text, bytes of a number; 0 for what has elements of its own."""
    if isinstance(value, (str, bytes)):
        return len(value)
    return value.bit_length() // 8 if isinstance(value, int) else 0


def _elements(value: Any) -> Iterator[Any]:
    if isinstance(value, Namespace):
        raise TooCostly("a namespace cannot be written or compared")
    if isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)):
        yield from value


def characters(value: Any) -> int:
    """Of all texts in JSON values."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(characters(key) + characters(one) for key, one in value.items())
    return sum(map(characters, value)) if isinstance(value, (list, tuple)) else 1


_running = threading.local()


@contextmanager
def bounded(budget: Budget) -> Iterator[None]:
    """Everything that this thread renders meanwhile is charged to one budget."""
    before = getattr(_running, "budget", None)
    _running.budget = budget
    try:
        yield
    finally:
        _running.budget = before


def _budget() -> Budget:
    budget: Budget = _running.budget
    return budget


# --- The environment ------------------------------------------------------------


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with transformers' settings and with what templates do counted."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", Generation],
            # Nothing is computed before there is a budget.
            optimized=False,
            finalize=_written,
        )
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.filters["tojson"] = _tojson
        for name in _UNNEEDED:
            del self.filters[name]
        self.filters = {name: _charged_filter(name, call) for name, call in self.filters.items()}
        self.tests |= {name: _charged_test(self.tests[name]) for name in _COMPARING if name in self.tests}

    def compiled(self, source: str) -> jinja2.Template:
        """Raises: jinja2.TemplateError, and whatever a source that is too deep runs into."""
        if len(source) > LONGEST:
            raise TooCostly(f"it is {len(source):,} characters long")
        tree = _Counting().visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _charge_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            _budget().charge_all(argument)  # to be hashed
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _charge_call(__obj, (*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    # What `_Counting` puts into templates.

    def tick(self, amount: int) -> None:
        _budget().charge(amount)

    def joined(self, *parts: Any) -> str:
        return "".join(map(_text, parts))

    def cut(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        _budget().charge(1 + (len(value) if hasattr(value, "__len__") else 0))
        return value[start:stop:step]

    def weighed(self, value: Any) -> Any:
        """The value, which will be compared or hashed."""
        _budget().charge_all(value)
        return value


def _text(value: Any) -> str:
    _budget().charge_all(value)
    return str(value)


@pass_context
def _written(context: Any, value: Any) -> str:
    """Jinja calls this on every output. With the context it does so while rendering, never while compiling."""
    return _text(value)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(_text(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012, Jinja's own declaration

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Counting(NodeTransformer):
    """Puts the environment's counters where a template repeats, joins, cuts and compares."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    visit_Macro = visit_CallBlock = visit_Block = visit_For

    def _ticking(self, node: Any) -> nodes.Node:
        text = sum(len(data.data) for part in node.body for data in _data_of(part))
        self.generic_visit(node)
        tick = _call("tick", [nodes.Const(1 + text, lineno=node.lineno)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", node.nodes, node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [node.arg.start, node.arg.stop, node.arg.step]
        absent = nodes.Const(None, lineno=node.lineno)
        return _call("cut", [node.node, *(bound or absent for bound in bounds)], node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call("weighed", [node.expr], node.lineno)
        for operand in node.ops:
            operand.expr = _call("weighed", [operand.expr], node.lineno)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _call("weighed", [node.key], node.lineno)
        return node


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    """A call of the environment's method, which no variable of the template can stand before."""
    return nodes.Call(nodes.EnvironmentAttribute(name, lineno=line), arguments, [], None, None, lineno=line)


def _data_of(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    return iter([node]) if isinstance(node, nodes.TemplateData) else node.find_all(nodes.TemplateData)


# --- What things cost -------------------------------------------------------------


_NUMBERS = re.compile(r"\d{7,}")
"""A width in a format that fills a million characters."""


def _charge_operator(operator: str, left: Any, right: Any) -> None:
    budget = _budget()
    if operator == "%" and isinstance(left, (str, bytes)):
        _charge_format(str(left), "%", right)
    elif operator == "*" and (isinstance(left, int) != isinstance(right, int)):
        times, value = (left, right) if isinstance(left, int) else (right, left)
        budget.charge(max(0, times) * 8 * len(value) if hasattr(value, "__len__") else 1)
    elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        budget.charge(len(left) + len(right))
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(1, right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _LARGEST_BITS:
            raise TooCostly(f"it computes a number of {bits:,} bits" if bits < 10**12 else "it computes a huge number")
    else:
        budget.charge(1)


def _charge_format(pattern: str, mark: str, arguments: Any) -> None:
    """Every placeholder may write all arguments, or fill the width that a number says."""
    if _NUMBERS.search(pattern):
        raise TooCostly("it asks for more than a million characters")
    budget, count = _budget(), pattern.count(mark)
    widths = sum(abs(one) for one in _flat(arguments) if isinstance(one, int))
    budget.charge(len(pattern) + count * widths + sum(map(int, re.findall(r"\d+", pattern))))
    budget.charge_all(arguments, max(1, count))


def _flat(value: Any) -> Iterator[Any]:
    return iter(value) if isinstance(value, (tuple, list)) else iter((value,))


def _charge_call(function: Any, arguments: Sequence[Any]) -> None:
    """A call of a method or function, before it is made."""
    budget = _budget()
    _refuse_large(arguments)
    method = getattr(function, "__wrapped__", function)
    name, owner = getattr(method, "__name__", ""), getattr(method, "__self__", None)
    if function is dict or (isinstance(owner, (list, tuple)) and name in ("index", "count")):
        budget.charge_all([owner, arguments])
    elif isinstance(owner, (str, bytes)):
        if name in ("format", "format_map"):
            _charge_format(str(owner), "{", list(arguments))
        elif name in ("replace", "join", "translate", "expandtabs"):
            budget.charge((1 + len(owner)) * budget.charge_all(arguments) * _product(arguments))
        else:
            budget.charge(len(owner) + _sum(arguments) + budget.charge_all(arguments))
    else:
        budget.charge(1)


def _refuse_large(arguments: Sequence[Any]) -> None:
    for one in arguments:
        if isinstance(one, int) and abs(one) > _LARGEST:
            raise TooCostly("it asks for more than a million of something")


def _sum(arguments: Sequence[Any]) -> int:
    return sum(abs(one) for one in arguments if isinstance(one, int))


def _product(arguments: Sequence[Any]) -> int:
    product = 1
    for one in arguments:
        product *= max(1, abs(one)) if isinstance(one, int) else 1
    return product


_UNNEEDED = ("urlize", "striptags", "wordwrap", "xmlattr", "pprint")
"""For web pages; some take long on texts made for it."""
_STRUCTURAL = ("length", "count", "first", "last", "list", "map", "select", "reject", "selectattr", "rejectattr")
_STRUCTURAL += ("items", "reverse", "attr", "default", "d", "random")
"""Filters that pass elements on without looking into them."""
_COMPARING = ("in", "eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan")
_COMPARING += ("ge", ">=")


def _charged_filter(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    # Jinja passes the context, the environment or so first, where the filter asks for it.
    skipped = int(hasattr(call, "jinja_pass_arg"))

    @functools.wraps(call)
    def charged(*args: Any, **kwargs: Any) -> Any:
        _charge_filter(name, (*args[skipped:], *kwargs.values()))
        return call(*args, **kwargs)

    return charged


def _charge_filter(name: str, arguments: Sequence[Any]) -> None:
    budget = _budget()
    _refuse_large(arguments[1:])
    if name in _STRUCTURAL:
        budget.charge(1 + (len(arguments[0]) if hasattr(arguments[0], "__len__") else 0))
        return
    if name == "format":
        _charge_format(str(arguments[0]), "%", list(arguments[1:]))
        return
    sizes = [budget.charge_all(one) for one in arguments]
    if name in ("replace", "join", "sum"):
        budget.charge(functools.reduce(lambda one, other: one * other, sizes[:3], 1))
    elif name in ("indent", "tojson"):
        budget.charge(sizes[0] * (1 + _sum(arguments[1:]) + sum(sizes[1:])))
    else:
        budget.charge(_sum(arguments[1:]))


def _charged_test(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def charged(*args: Any) -> Any:
        _budget().charge_all(args)
        return call(*args)

    return charged


@functools.cache
def environment() -> Environment:
    return Environment()


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """Compiled once: training renders thousands of conversations with one template."""
    return environment().compiled(source)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Render a template within the budget that its variables allow.

    Raises:
        Exception: whatever the template runs into; it is a stranger's program.
    """
    budget = Budget(BASE_BUDGET + PER_CHARACTER * characters(variables), SECONDS)
    with bounded(budget):
        return compiled(source).render(variables)
