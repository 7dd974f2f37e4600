"""Whether a file holds the very codes and scales that a run computed with."""

from __future__ import annotations

from pathlib import Path

from edgeft.errors import UnsupportedModel
from edgeft.plugins import Source
from edgeft.verify.report import Finding


def check_codes(source: Source, artifact: Path) -> list[Finding]:
    """Compare the run's packed weights with the file's, tensor by tensor; nothing where the run has none.

    Raises:
        ModelError: one of the two cannot be read.
    """
    if source.packed is None:
        return []
    from safetensors import safe_open
    from transformers import AutoConfig

    from edgeft.models.gguf_header import TENSOR_TYPES, read_header
    from edgeft.models.gguf_torch import StoredRows, check_supported
    from edgeft.models.packed import read_packed

    header, packed = read_header(artifact), read_packed(source.packed)
    try:
        check_supported(header)
    except UnsupportedModel as error:
        return [Finding("codes", True, f"not compared: {error.message}", skipped=True)]
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
    return [
        Finding("codes", equal == total, f"{equal:,} of {total:,} blocks are those of training", equal / total, 1.0)
    ]
