"""Which tensors a merged model has: whether embedding and head are still one, and what QLoRA rounded."""

from __future__ import annotations

from edgeft.models.nf4 import BLOCK

from .adapter import EMBEDDING, HEAD, Adapter, Change
from .safetensors_rows import StoredTensor


def separate_head(
    base: dict[str, StoredTensor], adapter: Adapter | None, changes: dict[str, Change], warnings: list[str]
) -> bool:
    """Keep embedding and head of a tied base one tensor when training kept them one; else give the head its own.

    Returns:
        Whether `base` has a head now.
    """
    embedding, separate = changes.get(EMBEDDING), changes.get(HEAD)
    if adapter is None or _still_tied(adapter, embedding, separate, base[EMBEDDING]):
        changes.pop(HEAD, None)
        return False
    # In training, what is added to the embedding alone leaves the head with the base's weights.
    base[HEAD] = (embedding.base if embedding and embedding.base else None) or base[EMBEDDING]
    warnings.append("the adapter changes embedding and head separately; the file stores both, the base shared them")
    return True


def is_nf4(name: str, stored: StoredTensor) -> bool:
    """As `edgeft.models.nf4.kept` has it: linear layers between embedding and head, of whole blocks per row."""
    return ".layers." in name and len(stored.shape) == 2 and stored.columns % BLOCK == 0


def _still_tied(adapter: Adapter, embedding: Change | None, separate: Change | None, base: StoredTensor) -> bool:
    if embedding is None and separate is None:
        return True
    if separate is None and embedding is not None:
        if embedding.down is not None:
            return False
        grown = embedding.replacement is not None and embedding.replacement.shape != base.shape
        return embedding.replacement is None or grown or adapter.ties_weights
    if embedding is None or separate is None or embedding.down or separate.down:
        return False
    return _same_bytes(embedding.replacement, separate.replacement) and embedding.tokens == separate.tokens


def _same_bytes(one: StoredTensor | None, other: StoredTensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step = 1 << 22
    with one.file.open("rb") as left, other.file.open("rb") as right:
        left.seek(one.offset)
        right.seek(other.offset)
        return all(
            left.read(min(step, one.bytes - at)) == right.read(min(step, one.bytes - at))
            for at in range(0, one.bytes, step)
        )
