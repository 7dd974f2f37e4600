"""What llama.cpp takes for granted of a GGUF: where it does not hold, it ends the process instead of reporting it.

The checks are its own assertions (`llama-model.cpp`, `llama-vocab.cpp` and `ops.cpp` of llama.cpp 0c1e57098), made
before it sees the file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft.errors import ModelError
from edgeft.models.gguf_header import GgufHeader, read_header

_MAX_LAYERS, _MAX_EXPERTS = 512, 1024
_ROPE_SCALING = ("none", "linear", "yarn", "longrope")


def check_loadable(file: Path) -> None:
    """Raises: ModelError when the file is damaged or llama.cpp would end the process on it."""
    header = read_header(file)
    reason = next(_reasons(header), None)
    if reason is not None:
        raise ModelError(f"{file} is damaged: {reason}", "Fetch or export it again.")


def _reasons(header: GgufHeader) -> Iterator[str]:
    yield from _sizes(header)
    yield from _numbers(header)
    yield from _vocabulary(header)


def _sizes(header: GgufHeader) -> Iterator[str]:
    layers = _whole(header, "block_count")
    if layers is not None and not 0 < layers <= _MAX_LAYERS:
        yield f"it says it has {layers} layers"
    if (_whole(header, "nextn_predict_layers") or 0) > (layers or 0):
        yield "it says it has more layers for prediction than layers"
    experts, used = _whole(header, "expert_count") or 0, _most(header, "expert_used_count")
    if not 0 <= experts <= _MAX_EXPERTS:
        yield f"it says it has {experts} experts"
    if used > experts or (experts and used <= 0):
        yield f"it says it uses {used} of {experts} experts"


def _numbers(header: GgufHeader) -> Iterator[str]:
    for name in ("layer_norm_rms_epsilon", "layer_norm_epsilon", "group_norm_epsilon"):
        value = _of(header, f"attention.{name}")
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            yield f"its {name} is {value}"
    kind = _of(header, "rope.scaling.type")
    if isinstance(kind, str) and kind not in _ROPE_SCALING:
        yield f"its rope.scaling.type is {kind[:40]!r}"


def _vocabulary(header: GgufHeader) -> Iterator[str]:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return
    known = set(tokens)
    if len(known) < len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        yield f"the token {str(twice)[:40]!r} is in its vocabulary twice"
    if header.metadata.get("tokenizer.ggml.model") == "llama":
        lost = [byte for byte in range(256) if f"<0x{byte:02X}>" not in known and chr(byte) not in known]
        if lost:
            yield f"its SentencePiece vocabulary has no token for the byte {lost[0]}"


def _of(header: GgufHeader, name: str) -> Any:
    return header.metadata.get(f"{header.architecture}.{name}")


def _whole(header: GgufHeader, name: str) -> int | None:
    return header.number(f"{header.architecture}.{name}")


def _most(header: GgufHeader, name: str) -> int:
    """The largest value of a number, or of a list with one for every layer."""
    value = _of(header, name)
    values = value if isinstance(value, list) else [value]
    return max((one for one in values if isinstance(one, int)), default=0)
