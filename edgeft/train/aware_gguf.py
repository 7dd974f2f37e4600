"""Training for a GGUF target: linear layers compute with ggml's values of W + s·B·A.

Every other tensor that the file quantizes (embedding, head, layers without an adapter) does not change in training: it
is rounded in place when rounding begins. The exporter's own plan says which type each tensor gets.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeft import plugins
from edgeft.errors import UnsupportedModel
from edgeft.models.packed import grid_of, write_packed
from edgeft.plugins import ConvertOptions, Source
from edgeft.train import fused
from edgeft.train.aware import Aware
from edgeft.train.config import TrainConfig
from edgeft.train.rounded import Merged, RoundedLinear

_FLOATS = ("F32", "F16", "BF16")

SCALES = "scale_change"
"""Parameter of a layer with an adapter: t in d = d₀ · (1 + t), of its blocks' scales."""


def make(config: TrainConfig, model: Any, base: Path, steps: int) -> Aware:
    """Raises: UnsupportedModel, ModelError."""
    assert config.target is not None
    kinds = tensor_types(base, config.target)
    if config.tune == "scales":
        from edgeft.train.scales import TunedScales

        return TunedScales(config.target, kinds, model)
    aware = RoundedAdapters(config.target, kinds, first_rounded(config.quantize_after, steps))
    if config.tune == "both":
        aware.add_scales(model)
    return aware


def first_rounded(share: float, steps: int) -> int:
    """Steps before rounding begins; at least one step has it."""
    return min(int(share * steps), steps - 1)


def tensor_types(base: Path, target: str) -> dict[str, str]:
    """Hugging Face name -> type in the file, of every quantized tensor.

    Raises:
        UnsupportedModel: the file cuts tensors up, or stacks them.
    """
    gguf = plugins.load("converters", "gguf")
    source = Source(base)
    plan = gguf.plan(source, target, ConvertOptions(Path("never-written.gguf")))
    kinds = {tensor.name: tensor.type for tensor in plan.tensors if tensor.type not in _FLOATS}
    found: dict[str, str] = {}
    with gguf.merged(source) as merged:
        for name, stored in merged.gguf_names.items():
            types_here = {kinds[each] for each in stored if each in kinds}
            if types_here and (len(stored) > 1 or len(merged.shapes[name]) != 2):
                raise UnsupportedModel(
                    f"{base} cannot be trained for {target}: {name} becomes {', '.join(stored)}",
                    "Models whose linear layers are tensors of their own can: Llama, Mistral, Qwen, SmolLM.",
                )
            if types_here:
                found[name] = types_here.pop()
    if len(found) != len(kinds):
        raise UnsupportedModel(f"{base} cannot be trained for {target}: its file stacks tensors (experts)")
    return found


def stored_name(parameter: str) -> str:
    """A parameter's name in the base, whatever PEFT put around it."""
    return parameter.removeprefix("base_model.model.").replace(".base_layer.", ".")


class RoundedAdapters:
    """See `edgeft.train.aware.Aware`."""

    def __init__(self, target: str, kinds: Mapping[str, str], begin: int) -> None:
        """
        Args:
            kinds: Hugging Face name -> type.
            begin: the first step that computes with rounded weights.
        """
        self.target, self._kinds, self._begin = target, kinds, begin
        self._grids = {kind: grid_of(kind) for kind in set(kinds.values())}
        self.layers: dict[str, Merged] = {}
        self._constants: dict[str, Tensor] = {}
        self._packed: dict[str, Tensor] = {}
        self._step = -1
        self.ships = False

    def add_scales(self, model: Any) -> None:
        """Give every layer with an adapter a trained factor per block.

        Raises: UnsupportedModel when a layer's type has more than one scale per block.
        """
        from edgeft.train.scales import check_scaled

        for name, module in model.named_modules():
            if fused.is_plain_adapter(module):
                grid = self._grids[check_scaled(f"{stored_name(name)}.weight", self._kinds)]
                rows, columns = module.get_base_layer().weight.shape
                change = torch.zeros(rows, columns // grid.block, device=module.get_base_layer().weight.device)
                module.register_parameter(SCALES, torch.nn.Parameter(change))

    def install(self, model: Any) -> None:
        """See `edgeft.train.aware.Aware`."""
        for name, module in model.named_modules():
            if fused.is_plain_adapter(module):
                self._install_layer(f"{stored_name(name)}.weight", module)
        for name, parameter in model.named_parameters():
            known = stored_name(name)
            if known in self._kinds and known not in self.layers:
                self._constants[known] = parameter
        together = tuple(self.layers.values())
        for merged in together:
            merged.together = together
        if missing := set(self._kinds) - set(self.layers) - set(self._constants):
            raise UnsupportedModel(f"the model has no parameter {sorted(missing)[0]}, which {self.target} quantizes")

    def _install_layer(self, name: str, module: Any) -> None:
        adapter, layer = module.active_adapters[0], module.get_base_layer()
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        change = getattr(module, SCALES, None)
        merged = Merged(self._grids[self._kinds[name]], layer.weight, a, b, module.scaling[adapter], change)
        exact = module.forward

        def forward(layer_: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
            if not self.ships:
                result: Tensor = exact(x)
                return result
            result = RoundedLinear.apply(x, merged, a, b, change, layer.bias)
            return result

        module.forward = types.MethodType(forward, module)
        self.layers[name] = merged

    def at_step(self, step: int) -> None:
        """See `edgeft.train.aware.Aware`."""
        if step != self._step:
            self.moved()
            self._step = step
        if self.ships or step < self._begin:
            return
        for name, parameter in self._constants.items():
            self._round_constant(name, parameter)
        self.ships = True

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """See `edgeft.train.aware.Aware`."""
        self.ships, before = False, self.ships
        try:
            yield
        finally:
            self.ships = before

    def moved(self) -> None:
        """See `edgeft.train.aware.Aware`."""
        for merged in self.layers.values():
            merged.moved()

    def _round_constant(self, name: str, parameter: Tensor) -> None:
        grid = self._grids[self._kinds[name]]
        exact = parameter.detach().float().contiguous()
        self._packed[name] = grid.pack(exact)
        with torch.no_grad():
            parameter.copy_(grid.unpack(self._packed[name], exact.shape[1]))

    def save(self, folder: Path) -> None:
        """See `edgeft.train.aware.Aware`."""
        packed = {name: merged.pack() for name, merged in self.layers.items()} | self._packed
        write_packed(folder, self.target, {name: (self._kinds[name], packed[name]) for name in self._kinds})
