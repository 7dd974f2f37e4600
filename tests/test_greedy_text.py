"""One prompt, five engines, one answer: from unquantized files, every runtime says what transformers says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.chat import Sampling
from edgeft.cli.main import main
from edgeft.plugins import LoadOptions

pytestmark = pytest.mark.model

REQUIRED = os.environ.get("EDGEFT_TEST_REQUIRE", "").split(",")

LENGTH = 16
"""Tokens of every answer that are compared."""

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in one sentence what a compiler does.",
    "Übersetze ins Englische: Guten Morgen, wie geht es dir?",
)
RUNTIMES = {
    "xllamacpp": "gguf-f16",
    "llama-cpp-python": "gguf-f16",
    "onnxruntime-genai": "onnx-fp32",
    "onnxruntime": "onnx-fp32",
}


@dataclass(frozen=True)
class Said:
    prompt: list[int]
    answer: list[int]
    text: str


@pytest.fixture(scope="module")
def transformers_says(smollm2_hf: Path) -> dict[str, Said]:
    """Greedy answers of the Hugging Face directory in float32."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_hf)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_hf, dtype=torch.float32)
    said = {}
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=LENGTH)[0][len(ids) :].tolist()
        if made[-1] == tokenizer.eos_token_id:
            del made[-1]  # runtimes stop before it
        said[prompt] = Said(list(ids), made, tokenizer.decode(made))
    return said


@pytest.fixture(scope="module")
def artifacts(smollm2_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Exported on first use, by target."""
    folder = tmp_path_factory.mktemp("unquantized")

    def exported(target: str) -> Path:
        out = folder / target
        if not out.exists():
            assert main(["export", str(smollm2_hf), "--to", target, "--out", str(out), "--no-verify"]) == 0
        return out

    yield exported


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_says_what_transformers_says(
    runtime: str, artifacts: Any, transformers_says: dict[str, Said]
) -> None:
    found = plugins.load("runtimes", runtime)
    if not found.ready().ok and runtime not in REQUIRED:
        pytest.skip(found.ready().reason)
    with found.load(Artifact(artifacts(RUNTIMES[runtime])), LoadOptions(context=512)) as session:
        for prompt, expected in transformers_says.items():
            ids = session.render([{"role": "user", "content": prompt}])
            assert ids == expected.prompt
            deltas = list(session.generate(ids, Sampling(max_tokens=LENGTH)))
            text = "".join(delta.text for delta in deltas)
            made = [delta.token for delta in deltas if delta.token is not None]
            assert (made, text) == (expected.answer, expected.text), prompt


def test_the_answers_are_long_enough_to_tell(transformers_says: dict[str, Said]) -> None:
    assert sum(len(said.answer) == LENGTH for said in transformers_says.values()) >= 3
    assert len({said.text for said in transformers_says.values()}) == len(PROMPTS)
