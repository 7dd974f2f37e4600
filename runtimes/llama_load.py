"""A model and a context of llama.cpp's."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

from edgeft.errors import ModelError, UsageError
from edgeft.plugins import Choice, KvType, LoadOptions

from .amx import crashes_on_amx
from .cores import available_cores, physical_cores
from .llama_api import Library
from .memory import available_bytes

DEFAULT_CONTEXT = 4096
_KV: Mapping[KvType, tuple[int, float]] = {"f16": (1, 2.0), "q8_0": (8, 34 / 32)}
"""Type of keys and values -> its number in ggml.h, bytes per value."""


def metadata(library: Library, model: int, key: str) -> str:
    """A short text from the file's metadata; "" when it has no such key."""
    room = ctypes.create_string_buffer(64)
    size = library.llama_model_meta_val_str(model, key.encode(), room, len(room))
    return room.value.decode("utf-8", "replace") if size >= 0 else ""


def repacking(library: Library, path: Path, options: LoadOptions) -> Choice:
    """Whether weights are copied into the order that ggml's fastest kernels want.

    Raises:
        UsageError: asked for where it would end the process.
    """
    crashes = crashes_on_amx(library.path)  # without repacked buffers ggml's AMX kernels are never reached
    if options.repack is not None:
        if options.repack and crashes:
            raise UsageError("this build's AMX kernels crash on this processor", "Leave out --repack.")
        return _chosen("repack", options.repack, None, "")
    if crashes:
        return Choice("repack", "off", "its AMX kernels crash here")
    # Which tensors are copied depends on type and processor; the file is the most that it can be.
    size, available = path.stat().st_size, available_bytes()
    if available is not None and size > available:
        return Choice("repack", "off", f"{size / 1e6:,.0f} MB do not fit into {available / 1e6:,.0f} MB twice")
    return Choice("repack", "on", "faster prompts")


def uses_flash_attention(options: LoadOptions, default: bool) -> bool:
    """Raises: UsageError when it is turned off for values that only it can read."""
    quantized = options.kv_type == "q8_0"
    if options.flash_attention is None:
        return default or quantized
    if quantized and not options.flash_attention:
        raise UsageError("only flash attention reads quantized values", "Leave out --flash-attention or --kv-type.")
    return options.flash_attention


def load_model(library: Library, path: Path, options: LoadOptions, *, repack: bool) -> int:
    params = library.llama_model_default_params()
    params.load_mode = 0 if options.mmap is False else 1
    params.use_extra_bufts = repack
    library.forget_errors()
    model = library.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        said = "; ".join(library.errors[:2]) or "no reason given"
        raise ModelError(f"llama.cpp cannot load {path}: {said}", "The file may be cut short; export or pull it again.")
    return int(model)


def make_context(library: Library, model: int, options: LoadOptions, path: Path, flash_attention: bool) -> int:
    params = library.llama_context_default_params()
    params.n_ctx, params.n_seq_max = _tokens(library, model, options), options.parallel
    params.n_batch = params.n_ubatch = options.batch
    params.type_k = params.type_v = _KV[options.kv_type or "f16"][0]
    if not flash_attention:
        params.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED; the default lets llama.cpp choose
    elif options.flash_attention:
        params.flash_attn_type = 1
    params.n_threads = options.threads or physical_cores()
    params.n_threads_batch = options.threads_batch or available_cores()
    try:
        _check_memory(library, model, options, path)
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


def _tokens(library: Library, model: int, options: LoadOptions) -> int:
    """Of all answers that are made at a time."""
    each = options.context or min(int(library.llama_model_n_ctx_train(model)), DEFAULT_CONTEXT)
    return each * options.parallel


def cache_bytes(library: Library, model: int, context: int, kv_type: KvType | None = None) -> int:
    """Of keys and values of every layer. Models with sliding windows or states take less."""
    layers, heads = library.llama_model_n_layer(model), library.llama_model_n_head(model)
    width = library.llama_model_n_embd(model) * library.llama_model_n_head_kv(model) // max(heads, 1)
    return int(2 * _KV[kv_type or "f16"][1] * layers * width * context)


def _check_memory(library: Library, model: int, options: LoadOptions, path: Path) -> None:
    """Keys and values must fit; what else a context takes is small beside them."""
    context = _tokens(library, model, options)
    needed, available = cache_bytes(library, model, context, options.kv_type), available_bytes()
    if available is not None and needed > available:
        raise ModelError(
            f"a context of {context} tokens for {path} takes {needed / 1e9:.1f} GB; {available / 1e9:.1f} GB are free",
            "Try a shorter --context, fewer answers at a time, or --repack off.",
        )


def llama_choices(options: LoadOptions, repack: Choice, flash_attention: bool) -> list[Choice]:
    """What a context was made with, and why."""
    quantized = options.kv_type == "q8_0"
    flash = "only it reads quantized values" if quantized else "measured for this package: docs/runtimes.md"
    return [
        _chosen("threads", options.threads, physical_cores(), "one per physical core"),
        _chosen("threads-batch", options.threads_batch, available_cores(), "all cores: a prompt is arithmetic"),
        _chosen("flash attention", options.flash_attention, flash_attention, flash),
        _chosen("kv-type", options.kv_type, "f16", "exact: q8_0 halves the memory and changes log-probabilities"),
        _chosen("lookup", options.lookup, False, "only an answer that repeats its prompt can gain"),
        _chosen("mmap", options.mmap, True, "the file's pages are shared and need no copy"),
        repack,
    ]


def _chosen(name: str, asked: object, default: object, reason: str) -> Choice:
    value = default if asked is None else asked
    text = {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    return Choice(name, text, reason if asked is None else "asked for")
