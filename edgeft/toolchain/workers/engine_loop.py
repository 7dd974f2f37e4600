"""The loop of a process that holds a model for a runtime of edgeft's: JSON lines in, JSON lines and logits out.

in   {"open": {...}}                    -> {"context": tokens, "vocabulary": n, "batch": tokens per call}
     {"evaluate": [token], "at": n}     -> {"bytes": n} and as many bytes, the last token's logits in float32
     {"fill": [token], "at": n}         -> {}
A failure is {"error": text}. The process ends with its standard input.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol


class Model(Protocol):
    context: int
    vocabulary: int
    batch: int

    def fill(self, tokens: list[int], at: int) -> None:
        """Add tokens behind the first `at`; never more than `batch` are given."""

    def evaluate(self, tokens: list[int], at: int) -> Any:
        """The same, and the last one's logits as a numpy array."""


def serve(load: Callable[[dict[str, Any]], Model]) -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print

    def send(answer: dict[str, Any], data: bytes = b"") -> None:
        answers.write(json.dumps(answer).encode() + b"\n" + data)
        answers.flush()

    model: Any = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            if "open" in request:
                model = load(request["open"])
                send({"context": model.context, "vocabulary": model.vocabulary, "batch": model.batch})
            elif "evaluate" in request:
                logits = model.evaluate(request["evaluate"], request["at"]).astype("<f4", copy=False).tobytes()
                send({"bytes": len(logits)}, logits)
            else:
                model.fill(request["fill"], request["at"])
                send({})
        except Exception as error:  # the border: whatever a library raises becomes one message
            send({"error": (str(error).strip().splitlines() or [type(error).__name__])[0]})
    answers.close()
    os._exit(0)  # without the libraries' farewells
