"""Every architecture in every type with every kind of tokenizer, against llama.cpp's converter and quantizer.

`MATRIX` is what `make parity` compares and docs/parity.md lists; `TESTED` is the part of it that every run of the
reference tests compares: each architecture, each type and each tokenizer several times.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny_families
from edgeft.converters import importance
from edgeft.converters.gguf import converter
from edgeft.converters.gguf_mixtures import MIXTURES
from gguf import GGUFReader
from reference import Job, Reference, ReferenceMissing, Shape
from tiny_families import FamilyCase

from edgeft.plugins import ConvertOptions, Source
from edgeft.progress import Silent

WIDE = Shape(hidden=256, ffn=256, layers=2, heads=4, kv_heads=2, tied=True)
"""Every row a multiple of 256: no type falls back."""
NARROW = tiny_families.NARROW
"""No row a multiple of 256: every type of larger blocks falls back."""

_OWN = ("gguf", "gguf-q4")
"""edgeft's own choices of types, which llama.cpp does not have."""
TARGETS = tuple(name for name in converter.targets if name not in _OWN and "lora" not in name)
_WEIGHTED = ("gguf-iq1", "gguf-iq2", "gguf-iq3_x", "gguf-q2_k_s")
_SLOW = ("gguf-iq1", "gguf-iq2")
"""ggml takes seconds for a million weights."""


@dataclass(frozen=True)
class Pair:
    case: FamilyCase
    target: str

    @property
    def label(self) -> str:
        return f"{self.case.label}-{self.target.removeprefix('gguf-')}"


def cases() -> list[FamilyCase]:
    """Every architecture with every kind of tokenizer that its models have, wide and narrow."""
    found = {}
    for case in tiny_families.CONVERTED:
        if not case.variant:
            wide = case.shape.hidden == 256
            shape = replace(WIDE, tied=case.shape.tied) if wide else case.shape
            found[case.family, case.tokenizer, wide] = replace(case, shape=shape)
    return list(found.values())


MATRIX = [Pair(case, target) for case, target in itertools.product(cases(), TARGETS)]


def _tested() -> Iterator[Pair]:
    """Each case with every fifth type, beginning at another one, so that all types and all cases meet often."""
    for at, case in enumerate(cases()):
        fast = [target for target in TARGETS if not target.startswith(_SLOW)]
        yield from (Pair(case, target) for target in fast[at % 5 :: 5])
    slow = [target for target in TARGETS if target.startswith(_SLOW)]
    wide = [case for case in cases() if case.shape.hidden == 256 and case.family != "qwen3moe"]
    yield from (Pair(case, target) for case, target in zip(wide, slow, strict=False))


TESTED = list(_tested())


@dataclass(frozen=True)
class Converted:
    """A case as a model, as llama.cpp's 16-bit file, and with an importance matrix made up for it."""

    case: FamilyCase
    model: Path
    bf16: Path
    matrix: Path


def prepare(case: FamilyCase, folder: Path, llama_cpp: Reference) -> Converted:
    model = tiny_families.build(folder / "Tiny-1B-Instruct", case)
    converted = Converted(case, model, folder / "theirs-bf16.gguf", folder / "imatrix.gguf")
    llama_cpp.run(Job(str(model), str(converted.bf16), pre="smollm"))
    _write_matrix(converted)
    return converted


def _write_matrix(converted: Converted) -> None:
    """Random importance of all layers; llama.cpp's tools have none for embedding and head."""
    generator, uses = np.random.default_rng(0), {}
    for tensor in GGUFReader(converted.bf16).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1 and "norm" not in tensor.name:
            experts = int(tensor.shape[2]) if len(tensor.shape) == 3 else 1
            sums = generator.random((experts, int(tensor.shape[0])), np.float32) * 100
            uses[tensor.name] = importance.Use(sums, np.full(experts, 50, np.float32))
    importance.write_importance(converted.matrix, uses, ["random"], 1, 50)


def different(converted: Converted, target: str) -> tuple[list[str], int]:
    """Names of the tensors that are not llama.cpp's in name, order, type or bytes, and how many there are."""
    weighted = converted.matrix if target.startswith(_WEIGHTED) else None
    ours = converted.bf16.with_name(f"ours-{target}.gguf")
    options = ConvertOptions(ours, extra={"imatrix": weighted, "force": True})
    converter.convert(converter.plan(Source(converted.model), target, options), Silent())
    theirs = converted.bf16
    if target not in ("gguf-bf16", "gguf-f32"):
        theirs = converted.bf16.with_name(f"theirs-{target}.gguf")
        quantize(converted.bf16, theirs, target, weighted)
    found = different_tensors(ours, theirs, widened=target == "gguf-f32"), len(GGUFReader(theirs).tensors)
    for file in {ours, theirs} - {converted.bf16}:
        file.unlink()
    return found


def different_tensors(ours: Path, theirs: Path, *, widened: bool = False) -> list[str]:
    """
    Args:
        widened: ours has the same values in float32 that theirs has in bfloat16.
    """
    left, right = (GGUFReader(file).tensors for file in (ours, theirs))
    if theirs.name.endswith("bf16.gguf"):
        # The converter writes tensors as it meets them; the order of files is the quantizer's.
        left, right = (sorted(tensors, key=lambda tensor: tensor.name) for tensors in (left, right))
    if [tensor.name for tensor in left] != [tensor.name for tensor in right]:
        return ["names or order"]
    return [mine.name for mine, other in zip(left, right, strict=True) if not _same(mine, other, widened)]


def _same(mine: Any, other: Any, widened: bool) -> bool:
    if mine.shape.tolist() != other.shape.tolist():
        return False
    if widened and other.tensor_type.name == "BF16":
        wide = other.data.view(np.uint16).astype(np.uint32).reshape(-1) << 16
        return mine.tensor_type.name == "F32" and np.array_equal(mine.data.reshape(-1).view(np.uint32), wide)
    return bool(mine.tensor_type == other.tensor_type and np.array_equal(mine.data, other.data))


def quantize(
    bf16: Path, out: Path, target: str, known: Path | None = None, overrides: Mapping[str, str] | None = None
) -> None:
    """llama.cpp's own quantizer, with an importance matrix and types by name where they are given."""
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        raise ReferenceMissing("the reference quantizer: pip install llama-cpp-python") from error
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = MIXTURES[target.removeprefix("gguf-").upper()].file_type
    parameters.allow_requantize = True
    keep: list[Any] = []
    if known is not None:
        means = importance.read_importance(known)
        entries = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()
        for entry, (name, mean) in zip(entries, means.items(), strict=False):
            flat = np.ascontiguousarray(mean.reshape(-1))
            keep.append(flat)
            entry.name, entry.size = name.encode(), flat.size
            entry.data = flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = entries
    if overrides:
        patterns = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()
        for entry, (pattern, kind) in zip(patterns, overrides.items(), strict=False):
            entry.pattern, entry.type = pattern.encode(), getattr(llama_cpp, f"GGML_TYPE_{kind.upper()}")
        parameters.tt_overrides = patterns
    assert llama_cpp.llama_model_quantize(str(bf16).encode(), str(out).encode(), ctypes.byref(parameters)) == 0


def covered() -> dict[tuple[str, str], set[str]]:
    """(architecture, target) -> kinds of tokenizers compared."""
    found: dict[tuple[str, str], set[str]] = {}
    for pair in MATRIX:
        found.setdefault((pair.case.family, pair.target), set()).add(pair.case.tokenizer)
    return found
