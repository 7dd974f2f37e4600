"""The demo's data set: reproducible, held out in truth, and every answer follows from its command."""

import json
import re
from pathlib import Path

import pytest

from edgeft.data.load import BUILT_IN, SPLITS, dataset_digest, load_split, resolve_dataset
from edgeft.data.smart_home import generate
from edgeft.data.smart_home.vocabulary import COLOURS, COMMON_ROOMS, HELD_OUT, ROOMS, TEMPLATES

KEYS = ["device", "action", "value", "room", "time"]
COMMANDS = {split: list(generate.commands(split)) for split in SPLITS}


def calls(split: str) -> list[generate.Call]:
    return [command.call for command in COMMANDS[split] if command.call.action != "unsupported"]


def test_generator_writes_the_shipped_files(tmp_path: Path) -> None:
    generate.write(tmp_path)
    shipped = resolve_dataset("smart-home")
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl", "data.json"):
        assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes(), f"{name}: run the generator again"


def test_manifest_states_the_digest_of_the_files() -> None:
    manifest = json.loads((resolve_dataset("smart-home") / "data.json").read_text())
    assert manifest["digest"] == dataset_digest("smart-home")
    assert manifest["licence"] == "Apache-2.0"
    assert {split: entry["examples"] for split, entry in manifest["splits"].items()} == generate.SIZES


@pytest.mark.parametrize("split", SPLITS)
def test_every_example_is_system_user_and_one_compact_call(split: str) -> None:
    for example in load_split("smart-home", split):
        system, user, assistant = example.messages
        assert [m["role"] for m in example.messages] == ["system", "user", "assistant"]
        assert system["content"] == generate.SYSTEM and user["content"].strip()
        call = json.loads(assistant["content"])
        assert list(call) == KEYS
        assert json.dumps(call, separators=(",", ":")) == assistant["content"]


@pytest.mark.parametrize("held_out", ["valid", "test"])
@pytest.mark.parametrize("other", ["train", "valid", "test"])
def test_held_out_splits_share_nothing_with_others(held_out: str, other: str) -> None:
    if held_out == other:
        return
    mine, theirs = COMMANDS[held_out], COMMANDS[other]
    assert not {c.text.lower() for c in mine} & {c.text.lower() for c in theirs}
    assert not {c.template for c in mine} & {c.template for c in theirs}
    assert not set(calls(held_out)) & set(calls(other)), "an answer was already given in another split"
    numbers = {c.value for c in calls(held_out) if c.value} & {c.value for c in calls(other) if c.value}
    assert not numbers
    assert not clock_times(held_out) & clock_times(other)
    pairs = {(c.device, c.room) for c in calls(held_out) if c.room not in (None, "all")}
    assert not pairs & {(c.device, c.room) for c in calls(other)}


def clock_times(split: str) -> set[str]:
    return {c.time for c in calls(split) if c.time and re.search(r"\d", c.time) and c.time not in ("12:00", "00:00")}


def test_pools_are_disjoint() -> None:
    for kind, groups in HELD_OUT.items():
        pools = [set(generate.numbers(kind, split)) for split in SPLITS]
        assert sum(map(len, pools)) == len(set.union(*pools)), kind
        assert set(groups["test"]) <= set(generate.RANGES[kind])
    for name, templates in TEMPLATES.items():
        assert sum(len(set(templates[split])) for split in SPLITS) == len(set().union(*templates.values())), name
    for dealt in (COLOURS, ROOMS, {"common": COMMON_ROOMS, **ROOMS}):
        assert sum(map(len, dealt.values())) == len(set().union(*dealt.values()))


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_the_text(split: str) -> None:
    for command in COMMANDS[split]:
        text, call = command.text.lower(), command.call
        if call.room not in (None, "all"):
            assert call.room in text
        if call.value and (number := re.match(r"\d+", call.value)):
            words = [generate.number_words(int(number[0]), joint) for joint in " -" if int(number[0]) <= 100]
            assert any(form in text for form in (number[0], *words)), command
        if call.time and ":" in call.time:
            assert 0 <= int(call.time[:2]) < 24 and 0 <= int(call.time[3:]) < 60


def test_every_hour_and_every_action_is_taught() -> None:
    hours = {c.time[:2] for c in calls("train") if c.time and ":" in c.time}
    assert hours == {f"{hour:02}" for hour in range(24)}
    for split in ("valid", "test"):
        assert {(c.device, c.action) for c in calls(split)} <= {(c.device, c.action) for c in calls("train")}


def test_text_means_one_thing() -> None:
    meanings: dict[str, str] = {}
    for command in (c for split in SPLITS for c in COMMANDS[split]):
        assert meanings.setdefault(command.text.lower().strip("."), command.call.json()) == command.call.json()


def test_built_in_names_resolve() -> None:
    assert all(resolve_dataset(name).is_dir() for name in BUILT_IN)
