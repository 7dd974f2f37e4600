"""Torch tensors that are only a shape and a recipe, so that a graph can be built before any weight is read."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from edgeft.errors import require

EXTRA = "onnx-export"

_VALUES = frozenset({"__bool__", "__float__", "__int__", "item", "numpy", "tolist", "cpu", "__array__"})
"""What asks for values and not for a tensor of later."""


def telemetry_off() -> None:
    """To be called before any of onnxruntime's packages is imported."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"


@functools.cache
def lazy_type() -> Any:
    """The class; made on demand, because it derives from `torch.Tensor`."""
    torch = require("torch", EXTRA)

    class LazyTensor(torch.Tensor):  # type: ignore[misc, name-defined]
        """A tensor on torch's meta device that remembers how its values come about.

        Every operation on it gives another lazy tensor; one that needs values computes them then and keeps nothing.
        """

        make: Callable[[], Any]

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if getattr(function, "__name__", "") in _VALUES:
                return function(*_mapped(_real, args), **_mapped(_real, kwargs))
            with torch._C.DisableTorchFunctionSubclass():
                shape = function(*_mapped(_meta, args), **_mapped(_meta, kwargs))

            def make() -> Any:
                return function(*_mapped(_real, args), **_mapped(_real, kwargs))

            if isinstance(shape, torch.Tensor):
                return lazy(shape, make)
            if isinstance(shape, (tuple, list)) and any(isinstance(part, torch.Tensor) for part in shape):
                return tuple(lazy(part, functools.partial(_part, make, at)) for at, part in enumerate(shape))
            return shape

    return LazyTensor


def _part(make: Callable[[], Any], at: int) -> Any:
    return make()[at]


def lazy(meta: Any, make: Callable[[], Any]) -> Any:
    """A lazy tensor of the shape and type of `meta` (a meta tensor); `make` gives the real one."""
    torch = require("torch", EXTRA)
    result = torch.Tensor._make_subclass(lazy_type(), meta)
    result.make = make
    return result


def is_lazy(value: Any) -> bool:
    return isinstance(value, lazy_type())


def _real(value: Any) -> Any:
    return value.make() if is_lazy(value) else value


def _meta(value: Any) -> Any:
    torch = require("torch", EXTRA)
    if not isinstance(value, torch.Tensor):
        return value
    return value.as_subclass(torch.Tensor) if is_lazy(value) else value.to("meta")


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` applied to every leaf of nested tuples, lists and dictionaries."""
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(change, part) for part in value)
    if isinstance(value, dict):
        return {key: _mapped(change, part) for key, part in value.items()}
    return change(value)
