"""What goes wrong in practice, through the real commands: one message that names the place, and no traceback."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from edgeft.cli.main import main
from edgeft.errors import ExitCode

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    base = tiny.write_loadable(folder / "base")
    tiny.write_adapter(base, folder / "adapter", target_modules=["q_proj"])
    (folder / "good.jsonl").write_text(lines())
    return folder


@pytest.fixture
def work(intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to damage things in: base, adapter and good.jsonl."""
    folder = tmp_path / "work"
    shutil.copytree(intact, folder)
    monkeypatch.chdir(folder)
    return folder


def lines(answer: str | None = None, count: int = 40) -> str:
    return "".join(json.dumps({"prompt": f"{n}+1?", "completion": answer or str(n + 1)}) + "\n" for n in range(count))


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must fail, and returns what it says on stderr."""

    def run(*command: str, code: int = ExitCode.FAILED) -> str:
        capsys.readouterr()
        assert main(list(command)) == code
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert "error: " in said or "unusable: " in said
        return said

    return run


def train(model: str = "base", data: str = "good.jsonl", method: str = "lora") -> list[str]:
    return ["train", "--model", model, "--data", data, "--out", "run", "--method", method, "--epochs", "1"]


def export(model: str = "base", *more: str) -> list[str]:
    return ["export", model, "--out", "x.gguf", "--no-verify", *more]


# --- Data -----------------------------------------------------------------------------


BROKEN = {
    "broken.jsonl": ('{"prompt": \nxxx\n', "broken.jsonl:1: not JSON"),
    "empty.jsonl": ("", "empty.jsonl is empty"),
    "blank.jsonl": ("\n \n\n", "blank.jsonl"),
    "deep.jsonl": ("[" * 100_000 + "\n", "deep.jsonl:1: not JSON: nested too deeply"),
    "one.jsonl": (lines("yes"), "have the same answer"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("verb", ["check", "train"])
def test_data_that_teaches_nothing(name: str, verb: str, work: Path, refused: Refused) -> None:
    content, reason = BROKEN[name]
    (work / name).write_text(content)
    said = refused(*(train(data=name) if verb == "train" else ["data", "check", name]))
    assert reason in said and name in said
    assert not (work / "run").exists()


def test_a_split_with_one_answer_is_named(work: Path, refused: Refused) -> None:
    (work / "data").mkdir()
    (work / "data" / "train.jsonl").write_text(lines())
    (work / "data" / "test.jsonl").write_text(lines("yes", 30).replace("+1?", "-1?"))
    assert "all 30 examples of data/test.jsonl have the same answer" in refused("data", "check", "data")


def test_one_broken_line_is_reported_and_the_rest_is_used(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "mixed.jsonl").write_text(lines() + '{"prompt": "x", "completion": \n')
    assert main(["data", "check", "mixed.jsonl"]) == 0
    assert "mixed.jsonl:41: not JSON" in capsys.readouterr().err


# --- Models -----------------------------------------------------------------------------


def cut(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])


def without_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()


def unknown(base: Path) -> None:
    change(base, architectures=["FooForCausalLM"], model_type="foo")


def not_finite(base: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")

    changed(base, damage)


def one_missing(base: Path) -> None:
    changed(base, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def no_layers(base: Path) -> None:
    change(base, num_hidden_layers=10**9)


def bad_template(base: Path) -> None:
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content * 10**9 }}{% endfor %}")


def template_of_bytes(base: Path) -> None:
    (base / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")


def change(base: Path, **settings: object) -> None:
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def changed(base: Path, damage: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(base / "model.safetensors")
    damage(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


DAMAGE = {
    cut: "model.safetensors is cut short",
    without_tokenizer: "has no tokenizer",
    unknown: "foo",
    not_finite: "tensor model.layers.1.mlp.up_proj.weight",
    one_missing: "lacks tensor model.layers.1.mlp.up_proj.weight",
    template_of_bytes: "chat_template.jinja cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_model_is_not_exported(damage: Callable[[Path], None], work: Path, refused: Refused) -> None:
    damage(work / "base")
    assert DAMAGE[damage].lower() in refused(*export()).lower()
    assert not list(work.glob("*x.gguf*"))


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_model_is_not_trained(damage: Callable[[Path], None], work: Path, refused: Refused) -> None:
    damage(work / "base")
    assert DAMAGE[damage] in refused(*train())


def test_a_run_is_not_begun_on_a_model_that_cannot_be_loaded(work: Path, refused: Refused) -> None:
    cut(work / "base")
    refused(*train())
    assert not (work / "run").exists()


def test_a_model_of_a_billion_layers_takes_no_memory(work: Path, refused: Refused) -> None:
    no_layers(work / "base")
    assert "1000000000 layers" in refused(*export())
    assert "memory" in refused(*train(), code=ExitCode.USAGE)


def test_a_template_that_would_fill_the_memory_is_not_trained_with(work: Path, refused: Refused) -> None:
    bad_template(work / "base")
    assert "chat template" in refused(*train())


@pytest.mark.parametrize("size", ["'64'", "0", "-1", "null", "1.5", "[64]", "true"])
def test_sizes_that_are_none(size: str, work: Path, refused: Refused) -> None:
    change(work / "base", num_attention_heads=json.loads(size.replace("'", '"')))
    assert "num_attention_heads" in refused(*export())


# --- Adapters ------------------------------------------------------------------------------


def test_an_adapter_of_another_base(work: Path, refused: Refused) -> None:
    tiny.write_loadable(work / "wide", hidden_size=128, head_dim=32)
    said = refused(*export("wide", "--adapter", "adapter"))
    assert "the adapter adapter does not fit" in said and "q_proj" in said


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0},
        {"r": "x"},
        {"lora_alpha": None},
        {"lora_alpha": 1e999},
        {"rank_pattern": [1]},
        {"rank_pattern": {"(": 3}},
        {"rank_pattern": {"(a+)+$": 3}},
        {"rank_pattern": {".*.*.*.*.*x": 3}},
        {"alpha_pattern": {"q_proj": "much"}},
    ],
)
def test_adapter_settings_that_make_no_sense(settings: dict[str, object], work: Path, refused: Refused) -> None:
    file = work / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    assert f"adapter_config.json: {next(iter(settings))}" in refused(*export("base", "--adapter", "adapter"))


# --- Pickles ---------------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a pickle that is opened leaves a trace; torch.load itself fails the test."""

    def load(*arguments: object, **options: object) -> None:
        raise AssertionError(f"torch.load{arguments}")

    monkeypatch.setattr(torch, "load", load)
    return work / "opened"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_a_pickled_model_is_never_opened(name: str, work: Path, mark: Path, refused: Refused) -> None:
    (work / "base" / "model.safetensors").unlink()
    (work / "base" / name).write_bytes(pickle.dumps(Evil(mark)))
    for command in (train(), train(method="qlora"), train(method="full"), export(), export("base", "--to", "onnx-q4")):
        assert f"{name} is a pickle" in refused(*command)
    assert f"{name} is a pickle" in refused("imatrix", "base", "--data", "good.jsonl", "--out", "i.gguf")
    assert not mark.exists()


def test_a_pickled_adapter_is_never_opened(work: Path, mark: Path, refused: Refused) -> None:
    (work / "adapter" / "adapter_model.safetensors").unlink()
    (work / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    for more in ([], ["--to", "gguf-lora"], ["--to", "onnx-q4"]):
        assert "adapter_model.bin is a pickle" in refused(*export("base", "--adapter", "adapter", *more))
    from edgeft.errors import UnsupportedModel
    from edgeft.verify.torch_reference import load_reference

    with pytest.raises(UnsupportedModel, match=r"adapter_model\.bin is a pickle"):
        load_reference(work / "base", work / "adapter")
    assert not mark.exists()


def test_pickles_beside_safetensors_are_left_alone(work: Path, mark: Path) -> None:
    """Trainers leave such files; resuming reads none either."""
    for name in ("training_args.bin", "pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (work / "base" / name).write_bytes(pickle.dumps(Evil(mark)))
    command = [*train(), "--save-every", "1", "--batch-tokens", "256"]
    assert main(command) == 0
    steps = sorted((work / "run" / "checkpoints").glob("step-*"))
    (work / "run" / "manifest.json").unlink()
    for folder in (work / "run", *steps):
        for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
            (folder / name).write_bytes(pickle.dumps(Evil(mark)))
    assert main(["train", "--resume", "run"]) == 0
    assert main(["export", "run", "--out", "x.gguf", "--no-verify"]) == 0
    assert not mark.exists()


def test_a_models_own_code_is_never_run(work: Path, mark: Path, refused: Refused) -> None:
    change(work / "base", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, model_type="evil")
    (work / "base" / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    assert "custom code" in refused(*train())
    assert not mark.exists()


# --- Signals -----------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["train", "imatrix"])
def test_ctrl_c_ends_with_130_and_no_traceback(verb: str, work: Path) -> None:
    """Of export and run: test_export_kill.py and test_run_chat.py."""
    (work / "many.jsonl").write_text(lines(count=6000))
    commands = {
        "train": [*train(data="many.jsonl"), "--epochs", "50", "--batch-tokens", "256"],
        "imatrix": ["imatrix", "base", "--data", "many.jsonl", "--examples", "6000", "--out", "i.gguf"],
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeft", *commands[verb]], cwd=work, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    before = ""
    while "Calibrating" not in before and not (work / "run" / "metrics.jsonl").exists():
        before += (line := process.stderr.readline())
        assert line, before
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED, said
    assert "Traceback" not in said and "interrupted" in said.lower()
    assert not (work / "i.gguf").exists()
