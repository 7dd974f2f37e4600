"""Importance matrices: how strongly each column of a weight is used, in llama.cpp's GGUF format.

The file has two tensors per weight: `NAME.in_sum2`, the sum of squared inputs per column, and `NAME.counts`, over how
many tokens; one row per expert. The quantizers weigh errors by the mean of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeft.errors import ModelError
from edgeft.models.gguf_header import read_header
from edgeft.paths import atomic_write

from .gguf_writer import KeyValue, TensorInfo, ValueType, array, head, padded, string, uint32

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .gguf_types import Shape

    Floats = NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_GRADIENTS, _ROWS = ".out_grad2", ".row_share"
"""edgeft's own, which llama.cpp passes over: mean squared gradient of each output, share of tokens that read a row."""
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_F32 = 0


@dataclass(frozen=True)
class Use:
    """What one weight's input was."""

    sums: Floats
    """Sum of squares, (experts, columns); one expert for a weight that all tokens meet."""
    counts: Floats
    """Tokens, (experts,)."""
    gradients: Floats | None = None
    """Squared gradients of each output per predicted token, (experts, rows)."""

    def mean(self) -> Floats:
        """Mean square, (experts, columns); 1 for an expert that no token met, as llama-quantize has it."""
        counts = self.counts[:, None]
        means: Floats = np.where(counts > 0, self.sums / np.maximum(counts, 1), 1).astype(np.float32)
        return means


def read_importance(file: Path) -> dict[str, Floats]:
    """GGUF name of a weight -> mean squared input, (experts, columns).

    Raises:
        ModelError: the file is no importance matrix, or a value is negative or not finite.
    """
    tensors = _tensors(file)
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    if not names:
        raise ModelError(f"{file} is not an importance matrix", "Write one with edgeft imatrix.")
    found = {}
    for name in names:
        sums, counts = tensors[name + _SUMS], tensors.get(name + _COUNTS)
        if counts is None or len(counts.reshape(-1)) != len(sums := sums.reshape(-1, sums.shape[-1])):
            raise ModelError(f"{file}: {name} has no counts that fit")
        _check_values(file, name, sums)
        _check_values(file, name, counts)
        found[name] = Use(sums, counts.reshape(-1)).mean()
    return found


def write_importance(
    file: Path,
    uses: Mapping[str, Use],
    datasets: Sequence[str],
    chunks: int,
    context: int,
    embedding: tuple[Floats, Floats] | None = None,
) -> None:
    """Atomic.

    Args:
        chunks: texts that were read, of up to `context` tokens.
        embedding: share of tokens that read each row, (vocabulary,), and mean squared gradients, (columns,).

    Raises:
        WriteError: the file cannot be written.
    """
    pairs: list[KeyValue] = [
        string("general.type", "imatrix"),
        array("imatrix.datasets", ValueType.STRING, list(datasets)),
        uint32("imatrix.chunk_count", chunks),
        uint32("imatrix.chunk_size", context),
    ]
    arrays: dict[str, Floats] = {}
    for name, use in sorted(uses.items()):
        arrays[name + _SUMS] = np.ascontiguousarray(use.sums, np.float32)
        arrays[name + _COUNTS] = np.ascontiguousarray(use.counts[:, None], np.float32)
        if use.gradients is not None:
            arrays[name + _GRADIENTS] = np.ascontiguousarray(use.gradients, np.float32)
    if embedding is not None:
        arrays[EMBEDDING + _ROWS], arrays[EMBEDDING + _GRADIENTS] = embedding
    infos = [TensorInfo(name, values.shape, _F32, values.nbytes) for name, values in arrays.items()]
    with atomic_write(file) as stream:
        stream.write(head(pairs, infos))
        for values in arrays.values():
            stream.write(values.tobytes())
            stream.write(bytes(padded(values.nbytes) - values.nbytes))


@dataclass(frozen=True)
class Cost:
    """What a squared error costs, in nats per token: the product of its row's and its column's figure."""

    rows: Floats
    """(experts, rows)."""
    columns: Floats
    """(experts, columns)."""


def read_sensitivities(file: Path) -> dict[str, Cost]:
    """GGUF name of a weight -> what errors in it cost.

    The embedding's are those of reading it; as a head it has others, under the head's name.

    Raises:
        ModelError: the file is no importance matrix, or has no gradients.
    """
    tensors, found = _tensors(file), {}
    for name, columns in read_importance(file).items():
        if (gradients := tensors.get(name + _GRADIENTS)) is not None:
            if gradients.size == 0 or gradients.size % len(columns):
                raise ModelError(f"{file}: {name} has gradients that do not fit")
            found[name] = Cost(gradients.reshape(len(columns), -1), columns)
    if not found or not {EMBEDDING + _ROWS, EMBEDDING + _GRADIENTS} <= tensors.keys():
        raise ModelError(
            f"{file} says how weights are used, not what errors in them cost", "Make it with edgeft imatrix."
        )
    for name, values in tensors.items():
        _check_values(file, name, values)
    found[EMBEDDING] = Cost(tensors[EMBEDDING + _ROWS][None], tensors[EMBEDDING + _GRADIENTS][None])
    return found


def _check_values(file: Path, name: str, values: Floats) -> None:
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ModelError(f"{file}: {name} has values that are negative or not finite")


def _tensors(file: Path) -> dict[str, Floats]:
    """Those of an importance matrix; a model that was given by mistake is not read."""
    header, found = read_header(file), {}
    with file.open("rb") as stream:
        for tensor in header.tensors:
            if tensor.type == "F32" and tensor.name.endswith((_SUMS, _COUNTS, _GRADIENTS, _ROWS)):
                stream.seek(header.data_offset + tensor.offset)
                values = np.frombuffer(stream.read(tensor.bytes), np.float32)
                found[tensor.name] = values.reshape(tensor.shape[::-1])
    return found


def importance_of(known: Mapping[str, Floats], tensor: Shape) -> Floats | None:
    """For one tensor: (columns,), (experts, columns), or None when the matrix does not speak of it.

    Raises:
        ModelError: it is of another model.
    """
    found = known.get(tensor.name)
    if found is None:
        return None
    experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
    if found.shape != (experts, tensor.columns):
        raise ModelError(
            f"the importance matrix has {found.shape} for {tensor.name}, the model {(experts, tensor.columns)}",
            "It was made for another model.",
        )
    return found if experts > 1 else found[0]
