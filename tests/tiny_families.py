"""Tiny random models of every family that can be exported, with both kinds of tokenizers."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import tiny
from reference import LLAMA3_ROPE, Shape

Kind = Literal["bytes", "pieces"]
"""Byte-level BPE, or SentencePiece with byte fallback."""

ROWS = tiny.TOKENS + 12
"""Rows of the embedding: more than there are tokens."""


@dataclass(frozen=True)
class FamilyCase:
    family: str
    tokenizer: Kind
    shape: Shape
    variant: str = ""

    @property
    def label(self) -> str:
        return "-".join(part for part in (self.family, self.variant, self.tokenizer, self.shape.label) if part)


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 64,
}
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3moe": "Qwen3Moe",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3Text",
    "phi3": "Phi3",
    "granite": "Granite",
    "olmo2": "Olmo2",
    "smollm3": "SmolLM3",
    "stablelm": "StableLm",
}
UNTIED = ("olmo2", "stablelm")
"""Families of which llama.cpp wants a head."""
TIED = ("gemma2",)
PIECES = ("llama", "mistral", "gemma2", "gemma3", "phi3")
"""Families with models that have a SentencePiece tokenizer."""
BYTES = tuple(name for name in CLASSES if name not in ("gemma2", "gemma3"))

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "llama": ("llama3", "yarn", "linear", "bias"),
    "qwen2": ("yarn",),
    "qwen3": ("yarn", "linear"),
    "qwen3moe": ("yarn",),
    "gemma3": ("pattern",),
    "phi3": ("longrope",),
    "granite": ("bias", "yarn"),
    "olmo2": ("yarn", "linear"),
    "smollm3": ("yarn", "linear"),
    "stablelm": ("parallel", "norms"),
}
"""Further settings that a family has."""


def _settings(case: FamilyCase) -> Mapping[str, Any]:
    own = _own_settings(case)
    if case.variant in ("yarn", "linear"):
        rope = {"rope_type": case.variant, "factor": 4.0, "rope_theta": 5e4}
        return {**own, "rope_parameters": {**rope, "original_max_position_embeddings": 64}}
    return own


def _own_settings(case: FamilyCase) -> Mapping[str, Any]:
    """What a family's configuration has besides sizes; values differ from the defaults, so that none goes unread."""
    shape, variant = case.shape, case.variant
    head = max(32, shape.hidden // shape.heads)
    match case.family:
        case "llama" if variant == "llama3":
            return {"rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 64}}
        case "llama" if variant == "bias":
            return {"attention_bias": True, "mlp_bias": True}
        case "qwen3":
            return {"head_dim": head}
        case "qwen3moe":
            experts = 8 if shape.hidden == 256 else 4
            moe = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": shape.hidden}
            return {**moe, "norm_topk_prob": True, "head_dim": head}
        case "gemma2":
            caps = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0}
            return {**caps, "head_dim": 48, "query_pre_attn_scalar": 48, "sliding_window": 8}
        case "gemma3":
            local = {"rope_type": "default", "rope_theta": 5000.0}
            full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e5}
            more: dict[str, Any] = {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
            if variant == "pattern":
                kinds = ("full_attention", "sliding_attention")
                more |= {"layer_types": [kinds[layer % 3 == 1] for layer in range(shape.layers)]}
                more |= {"final_logit_softcapping": 15.0}
            return {**more, "head_dim": 48, "query_pre_attn_scalar": 48, "sliding_window": 8}
        case "phi3" if variant == "longrope":
            count = int(shape.hidden // shape.heads * 0.75) // 2
            factors = {"short_factor": [1 + at / count for at in range(count)]}
            factors |= {"long_factor": [2.0 + at for at in range(count)]}
            return {"rope_parameters": {**LONG_ROPE, **factors}, "original_max_position_embeddings": 64}
        case "granite":
            scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5}
            return {**scales, "logits_scaling": 4.0, "attention_multiplier": 0.05, "attention_bias": variant == "bias"}
        case "olmo2":
            return {"rope_theta": 5e5}
        case "stablelm" if variant:
            return {"use_parallel_residual": True, "qk_layernorm": variant == "norms", "use_qkv_bias": True}
        case "stablelm":
            return {"partial_rotary_factor": 0.5}
    return {}


def build_unknown(folder: Path) -> Path:
    """A model that llama.cpp knows and edgeft does not: the first Gemma."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    config = transformers.GemmaConfig(**sizes, **heads, vocab_size=ROWS, bos_token_id=1, eos_token_id=len(_PIECES) + 1)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder, "gemma", "pieces")
    return folder


def build(folder: Path, case: FamilyCase, seed: int = 0, spread: float | None = None) -> Path:
    """The model as a Hugging Face directory, in bfloat16, every parameter random.

    Args:
        spread: standard deviation of the weights; None: cubes of a normal distribution, so that blocks differ in scale
            and have outliers as trained weights do.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    shape = case.shape
    config = getattr(transformers, f"{CLASSES[case.family]}Config")(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=ROWS,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=256,
        bos_token_id=256 if case.tokenizer == "bytes" else 1,
        eos_token_id=258 if case.tokenizer == "bytes" else len(_PIECES) + 1,
        pad_token_id=None,
        **_settings(case),
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if spread is None:
                parameter.copy_(0.1 * noise**3)
            else:
                parameter.copy_(spread * noise + ("norm" in name and name.endswith("weight")))
    model.save_pretrained(folder)
    write_tokenizer(folder, case.family, case.tokenizer)
    return folder


NARROW = Shape(hidden=96, ffn=160, layers=7, heads=3, kv_heads=1, tied=True)
"""No row a multiple of 256, all of 32; more layers than the period of any pattern."""

COMPUTED = [
    FamilyCase(family, "bytes" if family in BYTES else "pieces", replace(NARROW, tied=family not in UNTIED), variant)
    for family in CLASSES
    for variant in ("", *VARIANTS.get(family, ()))
]
"""Compared with transformers."""

ROUNDED = [replace(case, shape=replace(case.shape, hidden=128, heads=4, kv_heads=2, layers=2)) for case in COMPUTED]
"""Rows of whole NF4 blocks in some layers."""

_WIDE = Shape(hidden=256, ffn=512, layers=3, heads=4, kv_heads=2, tied=True)
"""Every row a multiple of 256: K-quants everywhere; with eight experts, for which llama.cpp has rules of its own."""


def _converted() -> Iterator[FamilyCase]:
    for family, kind in itertools.product(CLASSES, get_args(Kind)):
        if family not in (BYTES if kind == "bytes" else PIECES):
            continue
        for variant in ("", *VARIANTS.get(family, ())):
            for shape, tied in ((_WIDE, True), (NARROW, False)):
                # llama.cpp's converter fails on StableLM's norms of heads; rope scaling is the same for all families.
                if variant != "norms" and (variant not in ("yarn", "linear") or family == "llama"):
                    tied = family in TIED or (tied and family not in UNTIED)
                    yield FamilyCase(family, kind, replace(shape, tied=tied), variant)


CONVERTED = list(_converted())
"""Compared with llama.cpp's converter and quantizer."""


# --- Tokenizers ---------------------------------------------------------------


def write_tokenizer(folder: Path, family: str, kind: Kind) -> None:
    if kind == "pieces":
        write_pieces(folder, gemma=family.startswith("gemma"))
        return
    tiny.write_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    # llama.cpp loads no BPE without merges.
    tokenizer["model"] |= {"vocab": {**tokenizer["model"]["vocab"], "th": tiny.TOKENS}, "merges": [["t", "h"]]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    file = folder / "tokenizer_config.json"
    # By this name llama.cpp's converter tells Phi-4 from Phi-3.
    named = {"tokenizer_class": "GPT2Tokenizer"} if family == "phi3" else {}
    file.write_text(json.dumps({**json.loads(file.read_text()), "add_bos_token": False, **named}))


_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_WORDS = ("▁", "e", "t", "a", "h", "▁t", "he", "▁the")
_PIECES = [("<unk>", 0.0, _UNKNOWN), ("<s>", 0.0, _CONTROL), ("</s>", 0.0, _CONTROL)]
_PIECES += [(f"<0x{byte:02X}>", 0.0, _BYTE) for byte in range(256)]
_PIECES += [(word, -float(at), _NORMAL) for at, word in enumerate(_WORDS)]


def write_pieces(folder: Path, *, gemma: bool) -> None:
    """A SentencePiece BPE: specials, bytes, and a few pieces, in less than `ROWS` rows.

    Gemma's has no space in front of texts, added tokens made of spaces, and some that publishers forgot to mark.
    """
    data = b"".join(_field(1, _piece(*piece)) for piece in _PIECES)
    # TrainerSpec: BPE, byte fallback; NormalizerSpec: whether a space comes in front.
    data += _field(2, _number(3, 2) + _number(35, 1)) + _field(3, _number(3, int(not gemma)))
    (folder / "tokenizer.model").write_bytes(data)
    texts = [text for text, _, _ in _PIECES[:3]]
    added = [(at, text, True) for at, text in enumerate(texts)]
    later = [("<|im_start|>", True), ("<|im_end|>", True)] + [("<unused0>", False), ("▁▁", False)] * gemma
    added += [(len(_PIECES) + at, text, special) for at, (text, special) in enumerate(later)]
    decoder = {id_: {"content": text, "special": special} for id_, text, special in added}
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": decoder, "add_bos_token": True}
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **named}))
    prefix = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never" if gemma else "always"}
    tokenizer = {
        "added_tokens": [{"id": id_, "content": text, "special": special} for id_, text, special in added],
        "normalizer": None,
        "pre_tokenizer": prefix,
        "post_processor": None,
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {p[0]: at for at, p in enumerate(_PIECES)},
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(tiny.TEMPLATE)


def _piece(text: str, score: float, kind: int) -> bytes:
    return _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind)


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)
