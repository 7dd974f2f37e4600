"""Less noise from the libraries: edgeft shows its own progress, and says itself what a user should know."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from edgeft.errors import require

_KNOWN = (
    "Failed to load CPU gemm_4bit_forward",  # an optional kernel for inference
    "The tokenizer has new PAD/BOS/EOS tokens",  # TRL aligns them; the template's own are what is trained
)
_LOGGERS = ("bitsandbytes.backends.cpu.ops", "transformers.trainer", "transformers.trainer_utils")


class _Known(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_KNOWN)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Drop bars, and messages that say nothing to a user; everything else still gets through."""
    noise = _Known()
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(noise)
    with _without_bars(), warnings.catch_warnings():
        # TRL and PEFT still use the old names of transformers' arguments.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator.*", category=UserWarning)
        try:
            yield
        finally:
            for name in _LOGGERS:
                logging.getLogger(name).removeFilter(noise)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    require("torch", "train")
    switch = require("transformers.utils.logging", "train")
    reader: Any = require("transformers.modeling_gguf_pytorch_utils", "train")
    shown, bar = switch.is_progress_bar_enabled(), reader.tqdm
    switch.disable_progress_bar()
    # The GGUF reader does not go through the switch above.
    reader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar
        if shown:
            switch.enable_progress_bar()
