"""A model and a context of llama.cpp's."""

from __future__ import annotations

import ctypes
from pathlib import Path

from edgeft.errors import ModelError
from edgeft.plugins import LoadOptions

from .amx import crashes_on_amx
from .cores import available_cores, physical_cores
from .llama_api import Library
from .memory import available_bytes

DEFAULT_CONTEXT = 4096


def metadata(library: Library, model: int, key: str) -> str:
    """A short text from the file's metadata; "" when it has no such key."""
    room = ctypes.create_string_buffer(64)
    size = library.llama_model_meta_val_str(model, key.encode(), room, len(room))
    return room.value.decode("utf-8", "replace") if size >= 0 else ""


def load_model(library: Library, path: Path, options: LoadOptions) -> int:
    params = library.llama_model_default_params()
    params.load_mode = 1 if options.use_mmap else 0
    if crashes_on_amx(library.path):
        # Without ggml's repacked buffers its AMX kernels are never reached.
        params.use_extra_bufts = False
    library.forget_errors()
    model = library.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        said = "; ".join(library.errors[:2]) or "no reason given"
        raise ModelError(f"llama.cpp cannot load {path}: {said}", "The file may be cut short; export or pull it again.")
    return int(model)


def make_context(library: Library, model: int, options: LoadOptions, path: Path, flash_attention: bool) -> int:
    params = library.llama_context_default_params()
    each = options.context or min(int(library.llama_model_n_ctx_train(model)), DEFAULT_CONTEXT)
    whole = each * options.parallel
    params.n_ctx, params.n_seq_max = whole, options.parallel
    params.n_batch = params.n_ubatch = options.batch
    if not flash_attention:
        params.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED; the default lets llama.cpp choose
    params.n_threads = options.threads or physical_cores()
    params.n_threads_batch = options.threads_batch or available_cores()
    try:
        _check_memory(library, model, whole, path)
    except ModelError:
        library.llama_model_free(model)
        raise
    library.forget_errors()
    context = library.llama_init_from_model(model, params)
    if not context:
        library.llama_model_free(model)
        said = "; ".join(library.errors[:2]) or "no reason given"
        raise ModelError(
            f"llama.cpp cannot make a context of {params.n_ctx} tokens for {path}: {said}", "Try a shorter --context."
        )
    return int(context)


def cache_bytes(library: Library, model: int, context: int) -> int:
    """Of keys and values of every layer, two bytes each. Models with sliding windows or states take less."""
    layers, heads = library.llama_model_n_layer(model), library.llama_model_n_head(model)
    width = library.llama_model_n_embd(model) * library.llama_model_n_head_kv(model) // max(heads, 1)
    return int(2 * 2 * layers * width * context)


def _check_memory(library: Library, model: int, context: int, path: Path) -> None:
    """Keys and values must fit; what else a context takes is small beside them."""
    needed, available = cache_bytes(library, model, context), available_bytes()
    if available is not None and needed > available:
        raise ModelError(
            f"a context of {context} tokens for {path} takes {needed / 1e9:.1f} GB; {available / 1e9:.1f} GB are free",
            "Try a shorter --context, or fewer answers at a time.",
        )
