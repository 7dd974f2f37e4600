"""Which exports are compared with llama.cpp's own, and how. Used by the tests and by `benchmarks/parity.py`."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import reference
import tiny_families
from reference import FILE_TYPES, Gguf, Job, Reference, Shape
from tiny_families import FamilyCase

from edgeft import plugins
from edgeft.plugins import ConvertOptions, Source
from edgeft.progress import Silent

WIDE = Shape(hidden=256, ffn=512, layers=4, heads=4, kv_heads=2, tied=True)
"""Every row a multiple of 256: K-quants everywhere."""
NARROW = Shape(hidden=96, ffn=160, layers=9, heads=3, kv_heads=1, tied=True)
"""No row a multiple of 256, all of 32: K-quants nowhere."""
MIXED = Shape(hidden=192, ffn=512, layers=8, heads=3, kv_heads=1, tied=True)
"""As in SmolLM2-135M (576 x 1536): only the rows of ffn_down are multiples of 256."""
ODD = Shape(hidden=48, ffn=112, layers=3, heads=3, kv_heads=3, tied=True)
"""Not even multiples of 32: nothing can be quantized in blocks."""


@dataclass(frozen=True)
class Case:
    tokenizer: str
    shape: Shape

    @property
    def label(self) -> str:
        return f"{self.tokenizer}-{self.shape.label}"


_HASHED = [name for name in reference.ROWS if name != "gemma3"]
"""Without its tokenizer.model, llama.cpp's converter does not know Gemma's tokenizer."""


def cases(shapes: Sequence[Shape]) -> list[Case]:
    """Every family and tokenizer with every shape, tied and untied."""
    return [
        Case(tokenizer, replace(shape, tied=tied))
        for tokenizer, shape, tied in itertools.product(_HASHED, shapes, (True, False))
    ]


ALL = cases([WIDE, NARROW, MIXED, ODD])
TESTED = [
    # Tokenizers with large vocabularies, narrow; the smaller ones with every shape. Families: `tiny_families`.
    *(Case(tokenizer, NARROW) for tokenizer in ("llama3_2", "qwen2_5", "qwen3")),
    Case("llama2", WIDE),
    Case("llama2", replace(NARROW, tied=False)),
    *cases([WIDE])[:2],
    Case("smollm2", MIXED),
    Case("smollm2", replace(ODD, tied=False)),
]
ADAPTED = [case for case in cases([WIDE]) if case.shape.tied]
"""Exported with an adapter by the benchmark."""


@dataclass(frozen=True)
class Exported:
    """One case on disk: the model, llama.cpp's files and ours."""

    case: Case | FamilyCase
    model: Path
    folder: Path

    def theirs(self, target: str) -> Path:
        return self.folder / f"theirs-{target}.gguf"

    def ours(self, target: str) -> Path:
        """Exported on first use."""
        file = self.folder / f"ours-{target}.gguf"
        return file if file.exists() else export(self.model, target, file)


def export(
    base: Path, target: str, out: Path, adapter: Path | None = None, rounding: Literal["none", "bf16"] = "none"
) -> Path:
    converter = plugins.load("converters", "gguf")
    options = ConvertOptions(out=out, round=rounding)
    converter.convert(converter.plan(Source(base, adapter), target, options), Silent())
    return out


def prepare(case: Case, folder: Path, tokenizer_dir: Path, llama_cpp: Reference) -> Exported:
    """Build a case's model and let llama.cpp convert and quantize it."""
    # llama.cpp reads names and sizes out of the folder's name.
    model = reference.build_model(folder / "Tiny-1B-Instruct", case.tokenizer, tokenizer_dir, case.shape)
    exported = Exported(case, model, folder)
    convert_and_quantize(model, folder, llama_cpp)
    return exported


def prepare_family(case: FamilyCase, folder: Path, llama_cpp: Reference) -> Exported:
    """The same for a tiny model of a family, with a tiny tokenizer."""
    model = tiny_families.build(folder / "Tiny-1B-Instruct", case)
    convert_and_quantize(model, folder, llama_cpp, pre="smollm")
    return Exported(case, model, folder)


def convert_and_quantize(model: Path, folder: Path, llama_cpp: Reference, pre: str | None = None) -> None:
    bf16 = folder / "theirs-bf16.gguf"
    files = {target: str(folder / f"theirs-{target}.gguf") for target in FILE_TYPES}
    llama_cpp.run(Job(str(model), str(bf16), files, pre=pre))
    bf16.unlink()


# --- Adapters -----------------------------------------------------------------


def add_adapter(base: Path, folder: Path, seed: int = 1) -> tuple[Path, Path]:
    """A random rank-8 adapter on all linear layers, and PEFT's merge of it in bfloat16."""
    import peft
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / base.name)
    for file in base.iterdir():
        if not (folder / base.name / file.name).exists():
            shutil.copy(file, folder / base.name)
    return folder / "adapter", folder / base.name


def differing_blocks(ours: Gguf, theirs: Gguf) -> tuple[int, int]:
    """(blocks that differ, blocks) over all tensors that the adapter reaches (the linear layers)."""
    import numpy as np

    differing = total = 0
    for name, tensor in theirs.tensors.items():
        if not name.startswith("blk.") or "norm" in name or not name.endswith("weight"):
            continue
        size = reference.BLOCKS[tensor.type][1]
        one, other = (np.frombuffer(gguf.tensors[name].data, np.uint8).reshape(-1, size) for gguf in (ours, theirs))
        differing += int((one != other).any(axis=1).sum())
        total += len(one)
    return differing, total


# --- Comparing ----------------------------------------------------------------


def different_tensors(ours: Gguf, theirs: Gguf) -> list[str]:
    """Names of tensors whose name, shape, type or bytes are not the same; order counts."""
    if list(ours.tensors) != list(theirs.tensors):
        return sorted(set(ours.tensors) ^ set(theirs.tensors)) or ["order"]
    return [
        name
        for name, tensor in ours.tensors.items()
        if (tensor.shape, tensor.type, tensor.data)
        != (theirs.tensors[name].shape, theirs.tensors[name].type, theirs.tensors[name].data)
    ]


def unexplained(ours: Gguf, theirs: Gguf) -> Iterator[str]:
    """Keys whose values differ without one of the reasons of docs/gguf-metadata.md."""
    for key in sorted(ours.metadata.keys() | theirs.metadata.keys()):
        mine, other = ours.metadata.get(key), theirs.metadata.get(key)
        if mine != other and not _explained(key, mine, other, ours):
            yield f"{key}: {_brief(mine)} instead of {_brief(other)}"


def _explained(key: str, mine: Any, other: Any, ours: Gguf) -> bool:
    if other is None:
        # Left out by llama.cpp's converter, which takes 10,000 and the family's usual pattern for granted.
        return key in ("gemma2.rope.freq_base", "stablelm.rope.freq_base", "gemma3.attention.sliding_window_pattern")
    if mine is None:
        return False
    if key == "tokenizer.ggml.tokens":
        return all(a == f"[PAD{id_}]" and b == "</s>" for id_, (a, b) in _changes(mine, other))
    if key == "tokenizer.ggml.scores":
        # Without tokenizer.model, llama.cpp gives every token the same score.
        return set(other[1]) == {-1000.0}
    if key == "tokenizer.ggml.token_type":
        tokens = ours.metadata["tokenizer.ggml.tokens"][1]
        return all(tokens[id_] == f"[PAD{id_}]" and (a, b) == (5, 1) for id_, (a, b) in _changes(mine, other))
    return False


def _changes(mine: Any, other: Any) -> list[tuple[int, tuple[Any, Any]]]:
    pairs = zip(mine[1], other[1], strict=True)
    return [(id_, pair) for id_, pair in enumerate(pairs) if pair[0] != pair[1]]


def _brief(value: Any) -> str:
    return repr(value)[:120]


def weights(gguf: Gguf) -> int:
    return sum(math.prod(tensor.shape) for tensor in gguf.tensors.values())
