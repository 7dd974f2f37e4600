"""Model families that can be exported to GGUF, one page each. See docs/adding-an-architecture.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeft.errors import UnsupportedModel

from . import gemma2, gemma3, granite, llama, mistral, olmo2, phi3, qwen2, qwen3, qwen3_moe, smollm3, stablelm
from .family import Family

FAMILIES: tuple[Family, ...] = tuple(
    page.FAMILY
    for page in (
        llama, mistral, qwen2, qwen3, qwen3_moe, gemma2, gemma3, phi3, granite, olmo2, smollm3, stablelm
    )
)  # fmt: skip


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its class, or by its model type when it names no class.

    Raises:
        UnsupportedModel: no page describes it.
    """
    named = (config.get("architectures") or [None])[0]
    kind = config.get("model_type")
    for family in FAMILIES:
        if named in family.classes or (named is None and kind in family.model_types):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.classes)
    raise UnsupportedModel(
        f"the architecture {named or kind or '(none named)'} cannot be exported to GGUF yet",
        f"These can: {known}. For others, --engine llama.cpp drives your checkout of llama.cpp.",
    )
