"""Weights of an ONNX graph as numbers: MatMulNBits and GatherBlockQuantized undone in numpy.

Operators: onnxruntime's `docs/ContribOperators.md`, com.microsoft.MatMulNBits and com.microsoft.GatherBlockQuantized.
A weight is (code - zero point) · scale, with one scale and zero point per block of a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import ModelError, UnsupportedModel, require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

EXTRA = "onnx-export"


@dataclass(frozen=True)
class OnnxTensor:
    """A matrix a graph multiplies with or looks rows up in, or another constant that it holds."""

    name: str
    """Without what the quantizer added: `model.layers.0.mlp.up_proj.MatMul.weight`."""
    type: str
    """int4, int8, or the element type of what is not quantized: fp32, fp16."""
    shape: tuple[int, ...]
    """(rows, columns) of a matrix: as transformers has them."""
    bytes: int
    parts: tuple[str, ...]
    """Initializers that hold it."""
    bits: int = 0
    block: int = 0
    transposed: bool = False


class OnnxFile:
    """The graph of a directory; weights are read from its data files when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises: MissingDependency, ModelError."""
        onnx = require("onnx", EXTRA)
        self._numpy = require("onnx.numpy_helper", EXTRA)
        self.folder = folder
        self.file = folder / _graph_name(folder)
        try:
            self._graph = onnx.load(str(self.file), load_external_data=False).graph
        except Exception as error:  # protobuf's own classes
            raise ModelError(f"{self.file} cannot be read: {error}", "Export it again.") from error
        self._stored = {tensor.name: tensor for tensor in self._graph.initializer}
        self.tensors = {tensor.name: tensor for tensor in self._tensors()}

    def _tensors(self) -> Iterator[OnnxTensor]:
        used: set[str] = set()
        for node in self._graph.node:
            if node.op_type == "MatMulNBits":
                tensor = self._quantized(node)
            elif node.op_type == "MatMul" and node.input[1] in self._stored:
                tensor = self._plain(node.input[1], transposed=True)
            elif node.op_type == "GatherBlockQuantized" and node.input[0] in self._stored:
                tensor = self._table(node)
            else:
                continue
            if not used.issuperset(tensor.parts):
                used.update(tensor.parts)
                yield tensor
        for name, stored in self._stored.items():
            if name not in used and len(stored.dims) and self._size(stored) >= 64:
                yield self._plain(name, transposed=False)

    def _quantized(self, node: Any) -> OnnxTensor:
        given = _attributes(node)
        bits, block = int(given.get("bits", 4)), int(given["block_size"])
        return self._blocks(node.input[1:4], (int(given["N"]), int(given["K"])), bits, block)

    def _table(self, node: Any) -> OnnxTensor:
        given = _attributes(node)
        bits, block = int(given.get("bits", 4)), int(given["block_size"])
        rows, width = self._stored[node.input[0]].dims
        parts = (node.input[0], *node.input[2:4])
        return self._blocks(parts, (int(rows), int(width) * 8 // bits), bits, block)

    def _blocks(self, inputs: Any, shape: tuple[int, int], bits: int, block: int) -> OnnxTensor:
        parts = tuple(name for name in inputs if name)
        missing = [name for name in parts if name not in self._stored]
        if missing:
            raise UnsupportedModel(f"{self.file}: {missing[0]} is computed, not stored")
        name = parts[0].removesuffix(f"_Q{bits}")
        size = sum(self._size(self._stored[part]) for part in parts)
        return OnnxTensor(name, f"int{bits}", shape, size, parts, bits, block)

    def _plain(self, name: str, *, transposed: bool) -> OnnxTensor:
        stored = self._stored[name]
        shape = tuple(int(length) for length in stored.dims)
        kind = _TYPES.get(stored.data_type, f"type {stored.data_type}")
        return OnnxTensor(
            name, kind, shape[::-1] if transposed else shape, self._size(stored), (name,), transposed=transposed
        )

    def _size(self, stored: Any) -> int:
        """Bytes of an initializer."""
        where = _external(stored)
        if "length" in where:
            return int(where["length"])
        return len(stored.raw_data) or int(self._numpy.to_array(stored).nbytes)

    def stored_bytes(self, tensor: OnnxTensor) -> bytes:
        """What the files hold of a tensor."""
        return b"".join(self._array(part).tobytes() for part in tensor.parts)

    def values(self, tensor: OnnxTensor) -> Floats:
        """The numbers of a tensor, in its shape. Raises: ModelError."""
        import numpy as np

        arrays = [self._array(part) for part in tensor.parts]
        if not tensor.bits:
            plain = np.asarray(arrays[0], np.float32)
            return np.ascontiguousarray(plain.T) if tensor.transposed else plain
        rows, columns = tensor.shape
        codes = _unpacked(arrays[0].reshape(rows, -1), tensor.bits)
        blocks = codes.shape[1] // tensor.block
        scales = np.asarray(arrays[1], np.float32).reshape(rows, blocks)
        zeros = _zero_points(arrays[2] if len(arrays) > 2 else None, tensor.bits, rows, blocks)
        wide = codes.reshape(rows, blocks, tensor.block).astype(np.float32)
        wide -= zeros[:, :, None]
        wide *= scales[:, :, None]
        return wide.reshape(rows, -1)[:, :columns]

    def packed_rows(self, tensor: OnnxTensor) -> NDArray[np.uint8]:
        """Codes, scales and zero points of a quantized tensor's rows, as `edgeft.models.nbits` packs them."""
        import numpy as np

        rows = tensor.shape[0]
        parts = [np.ascontiguousarray(self._array(part)).view(np.uint8).reshape(rows, -1) for part in tensor.parts]
        return np.concatenate(parts, 1)

    def _array(self, name: str) -> Any:
        import numpy as np

        stored = self._stored[name]
        where = _external(stored)
        if not where:
            return self._numpy.to_array(stored)
        onnx = require("onnx", EXTRA)
        kind = onnx.helper.tensor_dtype_to_np_dtype(stored.data_type)
        file = self.folder / Path(where["location"]).name
        try:
            found = np.memmap(file, kind, "r", int(where.get("offset", 0)), tuple(stored.dims))
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} does not hold {name}: {error}", "Export the model again.") from error
        return np.asarray(found)


_TYPES: Mapping[int, str] = {1: "fp32", 10: "fp16", 16: "bf16", 2: "uint8", 3: "int8", 6: "int32", 7: "int64"}
"""onnx.TensorProto.DataType."""


def _graph_name(folder: Path) -> str:
    config = folder / "genai_config.json"
    try:
        return str(json.loads(config.read_text(encoding="utf-8"))["model"]["decoder"]["filename"])
    except (OSError, ValueError, KeyError, TypeError):
        return "model.onnx"


def _external(stored: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in stored.external_data}


def _attributes(node: Any) -> dict[str, Any]:
    helper = require("onnx.helper", EXTRA)
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes of rows of bytes; of two in a byte, the low half comes first."""
    import numpy as np

    if bits == 8:
        return packed
    if bits != 4:
        raise UnsupportedModel(f"codes of {bits} bits cannot be read")
    codes = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
    return codes


def _zero_points(stored: Any, bits: int, rows: int, blocks: int) -> Floats:
    import numpy as np

    if stored is None:
        return np.full((rows, blocks), 1 << (bits - 1), np.float32)
    if stored.dtype == np.uint8:
        return _unpacked(stored.reshape(rows, -1), bits)[:, :blocks].astype(np.float32)
    # HQQ's are numbers.
    return np.asarray(stored, np.float32).reshape(rows, blocks)
