"""References, splits and digests."""

import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeft.data.example import Example
from edgeft.data.load import (
    DataWarning,
    content_digest,
    dataset_digest,
    load_split,
    resolve_dataset,
    split_of,
)
from edgeft.data.readers import BadLine
from edgeft.errors import DataError


def write(file: Path, count: int, start: int = 0) -> Path:
    lines = [json.dumps({"prompt": f"question {n}", "completion": f"answer {n}"}) for n in range(start, start + count)]
    file.write_text("\n".join(lines) + "\n")
    return file


def question(number: int) -> Example:
    pair = ({"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"})
    return Example(pair)


def test_folder_with_splits_under_other_names(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", 3)
    write(tmp_path / "validation.jsonl", 2)
    assert load_split(tmp_path, "train") == [question(0), question(1), question(2)]
    assert len(load_split(tmp_path, "valid")) == 2
    with pytest.raises(DataError, match="has no test split, only train, valid"):
        load_split(tmp_path, "test")


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "valid.jsonl", 1)
    write(tmp_path / "dev.jsonl", 1)
    with pytest.raises(DataError, match=r"two valid splits: dev.jsonl and valid.jsonl"):
        load_split(tmp_path, "valid")


def test_single_file_is_split_without_rest_or_overlap(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", 400)
    parts = {split: load_split(file, split) for split in ("train", "valid", "test")}
    digests = [content_digest(example) for part in parts.values() for example in part]
    assert len(digests) == len(set(digests)) == 400
    assert 5 <= len(parts["valid"]) <= 40 and 5 <= len(parts["test"]) <= 40


def test_adding_lines_moves_none_of_the_others(tmp_path: Path) -> None:
    before = load_split(write(tmp_path / "a.jsonl", 300), "test")
    after = load_split(write(tmp_path / "a.jsonl", 600), "test")
    assert after[: len(before)] == before and len(after) > len(before)


@given(st.text(min_size=1), st.text(min_size=1), st.text(min_size=1))
def test_answers_to_one_question_never_part(prompt: str, one: str, other: str) -> None:
    user = {"role": "user", "content": prompt}
    examples = [Example((user, {"role": "assistant", "content": answer})) for answer in (one, other)]
    assert split_of(examples[0]) == split_of(examples[1])
    shouted = Example(({"role": "user", "content": f"  {prompt}\n"}, {"role": "assistant", "content": one}))
    assert split_of(shouted) == split_of(examples[0])


def test_bad_lines_are_reported_and_the_rest_is_kept(tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", 2)
    file.write_text(file.read_text() + "{oops\n")
    with pytest.warns(DataWarning, match=r"1 lines left out:\n.*train.jsonl:3: not JSON"):
        assert len(load_split(tmp_path, "train")) == 2
    heard: list[BadLine] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_split(tmp_path, "train", on_bad=heard.append)
    assert [bad.line for bad in heard] == [3]


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{oops\n")
    with pytest.warns(DataWarning), pytest.raises(DataError, match=r"train.jsonl holds no usable example"):
        load_split(tmp_path, "train")
    small = write(tmp_path / "small.jsonl", 2)
    with pytest.raises(DataError, match="has no example for the"):
        load_split(small, "valid"), load_split(small, "test")


def test_wrong_references(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set at nowhere") as error:
        resolve_dataset("nowhere")
    assert error.value.hint is not None and "smart-home" in error.value.hint
    with pytest.raises(DataError, match="holds no train, valid or test file"):
        load_split(tmp_path, "train")
    with pytest.raises(DataError, match="no split named 'dev'"):
        load_split("smart-home", "dev")


def test_preference_pairs_are_not_examples(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    with pytest.raises(DataError, match=r"train.jsonl:1: a preference pair") as error:
        load_split(tmp_path, "train")
    assert error.value.hint is not None and "--preferences chosen" in error.value.hint


def test_digest_is_of_the_data_and_nothing_else(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        write(folder / "train.jsonl", 3)
        (folder / "data.json").write_text(json.dumps({"digest": "lies", "path": str(folder)}))
    assert dataset_digest(one) == dataset_digest(two)
    write(two / "valid.jsonl", 1)
    assert dataset_digest(one) != dataset_digest(two)
