"""Weights that are refused: pickles, which can run any code when they are opened, and checkpoints with holes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeft.errors import ModelError, UnsupportedModel

_PATTERNS = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def refuse_pickles(folder: Path) -> None:
    """Raises: UnsupportedModel when a directory without safetensors has its weights as a pickle."""
    if next(folder.glob("*.safetensors"), None) is not None:
        return
    found = next((file for pattern in _PATTERNS for file in sorted(folder.glob(pattern))), None)
    if found is not None:
        raise UnsupportedModel(
            f"{found} is a pickle, which can run code when it is opened",
            "Fetch the safetensors version, or load it where you trust it and call save_pretrained again.",
        )


def refuse_missing(path: Path, found: Mapping[str, Any]) -> None:
    """
    Args:
        found: transformers' loading information.

    Raises:
        ModelError: transformers made weights up that the checkpoint does not have.
    """
    missing = sorted(found.get("missing_keys") or ())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{path} lacks tensor {missing[0]}{more}", "Copy or download the model again.")
