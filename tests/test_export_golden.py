"""Exports have the bytes that llama.cpp's converter and quantizer gave: what a machine without a compiler can check.

The digests in golden_exports.json were recorded from the reference (test_export_parity.py compares with it directly):

    python tests/test_export_golden.py      records them again
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import parity_cases as parity
import pytest
import reference
import tiny
from reference import FILE_TYPES, Gguf, Job, Reference, Shape

GOLDEN = Path(__file__).with_name("golden_exports.json")

CASES = [
    (kind, shape)
    for kind in ("llama", "qwen2", "qwen3")
    for shape in (parity.WIDE, replace(parity.NARROW, tied=False), parity.MIXED, replace(parity.ODD, tied=False))
]


def label(case: tuple[str, Shape]) -> str:
    return f"{case[0]}-{case[1].label}"


def build(folder: Path, kind: str, shape: Shape) -> Path:
    """A model whose weights are the same on every machine: their bits are drawn as integers."""
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    tiny.write_model(
        folder,
        kind,
        dtype="bfloat16",
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        tie_word_embeddings=shape.tied,
    )
    random = np.random.Generator(np.random.PCG64(0))
    weights = load_file(folder / "model.safetensors")
    for name in sorted(weights):
        shape_ = tuple(weights[name].shape)
        sign, exponent, fraction = (random.integers(*span, shape_) for span in ((0, 2), (112, 125), (0, 128)))
        bits = (sign << 15 | exponent << 7 | fraction).astype(np.uint16).view(np.int16)
        weights[name] = torch.from_numpy(bits).view(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def digest(gguf: Gguf) -> str:
    """SHA-256 over name, shape, type and bytes of every tensor, in the file's order."""
    total = hashlib.sha256()
    for name, tensor in gguf.tensors.items():
        total.update(repr((name, tensor.shape, tensor.type)).encode())
        total.update(tensor.data)
    return total.hexdigest()


@pytest.mark.parametrize("case", CASES, ids=label)
def test_an_export_has_the_reference_bytes(case: tuple[str, Shape], tmp_path: Path) -> None:
    model = build(tmp_path / "model", *case)
    files = {target: parity.export(model, target, tmp_path / f"{target}.gguf") for target in FILE_TYPES}
    recorded = json.loads(GOLDEN.read_text())[label(case)]
    assert {target: digest(reference.read_gguf(file)) for target, file in files.items()} == recorded


def record(cache: Path) -> None:
    """Write golden_exports.json from llama.cpp's own conversion and quantization."""
    recorded = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        llama_cpp = Reference(reference.converter_source(cache), work / "log.txt")
        for case in CASES:
            folder = work / label(case)
            model = build(folder / "model", *case)
            files = {target: folder / f"{target}.gguf" for target in FILE_TYPES}
            job = Job(str(model), str(folder / "bf16.gguf"), {key: str(file) for key, file in files.items()})
            llama_cpp.run(replace(job, pre="smollm"))
            recorded[label(case)] = {key: digest(reference.read_gguf(file)) for key, file in files.items()}
        llama_cpp.close()
    GOLDEN.write_text(json.dumps(recorded, indent=2) + "\n")


if __name__ == "__main__":
    record(Path(__file__).parent.parent / ".cache")
