"""A run as a user sees it: its files, resuming, interrupting, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny

from edgeft.cli.main import main
from edgeft.errors import ConfigError, DataError, ModelError, UsageError
from edgeft.progress import Silent
from edgeft.run import Run, is_run
from edgeft.train import Interrupted, TrainConfig, read_config, train
from edgeft.train import checkpoint as checkpoints
from edgeft.train.config import write_config

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 40), ("valid", 6), ("test", 6)):
        write_examples(folder / f"{split}.jsonl", count)
    return folder


def write_examples(file: Path, count: int) -> None:
    with file.open("w") as lines:
        for at in range(count):
            turns = [{"role": "user", "content": f"{file.stem} {at}"}, {"role": "assistant", "content": str(at * 7)}]
            lines.write(json.dumps({"messages": turns}) + "\n")


def settings(base: Path, data: Path, out: Path, **others: Any) -> TrainConfig:
    chosen: dict[str, Any] = {"epochs": 2, "rank": 4, "micro_tokens": 192, "batch_tokens": 384, "save_every": 2}
    return TrainConfig(str(base), str(data), out, **{**chosen, **others})


def curve(run: Run) -> list[dict[str, Any]]:
    timings = ("tokens_per_s", "memory_peak_bytes", "elapsed_s", "left_s")
    return [{key: value for key, value in line.items() if key not in timings} for line in run.metrics()]


class InterruptAt(Silent):
    """Presses Ctrl-C after so many steps."""

    def __init__(self, step: int) -> None:
        self._left = step + 1  # the first call tells where a resumed run stands

    def advance(self, amount: float, note: str = "", /) -> None:
        self._left -= 1
        if self._left == 0:
            signal.raise_signal(signal.SIGINT)  # os.kill may reach another thread, some steps later


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_a_run_learns_and_leaves_everything_that_later_stages_need(
    method: str, base: Path, data: Path, tmp_path: Path
) -> None:
    rate = 1e-2 if method == "full" else 5e-2
    outcome = train(settings(base, data, tmp_path / "run", method=method, learning_rate=rate, epochs=6))
    run, manifest = outcome.run, outcome.manifest
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    assert manifest.evaluation["nll_training_graph"] < losses[0]
    assert manifest.evaluation["tokens"] > 0
    assert manifest.data["digest"]
    assert manifest.base["digest"]
    assert manifest.chat_template == tiny.TEMPLATE
    assert (run.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert is_run(run.path)
    if method == "full":
        assert (run.model / "model.safetensors").is_file()
        assert (run.model / "tokenizer.json").is_file()
    else:
        assert run.adapter is not None
        assert json.loads((run.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_the_same_seed_makes_the_same_run(base: Path, data: Path, tmp_path: Path) -> None:
    first = train(settings(base, data, tmp_path / "a", dropout=0.2, epochs=1)).run
    second = train(settings(base, data, tmp_path / "b", dropout=0.2, epochs=1)).run
    other = train(settings(base, data, tmp_path / "c", dropout=0.2, epochs=1, seed=1)).run
    assert curve(first) == curve(second) != curve(other)


def test_an_interrupted_run_continues_the_same_curve(base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(base, data, tmp_path / "whole", dropout=0.2)
    whole = train(config).run
    broken = dataclasses.replace(config, out=tmp_path / "broken")
    with pytest.raises(Interrupted) as stopped:
        train(broken, InterruptAt(3))
    assert stopped.value.command.startswith("edgeft train --resume")
    assert not Run(broken.out).finished
    resumed = train(read_config(broken.out), resume=True).run
    assert curve(resumed) == curve(whole)
    assert weights(resumed) == weights(whole)


def test_a_run_can_end_early_and_keep_what_it_has_learned(base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(base, data, tmp_path / "run", epochs=50)

    class AskAt(Silent):
        def advance(self, amount: float, note: str = "", /) -> None:
            if any(line["step"] == 3 for line in Run(config.out).metrics()):
                Run(config.out).ask_to_finish()

    run = train(config, AskAt()).run
    steps = [line["step"] for line in run.metrics() if "loss" in line]
    assert run.finished and run.adapter is not None and not run.asked_to_finish
    assert steps[-1] in (3, 4) and [line["step"] for line in run.metrics() if "val_loss" in line][-1] == steps[-1]


def test_an_interrupted_run_can_be_kept_as_it_is(base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(base, data, tmp_path / "run", epochs=50)
    with pytest.raises(Interrupted):
        train(config, InterruptAt(3))
    before = curve(Run(config.out))
    assert main(["train", "--resume", str(config.out), "--finish"]) == 0
    assert Run(config.out).finished and curve(Run(config.out)) == before
    assert main(["train", "--finish", "--model", str(base), "--data", str(data)]) == 2


def test_answers_to_held_out_prompts_change_nothing_else(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(settings(base, data, tmp_path / "plain", dropout=0.2, eval_every=3)).run
    asked = train(settings(base, data, tmp_path / "asked", dropout=0.2, eval_every=3, samples=2)).run
    assert weights(plain) == weights(asked)
    assert curve(plain) == curve(asked)
    assert not plain.samples()
    validated = [line["step"] for line in asked.metrics() if "val_loss" in line]
    assert [each["step"] for each in asked.samples()] == validated
    first = asked.samples()[0]["samples"]
    assert len(first) == 2 and "valid 0" in first[0]["prompt"] and first[0]["wanted"].endswith("0")
    assert main(["curves", str(asked.path), str(plain.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["different"] == {"samples": [2, 0]}
    assert told["runs"][0]["curves"]["val_loss"] == told["runs"][1]["curves"]["val_loss"]
    assert main(["curves", str(asked.path), "--samples"]) == 0
    assert "valid 0" in capsys.readouterr().out


def test_a_sample_is_what_the_model_says_by_itself(base: Path, data: Path) -> None:
    """All prompts in one row give what transformers gives for each alone."""
    import torch
    import transformers

    from edgeft.data.example import Encoded
    from edgeft.train import attention
    from edgeft.train.samples import answers, prompts

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    texts = ["one two three four", "the lamp", "0123456789 and more"]
    encoded = [Encoded(ids, [False] * (len(ids) - 2) + [True] * 2) for ids in map(tokenizer.encode, texts)]
    asked = prompts(encoded, 3, 200)
    attention.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation=attention.NAME)
    attention.install(model)
    found = answers(model, asked, set(), None)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    for prompt, answer in zip(asked, found, strict=True):
        tokens = torch.tensor([prompt.tokens])
        alone = plain.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=len(answer),
            eos_token_id=None,
            pad_token_id=0,
        )
        assert alone[0, tokens.shape[1] :].tolist() == answer and len(answer) == len(prompt.wanted) + 8


def weights(run: Run) -> bytes:
    return (run.path / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_damaged_checkpoint_is_passed_over(base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(base, data, tmp_path / "run")
    with pytest.raises(Interrupted):
        train(config, InterruptAt(3))
    newest = checkpoints.steps(config.out / "checkpoints")[-1]
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    (config.out / "checkpoints" / ".step-00000009.tmp").mkdir()
    intact = checkpoints.latest(config.out / "checkpoints")
    assert intact is not None
    assert intact != newest
    resumed = train(config, resume=True).run
    whole = train(dataclasses.replace(config, out=tmp_path / "whole")).run
    assert curve(resumed) == curve(whole)


def test_checkpoints_hold_no_pickle(base: Path, data: Path, tmp_path: Path) -> None:
    run = train(settings(base, data, tmp_path / "run", epochs=1)).run
    files = [file for file in (run.path / "checkpoints").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json"}


def test_a_finished_run_is_returned_as_it_is(base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(base, data, tmp_path / "run", epochs=1)
    before = train(config)
    after = train(config, resume=True)
    assert after.manifest == before.manifest
    assert after.steps == before.steps


def test_training_stops_early_and_keeps_the_best_weights(base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(base, data, tmp_path / "run", learning_rate=2.0, epochs=8, patience=2, eval_every=1)
    outcome = train(config)
    lines = list(outcome.run.metrics())
    validations = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert max(validations) == outcome.manifest.evaluation["best_step"] + 2
    assert outcome.manifest.evaluation["best_val_loss"] == min(validations.values())


def test_a_loss_that_is_not_a_number_stops_with_the_last_good_checkpoint(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(base, data, tmp_path / "run", method="full", learning_rate=1e30, max_grad_norm=1e30, warmup=0.0)
    command = ["train", "--model", str(base), "--data", str(data), "--out", str(config.out), "--method", "full"]
    command += ["--learning-rate", "1e30", "--max-grad-norm", "1e30", "--warmup", "0", "--micro-tokens", "192"]
    assert main(command) == 1
    assert "not finite" in capsys.readouterr().err
    assert not Run(config.out).finished


def test_memory_that_cannot_suffice_is_refused_with_what_to_change(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100_000_000}))
    with pytest.raises(UsageError, match="needs about") as refused:
        train(settings(base, data, tmp_path / "run", method="lora"))
    assert refused.value.hint is not None
    assert "--method qlora" in refused.value.hint
    assert not (tmp_path / "run").exists()


def test_dry_run_writes_nothing(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "--model", str(base), "--data", str(data), "--out", str(out), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] > 0
    assert plan["reasons"]["precision"]
    assert not out.exists()


def test_bad_input_is_named(base: Path, data: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="holds no model"):
        train(settings(empty, data, tmp_path / "run"))
    with pytest.raises(DataError, match="no train, valid or test"):
        train(settings(base, empty, tmp_path / "run"))
    with pytest.raises(DataError, match="longer than 8 tokens"):
        train(settings(base, data, tmp_path / "run", max_length=8))
    with pytest.raises(ConfigError, match="not a training run"):
        read_config(empty)
    with pytest.raises(UsageError, match="exists already"):
        train(settings(base, data, data))


@pytest.mark.parametrize("left", [".config.toml.x1.tmp", "config.toml"])
def test_a_run_killed_before_its_first_step_goes_on(base: Path, data: Path, tmp_path: Path, left: str) -> None:
    config = settings(base, data, tmp_path / "run", epochs=0.5)
    config.out.mkdir()
    if left == "config.toml":
        write_config(config.out / left, config)
    else:
        (config.out / left).touch()
    assert train(config, resume=left == "config.toml").run.finished


def test_a_model_without_a_template_cannot_learn_conversations(data: Path, tmp_path: Path) -> None:
    bare = tiny.write_model(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        train(settings(bare, data, tmp_path / "run"))
