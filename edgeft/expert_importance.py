"""Experts of a layer, one by one, so that what each of them meets can be counted.

transformers 5 holds all experts of a layer in two parameters, and computes with them in one of several ways; none of
them has a module per expert to listen to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from edgeft.errors import require

Seen = Callable[[str, int, Any, Any, Any], None]
"""(parameter, expert, numbers of the tokens, inputs, outputs) of one product with a weight."""


def is_experts(module: Any) -> bool:
    """Whether a module holds experts as parameters of three dimensions, gate and up in one."""
    shapes = {name: len(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    return shapes == {"gate_up_proj": 3, "down_proj": 3} and hasattr(module, "act_fn")


@contextlib.contextmanager
def watched(module: Any, seen: Seen) -> Iterator[None]:
    """Compute the module's output expert by expert and tell `seen` of every product."""

    def forward(hidden: Any, experts: Any, weights: Any) -> Any:
        return _forward(module, seen, hidden, experts, weights)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _forward(module: Any, seen: Seen, hidden: Any, experts: Any, weights: Any) -> Any:
    """
    Args:
        hidden: (tokens, width).
        experts: the experts that each token goes to, (tokens, chosen), and their weights.
    """
    torch = require("torch", "train")
    linear = torch.nn.functional.linear
    total = torch.zeros_like(hidden)
    for expert in experts.unique().tolist():
        tokens, place = torch.where(experts == expert)
        inputs = hidden[tokens]
        both = linear(inputs, module.gate_up_proj[expert])
        seen("gate_up_proj", expert, tokens, inputs, both)
        gate, up = both.chunk(2, dim=-1)
        inner = module.act_fn(gate) * up
        outputs = linear(inner, module.down_proj[expert])
        seen("down_proj", expert, tokens, inner, outputs)
        total = total.index_add(0, tokens, (outputs * weights[tokens, place, None]).to(total.dtype))
    return total
