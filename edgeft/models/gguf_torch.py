"""A GGUF as a torch model whose linear weights stay as the file has them: packed, and made dense where they are used.

What such a model computes is what the file says, to the last bit of every weight: no import, no second rounding. Rows
of Llama's rotary projections are put back into Hugging Face's order while they are still packed; rows are quantized
one by one, so that changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgeft.errors import ModelError, UnsupportedModel, require
from edgeft.models import ggml_rows
from edgeft.models.gguf_header import GgufHeader, TensorInfo, read_header
from edgeft.paths import sha256_file

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those whose tensors differ from Hugging Face's in name and row order only."""

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_SLAB = 1 << 16
"""Weights that a thread widens at once: 256 kB of float32, which stay in a core's cache until they are rounded."""


class PackedLinear(torch.nn.Linear):  # type: ignore[misc]
    """A frozen linear layer whose `weight` holds a GGUF tensor's bytes, shape (out, bytes per row), uint8."""

    def __init__(self, packed: Tensor, kind: str, columns: int, bias: Tensor | None) -> None:
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features, self.kind = len(packed), columns, kind
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The (out, in) weight, exact in float32, else rounded to `dtype`."""
        return dense(self.weight, self.kind, self.in_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _PackedProduct.apply(x, self)
        return result

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class _PackedProduct(torch.autograd.Function):  # type: ignore[misc]
    """`x W^T + b` for a packed W; the dense weight lives for one product, not until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.dense(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.dense(grads[0].dtype), None


def dense(packed: Tensor, kind: str, columns: int, dtype: torch.dtype) -> Tensor:
    """Packed rows (rows, bytes per row) as numbers (rows, columns) on the device of the bytes."""
    if kind in _FLOATS:
        return packed.detach().view(_FLOATS[kind]).to(dtype)
    source = packed.detach().cpu()
    out = torch.empty(len(source), columns, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    step = max(1, _SLAB // columns)
    spans = [(start, min(start + step, len(source))) for start in range(0, len(source), step)]
    widen = _widen_bfloat16 if dtype == torch.bfloat16 else _widen
    workers = min(torch.get_num_threads(), len(spans))
    if workers < 2:
        widen(source, kind, out, spans)
    else:
        list(_pool(workers).map(lambda part: widen(source, kind, out, spans[part::workers]), range(workers)))
    return out.to(device=packed.device, dtype=dtype)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="edgeft-dequantize")


def _widen(source: Tensor, kind: str, out: Tensor, spans: list[tuple[int, int]]) -> None:
    read = ggml_rows.to_float32(kind)
    columns = out.shape[1]
    for start, stop in spans:
        read(_address(source, start), _address(out, start), (stop - start) * columns)


def _widen_bfloat16(source: Tensor, kind: str, out: Tensor, spans: list[tuple[int, int]]) -> None:
    read, narrow = ggml_rows.to_float32(kind), ggml_rows.to_bfloat16()
    columns = out.shape[1]
    for start, stop in spans:
        wide = _scratch((stop - start) * columns)
        read(_address(source, start), wide.data_ptr(), wide.numel())
        narrow(wide.data_ptr(), _address(out, start), wide.numel())


def _address(tensor: Tensor, row: int) -> int:
    start, width = int(tensor.data_ptr()), int(tensor.stride(0) * tensor.element_size())
    return start + row * width


_LOCAL = threading.local()


def _scratch(count: int) -> Tensor:
    """This thread's float32 buffer."""
    held = getattr(_LOCAL, "held", None)
    if held is None or held.numel() < count:
        held = _LOCAL.held = torch.empty(max(count, _SLAB))
    part: Tensor = held[:count]
    return part


# --- Loading --------------------------------------------------------------------


def load_packed(
    file: Path, folder: Path, dtype: torch.dtype, *, attention: str = "sdpa", sha256: str | None = None
) -> Any:
    """The causal model of a GGUF.

    Args:
        folder: its text side, with config.json (`gguf_import.text_side`).
        dtype: of everything but the packed weights.
        attention: transformers' name of the attention to use.
        sha256: what the file must have.

    Raises:
        ModelError: the file is damaged or another one.
        UnsupportedModel: an architecture or tensor type that cannot be used in place.
    """
    header = read_header(file)
    check_supported(header)
    if sha256 is not None and sha256_file(file) != sha256:
        raise ModelError(f"{file} is not the file the run was trained on", "Restore it, or train again.")
    transformers = require("transformers", "train")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    _fill(model, StoredRows(header, config), dtype)
    return model.eval()


def unpack(model: Any) -> None:
    """Make every packed layer an ordinary one, in float32: four bytes per weight for many passes in a row."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            with torch.device("meta"):
                plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight = torch.nn.Parameter(layer.dense(torch.float32), requires_grad=False)
            plain.bias = layer.bias
            _replace(model, name, plain)


def check_supported(header: GgufHeader) -> None:
    """Raises: UnsupportedModel when the file's weights cannot be used as they lie."""
    if header.architecture not in _ARCHITECTURES:
        raise UnsupportedModel(
            f"{header.path} is of the architecture {header.architecture}, which cannot be trained in place",
            f"In place: {', '.join(_ARCHITECTURES)}. Give --method qlora to import it.",
        )
    for kind in {tensor.type for tensor in header.tensors} - set(_FLOATS):
        ggml_rows.to_float32(kind)


class StoredRows:
    """A GGUF's tensors by their Hugging Face names."""

    def __init__(self, header: GgufHeader, config: Any) -> None:
        gguf = require("gguf", "export")
        self._header, self._config = header, config
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture)
        self._names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def find(self, name: str) -> TensorInfo:
        """Raises: ModelError when the file lacks what the model needs."""
        found = self._tensors.get(str(self._names.get_name(name, try_suffixes=(".weight", ".bias"))))
        if found is None:
            raise ModelError(f"{self._header.path} lacks the tensor of {name}", "Fetch or export it again.")
        return found

    def packed(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, str]:
        """Bytes (rows, bytes per row) in Hugging Face's row order, and their type; a vector is one row."""
        info = self.find(name)
        if info.shape[::-1] != shape:
            raise ModelError(f"{self._header.path}: {info.name} has shape {info.shape[::-1]}, config.json says {shape}")
        rows = self._read(info).view(shape[0] if len(shape) > 1 else 1, -1)
        order = self._order(name, shape)
        if order is None:
            return rows, info.type
        if len(shape) == 1:
            return rows.view(len(order), -1)[order].reshape(1, -1), info.type
        return rows[order], info.type

    def _read(self, info: TensorInfo) -> Tensor:
        with self._header.path.open("rb") as stream:
            stream.seek(self._header.data_offset + info.offset)
            return torch.frombuffer(bytearray(stream.read(info.bytes)), dtype=torch.uint8)

    def dense(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        packed, kind = self.packed(name, shape)
        return dense(packed, kind, shape[-1], dtype).view(shape)

    def _order(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """Where each row of a rotary projection is: Llama's files hold the two halves of every head in turn."""
        if self._header.architecture != "llama" or not (".q_proj." in name or ".k_proj." in name):
            return None
        head = getattr(self._config, "head_dim", None) or self._config.hidden_size // self._config.num_attention_heads
        return torch.arange(shape[0]).view(-1, head // 2, 2).transpose(1, 2).reshape(-1)

    def rope_factors(self) -> Tensor | None:
        """Divisors of the rotary frequencies, which the metadata cannot say (Llama 3.1)."""
        if (info := self._tensors.get("rope_freqs.weight")) is None:
            return None
        return dense(self._read(info).view(1, -1), info.type, info.elements, torch.float32)[0]


def _fill(model: Any, weights: StoredRows, dtype: torch.dtype) -> None:
    """Give every parameter of a model on the meta device its values."""
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            _replace(model, name, _packed_linear(weights, name, layer, dtype))
        elif "rotary" in type(layer).__name__.lower():
            _replace(model, name, type(layer)(config=model.config))
    for name, owner, attribute, parameter in list(_unfilled(model)):
        tied = owner is head and attribute == "weight" and model.config.tie_word_embeddings
        if not tied:
            values = weights.dense(name, tuple(parameter.shape), dtype)
            setattr(owner, attribute, torch.nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    if (factors := weights.rope_factors()) is not None:
        rotary = model.base_model.rotary_emb
        rotary.inv_freq = rotary.original_inv_freq = rotary.inv_freq / factors


def _packed_linear(weights: StoredRows, name: str, layer: torch.nn.Linear, dtype: torch.dtype) -> PackedLinear:
    packed, kind = weights.packed(f"{name}.weight", (layer.out_features, layer.in_features))
    bias = None if layer.bias is None else weights.dense(f"{name}.bias", (layer.out_features,), dtype)
    return PackedLinear(packed, kind, layer.in_features, bias)


def _replace(model: Any, name: str, module: torch.nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _unfilled(model: Any) -> Iterator[tuple[str, Any, str, Tensor]]:
    """(full name, module, attribute, parameter) of what is still on the meta device."""
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                yield f"{prefix}.{attribute}", module, attribute, parameter
