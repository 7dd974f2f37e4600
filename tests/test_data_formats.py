"""Six formats in five kinds of file become one form; what cannot is told with its place."""

import json
from pathlib import Path
from typing import Any

import pytest

from edgeft.cli.data import FORMAT_NAMES
from edgeft.data.example import Example, Preference
from edgeft.data.formats import FORMATS, BadRecord, as_record, detect, parse
from edgeft.data.readers import BadLine, Record, read_records
from edgeft.errors import DataError

QUESTION = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
PLAIN = Example((QUESTION, ANSWER))

SAMPLES: dict[str, list[tuple[dict[str, Any], Any]]] = {
    "messages": [
        ({"messages": [QUESTION, ANSWER]}, PLAIN),
        ({"messages": json.dumps([QUESTION, ANSWER])}, PLAIN),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, ANSWER]}, PLAIN),
    ],
    "prompt-completion": [
        ({"prompt": "2+2?", "completion": "4"}, PLAIN),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, PLAIN),
        ({"prompt": "2+2?", "response": 4}, PLAIN),
    ],
    "instruction": [
        ({"instruction": "2+2?", "input": "", "output": "4"}, PLAIN),
        (
            {"instruction": "Add.", "input": "2+2?", "output": "4"},
            Example(({**QUESTION, "content": "Add.\n\n2+2?"}, ANSWER)),
        ),
        (
            {"instruction": "2+2?", "output": "4", "system": "Count.", "history": [["Hi", "Hello"]]},
            Example(
                (
                    {"role": "system", "content": "Count."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello"},
                    QUESTION,
                    ANSWER,
                )
            ),
        ),
    ],
    "sharegpt": [
        ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, PLAIN),
        ({"conversations": [QUESTION, ANSWER]}, PLAIN),
    ],
    "text": [({"text": "Once."}, Example(text="Once."))],
    "preference": [
        (
            {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
            Preference((QUESTION,), (ANSWER,), ({**ANSWER, "content": "5"},)),
        ),
        (
            {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, {**ANSWER, "content": "5"}]},
            Preference((QUESTION,), (ANSWER,), ({**ANSWER, "content": "5"},)),
        ),
    ],
}
CASES = [(name, record, expected) for name, samples in SAMPLES.items() for record, expected in samples]


def test_command_line_knows_every_format() -> None:
    assert FORMAT_NAMES == FORMATS
    assert set(SAMPLES) == set(FORMATS)


@pytest.mark.parametrize(("name", "record", "expected"), CASES)
def test_formats_are_detected_and_read(name: str, record: dict[str, Any], expected: Any) -> None:
    assert detect(record) == name
    assert parse(record) == parse(record, name) == expected  # type: ignore[arg-type]
    assert parse(json.loads(json.dumps(as_record(expected)))) == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1], "expected an object, found a list"),
        ({"a": 1, "b": 2}, "no known format has these keys: a, b"),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": "hello"}, "must be a list of turns, not text"),
        ({"messages": [QUESTION]}, "ends with a user turn"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "turn 1 of messages has the role 'robot'"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " "}]}, "turn 2 of messages is empty"),
        ({"messages": [QUESTION, {"role": "assistant"}]}, "must be text, not null"),
        ({"messages": [QUESTION, {"role": "assistant", "content": [{"type": "image"}]}]}, "must be text, not a list"),
        ({"prompt": "a\0b", "completion": "c"}, "NUL"),
        ({"prompt": "\ud800", "completion": "c"}, "half of a surrogate pair"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": "b", "rejected": "c"}, "no common turn"),
        ({"instruction": "a", "output": None}, "no known format"),
    ],
)
def test_bad_records_say_why(record: Any, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason.replace("[", r"\[")):
        parse(record)


def test_tool_calls_and_tools_are_kept() -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    example = parse({"messages": [QUESTION, call], "tools": [{"type": "function"}]})
    assert isinstance(example, Example)
    assert example.messages[1]["tool_calls"] == call["tool_calls"] and example.tools == ({"type": "function"},)
    assert parse(as_record(example)) == example


# --- Files ------------------------------------------------------------------------------


def read(file: Path) -> tuple[list[tuple[int, Any]], list[tuple[int, str]]]:
    items = list(read_records(file))
    good = [(item.line, item.item) for item in items if isinstance(item, Record)]
    return good, [(item.line, item.reason) for item in items if isinstance(item, BadLine)]


def test_jsonl_keeps_good_lines_and_places_bad_ones(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    good = json.dumps({"prompt": "2+2?", "completion": "4"}).encode()
    file.write_bytes(b"\n".join([good, b"{broken", b"", b"caf\xe9", b'{"text": "a\0"}', b"[1]", b"[" * 200_000, good]))
    examples, bad = read(file)
    assert examples == [(1, PLAIN), (8, PLAIN)]
    assert [line for line, _ in bad] == [2, 4, 5, 6, 7]
    assert "column 2" in bad[0][1] and "not UTF-8 at byte 4" in bad[1][1] and "NUL byte at column 12" in bad[2][1]
    assert str(next(item for item in read_records(file) if isinstance(item, BadLine))).startswith(f"{file}:2: not JSON")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_byte_order_marks_are_understood(tmp_path: Path, suffix: str, encoding: str) -> None:
    record = {"prompt": "Größe?", "completion": "4 €"}
    separator = {".csv": ",", ".tsv": "\t"}.get(suffix, "")
    text = {".jsonl": json.dumps(record, ensure_ascii=False), ".json": json.dumps([record], ensure_ascii=False)}.get(
        suffix, f"prompt{separator}completion\nGröße?{separator}4 €\n"
    )
    (tmp_path / f"a{suffix}").write_text(text, encoding=encoding)
    (example,), bad = read(tmp_path / f"a{suffix}")
    assert example[1].messages[0]["content"] == "Größe?" and not bad


def test_json_list_reports_lines_and_keeps_what_came_before_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[\n {"text": "one"},\n {"text": ""},\n {"text": "two"},\n {"text": oops}\n]')
    examples, bad = read(file)
    assert examples == [(2, Example(text="one")), (4, Example(text="two"))]
    assert [line for line, _ in bad] == [3, 5] and "the rest cannot be read" in bad[1][1]


def test_json_object_around_the_list(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"data": [{"text": "one"}]}))
    assert read(file) == ([(1, Example(text="one"))], [])


def test_csv_lines_count_newlines_in_quotes(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('prompt,completion\n"two\nlines",yes\nshort\n"x",' + "y" * 200_000 + "\n")
    examples, bad = read(file)
    assert [line for line, _ in examples] == [2, 5] and examples[0][1].messages[0]["content"] == "two\nlines"
    assert bad == [(4, "1 fields, but the header has 2")]


def test_parquet_rows(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION]}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    examples, bad = read(tmp_path / "a.parquet")
    assert examples == [(1, PLAIN)] and bad[0][0] == 2
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"b\.parquet: not a readable Parquet file"):
        read(tmp_path / "b.parquet")


def test_text_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    assert read(tmp_path / "a.txt") == ([(1, Example(text="one\ntwo")), (5, Example(text="three"))], [])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.xml", b"<a/>", "unknown kind of file"),
        ("a.json", b'{"x": 1}', "holds no list of records"),
        ("a.json", b"[{\n\xff", r"a.json:2: not UTF-8"),
        ("a.csv", b"text\na\0b\n", r"a.csv:2: NUL character"),
        ("a.csv", b"text,text\na,b\n", "two columns have the same name"),
    ],
)
def test_unreadable_files_are_one_clear_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)
