"""`edgeft data check`, `prepare` and `split`: what they find, take out and write."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeft.cli.main import main
from edgeft.data.check import check, require_variety
from edgeft.data.duplicates import near_duplicates
from edgeft.data.load import load_split
from edgeft.data.prepare import SPLIT_ONLY, Options, prepare, write_prepared
from edgeft.errors import DataError

WORDS = "light fan door oven lamp heater window garden kitchen bath north green quick seven paper stone river".split()  # noqa: SIM905


def sentence(seed: int, words: int = 12) -> str:
    dice = random.Random(seed)
    return " ".join(dice.choice(WORDS) for _ in range(words)) + f" {seed}"


def record(seed: int, answer: str | None = None) -> dict[str, str]:
    return {"prompt": sentence(seed), "completion": answer or sentence(seed + 10_000)}


def write(file: Path, records: list[dict[str, str]], extra: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(item) + "\n" for item in records) + extra)
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- Near-duplicates -------------------------------------------------------------------


def test_near_duplicates_point_at_the_kept_one() -> None:
    base = sentence(1, 60)
    texts = [base, sentence(2, 60), base + " yes", base.replace("light", "light", 1), sentence(3, 60)]
    assert near_duplicates(texts) == [None, None, 0, 0, None]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=12), st.sampled_from([0.6, 0.9, 1.0]))
def test_only_real_neighbours_are_called_near(texts: list[str], threshold: float) -> None:
    def shingles(text: str) -> set[bytes]:
        raw = text.encode().ljust(5)
        return {raw[at : at + 5] for at in range(len(raw) - 4)}

    for text, found in zip(texts, near_duplicates(texts, threshold), strict=True):
        if found is not None:
            one, other = shingles(text), shingles(texts[found])
            assert len(one & other) / len(one | other) >= threshold


def test_same_text_is_always_found() -> None:
    texts = [sentence(seed % 50) for seed in range(100)]
    assert near_duplicates(texts)[50:] == list(range(50))


def test_most_pairs_above_the_threshold_are_found() -> None:
    pairs = [(sentence(seed, 80), sentence(seed, 80) + " over") for seed in range(100)]
    found = near_duplicates([text for pair in pairs for text in pair])
    assert sum(place is not None for place in found) >= 97


# --- check -----------------------------------------------------------------------------


def test_check_reports_everything(tmp_path: Path) -> None:
    records = [record(n) for n in range(10)]
    write(
        tmp_path / "train.jsonl",
        [*records, records[0], {**records[1], "completion": records[1]["completion"] + "!"}],
        "{oops\n",
    )
    write(tmp_path / "test.jsonl", [records[3], record(50), record(51)])
    report = check(tmp_path)
    train, test = report.splits
    assert (train.name, test.name) == ("train", "test")
    assert train.examples == 12 and [bad.line for bad in train.bad] == [13]
    assert [str(place) for place in train.exact] == [f"{tmp_path}/train.jsonl:11: the same as line 1"]
    assert [place.line for place in train.near] == [12]
    assert [str(place) for place in report.leaks] == [f"{tmp_path}/test.jsonl:1: also in train, line 4"]
    assert report.problems() == []


def test_check_shows_the_first_examples_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "one", "completion": "1"}\nbroken\n{"prompt": "two", "completion": "2"}\n')
    assert main(["data", "check", str(file), "--preview", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["preview"]["all"]
    assert [[turn["content"] for turn in turns] for turns in found] == [["one", "1"], ["two", "2"]]
    assert main(["data", "check", str(file)]) == 0
    assert "one" not in capsys.readouterr().out


def test_check_names_role_problems(tmp_path: Path) -> None:
    def turns(*roles: str) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]}

    records = [
        turns("user", "assistant"),
        turns("user", "user", "assistant"),
        turns("assistant"),
        turns("user", "system", "assistant"),
        turns("system", "user", "assistant", "assistant"),
    ]
    roles = check(write(tmp_path / "a.jsonl", records)).splits[0].roles
    assert [(place.line, place.what) for place in roles] == [
        (2, "two user turns in a row"),
        (3, "the assistant speaks first"),
        (4, "a system turn after the conversation began"),
        (5, "two assistant turns in a row"),
    ]


def test_check_ends_with_1_on_unusable_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = write(tmp_path / "broken.jsonl", [], "{oops\n")
    code, out, err = run(capsys, "data", "check", broken)
    assert code == 1 and f"{broken}:1: not JSON" in err and f"{broken} holds no usable example" in err
    same = write(tmp_path / "same.jsonl", [record(n, "yes") for n in range(30)])
    code, out, _ = run(capsys, "data", "check", same, "--json")
    assert code == 1 and "same answer" in json.loads(out)["problems"][0]
    code, out, _ = run(
        capsys, "data", "check", write(tmp_path / "good.jsonl", [record(n) for n in range(30)]), "--json"
    )
    report = json.loads(out)
    assert code == 0 and report["usable"] and report["splits"]["all"]["examples"] == 30


def test_empty_file_is_one_line_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").touch()
    code, out, err = run(capsys, "data", "check", tmp_path / "a.jsonl")
    assert code == 1 and not out and f"error: {tmp_path}/a.jsonl is empty" in err and "Traceback" not in err


def test_one_answer_is_refused_by_name() -> None:
    examples = load_split("smart-home", "train")[:1] * 25
    with pytest.raises(DataError, match="all 25 examples of the train split have the same answer"):
        require_variety(examples, "the train split")
    require_variety(examples[:5], "a small test")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Hugging Face directory without weights: a byte-level tokenizer and a template."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *sorted(alphabet)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 300}))
    (folder / "model.safetensors").touch()
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return folder


def test_tokens_are_counted_with_the_models_own_tokenizer(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt": "x" * 400, "completion": "y"}
    stopping = {"instruction": "abc", "output": "de</s>fg"}
    data = write(tmp_path / "a.jsonl", [{"prompt": "abc", "completion": "de"}, record(1), long, stopping])
    code, out, _ = run(capsys, "data", "check", data, "--model", model, "--json")
    tokens = json.loads(out)["splits"]["all"]["tokens"]
    short = len("u:abc") + 1 + len("a:de") + 1
    assert code == 0 and tokens["context"] == 300
    assert tokens["histogram"][0]["from"] == short and sum(b["examples"] for b in tokens["histogram"]) == 3
    assert tokens["too_long"] == [f"{data}:3: needs 407 tokens"]
    assert tokens["control_tokens"] == [f"{data}:4: </s> in the text"]
    assert json.loads(out)["splits"]["all"]["formats"] == {"prompt-completion": 3, "instruction": 1}
    code, out, err = run(capsys, "data", "check", data, "--model", model)
    assert "█" in out and "longer than 300 tokens" in err
    code, _, err = run(capsys, "data", "check", data, "--model", model, "--context", "5")
    assert code == 1 and "no example" in err and "fits into 5 tokens" in err


# --- prepare and split ------------------------------------------------------------------


def test_prepare_writes_canonical_splits_and_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [record(n) for n in range(200)]
    source = write(tmp_path / "a.jsonl", [*records, *records[:7]], "{oops\n")
    out = tmp_path / "out"
    code, text, err = run(capsys, "data", "prepare", source, "--out", out, "--licence", "CC0-1.0", "--json")
    result = json.loads(text)
    assert code == 0 and result["written"] and f"{source}:208: not JSON" in err
    assert sum(result["splits"].values()) == 200 and result["removed"]["duplicate"] == 7
    manifest = json.loads((out / "data.json").read_text())
    assert manifest["digest"] == result["digest"] and manifest["licence"] == "CC0-1.0" and manifest["bad_lines"] == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    examples = [example for split in result["splits"] for example in load_split(out, split)]
    assert sorted(e.messages[0]["content"] for e in examples) == sorted(item["prompt"] for item in records)


def test_prepare_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [record(n) for n in range(80)])
    digests = [write_prepared(prepare(source, Options()), tmp_path / name, Options())["digest"] for name in "bc"]
    assert digests[0] == digests[1]


def test_prepare_of_a_folder_takes_leaks_out_of_train_only(tmp_path: Path) -> None:
    shared = [record(n) for n in range(3)]
    write(tmp_path / "d" / "train.jsonl", [*shared, *(record(n) for n in range(10, 30))])
    write(tmp_path / "d" / "test.jsonl", shared)
    prepared = prepare(tmp_path / "d", Options())
    assert prepared.counts() == {"train": 20, "test": 3} and prepared.removed["leak"] == 3
    assert prepare(tmp_path / "d", Options(leaks=False)).counts() == {"train": 23, "test": 3}


def test_split_removes_nothing_and_fills_every_wanted_split(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [record(1), record(1), record(2), record(3), record(4)])
    prepared = prepare(source, SPLIT_ONLY)
    assert sum(prepared.counts().values()) == 5 and all(prepared.counts().values())
    with pytest.raises(DataError, match=r"split of .* is empty"):
        prepare(write(tmp_path / "b.jsonl", [record(1)]), SPLIT_ONLY)


def test_existing_folder_is_replaced_only_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.jsonl", [record(n) for n in range(50)])
    out = tmp_path / "out"
    assert run(capsys, "data", "split", source, "--out", out)[0] == 0
    code, _, err = run(capsys, "data", "split", source, "--out", out)
    assert code == 2 and f"{out} exists" in err
    assert run(capsys, "data", "split", source, "--out", out, "--force", "--test", "0")[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["data.json", "train.jsonl", "valid.jsonl"]
    (out / "thesis.doc").touch()
    code, _, err = run(capsys, "data", "split", source, "--out", out, "--force")
    assert run(capsys, "data", "split", source, "--out", source, "--force")[0] == 2
    assert code == 2 and "thesis.doc" in err and (out / "thesis.doc").exists()


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.jsonl", [record(n) for n in range(50)])
    code, text, _ = run(capsys, "data", "prepare", source, "--out", tmp_path / "out", "--dry-run")
    assert code == 0 and "not written" in text and not (tmp_path / "out").exists()


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", [record(n) for n in range(50)])
    target = tmp_path / "file"
    target.touch()
    code = main(["data", "prepare", str(source), "--out", str(target / "out")])
    assert code == 1 and sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "file"]


def test_preferences_become_examples_on_request(tmp_path: Path) -> None:
    pairs = [{"prompt": sentence(n), "chosen": sentence(n + 99), "rejected": sentence(n + 999)} for n in range(40)]
    source = write(tmp_path / "a.jsonl", pairs)
    kept = write_prepared(prepare(source, Options()), tmp_path / "b", Options())
    assert kept["format"] == "preference"
    write_prepared(prepare(source, Options(preferences="chosen")), tmp_path / "c", Options())
    assert {e.messages[1]["content"] for e in load_split(tmp_path / "c", "train")} <= {p["chosen"] for p in pairs}
    with pytest.raises(DataError, match="mixes preference pairs"):
        prepare(write(tmp_path / "d.jsonl", [*pairs, *(record(n) for n in range(40))]), Options())


def test_personal_data_is_replaced_and_counted(tmp_path: Path) -> None:
    pytest.importorskip("datafog")
    said = "mail jane.doe@example.com or call (212) 555-0199, set it to 21 degrees at 19:20"
    records = [record(n) for n in range(30)] + [{"prompt": said, "completion": "card 4111 1111 1111 1111"}]
    prepared = prepare(write(tmp_path / "a.jsonl", records), Options(scrub_pii=True))
    assert prepared.scrubbed == {"EMAIL": 1, "PHONE": 1, "CREDIT_CARD": 1}
    texts = [e.item.messages for split in prepared.splits.values() for e in split]  # type: ignore[union-attr]
    changed = next(messages for messages in texts if "[EMAIL]" in messages[0]["content"])
    assert changed[0]["content"] == "mail [EMAIL] or call [PHONE], set it to 21 degrees at 19:20"
    assert changed[1]["content"] == "card [CREDIT_CARD]"


def test_demo_data_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "data", "check", "smart-home", "--json")
    report = json.loads(out)
    assert code == 0 and report["leaks"] == []
    for split in report["splits"].values():
        assert not split["bad_lines"] and not split["duplicates"] and not split["role_problems"]
        assert split["near_duplicates"] <= split["examples"] * 0.05
