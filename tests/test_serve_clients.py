"""`llm` and `litellm` against the server. They come in a virtual environment of their own: `make test-clients`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Serving, serving

CLIENTS = os.environ.get("SERVE_CLIENTS", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CLIENTS, reason="SERVE_CLIENTS is no environment with llm and litellm (make test-clients)"),
]

LITELLM = """
import sys
import litellm

how = {"model": "openai/echo", "api_base": sys.argv[1], "api_key": "none"}
messages = [{"role": "user", "content": "hello, 世界"}]
answer = litellm.completion(**how, messages=messages)
assert answer.choices[0].message.content == "hello, 世界" and answer.usage.completion_tokens == 13
stream = litellm.completion(**how, messages=messages, stream=True)
assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "hello, 世界"
more = {"logprobs": True, "top_logprobs": 2, "seed": 3, "stop": ["o"], "max_tokens": 9, "temperature": 0.5}
assert litellm.completion(**how, messages=messages, **more).choices[0].message.content == "hell"
try:
    litellm.completion(**{**how, "model": "openai/none"}, messages=messages)
except litellm.NotFoundError:
    print("done")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("clients"), "echo", "--runtime", "echo") as running:
        yield running


def run(program: str, *arguments: str, **environment: str) -> str:
    command = [str(Path(CLIENTS) / "bin" / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_litellm(server: Serving) -> None:
    assert run("python", "-c", LITELLM, f"{server.url}/v1", LITELLM_LOCAL_MODEL_COST_MAP="True").endswith("done\n")


@pytest.mark.parametrize("more", [[], ["--no-stream"], ["--system", "Be kind."]])
def test_llm(server: Serving, tmp_path: Path, more: list[str]) -> None:
    model = {"model_id": "echo", "model_name": "echo", "api_base": f"{server.url}/v1", "supports_tools": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    said = run("llm", "-m", "echo", "hello, 世界", *more, LLM_USER_PATH=str(tmp_path), OPENAI_API_KEY="none")
    assert said == "hello, 世界\n"
