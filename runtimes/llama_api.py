"""llama.cpp's C interface by ctypes: the part a session needs, for whichever package brings the library.

Structure layouts follow `llama.h` of ggml-org/llama.cpp at 0c1e57098 (October 2026). They have changed before and
will again, so a library is only accepted after its default parameters were found where this file expects them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any, ClassVar

from edgeft.errors import PluginError
from edgeft.openmp import short_spins

Token = c_int32


class ModelParams(Structure):
    _fields_: ClassVar = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        # Room for fields a newer library may add at the end: it would write past a shorter structure.
        ("_room", c_int8 * 128),
    ]


class ContextParams(Structure):
    _fields_: ClassVar = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        # More fields follow and differ between releases; none of them is set here, all keep their defaults.
        ("_rest", c_int8 * 256),
    ]


class Batch(Structure):
    _fields_: ClassVar = [
        ("n_tokens", c_int32),
        ("token", POINTER(Token)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", POINTER(c_int8)),
    ]


class SamplerChainParams(Structure):
    _fields_: ClassVar = [("no_perf", c_bool)]


LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
LOG_ERROR = 4
"""GGML_LOG_LEVEL_ERROR in ggml.h."""

_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_model_is_recurrent": (c_bool, [c_void_p]),
    "llama_model_is_hybrid": (c_bool, [c_void_p]),
    **{f"llama_model_n_{what}": (c_int32, [c_void_p]) for what in ("layer", "embd", "head", "head_kv")},
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_meta_val_str": (c_int32, [c_void_p, c_char_p, c_char_p, c_size_t]),
    "llama_model_chat_template": (c_char_p, [c_void_p, c_char_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, Token]),
    "llama_vocab_bos": (Token, [c_void_p]),
    "llama_vocab_eos": (Token, [c_void_p]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_vocab_get_text": (c_char_p, [c_void_p, Token]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(Token), c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [c_void_p, Token, c_char_p, c_int32, c_int32, c_bool]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_state_seq_get_size": (c_size_t, [c_void_p, c_int32]),
    "llama_state_seq_get_data": (c_size_t, [c_void_p, c_void_p, c_size_t, c_int32]),
    "llama_state_seq_set_data": (c_size_t, [c_void_p, c_char_p, c_size_t, c_int32]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_set_abort_callback": (None, [c_void_p, c_void_p, c_void_p]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_adapter_lora_free": (None, [c_void_p]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
    "llama_sampler_chain_init": (c_void_p, [SamplerChainParams]),
    "llama_sampler_chain_add": (None, [c_void_p, c_void_p]),
    "llama_sampler_init_greedy": (c_void_p, []),
    "llama_sampler_init_dist": (c_void_p, [c_uint32]),
    "llama_sampler_init_top_k": (c_void_p, [c_int32]),
    "llama_sampler_init_top_p": (c_void_p, [c_float, c_size_t]),
    "llama_sampler_init_min_p": (c_void_p, [c_float, c_size_t]),
    "llama_sampler_init_temp": (c_void_p, [c_float]),
    "llama_sampler_init_grammar": (c_void_p, [c_void_p, c_char_p, c_char_p]),
    "llama_sampler_init_penalties": (c_void_p, [c_int32, c_int32, c_float, c_float, c_float]),
    "llama_sampler_accept": (None, [c_void_p, Token]),
    "llama_sampler_sample": (Token, [c_void_p, c_void_p, c_int32]),
    "llama_sampler_free": (None, [c_void_p]),
}


class Library:
    """A loaded llama.cpp. Functions of the C interface are attributes with their prototypes set."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.errors: list[str] = []
        """Error lines that llama.cpp logged since `forget_errors`."""
        self._dll = _open(path)
        for name, (result, arguments) in _PROTOTYPES.items():
            try:
                function = getattr(self._dll, name)
            except AttributeError:
                raise _drifted(path, f"it has no {name}") from None
            function.restype, function.argtypes = result, arguments
        _check_layout(self)
        self._log = LogCallback(self._on_log)  # ctypes keeps no reference of its own
        self.llama_log_set(self._log, None)
        self.llama_backend_init()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dll, name)

    def _on_log(self, level: int, text: bytes, _data: object) -> None:
        if level == LOG_ERROR:
            self.errors = [*self.errors[-9:], text.decode("utf-8", "replace").strip()]

    def forget_errors(self) -> None:
        self.errors = []


@functools.cache
def open_library(path: Path) -> Library:
    """The library at `path`, loaded and checked once per process.

    Raises:
        PluginError: it cannot be loaded, or its structures are not laid out as this edgeft expects.
    """
    return Library(path)


def _open(path: Path) -> ctypes.CDLL:
    try:
        with short_spins():
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise PluginError(f"llama.cpp at {path} cannot be loaded: {error}") from error


def _drifted(path: Path, what: str) -> PluginError:
    return PluginError(
        f"llama.cpp at {path} is not a version this edgeft knows: {what}",
        "Install the version that constraints.txt names, or a newer edgeft.",
    )


def _check_layout(library: Library) -> None:
    """Compare defaults with those documented in llama.h; a field that moved shows up as a wrong value."""
    model, context = library.llama_model_default_params(), library.llama_context_default_params()
    expected = {
        "model n_gpu_layers": (model.n_gpu_layers, -1),
        "model split_mode": (model.split_mode, 1),
        "model load_mode": (model.load_mode, -1),
        "model vocab_only": (model.vocab_only, False),
        "model use_extra_bufts": (model.use_extra_bufts, True),
        "context n_ctx": (context.n_ctx, 512),
        "context n_batch": (context.n_batch, 2048),
        "context n_ubatch": (context.n_ubatch, 512),
        "context n_seq_max": (context.n_seq_max, 1),
        "context rope_scaling_type": (context.rope_scaling_type, -1),
        "context flash_attn_type": (context.flash_attn_type, -1),
        "context yarn_ext_factor": (context.yarn_ext_factor, -1.0),
        "context type_k": (context.type_k, 1),
        "context type_v": (context.type_v, 1),
    }
    wrong = [f"{name} is {found}, not {wanted}" for name, (found, wanted) in expected.items() if found != wanted]
    if wrong:
        raise _drifted(library.path, "; ".join(wrong))


@functools.cache
def abort_function() -> int:
    """Address of a C function that llama.cpp can ask "stop now?", with no Python in between.

    llama.cpp calls it before every node of the graph, hundreds of times a token; entering the interpreter there would
    cost several per cent. `strlen` is of the right shape: given the address of a buffer it returns 0 while the first
    byte is 0, and 1, which reads as true, once it is set.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else ctypes.cdll.msvcrt
    address = ctypes.cast(libc.strlen, c_void_p).value
    if address is None:
        raise PluginError(f"the C library of {sys.platform} has no strlen")
    return address


def scored_batch(tokens: Sequence[int], position: int) -> Batch:
    """A batch that asks for the outputs of all its tokens."""
    count = len(tokens)
    return Batch(
        n_tokens=count,
        token=(Token * count)(*tokens),
        pos=(ctypes.c_int32 * count)(*range(position, position + count)),
        logits=(ctypes.c_int8 * count)(*([1] * count)),
    )
