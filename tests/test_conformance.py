"""Every runtime of edgeft's own is held to what `edgeft.testing` asks of any."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from tiny_letters import ANSWER, write_letters

from edgeft.artifact import Artifact
from edgeft.cli.main import main
from edgeft.testing import ASK, RuntimeConformance, Subject

Models = dict[str, Path]


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
            answer=ANSWER,
            plain=Artifact(folder / "plain.echo.json"),
            damaged=Artifact(folder / "bad.echo.json"),
        )
