"""`onnxruntime`: the graph alone, with a loop and a cache of edgeft's own."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.chat import TokenIds
from edgeft.errors import ModelError
from edgeft.plugins import LoadOptions

from .cores import physical_cores
from .onnx_session import GROWING, Engine, OnnxRuntime, Shape, first_line, without_telemetry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class PlainEngine:
    """Keys and values lie in buffers as long as the context, which the graph reads and extends in place.

    GroupQueryAttention takes past and present in one buffer and is told by the attention mask how much of it counts
    (onnxruntime docs/ContribOperators.md): nothing is copied per token, and forgetting is a smaller number.
    """

    def __init__(self, folder: Path, shape: Shape, options: LoadOptions) -> None:
        """Raises: ModelError when the graph cannot be loaded."""
        self._ort: Any = without_telemetry("onnxruntime")
        self._shape = shape
        self._length = 0
        self._run = self._ort.RunOptions()
        self._session = open_graph(self._ort, folder / shape.file, options)
        self._cache = self._buffers(folder)

    def _buffers(self, folder: Path) -> dict[str, tuple[str, Any]]:
        """Input name -> output name and the buffer both use."""
        import numpy as np

        shape = (1, self._shape.heads, self._shape.context, self._shape.head)
        past = [value.name for value in self._session.get_inputs() if value.name.startswith("past_key_values.")]
        present = {value.name for value in self._session.get_outputs()}
        pairs = {name: name.replace("past_key_values", "present") for name in past}
        if len(pairs) != 2 * self._shape.layers or not present.issuperset(pairs.values()):
            raise ModelError(f"{folder}: the graph's keys and values are not where edgeft expects them")
        make = self._ort.OrtValue.ortvalue_from_shape_and_type
        return {name: (other, make(shape, np.float32, "cpu", 0)) for name, other in pairs.items()}

    def evaluate(self, tokens: TokenIds, stopped: threading.Event) -> NDArray[np.float32] | None:
        import numpy as np

        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, self._length + len(tokens)), np.int64))
        for name, (other, buffer) in self._cache.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(other, buffer)
        binding.bind_output("logits", "cpu")
        self._run = self._ort.RunOptions()
        if stopped.is_set():
            return None
        try:
            self._session.run_with_iobinding(binding, self._run)
        except Exception as error:  # onnxruntime's own classes, one per status code
            if stopped.is_set():
                return None
            raise ModelError(f"onnxruntime could not evaluate {len(tokens)} tokens: {first_line(error)}") from error
        self._length += len(tokens)
        logits: NDArray[np.float32] = binding.get_outputs()[-1].numpy()[0]
        return logits

    def rewind(self, length: int) -> None:
        self._length = length

    def interrupt(self) -> None:
        self._run.terminate = True

    def close(self) -> None:
        self._cache, self._session = {}, None


class GrowingEngine:
    """Keys and values come back from every call with the new tokens behind the old ones.

    That is what Optimum exports: nothing of onnxruntime's own operators, so any architecture, and a copy of the cache
    per token. They stay onnxruntime's values between calls.
    """

    def __init__(self, folder: Path, shape: Shape, options: LoadOptions) -> None:
        """Raises: ModelError when the graph cannot be loaded."""
        self._ort: Any = without_telemetry("onnxruntime")
        self._run = self._ort.RunOptions()
        self._session = open_graph(self._ort, folder / shape.file, options)
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        past = [name for name in sorted(self._inputs) if name.startswith("past_key_values.")]
        self._pairs = {name: name.replace("past_key_values", "present") for name in past}
        if len(self._pairs) != 2 * shape.layers or not set(self._outputs).issuperset(self._pairs.values()):
            raise ModelError(f"{folder}: the graph's keys and values are not where edgeft expects them")
        self._shape = shape
        self._length = 0
        self._cache = self._empty()

    def _empty(self) -> dict[str, Any]:
        import numpy as np

        make = self._ort.OrtValue.ortvalue_from_numpy
        shape = (1, self._shape.heads, 0, self._shape.head)
        return {name: make(np.zeros(shape, np.float32)) for name in self._pairs}

    def evaluate(self, tokens: TokenIds, stopped: threading.Event) -> NDArray[np.float32] | None:
        import numpy as np

        end = self._length + len(tokens)
        values = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self._length, end, dtype=np.int64)[None],
        }
        make = self._ort.OrtValue.ortvalue_from_numpy
        given = {name: make(value) for name, value in values.items() if name in self._inputs} | self._cache
        self._run = self._ort.RunOptions()
        if stopped.is_set():
            return None
        try:
            found = self._session.run_with_ort_values(self._outputs, given, self._run)
        except Exception as error:  # onnxruntime's own classes, one per status code
            if stopped.is_set():
                return None
            raise ModelError(f"onnxruntime could not evaluate {len(tokens)} tokens: {first_line(error)}") from error
        named = dict(zip(self._outputs, found, strict=True))
        self._cache = {name: named[other] for name, other in self._pairs.items()}
        self._length = end
        logits: NDArray[np.float32] = named["logits"].numpy()[0]
        return logits

    def rewind(self, length: int) -> None:
        if length < self._length:
            make = self._ort.OrtValue.ortvalue_from_numpy
            # A copy, because a view keeps the longer one alive.
            cut = {name: value.numpy()[:, :, :length].copy() for name, value in self._cache.items()}
            self._cache = {name: make(value) for name, value in cut.items()}
            self._length = length

    def interrupt(self) -> None:
        self._run.terminate = True

    def close(self) -> None:
        self._cache, self._session = {}, None


def open_graph(ort: Any, file: Path, options: LoadOptions) -> Any:
    """Raises: ModelError when onnxruntime cannot load the graph."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = options.threads or physical_cores()
    try:
        return ort.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes, one per status code
        raise ModelError(f"onnxruntime cannot load {file}: {first_line(error)}", "Export the model again.") from error


def engine(folder: Path, shape: Shape, options: LoadOptions) -> Engine:
    """The engine for the graph's kind of cache. Raises: ModelError."""
    return (GrowingEngine if shape.kind == GROWING else PlainEngine)(folder, shape, options)


runtime = OnnxRuntime("onnxruntime", "onnxruntime", engine, growing=True)
