"""llama-quantize's mixtures: which type a tensor gets by its role, as data.

The rules of `llama_tensor_get_type_impl` (`src/llama-quant.cpp` of llama.cpp b7300) for the families that edgeft
exports; `tests/test_export_parity.py` holds them against llama.cpp itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

BEST = "Q4_K_M narrow"
"""edgeft's own: Q4_K_M with the nearest types where rows do not fill blocks of 256 (docs/export.md)."""


@dataclass(frozen=True)
class Model:
    """What the rules ask about the model."""

    layers: int
    values: int
    """Tensors with attention values."""
    sharing: int = 1
    """Query heads per key-value head."""
    experts: int = 0
    importance: bool = False
    """An importance matrix is at hand."""
    wide_values: bool = False
    """Attention values are few and get more bits (llama.cpp does so in its "70B" models)."""

    @property
    def shares_values(self) -> bool:
        return self.sharing >= 4


_MORE = {"attn_v": "Q8_0", "attn_k": "Q8_0"}
_MOST = {**_MORE, "attn_output": "Q5_K"}

Rule = Callable[[int, Model], str | None]
"""(running number among tensors of that role, model) -> type; None: the mixture's own."""


@dataclass(frozen=True)
class Mixture:
    file_type: int
    """`general.file_type`, from `llama.h`."""
    type: str
    """Of all tensors that no rule speaks of."""
    head: str = "Q6_K"
    """Of the output head, or of an embedding that serves as one."""
    embedding: str | None = None
    """Of an embedding beside a head of its own."""
    rules: Mapping[str, Rule] = field(default_factory=dict)
    """Role -> rule. Roles are the ends of tensor names: attn_v, ffn_down and so on."""
    of_eight_experts: Mapping[str, str] = field(default_factory=lambda: _MORE)
    """Role -> type in models with eight experts, where attention is small beside them."""


def _always(kind: str) -> Rule:
    return lambda at, model: kind


def _first(share: int, kind: str, rest: str | None = None) -> Rule:
    """The first 1/share of the layers."""
    return lambda at, model: kind if at < model.layers // share else rest


def _more_bits(kind: str) -> Rule:
    return lambda at, model: kind if more_bits(at, model.layers) else None


def _shared(kind: str, rest: str | None = None) -> Rule:
    """Where four or more query heads share their values, which then are few."""
    return lambda at, model: kind if model.shares_values else rest


def _middle(kind: str) -> Rule:
    return lambda at, model: kind if model.layers // 8 <= at < 7 * model.layers // 8 else None


def _without_importance(rule: Rule) -> Rule:
    return lambda at, model: None if model.importance else rule(at, model)


def _with_importance(rule: Rule) -> Rule:
    return lambda at, model: rule(at, model) if model.importance else None


def _values(kind: str) -> Rule:
    """The first and last eighth of the tensors with values and every third between."""
    return lambda at, model: kind if more_bits(at, model.values) else None


def _below(number: int, kind: str, rest: str | None = None) -> Rule:
    return lambda at, model: kind if at < number else rest


def more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers and every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _two_bit_values(kind: str) -> Rule:
    return lambda at, model: "Q4_K" if model.shares_values or model.experts >= 4 else kind


def _two_bits(file_type: int, kind: str, embedding: str, values: str, out: str | None) -> Mixture:
    rules = {"attn_v": _two_bit_values(values), "ffn_down": _first(8, values)}
    if out:
        rules["attn_output"] = _always(out)
    return Mixture(file_type, kind, "Q5_K", embedding, rules, {"attn_k": "Q4_K", "attn_output": "Q5_K"})


_IQ3_XXS_VALUES: Rule = lambda at, model: (  # noqa: E731
    "Q4_K" if model.shares_values else None if model.importance else "IQ3_S"
)
_IQ3_M_DOWN: Rule = lambda at, model: (  # noqa: E731
    "Q4_K" if at < model.layers // 8 or (model.experts == 8 and more_bits(at, model.layers)) else None
)
_IQ4 = {"attn_v": _shared("Q5_K"), "ffn_down": _without_importance(_first(8, "Q5_K"))}
_Q4_K_M = {"attn_v": _values("Q6_K"), "ffn_down": _more_bits("Q6_K")}

_IQ_LISTED = ("IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS")

_PLAIN: Mapping[str, Mixture] = {
    "F32": Mixture(0, "F32", "F32", of_eight_experts={}),
    "F16": Mixture(1, "F16", "F16", of_eight_experts={}),
    "BF16": Mixture(32, "BF16", "BF16", of_eight_experts={}),
    "Q8_0": Mixture(7, "Q8_0", "Q8_0"),
    "Q4_0": Mixture(2, "Q4_0", rules={"ffn_down": _with_importance(_first(8, "Q4_1"))}),
    "Q4_1": Mixture(3, "Q4_1"),
    "Q5_0": Mixture(8, "Q5_0", rules={"ffn_down": _with_importance(_first(8, "Q5_1"))}),
    "Q5_1": Mixture(9, "Q5_1"),
    "Q2_K": Mixture(
        10,
        "Q2_K",
        rules={"attn_v": _shared("Q4_K", "Q3_K"), "ffn_down": _always("Q3_K"), "attn_output": _always("Q3_K")},
    ),
    "Q2_K_S": Mixture(21, "Q2_K", rules={"attn_v": _shared("Q4_K"), "ffn_down": _first(8, "Q4_K")}),
    "Q3_K_S": Mixture(11, "Q3_K"),
    "Q3_K_M": Mixture(
        12,
        "Q3_K",
        rules={
            "attn_v": _below(2, "Q5_K", "Q4_K"),
            "ffn_down": _first(16, "Q5_K", "Q4_K"),
            "attn_output": _always("Q4_K"),
        },
    ),
    "Q3_K_L": Mixture(13, "Q3_K", rules=dict.fromkeys(("attn_v", "ffn_down", "attn_output"), _always("Q5_K"))),
    "Q4_K_S": Mixture(14, "Q4_K", rules={"attn_v": _below(4, "Q5_K"), "ffn_down": _first(8, "Q5_K")}),
    "Q4_K_M": Mixture(15, "Q4_K", rules=_Q4_K_M),
    BEST: Mixture(15, "Q4_K", rules=_Q4_K_M),
    "Q5_K_S": Mixture(16, "Q5_K"),
    "Q5_K_M": Mixture(17, "Q5_K", rules=_Q4_K_M),
    "Q6_K": Mixture(18, "Q6_K"),
    "IQ1_S": _two_bits(24, "IQ1_S", "Q2_K", "Q2_K", "IQ2_XXS"),
    "IQ1_M": _two_bits(31, "IQ1_M", "Q2_K", "Q2_K", "IQ2_XXS"),
    "IQ2_XXS": _two_bits(19, "IQ2_XXS", "Q2_K", "Q2_K", None),
    "IQ2_XS": _two_bits(20, "IQ2_XS", "Q2_K", "Q2_K", None),
    "IQ2_S": _two_bits(28, "IQ2_XS", "IQ3_S", "IQ3_S", "IQ3_S"),
    "IQ2_M": _two_bits(29, "IQ2_S", "IQ3_S", "IQ3_S", "IQ3_S"),
    "IQ3_XXS": Mixture(
        23,
        "IQ3_XXS",
        "Q5_K",
        "IQ3_S",
        {
            "attn_v": _IQ3_XXS_VALUES,
            "attn_k": _always("IQ2_S"),
            "attn_q": _always("IQ2_S"),
            "ffn_down": _without_importance(_first(8, "Q4_K", "Q3_K")),
            "attn_output": _always("IQ3_S"),
        },
    ),
    "IQ3_XS": Mixture(
        22,
        "IQ3_S",
        rules={
            "attn_v": _shared("Q4_K"),
            **dict.fromkeys(("attn_k", "attn_q"), _always("IQ3_XXS")),
            **dict.fromkeys(("ffn_gate", "ffn_up"), _middle("IQ3_XXS")),
        },
    ),
    "IQ3_S": Mixture(26, "IQ3_S", rules={"attn_v": _shared("Q4_K")}),
    "IQ3_M": Mixture(
        27,
        "IQ3_S",
        rules={"attn_v": _always("Q4_K"), "ffn_down": _IQ3_M_DOWN, "attn_output": _always("Q4_K")},
    ),
    "IQ4_NL": Mixture(25, "IQ4_NL", rules=_IQ4),
    "IQ4_XS": Mixture(30, "IQ4_XS", rules=_IQ4),
    "TQ1_0": Mixture(36, "TQ1_0", embedding="Q4_K"),
    "TQ2_0": Mixture(37, "TQ2_0", embedding="Q4_K"),
    "MXFP4": Mixture(38, "Q8_0", "Q8_0", rules={"experts": _always("MXFP4")}, of_eight_experts={}),
}

_LISTED = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", BEST, *_IQ_LISTED)
_EIGHT = {**dict.fromkeys(_LISTED, _MOST), "Q3_K_L": {**_MORE, "attn_output": "Q3_K"}}
MIXTURES: Mapping[str, Mixture] = {
    name: replace(mixture, of_eight_experts=_EIGHT[name]) if name in _EIGHT else mixture
    for name, mixture in _PLAIN.items()
}

FALLBACK: Mapping[str, str] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""Where rows do not fill blocks of 256 (`tensor_type_fallback`)."""

NARROW: Mapping[str, str] = {**FALLBACK, "Q6_K": "Q5_1"}
"""The type of blocks of 32 that is nearest in bits: Q6_K has 6.6, Q5_1 6.0, Q8_0 8.5."""

NEEDS_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})
"""Types that llama-quantize refuses without an importance matrix, outside embedding and head."""
