"""The cascade's benchmark: its questions, its splits, and what it says of answers whose worth is known."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from edgeft.cascade.answers import Case

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import cascade as benchmark
import cascade_questions as questions


def cases(count: int, told: float) -> list[Case]:
    """The device is wrong on half of the questions; the prompt's digits say on which, as far as `told`."""
    choose, found = random.Random(0), []
    for number in range(count):
        hard = choose.random() < 0.5
        logprobs = {name: choose.gauss(-1, 1) for name in benchmark.LOGPROBS.values()}
        features = {"prompt_digits": told * hard + choose.gauss(0, 0.3), **logprobs}
        found.append(Case(str(number), features, (), not hard, choose.random() < 0.95, 0.01))
    return found


@pytest.mark.parametrize("task", questions.TASKS)
def test_no_question_is_in_two_sets_and_more_of_them_leave_the_first(task: str) -> None:
    training, development, reported, more = (
        questions.examples(task, purpose, count)
        for purpose, count in (
            ("training", questions.TRAINING),
            ("development", questions.DEVELOPMENT),
            ("reported", 20),
            ("reported", 40),
        )
    )
    assert more[:20] == reported and questions.examples(task, "training", 30) == training[:30]
    every = [str(one.messages[1]["content"]) for one in training + development + more]
    assert len(set(every)) == questions.TRAINING + questions.DEVELOPMENT + 40


def test_answers_are_right() -> None:
    for one in questions.examples("sort", "reported", 20):
        numbers = str(one.messages[1]["content"]).removeprefix("Sort: ").split()
        assert str(one.messages[2]["content"]).split() == sorted(numbers, key=int)
    assert questions.dates(random.Random(11)) == ("Date: the day before 14/10/18 (UK)", "2018-10-13")
    order, asked = questions.orders(random.Random(9))[0].splitlines()
    assert order.startswith("Vera Moss called: 6 grey pillows, 7 red shelves and 29 green plates for Rosa Haas")
    assert (asked, questions.orders(random.Random(9))[1]) == ("Of what are there most?", "plates")


def test_halves_share_no_question() -> None:
    tuned, test = benchmark.split(cases(41, 1), 3)
    assert sorted(tuned + test) == list(range(41)) and abs(len(tuned) - len(test)) == 1
    assert benchmark.split(cases(41, 1), 4)[0] != tuned


@pytest.mark.parametrize("told", [0.0, 1.0])
def test_the_interval_is_above_zero_only_where_there_is_something_to_learn(
    told: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "SEEDS", range(2))
    found = benchmark.judged(cases(400, told), 100)
    above = found["above"]["confidence"]
    assert found["apgr"]["random"] == pytest.approx(0.5)
    assert found["apgr"]["oracle"] > 0.7 > 0.55 > found["apgr"][found["rivals"]["confidence"]]
    assert above["low"] < above["mean"] < above["high"]
    assert above["low"] > 0.1 if told else above["low"] < 0.03


def test_risks_are_kept_on_average_or_nearly_always_as_promised() -> None:
    found = benchmark.kept(cases(600, 0.4), 40)
    expected, certain = found["risk=0.1"], found["risk=0.1@0.95"]
    assert expected["mean_risk"] < 0.11 and expected["within"] < 0.9
    assert certain["within"] >= 0.85 and certain["mean_deferred"] > expected["mean_deferred"]


def test_too_few_answers_promise_nothing() -> None:
    found = benchmark.kept(cases(160, 1.0), 3)["risk=0.05@0.95"]
    assert found["promised"] == 0 and "cannot be promised" in found["refused"]


def test_a_report_has_a_line_for_every_task_and_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SEEDS", range(2))
    figures = benchmark.report({"easy": cases(200, 1.0), "blind": cases(200, 0.0)}, resplits=3, rounds=20)
    assert figures["tasks_above_confidence"] >= 1
    mean = sum(each["apgr"]["learned"] for each in figures["tasks"].values()) / 2
    assert figures["learned_apgr"] == pytest.approx(mean)
    lines = benchmark.tables(figures).splitlines()
    assert sum(line.startswith("| easy |") for line in lines) == 2 + 9
    assert any("`risk=0.05@0.99`" in line and "refused" in line for line in lines)
