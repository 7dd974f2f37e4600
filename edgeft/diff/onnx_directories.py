"""Two ONNX directories: their files, settings and weights. Weights need the onnx package; no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft.diff.report import Changed, TensorDifference
from edgeft.models.onnx_values import OnnxFile, OnnxTensor
from edgeft.paths import sha256_file

_SETTINGS = ("genai_config.json", "config.json", "generation_config.json", "tokenizer_config.json")


def metadata(a: Path, b: Path) -> Iterator[Changed]:
    """Settings whose values differ, and the tokenizer where its file does."""
    for name in _SETTINGS:
        left, right = _flat(a / name), _flat(b / name)
        for key in sorted({*left, *right}):
            if left.get(key) != right.get(key):
                yield Changed(f"{name}: {key}", left.get(key), right.get(key))
    left_hash, right_hash = (_digest(folder / "tokenizer.json") for folder in (a, b))
    if left_hash != right_hash:
        yield Changed("tokenizer.json", left_hash, right_hash)


def _flat(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(_leaves(content, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _digest(file: Path) -> str | None:
    return f"SHA-256 {sha256_file(file)[:12]}…" if file.is_file() else None


def tensors(a: OnnxFile, b: OnnxFile) -> Iterator[TensorDifference]:
    """Every stored tensor of either graph. Raises: ModelError, UnsupportedModel."""
    for name in [*a.tensors, *(name for name in b.tensors if name not in a.tensors)]:
        yield _tensor(a, b, a.tensors.get(name), b.tensors.get(name))


def _tensor(a: OnnxFile, b: OnnxFile, left: OnnxTensor | None, right: OnnxTensor | None) -> TensorDifference:
    import numpy as np

    known = left or right
    assert known is not None
    described: dict[str, Any] = {
        "name": known.name,
        "type_a": left and left.type,
        "type_b": right and right.type,
        "shape_a": left and left.shape,
        "shape_b": right and right.shape,
        "bytes_a": left.bytes if left else 0,
        "bytes_b": right.bytes if right else 0,
    }
    if left is None or right is None or left.shape != right.shape:
        return TensorDifference(**described, equal=False)
    if (left.type, left.block) == (right.type, right.block) and a.stored_bytes(left) == b.stored_bytes(right):
        return TensorDifference(**described, equal=True, relative_rms=0.0, largest=0.0)
    one, other = a.values(left).astype(np.float64), b.values(right)
    apart, norm = one - other, float(np.sqrt(np.square(one).sum()))
    rms = float(np.sqrt(np.square(apart).sum())) / norm if norm else None
    return TensorDifference(**described, equal=False, relative_rms=rms, largest=float(np.abs(apart).max()))
