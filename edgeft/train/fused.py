"""The layers of a Llama-like model as fused autograd functions: same results, fewer passes over memory.

On a CPU a fine-tuning step spends most of its time outside of matrix products: in conversions between float32 and
bfloat16, in intermediate results that autograd keeps, in page faults for both. Each function here keeps only what
its backward pass cannot recompute cheaply, and works in the dtype of its input with reductions in float32.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgeft.models.gguf_torch import PackedLinear

# Modules whose forward is known to be exactly what the functions below compute.
_RMS_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
_SWIGLU_MLPS = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"})


def install(model: torch.nn.Module) -> dict[str, int]:
    """Replace the forward of every layer that has a fused equivalent; returns kind -> number of layers.

    Layers that are not recognised (DoRA, other architectures) keep their own forward.
    """
    counts = {"adapter": 0, "norm": 0, "mlp": 0}
    for module in model.modules():
        name = type(module).__name__
        if name in _RMS_NORMS:
            module.forward = types.MethodType(_norm_forward, module)
            counts["norm"] += 1
        elif name in _SWIGLU_MLPS and type(module.act_fn).__name__ in ("SiLUActivation", "SiLU"):
            module.forward = types.MethodType(_mlp_forward, module)
            counts["mlp"] += 1
        elif is_plain_adapter(module):
            module.forward = types.MethodType(_adapter_forward, module)
            counts["adapter"] += 1
        elif hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes repacks NF4 weights for AVX-512 at the first evaluation and rounds their scales to
            # bfloat16: the model that is scored would no longer be the model that is trained.
            module.support_avx512bf16_for_cpu = False
    return counts


def is_plain_adapter(module: torch.nn.Module) -> bool:
    """A LoRA or rsLoRA layer over a linear layer; DoRA and trained biases have more to compute."""
    from peft.tuners.lora import LoraLayer

    return (
        isinstance(module, LoraLayer)
        and isinstance(module.get_base_layer(), torch.nn.Linear)
        and len(module.active_adapters) == 1
        and module.active_adapters[0] in module.lora_A
        and not module.lora_variant
        and not any(module.lora_bias.values())
        and not getattr(module, "fan_in_fan_out", False)
    )


def _adapter_forward(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    name = self.active_adapters[0]
    base = self.get_base_layer()
    if self.disable_adapters or self.merged:
        return functional.linear(x, dense_weight(base, x.dtype), base.bias)
    dropout = self.lora_dropout[name]
    dropped = dropout(x) if getattr(dropout, "p", 0) and self.training else None
    result: Tensor = AdapterLinear.apply(
        x, dropped, base, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    )
    return result


def _norm_forward(self: Any, x: Tensor) -> Tensor:
    result: Tensor = RmsNorm.apply(x, self.weight, self.variance_epsilon)
    return result


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    result: Tensor = self.down_proj(SwiGlu.apply(self.gate_proj(x), self.up_proj(x)))
    return result


def dense_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """The (out, in) weight of a linear layer in `dtype`; NF4 and GGUF weights are dequantized."""
    if isinstance(layer, PackedLinear):
        return layer.dense(dtype)
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, state).to(dtype)


class AdapterLinear(torch.autograd.Function):  # type: ignore[misc]
    """`x W^T + b + s (x A^T) B^T` for a frozen W (float, NF4 or GGUF) and trained A (rank, in), B (out, rank).

    Keeps x and the rank-wide product only; W is dequantized again for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, base: Any, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        source = flat if dropped is None else dropped.reshape(flat.shape)
        down = source @ a.to(x.dtype).t()
        out = functional.linear(flat, dense_weight(base, x.dtype), None if base.bias is None else base.bias.to(x.dtype))
        out.addmm_(down, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(source, down, a, b)
        ctx.base, ctx.scale, ctx.shape, ctx.has_dropout = base, scale, x.shape, dropped is not None
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        source, down, a, b = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_down = (grad @ b.to(grad.dtype)).mul_(ctx.scale)
        grad_a = (grad_down.t() @ source).to(a.dtype)
        grad_b = (grad.t() @ down).to(b.dtype).mul_(ctx.scale)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dense_weight(ctx.base, grad.dtype)
            if not ctx.has_dropout:
                grad_x.addmm_(grad_down, a.to(grad.dtype))
            grad_x = grad_x.view(ctx.shape)
        if ctx.has_dropout and ctx.needs_input_grad[1]:
            grad_dropped = (grad_down @ a.to(grad.dtype)).view(ctx.shape)
        return grad_x, grad_dropped, None, grad_a, grad_b, None


class RmsNorm(torch.autograd.Function):  # type: ignore[misc]
    """Root-mean-square norm with a frozen or trained weight; keeps its input and one float per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = inverse.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        # Like the layer it replaces: round to the input's dtype before the weight is applied.
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, inverse = ctx.saved_tensors
        normed = x.float().mul_(inverse)
        grad = grads[0].float()
        grad_weight = (grad * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype) if weight.requires_grad else None
        grad = grad * weight
        mean = (grad * normed).mean(-1, keepdim=True)
        grad_x = grad.sub_(normed.mul_(mean)).mul_(inverse).to(x.dtype)
        return grad_x, grad_weight, None


class SwiGlu(torch.autograd.Function):  # type: ignore[misc]
    """`silu(gate) * up`; keeps its two inputs, not the activation."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        grad_up = functional.silu(gate).mul_(grads[0])
        grad_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return grad_gate, grad_up
