"""`edgeft eval`: what counts as right, and what is measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_verify import write_base

from edgeft.cli.main import main
from edgeft.data.example import Example
from edgeft.data.load import load_split
from edgeft.errors import DataError
from edgeft.evaluate import evaluate_file, json_match, predict
from edgeft.sessions import open_session

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]

ANSWERS = {"kitchen": '{"room":"kitchen","on":true}', "attic": '{"room":"attic","on":false}', "hall": "no"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = (json.dumps({"messages": chat(room, answer)}) for room, answer in ANSWERS.items())
    (folder / "test.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def chat(room: str, answer: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "One JSON call."},
        {"role": "user", "content": f"switch the {room}"},
        {"role": "assistant", "content": answer},
    ]


def script(folder: Path, **answers: str) -> str:
    file = folder / "model.echo.json"
    file.write_text(json.dumps({"script": answers, "default": "?"}))
    return str(file)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_an_answer_is_right_when_it_is_the_reference(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = script(tmp_path, kitchen=f" {ANSWERS['kitchen']}\n", attic='{"on": false, "room": "attic"}', hall="yes")
    result = run_json(capsys, model, "--data", data)
    assert result["exact_match"] == pytest.approx(1 / 3)
    assert result["json_match"] == pytest.approx(1.0)  # of the two references that are JSON
    assert result["examples"] == 3
    assert result["ttft_ms"] >= 0


@pytest.mark.parametrize(
    ("expected", "answer", "verdict"),
    [
        ('{"a": 1, "b": 2}', '{"b":2,"a":1}', True),
        ('{"a": 1}', '{"a": 1.0}', False),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": 1}', 'Sure: {"a": 1}', False),
        ("hello", "hello", None),
        ("null", "null", True),
    ],
)
def test_json_is_compared_by_value(expected: str, answer: str, verdict: bool | None) -> None:
    assert json_match(expected, answer) is verdict


def test_wrong_answers_are_shown_and_all_are_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.jsonl"
    model = script(tmp_path, kitchen=ANSWERS["kitchen"])
    assert main(["eval", model, "--data", str(data), "--out", str(out), "--show", "1"]) == 0
    shown = capsys.readouterr().err
    assert shown.count("answered  ?") == 1
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["exact"] for line in written] == [True, False, False]
    assert written[1]["expected"] == ANSWERS["attic"] and "ttft_ms" in written[1]["usage"]


def test_limit_and_metrics(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = script(tmp_path, kitchen=ANSWERS["kitchen"])
    result = run_json(capsys, model, "--data", data, "--limit", 1, "--metrics", "exact-match")
    assert (result["examples"], result["exact_match"], result["nll"]) == (1, 1.0, None)
    assert "ttft_ms" not in result
    assert main(["eval", model, "--data", str(data), "--metrics", "beauty"]) == 2


def test_exact_match_alone_ends_an_answer_once_it_cannot_match(data: Path, tmp_path: Path) -> None:
    model = script(
        tmp_path, kitchen=f" {ANSWERS['kitchen']}\n", attic='{"room":"cellar"} and so on and so on', hall="yes"
    )
    with open_session(model, "echo").session as session:
        predictions = list(predict(session, load_split(data, "test"), whole=False))
    assert [p.exact for p in predictions] == [True, False, False]
    # Given up at the c of cellar: one more token may be on its way when the switch is thrown.
    assert predictions[1].answer.startswith('{"room":"c') and len(predictions[1].answer) <= len('{"room":"c') + 1


def test_an_answer_without_end_is_cut_at_twice_the_longest_reference(data: Path, tmp_path: Path) -> None:
    model = script(tmp_path, switch="x" * 1000)
    with open_session(model, "echo").session as session:
        examples = [Example(tuple(chat(room, answer))) for room, answer in ANSWERS.items()]
        lengths = {prediction.usage.completion_tokens for prediction in predict(session, examples)}
    assert lengths == {2 * max(map(len, ANSWERS.values())) + 8}


def test_plain_text_has_nothing_to_answer(tmp_path: Path) -> None:
    with open_session(script(tmp_path), "echo").session as session, pytest.raises(DataError, match="conversation"):
        list(predict(session, [Example(text="once upon a time")]))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    write_base(folder / "base")
    assert (
        main(["export", str(folder / "base"), "--to", "gguf-f16", "--out", str(folder / "m.gguf"), "--no-verify"]) == 0
    )
    return folder / "m.gguf"


def test_a_real_file_is_measured(gguf: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, gguf, "--data", data, "--runtime", "xllamacpp")
    assert 0 < result["nll"] < 20
    assert result["decode_tokens_per_s"] > 0
    assert result["bytes"] == gguf.stat().st_size


def test_the_loss_is_that_of_the_torch_model(gguf: Path) -> None:
    from edgeft.plugins import Source
    from edgeft.verify.check import encode_for
    from edgeft.verify.divergence import compare
    from edgeft.verify.torch_reference import load_reference

    examples = [Example(tuple(chat(room, answer))) for room, answer in ANSWERS.items()]
    source = Source(gguf.parent / "base")
    with open_session(str(gguf), "xllamacpp").session as session:
        figures, predictions = evaluate_file(session, gguf, examples, metrics=["nll"])
        encoded = encode_for(source, examples, session.context)
        *_, total = compare(load_reference(source.base, None), session, encoded)
    assert predictions == []
    assert figures["nll"] == pytest.approx(total.nll_reference, abs=1e-3)
