"""The model as it is trained: base weights (NF4 or floating point), a fresh or trained adapter, fused layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeft.errors import ModelError, UnsupportedModel, require
from edgeft.models import nf4
from edgeft.models.weights import refuse_missing, refuse_pickles
from edgeft.train.config import TrainConfig
from edgeft.train.hardware import Hardware


def load_base(path: Path, config: TrainConfig, hardware: Hardware, gguf: Path | None = None) -> Any:
    """The base model on its device: NF4 for QLoRA, the compute dtype for LoRA, float32 for full fine-tuning.

    Args:
        gguf: for the method "gguf": the file whose weights stay as they are; `path` has its text side.

    Raises:
        MissingDependency: an extra is missing.
        ModelError: the directory holds no model that transformers can load.
    """
    transformers, torch = require("transformers", "train"), require("torch", "train")
    from edgeft.train import attention

    attention.register()
    compute = getattr(torch, hardware.dtype)
    if gguf is not None:
        from edgeft.models.gguf_torch import load_packed

        packed = load_packed(gguf, path, compute, attention=attention.NAME).to(hardware.device)
        attention.install(packed)
        return packed
    refuse_pickles(path)
    options: dict[str, Any] = {"dtype": torch.float32 if config.method == "full" and not config.target else compute}
    # Neither pickles nor a model's own Python code.
    options |= {"use_safetensors": True, "trust_remote_code": False}
    if hardware.device == "cuda":
        options["device_map"] = {"": 0}
    try:
        if config.method == "qlora":
            options["quantization_config"] = nf4.config(path, compute)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            path, attn_implementation=attention.NAME, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # transformers and safetensors raise anything on files made wrong
        raise ModelError(f"{path} cannot be loaded: {_first_line(error)}") from error
    refuse_missing(path, found)
    attention.install(model)
    return model


def check_base(path: Path) -> None:
    """Whether a model can be loaded, as far as its headers say; before a run is begun.

    Raises:
        UnsupportedModel: its weights are pickles, or transformers does not know its architecture.
        ModelError: a file is damaged.
    """
    transformers, safetensors = require("transformers", "train"), require("safetensors", "train")
    refuse_pickles(path)
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safetensors.safe_open(file, "pt"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            raise ModelError(
                f"{file} is cut short or damaged: {_first_line(error)}", "Copy or download the file again."
            ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises anything on files made wrong
        raise UnsupportedModel(f"{path} cannot be trained: {_first_line(error)}") from error
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"{path} is no language model that transformers knows: {type(config).__name__}")


def not_finite(path: Path) -> str | None:
    """The first tensor of a model's files with a value that is no number, for a message; None: all are finite."""
    torch, safetensors = require("torch", "train"), require("safetensors", "train")
    for file in sorted(path.glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, not a mapping
                values = tensors.get_tensor(name)
                if values.is_floating_point() and not torch.isfinite(values.float().abs().max()):
                    return f"tensor {name} of {file}"
    return None


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
