"""The words in which a family's page is written: weights, metadata keys, and what must hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..gguf_writer import KeyValue, float32, uint32
from ..rope import head_size

if TYPE_CHECKING:
    from ..rope import Tensors

Config = Mapping[str, Any]
"""config.json with the family's defaults filled in; see `gguf_architectures.settings`."""


class Weight(NamedTuple):
    """Where a Hugging Face tensor goes, and what happens to it on the way."""

    gguf: tuple[str, ...]
    """GGUF name within the layer. Several: the rows are dealt to them in equal parts."""
    shape: tuple[str, ...]
    """In the words of `Sizes`."""
    rotary: bool = False
    """GGUF has the two halves of every head's rows in turn, as Meta's Llama; transformers one after the other."""
    plus_one: bool = False
    """The model computes with 1 + weight, llama.cpp with what is stored."""
    linear: bool = True
    """Whether a matrix is an `nn.Linear` in transformers, which QLoRA rounds to NF4."""


def to(gguf: str | tuple[str, ...], *shape: str, rotary: bool = False, plus_one: bool = False,
       linear: bool = True) -> Weight:  # fmt: skip
    """`"mlp.up_proj.weight": to("ffn_up.weight", "ffn", "hidden")`"""
    return Weight((gguf,) if isinstance(gguf, str) else gguf, shape, rotary, plus_one, linear)


Table = Mapping[str, Weight]
"""Hugging Face name -> where it goes.

A name with a word of `Sizes` in braces (`mlp.experts.{experts}.up_proj.weight`) stands for that many tensors, which
are stacked into one.
"""


@dataclass(frozen=True)
class Key:
    """A metadata pair `<architecture>.<name>`; left out when the value is None."""

    name: str
    make: Callable[[str, Any], KeyValue]
    value: str | Callable[[Config], Any]
    """A setting of config.json, which must be there, or a function of all of them."""


def optional(setting: str) -> Callable[[Config], Any]:
    """The value of a setting that may be missing."""
    return lambda config: config.get(setting)


def kv_heads(config: Config) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def nothing_more(config: Config) -> Iterator[str]:
    """The check of a family that `Family.only` describes completely."""
    yield from ()


def no_tensors(config: Config) -> Tensors:
    return {}


COMMON_KEYS = (
    Key("block_count", uint32, "num_hidden_layers"),
    Key("context_length", uint32, "max_position_embeddings"),
    Key("embedding_length", uint32, "hidden_size"),
    Key("feed_forward_length", uint32, "intermediate_size"),
    Key("attention.head_count", uint32, "num_attention_heads"),
    Key("attention.head_count_kv", uint32, kv_heads),
)
RMS_NORM = Key("attention.layer_norm_rms_epsilon", float32, "rms_norm_eps")
HEAD_SIZE = (Key("attention.key_length", uint32, head_size), Key("attention.value_length", uint32, head_size))
SAID_HEAD_SIZE = (
    Key("attention.key_length", uint32, optional("head_dim")),
    Key("attention.value_length", uint32, optional("head_dim")),
)
"""For families whose configuration has no head size of its own: written when the file says one."""
LLAMA_KEYS = (
    Key("vocab_size", uint32, "vocab_size"),
    Key("rope.dimension_count", uint32, head_size),
)

TOP: Table = {
    "model.embed_tokens.weight": to("token_embd.weight", "vocab", "hidden"),
    "model.norm.weight": to("output_norm.weight", "hidden"),
    "lm_head.weight": to("output.weight", "vocab", "hidden"),
}


def attention(*, rotary: bool = False) -> Table:
    """Separate projections of query, key and value."""
    return {
        "self_attn.q_proj.weight": to("attn_q.weight", "q", "hidden", rotary=rotary),
        "self_attn.k_proj.weight": to("attn_k.weight", "kv", "hidden", rotary=rotary),
        "self_attn.v_proj.weight": to("attn_v.weight", "kv", "hidden"),
        "self_attn.o_proj.weight": to("attn_output.weight", "hidden", "q"),
    }


def attention_bias(*, rotary: bool = False) -> Table:
    return {
        "self_attn.q_proj.bias": to("attn_q.bias", "q", rotary=rotary),
        "self_attn.k_proj.bias": to("attn_k.bias", "kv", rotary=rotary),
        "self_attn.v_proj.bias": to("attn_v.bias", "kv"),
    }


NORMS: Table = {
    "input_layernorm.weight": to("attn_norm.weight", "hidden"),
    "post_attention_layernorm.weight": to("ffn_norm.weight", "hidden"),
}
MLP: Table = {
    "mlp.gate_proj.weight": to("ffn_gate.weight", "ffn", "hidden"),
    "mlp.up_proj.weight": to("ffn_up.weight", "ffn", "hidden"),
    "mlp.down_proj.weight": to("ffn_down.weight", "hidden", "ffn"),
}
OTHER_BIAS: Table = {
    "self_attn.o_proj.bias": to("attn_output.bias", "hidden"),
    "mlp.gate_proj.bias": to("ffn_gate.bias", "ffn"),
    "mlp.up_proj.bias": to("ffn_up.bias", "ffn"),
    "mlp.down_proj.bias": to("ffn_down.bias", "hidden"),
}
QK_NORM: Table = {
    "self_attn.q_norm.weight": to("attn_q_norm.weight", "head"),
    "self_attn.k_norm.weight": to("attn_k_norm.weight", "head"),
}


@dataclass(frozen=True)
class Family:
    """One page. What is not said here is as in Llama."""

    name: str
    """`general.architecture`."""
    classes: tuple[str, ...]
    """`architectures` in config.json."""
    model_types: tuple[str, ...]
    """`model_type` in config.json, for files that name no class."""
    layer: Table
    """Tensors of every layer, named from behind `model.layers.N.`."""
    optional: Table = field(default_factory=dict)
    """Tensors that a layer may have."""
    layouts: tuple[Table, ...] = ()
    """Ways to store the same weights, of which a layer has exactly one."""
    top: Table = field(default_factory=lambda: TOP)
    head: Literal["optional", "required", "never"] = "optional"
    """Whether llama.cpp reads an `output.weight`; optional: without one, the embedding is used."""
    defaults: Config = field(default_factory=dict)
    """What transformers takes for settings that config.json leaves out."""
    only: Config = field(default_factory=lambda: {"hidden_act": "silu"})
    """Settings that llama.cpp takes for granted: with any other value the file would compute something else."""
    check: Callable[[Config], Iterator[str]] = nothing_more
    """Further reasons why a model cannot be exported."""
    rope: tuple[str, ...] = ("default", "linear", "yarn")
    """Kinds of rope scaling that llama.cpp knows for this family."""
    keys: tuple[Key, ...] = (RMS_NORM, *HEAD_SIZE)
    """Metadata besides `COMMON_KEYS` and rope scaling."""
    extra: Callable[[Config], Tensors] = no_tensors
    """Tensors that follow from the configuration alone."""
    prefixes: tuple[tuple[str, str], ...] = ()
    """(beginning of a tensor's name, what stands there in the tables), for models wrapped into larger ones."""
    leaves_out: tuple[str, ...] = ()
    """Beginnings of the names of tensors that are not part of the text model."""
