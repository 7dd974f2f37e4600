"""Weights that are pickles: files that can run any code when they are opened. edgeft opens none."""

from __future__ import annotations

from pathlib import Path

from edgeft.errors import UnsupportedModel

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
