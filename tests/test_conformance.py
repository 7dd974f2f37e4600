"""Every runtime of edgeft's own is held to what `edgeft.testing` asks of any."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny_letters import ANSWER, write_letters

from edgeft.artifact import Artifact
from edgeft.cli.main import main
from edgeft.errors import ModelError
from edgeft.plugins import AdapterScale, Session
from edgeft.testing import ASK, RuntimeConformance, Subject, ask

Models = dict[str, Path]


@contextlib.contextmanager
def running(program: Path, model: Path) -> Iterator[str]:
    """The URL of a server that somebody else started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = f"--model {model} --host 127.0.0.1 --port {port} --ctx-size 1024 --threads 1 --threads-batch 1"
    words += " --batch-size 64 --ubatch-size 64 --parallel 1"
    with subprocess.Popen([str(program), *words.split()], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            while not (line := process.stdout.readline()).startswith(b"http"):
                assert line or process.poll() is None
            yield line.decode().strip()
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """One model in every form."""
    folder = tmp_path_factory.mktemp("letters")
    hf = write_letters(folder / "hf")
    tiny.write_adapter(hf, folder / "adapter", target_modules=["q_proj", "v_proj", "o_proj"])
    plain = shutil.copytree(hf, folder / "plain-hf")
    (plain / "chat_template.jinja").unlink()
    found = {"hf": hf, "hf plain": plain, "hf adapter": folder / "adapter"}
    for family, target in (("gguf", "gguf-f16"), ("onnx", "onnx-fp32")):
        for kind, source in (("", hf), (" plain", plain)):
            out = found[family + kind] = folder / f"{family}{kind.strip()}-model"
            assert main(["export", str(source), "--to", target, "--out", str(out), "--no-verify"]) == 0
    found["gguf adapter"] = folder / "adapter.gguf"
    assert (
        main(
            [
                "export",
                str(hf),
                "--adapter",
                str(folder / "adapter"),
                "--to",
                "gguf-lora",
                "--out",
                str(found["gguf adapter"]),
                "--no-verify",
            ]
        )
        == 0
    )
    cut = found["gguf damaged"] = folder / "cut.gguf"
    cut.write_bytes(found["gguf"].read_bytes()[:-1000])
    holed = found["hf damaged"] = shutil.copytree(hf, folder / "cut-hf")
    (holed / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes()[:-1000])
    broken = found["onnx damaged"] = shutil.copytree(found["onnx"], folder / "cut-onnx")
    (broken / "genai_config.json").write_text("{")
    return found


def prompt(models: Models) -> list[int]:
    """By transformers."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(models["hf"])
    return list(tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False))


class OfLetters(RuntimeConformance):
    runtime: str
    form: str

    @pytest.fixture(scope="class")
    def subject(self, models: Models) -> Subject:
        return Subject(
            self.runtime,
            Artifact(models[self.form]),
            prompt=prompt(models),
            answer=ANSWER,
            plain=Artifact(models[self.form + " plain"]),
            damaged=Artifact(models[self.form + " damaged"]),
            adapter=models.get(self.form + " adapter"),
            tolerance=0.002,  # a prompt that lacks one token moves these log-probabilities by 0.005 or more
        )


class TestXllamacpp(OfLetters):
    runtime, form = "xllamacpp", "gguf"


class TestLlamaCppPython(OfLetters):
    runtime, form = "llama-cpp-python", "gguf"


class TestOnnxruntimeGenai(OfLetters):
    runtime, form = "onnxruntime-genai", "onnx"


class TestOnnxruntime(OfLetters):
    runtime, form = "onnxruntime", "onnx"


class TestTransformers(OfLetters):
    runtime, form = "transformers", "hf"


class TestLlamaServer(OfLetters):
    """A child process: llama.cpp's server, from xllamacpp where there is no llama-server."""

    runtime, form = "llama-server", "gguf"

    @pytest.fixture(autouse=True)
    def program(self, llama_server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGEFT_LLAMA_SERVER", str(llama_server))

    def test_prompts_are_the_models_own_token_ids(self, subject: Subject, session: Session) -> None:
        assert session.render(ASK) == subject.prompt
        assert session.detokenize(session.render(ASK)) == "user\nhi\nassistant\n"

    def test_the_process_ends_with_its_session_and_its_key_is_not_on_the_command_line(self, subject: Subject) -> None:
        session = subject.open()
        child: Any = session._process  # type: ignore[attr-defined]
        process, key = child._process, child._key
        assert process.poll() is None and key not in Path(f"/proc/{process.pid}/cmdline").read_text()
        session.close()
        assert process.poll() is not None

    def test_a_running_server_takes_the_same_conversations(self, subject: Subject, llama_server: Path) -> None:
        with running(llama_server, subject.artifact.path) as url:
            session = subject.open(Artifact(Path("letters"), address=url))
            assert ask(session).text == ANSWER[:16]
            with pytest.raises(ModelError, match="not started with"):
                session.set_adapters([AdapterScale(Path("other.gguf"))])
            session.close()
            with subject.open(Artifact(Path("letters"), address=url)) as again:
                assert ask(again).text == ANSWER[:16]


class TestOpenAi(RuntimeConformance):
    """The protocol as a real server speaks it."""

    @pytest.fixture(scope="class")
    def subject(self, models: Models, llama_server: Path) -> Iterator[Subject]:
        with running(llama_server, models["gguf"]) as url:
            yield Subject(
                "openai",
                Artifact(Path("letters"), address=url + "/v1"),
                prompt=prompt(models),
                answer=ANSWER,
                decided=True,  # chat completions cannot switch off the server's own min-p
                damaged=Artifact(Path("nobody"), address="http://127.0.0.1:9/v1"),
            )

    def test_a_schema_is_followed_or_refused(self, subject: Subject, session: Session) -> None:
        """llama.cpp's server ends its process (llama-grammar.cpp) for a schema on this vocabulary; a scripted server
        takes its place in test_runtimes_openai.py."""


class TestEcho(RuntimeConformance):
    @pytest.fixture(scope="class")
    def subject(self, tmp_path_factory: pytest.TempPathFactory) -> Subject:
        folder = tmp_path_factory.mktemp("echo")
        for name, script in {
            "chat": {"default": ANSWER, "script": {"hi": [ANSWER, ANSWER[1:]]}, "prompt_delay_ms": 0.1, "delay_ms": 1},
            "plain": {"chat": False},
        }.items():
            (folder / f"{name}.echo.json").write_text(json.dumps(script))
        (folder / "bad.echo.json").write_text("{")
        return Subject(
            "echo",
            Artifact(folder / "chat.echo.json"),
            prompt=[256, 259, *b"hi", 257, 260],
            answer=ANSWER,
            plain=Artifact(folder / "plain.echo.json"),
            damaged=Artifact(folder / "bad.echo.json"),
        )
