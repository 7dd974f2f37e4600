"""Whether a file holds the very codes and scales that a run computed with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from edgeft.errors import UnsupportedModel
from edgeft.models.packed import Packed, read_packed
from edgeft.plugins import Source
from edgeft.verify.report import Finding


def check_codes(source: Source, artifact: Path) -> list[Finding]:
    """Compare the run's packed weights with the file's, tensor by tensor; nothing where the run has none.

    Raises:
        ModelError: one of the two cannot be read.
    """
    if source.packed is None:
        return []
    packed = read_packed(source.packed)
    try:
        equal, total = (_onnx if artifact.is_dir() else _gguf)(packed, source, artifact)
    except UnsupportedModel as error:
        return [Finding("codes", True, f"not compared: {error.message}", skipped=True)]
    return [
        Finding("codes", equal == total, f"{equal:,} of {total:,} blocks are those of training", equal / total, 1.0)
    ]


def _gguf(packed: Packed, source: Source, artifact: Path) -> tuple[int, int]:
    """(equal blocks, all blocks). Raises: ModelError, UnsupportedModel."""
    from safetensors import safe_open
    from transformers import AutoConfig

    from edgeft.models.gguf_header import TENSOR_TYPES, read_header
    from edgeft.models.gguf_torch import StoredRows, check_supported

    header = read_header(artifact)
    check_supported(header)
    found = StoredRows(header, AutoConfig.from_pretrained(source.base, local_files_only=True))
    sizes = {kind: (block, size) for kind, block, size in TENSOR_TYPES.values()}
    equal = total = 0
    with safe_open(packed.weights, "pt") as trained:
        for name, kind in packed.types.items():
            rows, (block, size) = trained.get_tensor(name), sizes[kind]
            shipped, shipped_kind = found.packed(name, (len(rows), rows.shape[1] // size * block))
            total += rows.numel() // size
            if shipped_kind == kind:
                equal += int((shipped.view(-1, size) == rows.view(-1, size)).all(1).sum())
    return equal, total


def _onnx(packed: Packed, source: Source, artifact: Path) -> tuple[int, int]:
    """(blocks of equal rows, all blocks); the graph may have put tensors together. Raises: ModelError."""
    from safetensors import safe_open

    from edgeft.models import nbits
    from edgeft.models.onnx_values import OnnxFile

    file = OnnxFile(artifact)
    shipped = Counter(
        bytes(row)
        for tensor in file.tensors.values()
        if tensor.bits and tensor.block == nbits.BLOCK
        for row in file.packed_rows(tensor)
    )
    equal = total = 0
    with safe_open(packed.weights, "np") as trained:
        for name, kind in packed.types.items():
            rows = trained.get_tensor(name)
            blocks = nbits.layout_of(kind, rows.shape[1]).blocks
            wanted = Counter(bytes(row) for row in rows)
            equal += blocks * (wanted & shipped).total()
            shipped -= wanted
            total += blocks * len(rows)
    return equal, total
