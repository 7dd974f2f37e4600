"""Holds a .pte program: {"open": {"file": path, "threads": n}}. Runs in the toolchain `executorch`."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import executorch.extension.llm.custom_ops.custom_ops  # the cache and the attention
import executorch.kernels.quantized  # noqa: F401 - the embedding
import torch
from engine_loop import serve  # type: ignore[import-not-found]
from executorch.extension.pybindings import portable_lib

BATCH = 128
"""Tokens of a prompt per call: between two of them a switch is heard."""


class Program:
    """The program has its keys and values inside; a position that is written again is forgotten."""

    def __init__(self, request: dict[str, Any]) -> None:
        portable_lib._unsafe_reset_threadpool(request["threads"])  # nothing runs yet
        self.module = portable_lib._load_for_executorch(request["file"])
        self.context = int(self.module.run_method("get_max_context_len", [])[0])
        self.vocabulary = int(self.module.run_method("get_vocab_size", [])[0])
        self.batch = BATCH

    def evaluate(self, tokens: list[int], at: int) -> Any:
        (logits,) = self.module.forward((torch.tensor([tokens]), torch.tensor([at])))
        return logits.reshape(-1)[-self.vocabulary :].numpy()

    def fill(self, tokens: list[int], at: int) -> None:
        self.module.forward((torch.tensor([tokens]), torch.tensor([at])))


if __name__ == "__main__":
    serve(Program)
