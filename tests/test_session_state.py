"""System prompts' keys and values on disk: the same text sooner, and never another model's.

Texts are compared over five tokens: how a prompt is cut into batches changes the last bits of its log-probabilities,
and a model of random weights has near ties.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from edgeft.runtimes.llama_session import LlamaSession
from edgeft.runtimes.llama_state import StateFolder
from tiny_gguf import write_adapter, write_random

from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.chat import Sampling, Usage
from edgeft.cli.main import main
from edgeft.plugins import AdapterScale, LoadOptions

SYSTEM = "You switch lights, heaters and fans. Answer with one JSON object and nothing else."
Ask = Callable[..., tuple[str, Usage, list[str]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("model") / "random.gguf")


@pytest.fixture(params=["xllamacpp", "llama-cpp-python"])
def ask(request: pytest.FixtureRequest) -> Iterator[Ask]:
    """Start anew, ask one question, end; gives the answer, its cost and the notes."""
    runtime = plugins.load("runtimes", request.param)
    if not (ready := runtime.ready()).ok:
        pytest.skip(f"{ready.reason}: {ready.install}")

    def ask_(
        model: Path,
        state: Path | None,
        question: str = "on?",
        system: str = SYSTEM,
        adapters: Sequence[AdapterScale] = (),
    ) -> tuple[str, Usage, list[str]]:
        options = LoadOptions(context=512, threads=1, threads_batch=1, state=state)
        with runtime.load(Artifact(model), options) as session:
            assert isinstance(session, LlamaSession)
            session.set_adapters(adapters)
            messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
            deltas = list(session.generate(session.render(messages), Sampling(max_tokens=5)))
            usage = deltas[-1].usage
            assert usage is not None
            return "".join(delta.text for delta in deltas), usage, list(session.notes)

    yield ask_


def only(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_the_second_start_computes_only_the_question(ask: Ask, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "states"
    first, before, _ = ask(model, folder)
    second, after, notes = ask(model, folder)
    assert before.reused_tokens == 0
    assert after.reused_tokens > len(SYSTEM)  # the tiny model's tokens are bytes
    assert first == second == ask(model, None)[0]
    assert not notes


def test_another_question_has_the_answer_it_has_without(ask: Ask, model: Path, tmp_path: Path) -> None:
    ask(model, tmp_path / "states")
    text, usage, _ = ask(model, tmp_path / "states", "and the fan in the hall?")
    assert usage.reused_tokens > len(SYSTEM)
    assert text == ask(model, None, "and the fan in the hall?")[0]


def test_no_folder_no_file(ask: Ask, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEFT_HOME", str(tmp_path))
    ask(model, None)
    assert not list(tmp_path.iterdir())


def test_only_the_owner_reads_it(ask: Ask, model: Path, tmp_path: Path) -> None:
    ask(model, tmp_path / "states")
    assert (tmp_path / "states").stat().st_mode & 0o777 == 0o700
    assert only(tmp_path / "states").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "noise"])
def test_a_damaged_state_is_passed_over_and_written_anew(ask: Ask, model: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "states"
    text, _, _ = ask(model, folder)
    file = only(folder)
    whole = file.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    file.write_bytes({"cut": whole[:-7], "flip": flipped, "empty": b"", "noise": b"\xff\x00" * 99}[damage])
    again, usage, notes = ask(model, folder)
    assert again == text
    assert usage.reused_tokens == 0
    assert str(file) in notes[0]
    assert file.read_bytes() == whole


def test_a_state_of_another_model_is_refused(ask: Ask, model: Path, tmp_path: Path) -> None:
    other = write_random(tmp_path / "other.gguf", seed=5)
    ask(other, tmp_path / "other")
    ask(model, tmp_path / "states")
    shutil.copy(only(tmp_path / "other"), only(tmp_path / "states"))
    text, usage, notes = ask(model, tmp_path / "states")
    assert "another model" in notes[0]
    assert usage.reused_tokens == 0
    assert text == ask(model, None)[0]


def test_the_file_of_a_model_that_changed_is_another(ask: Ask, model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy2(model, tmp_path / "model.gguf"))
    ask(copy, tmp_path / "states")
    write_random(copy, seed=5)
    text, usage, _ = ask(copy, tmp_path / "states")
    assert usage.reused_tokens == 0
    assert text == ask(copy, None)[0]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two that change values, so that a state made with one gives another's text away."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = []
    for seed in (1, 2):
        random = np.random.default_rng(seed)
        a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((4, 64), (32, 4)))
        paths.append(write_adapter(folder / f"{seed}.gguf", "blk.0.attn_v.weight", a, b, alpha=8))
    return paths[0], paths[1]


def test_a_state_made_with_an_adapter_is_that_adapters_alone(
    ask: Ask, model: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    one, other = adapters
    worn: list[list[AdapterScale]] = [
        [AdapterScale(one)],
        [],
        [AdapterScale(other)],
        [AdapterScale(one, 0.5)],
        [AdapterScale(one), AdapterScale(other)],
    ]
    texts = []
    for kinds, how in enumerate(worn, start=1):
        text, usage, notes = ask(model, tmp_path / "states", adapters=how)
        assert usage.reused_tokens == 0 and not notes, how
        assert len(list((tmp_path / "states").iterdir())) == kinds
        assert text == ask(model, None, adapters=how)[0]
        texts.append(text)
    assert len(set(texts)) > 1
    for how, text in zip(worn, texts, strict=True):
        again, usage, _ = ask(model, tmp_path / "states", adapters=how)
        assert usage.reused_tokens > len(SYSTEM) and again == text


def test_an_adapter_that_was_trained_on_has_a_state_of_its_own(
    ask: Ask, model: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = Path(shutil.copy(adapters[0], tmp_path / "adapter.gguf"))
    ask(model, tmp_path / "states", adapters=[AdapterScale(adapter)])
    shutil.copy(adapters[1], adapter)
    text, usage, _ = ask(model, tmp_path / "states", adapters=[AdapterScale(adapter)])
    assert usage.reused_tokens == 0
    assert text == ask(model, None, adapters=[AdapterScale(adapters[1])])[0]


def test_a_state_copied_over_another_adapters_is_refused(
    ask: Ask, model: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    ask(model, tmp_path / "worn", adapters=[AdapterScale(adapters[0])])
    ask(model, tmp_path / "bare")
    shutil.copy(only(tmp_path / "worn"), only(tmp_path / "bare"))
    text, usage, notes = ask(model, tmp_path / "bare")
    assert usage.reused_tokens == 0 and "another model" in notes[0]
    assert text == ask(model, None)[0]


def test_another_template_has_a_state_of_its_own(ask: Ask, model: Path, tmp_path: Path) -> None:
    changed = tmp_path / "model.gguf"
    changed.write_bytes(model.read_bytes().replace(b"<|im_start|>assistant\n{%", b"<|im_start|>assistans\n{%"))
    assert changed.read_bytes() != model.read_bytes()
    ask(model, tmp_path / "states")
    assert ask(changed, tmp_path / "states")[1].reused_tokens == 0
    assert len(list((tmp_path / "states").iterdir())) == 2


def test_another_system_prompt_has_a_state_of_its_own(ask: Ask, model: Path, tmp_path: Path) -> None:
    ask(model, tmp_path / "states")
    _, usage, _ = ask(model, tmp_path / "states", system=SYSTEM + " Be brief.")
    assert usage.reused_tokens == 0
    assert len(list((tmp_path / "states").iterdir())) == 2


def test_a_short_system_prompt_is_not_worth_a_file(ask: Ask, model: Path, tmp_path: Path) -> None:
    ask(model, tmp_path / "states", system="")
    assert not (tmp_path / "states").exists()


def test_a_folder_that_cannot_be_written_changes_no_answer(ask: Ask, model: Path, tmp_path: Path) -> None:
    (tmp_path / "states").write_text("a file")
    text, _, notes = ask(model, tmp_path / "states")
    assert text == ask(model, None)[0]
    assert notes


def test_the_oldest_go_when_the_folder_is_full(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, largest=2500)
    for name in ("a", "b"):
        assert not folder.keep({"tokens": name}, name.encode() * 1000)
    assert folder.find({"tokens": "a"}).data == b"a" * 1000  # used now, so `b` is the older one
    assert not folder.keep({"tokens": "c"}, b"c" * 1000)
    assert folder.find({"tokens": "b"}).data is None
    assert folder.find({"tokens": "a"}).data and folder.find({"tokens": "c"}).data
    assert "may hold" in folder.keep({"tokens": "d"}, b"d" * 3000)


def test_the_command_keeps_states_unless_told_not_to(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEFT_HOME", str(tmp_path))
    command = ["run", str(model), "on?", "--system", SYSTEM, "--max-tokens", "4", "--runtime", "xllamacpp"]
    said = []
    for more, files in (["--state", "off"], 0), ([], 1), ([], 1):
        assert main([*command, *more]) == 0
        assert len(list((tmp_path / "states").glob("*"))) == files
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
