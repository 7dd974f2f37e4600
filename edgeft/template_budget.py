"""What rendering a chat template costs, charged before it is done: iterations, characters, elements."""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from typing import Any

from jinja2.utils import Namespace

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
        self._seconds, self._deadline = seconds, time.monotonic() + seconds

    def charge(self, amount: int) -> None:
        """Raises: TooCostly."""
        self._left -= amount
        if self._left < 0:
            raise TooCostly("it computes far more than this conversation needs")
        if time.monotonic() > self._deadline:
            raise TooCostly(f"it takes longer than {self._seconds:g} seconds")

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


def running_budget() -> Budget:
    budget: Budget = _running.budget
    return budget


# --- Operators, calls and filters -------------------------------------------------------------


_NUMBERS = re.compile(r"\d{7,}")
"""A width in a format that fills a million characters."""


def charge_operator(operator: str, left: Any, right: Any) -> None:
    budget = running_budget()
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
    budget, count = running_budget(), pattern.count(mark)
    widths = sum(abs(one) for one in _flat(arguments) if isinstance(one, int))
    budget.charge(len(pattern) + count * widths + sum(map(int, re.findall(r"\d+", pattern))))
    budget.charge_all(arguments, max(1, count))


def _flat(value: Any) -> Iterator[Any]:
    return iter(value) if isinstance(value, (tuple, list)) else iter((value,))


def charge_call(function: Any, arguments: Sequence[Any]) -> None:
    """A call of a method or function, before it is made."""
    budget = running_budget()
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


_STRUCTURAL: tuple[str, ...] = ("length", "count", "first", "last", "list", "map", "select", "reject", "selectattr")
_STRUCTURAL += ("rejectattr", "items", "reverse", "attr", "default", "d", "random")
"""Filters that pass elements on without looking into them."""


def charge_filter(name: str, arguments: Sequence[Any]) -> None:
    budget = running_budget()
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
