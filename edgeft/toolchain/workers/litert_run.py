"""Holds the graph of a .litertlm file: {"open": {"file": path, "begin": byte, "end": byte, "threads": n}}."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from ai_edge_litert import compiled_model as litert
from engine_loop import serve  # type: ignore[import-not-found]

UNSEEN = np.float32(-0.7 * np.finfo(np.float32).max)
"""What LiteRT-LM writes into the mask where a token may not look: far from the end, so that a sum stays finite."""

WORTH = 16
"""Tokens from which on a whole prompt call is cheaper than calls of one token each."""


class Graph:
    """Keys and values lie in two sets of buffers, which the graph reads and writes by turns."""

    def __init__(self, request: dict[str, Any]) -> None:
        with open(request["file"], "rb") as stream:
            stream.seek(request["begin"])
            data = stream.read(request["end"] - request["begin"])
        options = litert.Options(
            hardware_accelerators=litert.HardwareAccelerator.CPU,
            cpu_options=litert.CpuOptions(num_threads=request["threads"]),
        )
        self.model = litert.CompiledModel.from_buffer(data, options=options)
        self.decode = Call(self.model, "decode", 1)
        names = self.model.get_signature_list()
        sizes = [int(name[8:]) for name in names if name.startswith("prefill_") and name[8:].isdigit()]
        self.prefill = Call(self.model, f"prefill_{max(sizes)}", max(sizes)) if sizes else None
        self.context, self.vocabulary = self.decode.context, self.decode.vocabulary
        self.batch = max(sizes, default=32)
        self.cache = self.buffers(), self.buffers()

    def buffers(self) -> dict[str, Any]:
        """One set of keys and values, empty: what is not seen must be a number all the same."""
        details = self.model.get_input_tensor_details("decode")
        found = {}
        for name in self.model.get_signature_list()["decode"]["inputs"]:
            if name.startswith("kv_cache_"):
                found[name] = self.model.create_input_buffer_by_name("decode", name)
                found[name].write(np.zeros(details[name]["shape"], np.float32))
        return found

    def evaluate(self, tokens: list[int], at: int) -> Any:
        self.fill(tokens[:-1], at)
        self.run(self.decode, tokens[-1:], at + len(tokens) - 1)
        return self.decode.logits.read(self.vocabulary, np.float32)

    def fill(self, tokens: list[int], at: int) -> None:
        # A prompt call writes all its places: where they would reach beyond the end, the graph moves them.
        if self.prefill and len(tokens) >= min(WORTH, self.batch) and at + self.batch <= self.context:
            self.run(self.prefill, tokens, at)
            return
        for place, token in enumerate(tokens, at):
            self.run(self.decode, [token], place)

    def run(self, call: "Call", tokens: list[int], at: int) -> None:
        call.run(tokens, at, *self.cache)
        self.cache = self.cache[::-1]


class Call:
    """A signature of the graph, for `size` tokens at once, and the buffers of its inputs."""

    def __init__(self, model: Any, name: str, size: int) -> None:
        self.model, self.name, self.size = model, name, size
        parts = ("tokens", "input_pos", "mask")
        self.inputs = {part: model.create_input_buffer_by_name(name, part) for part in parts}
        self.context = int(model.get_input_tensor_details(name)["mask"]["shape"][-1])
        outputs = model.get_output_tensor_details(name)
        self.vocabulary = int(outputs["logits"]["shape"][-1]) if "logits" in outputs else 0
        self.logits: Any = model.create_output_buffer_by_name(name, "logits") if self.vocabulary else None

    def run(self, tokens: list[int], at: int, now: dict[str, Any], then: dict[str, Any]) -> None:
        padded = np.zeros((1, self.size), np.int32)
        padded[0, : len(tokens)] = tokens
        places = np.arange(at, at + self.size, dtype=np.int32)
        seen = np.arange(self.context)[None, :] <= places[:, None]
        self.inputs["tokens"].write(padded)
        self.inputs["input_pos"].write(places)
        self.inputs["mask"].write(np.where(seen, np.float32(0), UNSEEN)[None, None])
        outputs = {**then, "logits": self.logits} if self.logits is not None else then
        self.model.run_by_name(self.name, {**self.inputs, **now}, outputs)


if __name__ == "__main__":
    serve(Graph)
