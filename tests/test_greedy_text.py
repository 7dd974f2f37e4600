"""One prompt, every engine, one answer: from unquantized files, all runtimes say what transformers says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serving import serving
from test_mobile import need

from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.chat import Sampling
from edgeft.cli.main import main
from edgeft.plugins import LoadOptions, Support, capabilities

pytestmark = pytest.mark.model

REQUIRED = os.environ.get("EDGEFT_TEST_REQUIRE", "").split(",")

LENGTH = 16
"""Tokens of every answer that are compared."""

SUFFIXES = {"litert-fp32": ".litertlm"}

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
    "transformers": "hf",
    "llama-server": "gguf-f16",
}
ON_PHONES = {"litert": "litert-fp32", "litert-lm": "litert-fp32", "executorch": "executorch-fp32"}
"""Their toolchains are of several GB, and their exports take minutes."""


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
        out = smollm2_hf if target == "hf" else folder / (target + SUFFIXES.get(target, ""))
        if not out.exists():
            unverified = [] if target in ON_PHONES.values() else ["--no-verify"]
            assert main(["export", str(smollm2_hf), "--to", target, "--out", str(out), *unverified]) == 0
        return out

    yield exported


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_says_what_transformers_says(
    runtime: str,
    artifacts: Any,
    transformers_says: dict[str, Said],
    llama_server: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EDGEFT_LLAMA_SERVER", str(llama_server))
    says_the_same(runtime, lambda: Artifact(artifacts(RUNTIMES[runtime])), transformers_says)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ON_PHONES)
def test_engines_of_phones_say_what_transformers_says(
    runtime: str,
    artifacts: Any,
    transformers_says: dict[str, Said],
    toolchain_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = ON_PHONES[runtime]
    need(target.partition("-")[0], toolchain_home)
    monkeypatch.setenv("EDGEFT_HOME", str(toolchain_home))
    says_the_same(runtime, lambda: Artifact(artifacts(target)), transformers_says)


def test_an_endpoint_says_what_transformers_says(
    artifacts: Any, transformers_says: dict[str, Said], tmp_path: Path
) -> None:
    """The protocol twice: edgeft's server and edgeft's client."""
    with serving(tmp_path, str(artifacts("gguf-f16")), "--context", "512", "--no-log") as server:
        endpoint = Artifact(Path("gguf-f16"), address=f"{server.url}/v1")
        says_the_same("openai", lambda: endpoint, transformers_says)


def says_the_same(runtime: str, artifact: Callable[[], Artifact], expected: dict[str, Said]) -> None:
    found = plugins.load("runtimes", runtime)
    ready = found.ready() if hasattr(found, "ready") else Support(True)
    if not ready.ok and runtime not in REQUIRED:
        pytest.skip(f"{ready.reason}: {ready.install}")
    counted = "tokens" in capabilities(found)
    with found.load(artifact(), LoadOptions(context=512)) as session:
        for prompt, said in expected.items():
            ids = session.render([{"role": "user", "content": prompt}])
            deltas = list(session.generate(ids, Sampling(max_tokens=LENGTH)))
            assert "".join(delta.text for delta in deltas) == said.text, prompt
            assert deltas[-1].usage is not None and deltas[-1].usage.prompt_tokens == len(said.prompt)
            if counted:
                assert ids == said.prompt
                assert [delta.token for delta in deltas if delta.token is not None] == said.answer, prompt


def test_the_answers_are_long_enough_to_tell(transformers_says: dict[str, Said]) -> None:
    assert sum(len(said.answer) == LENGTH for said in transformers_says.values()) >= 3
    assert len({said.text for said in transformers_says.values()}) == len(PROMPTS)
