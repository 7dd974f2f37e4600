"""`onnxruntime`: the graph alone, with a loop and a cache of edgeft's own."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.chat import TokenIds
from edgeft.errors import ModelError
from edgeft.plugins import LoadOptions

from .cores import physical_cores
from .onnx_session import OnnxRuntime, Shape, first_line, without_telemetry

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
        self._session = self._open(folder / shape.file, options)
        self._cache = self._buffers(folder)

    def _open(self, file: Path, options: LoadOptions) -> Any:
        settings = self._ort.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = options.threads or physical_cores()
        try:
            return self._ort.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes, one per status code
            raise ModelError(
                f"onnxruntime cannot load {file}: {first_line(error)}", "Export the model again."
            ) from error

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


runtime = OnnxRuntime("onnxruntime", "onnxruntime", PlainEngine)
