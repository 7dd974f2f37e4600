"""How much each weight matters on the user's text: squared inputs of every layer, and gradients of its outputs.

The model's weights are there one layer at a time: transformers' gradient checkpointing calls every layer a second time
for its backward pass, and each call reads the layer's merged weights anew. Models that fit easily are kept.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeft.data.example import Encoded
from edgeft.errors import UnsupportedModel, require
from edgeft.expert_importance import is_experts, watched
from edgeft.plugins import Source
from edgeft.progress import Progress, Silent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_LOGITS = 1 << 26
"""Logits per pass: 256 MB in float32; at most 2048 tokens."""
_KEEP_BYTES = 2 << 30
"""Weights of models up to this size stay in memory between passes."""


@dataclass
class Statistics:
    """Sums over the tokens that one linear layer met, or each of its experts; a plain layer counts as one expert."""

    inputs: Any
    """Squared inputs, (experts, columns)."""
    gradients: Any
    """Squared gradients of the outputs, (experts, rows)."""
    tokens: Any
    """(experts,)."""


@dataclass(frozen=True)
class Importance:
    """What calibration found."""

    layers: Mapping[str, Statistics]
    """GGUF name of the weight -> sums, as numpy arrays."""
    embedding_rows: Floats
    """How often each token was read, (vocabulary,)."""
    embedding_gradients: Floats
    """Squared gradients of the embedding's output, summed, (columns,)."""
    learned: int
    """Tokens whose prediction counts."""
    texts: int


def measure(
    source: Source,
    weights: Any,
    encoded: Sequence[Encoded],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Importance:
    """One forward and one backward pass over calibration texts.

    The gradients are of the log-probability of a next token drawn from the model's own prediction, at every learned
    position: their squares are the Fisher information, the curvature of the KL divergence that an export adds.

    Args:
        weights: the converter's view of base and adapter merged (`edgeft.converters.merged.Merged`).

    Raises:
        MissingDependency: torch, transformers or accelerate is not installed.
        UnsupportedModel: transformers builds the model otherwise than its weights are named.
    """
    progress = progress or Silent()
    torch = require("torch", "train")
    model = _empty_model(source)
    found = _Collector(model, weights)
    generator = torch.Generator().manual_seed(seed)
    progress.start("Calibrating", sum(len(one.tokens) for one in encoded), "tokens")
    try:
        with found.hooks():
            for batch in batches(encoded, found.vocabulary):
                found.add(batch, generator)
                progress.advance(sum(len(one.tokens) for one in batch))
    finally:
        progress.finish()
    return found.result(len(encoded))


def batches(encoded: Sequence[Encoded], vocabulary: int) -> Iterator[list[Encoded]]:
    """Texts of similar length together, as many as their logits allow."""
    most = min(2048, max(1, _LOGITS // vocabulary))
    batch: list[Encoded] = []
    for one in sorted(encoded, key=lambda one: len(one.tokens)):
        if batch and len(one.tokens) * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _empty_model(source: Source) -> Any:
    transformers, accelerate = require("transformers", "train"), require("accelerate", "train")
    torch = require("torch", "train")
    from edgeft.train.hardware import cpu_bfloat16

    dtype = torch.bfloat16 if cpu_bfloat16()[0] else torch.float32
    config = transformers.AutoConfig.from_pretrained(source.base)
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    model.train()  # only then transformers recomputes layers
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return model


class _Collector:
    """Fills a model with weights as its layers are called, and listens to them."""

    def __init__(self, model: Any, weights: Any) -> None:
        torch = require("torch", "train")
        self._model, self._weights = model, weights
        self._names = weights.gguf_names
        self._stacked = weights.stacked
        self._embedding = model.get_input_embeddings()
        self.vocabulary, width = (int(size) for size in weights.shapes["model.embed_tokens.weight"])
        self._rows = torch.zeros(self.vocabulary, dtype=torch.float64)
        self._columns = torch.zeros(width, dtype=torch.float64)
        self._layers: dict[str, Statistics] = {}
        self._learned = 0
        self._mask: Any = None
        layers = list(model.model.layers)
        inside = {id(module) for layer in layers for module in layer.modules()}
        self._keep = 4 * sum(parameter.numel() for parameter in model.parameters()) < _KEEP_BYTES
        self._layer_names = {f"model.layers.{at}": layer for at, layer in enumerate(layers)}
        for name, module in model.named_modules():
            if id(module) not in inside:
                self._fill(name, module, own=True)

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        torch = require("torch", "train")
        handles = contextlib.ExitStack()
        for name, layer in self._layer_names.items():
            # Not by hooks: the second call, for the backward pass, goes past them.
            layer._gradient_checkpointing_func = functools.partial(self._checkpoint, name, layer)
        for name, module in self._model.named_modules():
            if isinstance(module, torch.nn.Linear):
                handles.callback(module.register_forward_hook(self._listen(f"{name}.weight")).remove)
            elif is_experts(module):
                handles.enter_context(watched(module, functools.partial(self._seen, name)))
        with handles:
            yield

    def _checkpoint(self, name: str, layer: Any, forward: Callable[..., Any], *args: Any) -> Any:
        def call(*inner: Any) -> Any:
            self._fill(name, layer)
            try:
                return forward(*inner)
            finally:
                if not self._keep:
                    _empty(layer)

        return require("torch.utils.checkpoint", "train").checkpoint(call, *args, use_reentrant=True)

    def _fill(self, name: str, module: Any, *, own: bool = False) -> None:
        """Give a module its weights, and its parts theirs unless `own`."""
        torch = require("torch", "train")
        for path, part in [("", module)] if own else module.named_modules():
            for key, parameter in part._parameters.items():
                if parameter is None or not parameter.is_meta:
                    continue
                full = ".".join(filter(None, (name, path, key)))
                if full in self._stacked:
                    part._parameters[key] = self._experts(full, parameter)
                    continue
                if full not in self._names and module is self._model.get_output_embeddings():
                    part._parameters[key] = self._embedding.weight
                    continue
                if full not in self._names:
                    raise UnsupportedModel(f"{full} is not among the model's weights", "Export without calibration.")
                values = torch.from_numpy(self._weights.read(full)).to(parameter.dtype)
                part._parameters[key] = torch.nn.Parameter(values, requires_grad=False)

    def _experts(self, name: str, parameter: Any) -> Any:
        """All experts of a layer, of which one at a time is there in float32."""
        torch = require("torch", "train")
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        for at, expert in enumerate(self._weights.experts(name)):
            values[at] = torch.from_numpy(expert)
        return torch.nn.Parameter(values, requires_grad=False)

    def _listen(self, name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if output.requires_grad:
                known = self._known(name, 1, args[0].shape[-1], output.shape[-1])
                self._count(known, 0, self._mask, args[0], output)

        return hook

    def _seen(self, module: str, parameter: str, expert: int, tokens: Any, inputs: Any, outputs: Any) -> None:
        """A product with one expert; it is called without gradients too, in the first of two passes."""
        if outputs.requires_grad:
            name = f"{module}.{parameter}"
            known = self._known(name, self._experts_of(name), inputs.shape[-1], outputs.shape[-1])
            self._count(known, expert, self._mask.reshape(-1)[tokens], inputs, outputs)

    def _experts_of(self, name: str) -> int:
        return int(self._model.get_parameter(name).shape[0])

    def _known(self, name: str, experts: int, columns: int, rows: int) -> Statistics:
        torch = require("torch", "train")
        if name not in self._layers:
            self._layers[name] = Statistics(
                torch.zeros(experts, columns, dtype=torch.float64),
                torch.zeros(experts, rows, dtype=torch.float64),
                torch.zeros(experts, dtype=torch.int64),
            )
        return self._layers[name]

    def _count(self, known: Statistics, expert: int, mask: Any, inputs: Any, outputs: Any) -> None:
        known.inputs[expert] += _squares(inputs.detach()[mask])
        known.tokens[expert] += int(mask.sum())
        outputs.register_hook(functools.partial(_add_squares, known.gradients[expert], mask))

    def add(self, batch: Sequence[Encoded], generator: Any) -> None:
        torch = require("torch", "train")
        longest = max(len(one.tokens) for one in batch)
        tokens = torch.zeros(len(batch), longest, dtype=torch.long)
        mask, learned = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
        for row, one in enumerate(batch):
            tokens[row, : len(one.tokens)] = torch.tensor(one.tokens)
            mask[row, : len(one.tokens)] = True
            # Position t predicts token t + 1.
            learned[row, : len(one.tokens) - 1] = torch.tensor(one.learned[1:], dtype=torch.bool)
        self._mask = mask
        embedded = self._embedding(tokens).detach().requires_grad_()
        output = self._model(inputs_embeds=embedded, attention_mask=mask.long(), use_cache=False)
        logits = output.logits[learned]
        likely = torch.softmax(logits.detach().float(), -1)
        drawn = torch.multinomial(likely, 1, generator=generator)
        # The gradient of the drawn token's log-probability, written down: a large vocabulary is passed over less often.
        logits.backward(likely.neg_().scatter_add_(1, drawn, torch.ones_like(likely[:, :1])).to(logits.dtype))
        self._rows.index_add_(0, tokens[mask], torch.ones(int(mask.sum()), dtype=torch.float64))
        self._columns += _squares(embedded.grad[mask])
        self._learned += int(learned.sum())

    def result(self, texts: int) -> Importance:
        layers = {}
        for name, found in self._layers.items():
            cut = self._stacked.get(name) or self._names.get(name, ("output.weight",))
            parts = found.gradients.float().numpy().reshape(len(found.tokens), len(cut), -1)
            for at, gguf in enumerate(cut):
                layers[gguf] = Statistics(found.inputs.float().numpy(), parts[:, at], found.tokens.numpy())
        return Importance(layers, self._rows.float().numpy(), self._columns.float().numpy(), self._learned, texts)


def _add_squares(total: Any, mask: Any, gradient: Any) -> None:
    total += _squares(gradient[mask])


def _squares(values: Any) -> Any:
    """(tokens, width) -> sums of squares, (width,), float64."""
    return values.float().square().sum(0).double()


def _empty(module: Any) -> None:
    torch = require("torch", "train")
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[key] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
