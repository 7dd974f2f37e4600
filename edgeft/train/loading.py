"""The model as it is trained: base weights (NF4 or floating point), a fresh or trained adapter, fused layers."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft.errors import ModelError, UnsupportedModel, require
from edgeft.train.config import TrainConfig
from edgeft.train.hardware import Hardware


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Drop the messages that say nothing to a user; everything else still gets through."""
    from transformers.utils import logging as transformers_logging

    known = (
        "Failed to load CPU gemm_4bit_forward",  # an optional kernel for inference
        "The tokenizer has new PAD/BOS/EOS tokens",  # TRL aligns them; the template's own are what is trained
    )

    class Known(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return not record.getMessage().startswith(known)

    names = ("bitsandbytes.backends.cpu.ops", "transformers.trainer", "transformers.trainer_utils")
    noise = Known()
    for name in names:
        logging.getLogger(name).addFilter(noise)
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        # TRL still uses the old names of transformers' arguments.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator.*", category=UserWarning)
        try:
            yield
        finally:
            for name in names:
                logging.getLogger(name).removeFilter(noise)


def load_base(path: Path, config: TrainConfig, hardware: Hardware) -> Any:
    """The base model on its device: NF4 for QLoRA, the compute dtype for LoRA, float32 for full fine-tuning.

    Raises:
        MissingDependency: an extra is missing.
        ModelError: the directory holds no model that transformers can load.
    """
    transformers, torch = require("transformers", "train"), require("torch", "train")
    from edgeft.train import attention

    attention.register()
    compute = getattr(torch, hardware.dtype)
    options: dict[str, Any] = {"dtype": torch.float32 if config.method == "full" else compute}
    if config.method == "qlora":
        require("bitsandbytes", "train")
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    if hardware.device == "cuda":
        options["device_map"] = {"": 0}
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, attn_implementation=attention.NAME, local_files_only=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be loaded: {_first_line(error)}") from error


def add_adapter(model: Any, config: TrainConfig, base: Path) -> Any:
    """Wrap the base with a fresh adapter as the configuration says; its weights are float32.

    Raises:
        UnsupportedModel: no layer has one of the asked names.
    """
    peft = require("peft", "train")
    names = config.target_modules
    adapter = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.effective_alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear" if names == ("all-linear",) else list(names),
        use_rslora=config.rslora,
        use_dora=config.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )
    try:
        return peft.get_peft_model(model, adapter)
    except ValueError as error:
        raise UnsupportedModel(
            f"no adapter fits {base}: {_first_line(error)}", "--target-modules names layers such as q_proj,v_proj."
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
