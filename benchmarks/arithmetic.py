"""How far one GGUF file is from itself: two builds of llama.cpp, one build in two batch sizes, and its graph in torch.

    python benchmarks/arithmetic.py FILE --base MODEL [--pieces 16] [--json]

`edgeft verify` compares a file in llama.cpp with a graph in torch. For weights that are equal in every block, what is
left is arithmetic; this says how much of it a perfect file would show. General text, pieces of at most 256 tokens.
"alone" scores the last 16 tokens of a piece each in a pass of its own length, as other clients would. "8 bits" is the
graph with the inputs of its linear layers rounded as llama.cpp rounds them (ggml-quants.c, quantize_row_q8_0).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quantization_aware import text_pieces

from edgeft.models import resolve
from edgeft.models.text import load_text_side
from edgeft.sessions import open_session
from edgeft.verify.divergence import Divergence
from edgeft.verify.torch_reference import load_reference

TOKENS, ALONE, BLOCK = 256, 16, 32
BUILDS = ("llama-cpp-python", "xllamacpp")
Rows = NDArray[np.float32]


def round_inputs(model: Any, on: dict[str, bool]) -> None:
    """Round what goes into every linear layer to blocks of Q8_0 while `on["8 bits"]`."""
    import torch

    def rounded(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not on["8 bits"]:
            return None
        blocks = inputs[0].reshape(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True) / 127
        codes = torch.round(blocks / torch.where(scale == 0, 1.0, scale))
        return ((codes * scale.half().float()).reshape(inputs[0].shape), *inputs[1:])

    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(rounded)


def compare(file: Path, base: str, pieces: int) -> dict[str, Divergence]:
    """What is compared -> KL and the same next token, the first of the two being the reference."""
    folder = resolve(base, want="hf").path
    text, graph, on = load_text_side(folder), load_reference(folder, None, gguf=file), {"8 bits": False}
    round_inputs(graph._model, on)
    first, second = (open_session(str(file), build).session for build in BUILDS)
    found: dict[str, Divergence] = {}

    def add(name: str, reference: Rows, other: Rows, ids: Sequence[int]) -> None:
        targets = np.asarray(ids[-len(reference) + 1 :] if len(reference) > 1 else [])
        found.setdefault(name, Divergence()).add(reference[: len(targets)], other[: len(targets)], targets)

    with first, second:
        for piece in text_pieces()[:pieces]:
            ids = list(text.tokenize(piece))[:TOKENS]
            one, two = first.score(ids, 0), second.score(ids, 0)
            on["8 bits"] = False
            exact = graph.log_probs(ids, range(len(ids)))
            on["8 bits"] = True
            eight = graph.log_probs(ids, range(len(ids)))
            alone = [first.score(ids[: end + 1], end)[-1] for end in range(len(ids) - ALONE, len(ids))]
            add(f"graph, {BUILDS[0]}", exact, one, ids)
            add(f"graph, {BUILDS[1]}", exact, two, ids)
            add("graph, graph in 8 bits", exact, eight, ids)
            add(f"graph in 8 bits, {BUILDS[0]}", eight, one, ids)
            add(" and ".join(BUILDS), one, two, ids)
            add(f"{BUILDS[0]}, batch and alone", one[-ALONE:], np.stack(alone), ids)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--base", required=True, help="the model whose text side the file has")
    parser.add_argument("--pieces", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = compare(options.file, options.base, options.pieces)
    rows = {name: {"kl": each.kl, "top1": each.top1, "tokens": each.tokens} for name, each in found.items()}
    if options.json:
        print(json.dumps(rows))
        return
    for name, row in rows.items():
        print(f"{name:40} KL {row['kl']:.5f}  same next token {row['top1']:.2%}  {row['tokens']} tokens")


if __name__ == "__main__":
    main()
