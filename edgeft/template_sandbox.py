"""Chat templates are programs by strangers: an environment in which they cannot reach out and cannot run away.

Jinja's sandbox closes the way to Python's internals and to changing what it is given. It does not bound work: loops in
loops, `'x' * 10**10`, a list that holds itself twice, twenty times over. Here everything that repeats or makes
something large is charged to a budget before it is done: iterations, characters, elements. What is left over is an
error, never a process that hangs or takes the machine's memory.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from edgeft.template_budget import (
    BASE_BUDGET,
    PER_CHARACTER,
    Budget,
    TooCostly,
    bounded,
    characters,
    charge_call,
    charge_filter,
    charge_operator,
    running_budget,
)

LONGEST = 1 << 18
"""Characters of a template's source; published ones have up to 30,000."""
SECONDS = 10.0

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
        tests: dict[str, Any] = self.tests
        tests |= {name: _charged_test(tests[name]) for name in _COMPARING if name in tests}

    def compiled(self, source: str) -> jinja2.Template:
        """Raises: jinja2.TemplateError, and whatever a source that is too deep runs into."""
        if len(source) > LONGEST:
            raise TooCostly(f"it is {len(source):,} characters long")
        tree = _Counting().visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        charge_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            running_budget().charge_all(argument)  # to be hashed
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        charge_call(__obj, (*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    # What `_Counting` puts into templates.

    def tick(self, amount: int) -> None:
        running_budget().charge(amount)

    def joined(self, *parts: Any) -> str:
        return "".join(map(_text, parts))

    def cut(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        running_budget().charge(1 + (len(value) if hasattr(value, "__len__") else 0))
        return value[start:stop:step]

    def weighed(self, value: Any) -> Any:
        """The value, which will be compared or hashed."""
        running_budget().charge_all(value)
        return value


def _text(value: Any) -> str:
    running_budget().charge_all(value)
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


_UNNEEDED = ("urlize", "striptags", "wordwrap", "xmlattr", "pprint")
"""For web pages; some take long on texts made for it."""
_COMPARING: tuple[str, ...] = ("in", "eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">")
_COMPARING += ("greaterthan", "ge", ">=")


def _charged_filter(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    # Jinja passes the context, the environment or so first, where the filter asks for it.
    skipped = int(hasattr(call, "jinja_pass_arg"))

    @functools.wraps(call)
    def charged(*args: Any, **kwargs: Any) -> Any:
        charge_filter(name, (*args[skipped:], *kwargs.values()))
        return call(*args, **kwargs)

    return charged


def _charged_test(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def charged(*args: Any) -> Any:
        running_budget().charge_all(args)
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
