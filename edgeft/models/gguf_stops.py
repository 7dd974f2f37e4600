"""The tokens that end an answer, as a GGUF names them."""

from __future__ import annotations

from edgeft.models.gguf_header import GgufHeader

_KINDS = ("eos", "eot", "eom")
"""`tokenizer.ggml.<kind>_token_id`: end of sequence, of turn, of message."""


def stop_token_ids(header: GgufHeader) -> list[int]:
    """Every token that the GGUF says ends a turn, the model's EOS first."""
    found = (header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in _KINDS)
    return list(dict.fromkeys(token for token in found if isinstance(token, int)))
