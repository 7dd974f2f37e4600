"""`onnxruntime-genai`: onnxruntime with a cache of its own."""

from __future__ import annotations

import json
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

_AT_ONCE = 128
"""Tokens between two looks at the switch: a running batch is not interrupted."""


class GenaiEngine:
    """A generator that is only given tokens: what comes next is chosen by the session."""

    def __init__(self, folder: Path, shape: Shape, options: LoadOptions) -> None:
        """Raises: ModelError when the graph cannot be loaded."""
        genai: Any = without_telemetry("onnxruntime_genai")
        self._length = 0
        threads = {"intra_op_num_threads": options.threads or physical_cores(), "log_severity_level": 3}
        try:
            config = genai.Config(str(folder))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
            self._model = genai.Model(config)
            parameters = genai.GeneratorParams(self._model)
            parameters.set_search_options(max_length=shape.context, do_sample=False)
            self._generator = genai.Generator(self._model, parameters)
        except Exception as error:  # bare RuntimeError for whatever is wrong
            raise ModelError(
                f"onnxruntime-genai cannot load {folder}: {first_line(error)}", "Export the model again."
            ) from error

    def evaluate(self, tokens: TokenIds, stopped: threading.Event) -> NDArray[np.float32] | None:
        import numpy as np

        before, parts = self._length, []
        for at in range(0, len(tokens), _AT_ONCE):
            if stopped.is_set():
                self.rewind(before)
                return None
            part = tokens[at : at + _AT_ONCE]
            try:
                self._generator.append_tokens(np.array([part], np.int32))
                parts.append(self._generator.get_output("logits")[0])
            except RuntimeError as error:
                raise ModelError(
                    f"onnxruntime-genai could not evaluate {len(part)} tokens: {first_line(error)}"
                ) from error
            self._length += len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def rewind(self, length: int) -> None:
        if length < self._length:
            self._generator.rewind_to(length)
            self._length = length

    def interrupt(self) -> None:
        """Only between batches: a generator whose run was ended is not usable again."""

    def close(self) -> None:
        self._generator = self._model = None


runtime = OnnxRuntime("onnxruntime-genai", "onnxruntime_genai", GenaiEngine)
