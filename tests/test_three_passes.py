"""`edgeft export --engine llama.cpp`: models edgeft has no page for, through the user's own llama.cpp."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import tiny
import tiny_families
from test_families import TOKENS, divergence, file_log_probabilities

from edgeft.cli.main import main

QUANTIZER = """#!{python}
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
import reference

reference.quantize(Path(sys.argv[1]), Path(sys.argv[2]), "gguf-" + sys.argv[3].lower())
"""


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    return tiny_families.build_unknown(tmp_path / "gemma")


@pytest.fixture
def checkout(cache: Path, tmp_path: Path) -> Path:
    """llama.cpp's tree with its real converter; its real quantizer comes out of llama-cpp-python."""
    folder = tmp_path / "llama.cpp"
    (folder / "build" / "bin").mkdir(parents=True)
    for entry in reference.converter_source(cache).iterdir():
        if entry.name != "build":
            (folder / entry.name).symlink_to(entry)
    program = folder / "build" / "bin" / "llama-quantize"
    program.write_text(QUANTIZER.format(python=sys.executable, tests=str(Path(__file__).parent)))
    program.chmod(0o755)
    return folder


def export(model: Path, *arguments: object) -> int:
    return main(["export", str(model), *map(str, arguments)])


def test_without_it_the_message_says_that_there_is_another_way(
    unknown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(unknown, "--out", tmp_path / "x.gguf") == 1
    assert "--engine llama.cpp" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["nothing", "an empty folder", "a checkout that is not built"])
def test_a_missing_tool_is_named(
    given: str, unknown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    if given == "a checkout that is not built":
        (folder / "convert_hf_to_gguf.py").write_text("")
    options = [] if given == "nothing" else ["--llama-cpp", folder]
    out = tmp_path / "out" / "x.gguf"
    assert export(unknown, "--engine", "llama.cpp", *options, "--out", out) == 3
    said = capsys.readouterr().err
    assert {"nothing": "--llama-cpp DIR", "an empty folder": "convert_hf_to_gguf.py"}.get(
        given, "llama-quantize"
    ) in said
    assert not out.parent.exists()


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_base_and_adapter_become_one_file(unknown: Path, checkout: Path, tmp_path: Path) -> None:
    import torch

    model = tiny.write_adapter(unknown, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].log_softmax(-1).numpy()
    adapter = ["--adapter", tmp_path / "adapter", "--engine", "llama.cpp", "--llama-cpp", checkout, "--no-verify"]
    files = {target: tmp_path / "out" / f"{target}.gguf" for target in ("gguf-bf16", "gguf-q8_0")}
    for target, file in files.items():
        assert export(unknown, "--to", target, *adapter, "--out", file) == 0
        assert divergence(expected, file_log_probabilities(file)) < {"gguf-bf16": 1e-3}.get(target, 0.01)
    manifest = json.loads((tmp_path / "out" / "gguf-q8_0.gguf.json").read_text())
    assert manifest["types"]["Q8_0"] > manifest["types"]["F32"] and "three passes" in manifest["notes"][0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        name for file in files.values() for name in (file.name, f"{file.name}.json")
    )
    assert np.isfinite(expected).all()


@pytest.mark.reference
def test_a_pass_that_fails_leaves_nothing(
    unknown: Path, checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "x.gguf"
    (unknown / "tokenizer.model").write_bytes(b"damaged")
    assert export(unknown, "--to", "gguf-q8_0", "--engine", "llama.cpp", "--llama-cpp", checkout, "--out", out) == 1
    assert "llama.cpp failed" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []
