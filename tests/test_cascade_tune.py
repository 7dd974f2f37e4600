"""Tuning: both sides are asked once, costs are capped beforehand, goals are met or refused with the bound."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from faulty_cloud import FaultyCloud, faulty_cloud

from edgeft.cascade.answers import Case, is_right
from edgeft.cascade.calibration import certain_threshold, conformal_threshold
from edgeft.cascade.metrics import curve, interval, resampled
from edgeft.cascade.settings import PolicySettings, read_settings
from edgeft.cascade.tune import Goal, cross_fitted, fitted, halves, outcome, parse_goal, policy_for, risks, tune
from edgeft.cli._cascade_tune import with_policy
from edgeft.cli.main import main
from edgeft.errors import CheckFailed, UsageError


def cases(count: int, seed: int) -> list[Case]:
    """Answers of which the device gets those right that have no digits; the cloud gets nearly all right."""
    choose = random.Random(seed)
    found = []
    for number in range(count):
        hard = choose.random() < 0.5
        local, cloud = choose.random() < (0.2 if hard else 0.9), choose.random() < 0.95
        features = {"prompt_digits": choose.gauss(1.0 if hard else 0.0, 0.4), "logprob_mean": choose.gauss(-1, 1)}
        found.append(Case(f"{seed}-{number}", features, (), local, cloud, 0.01))
    return found


def columns(found: list[Case]) -> Any:
    import numpy as np

    return [np.array([float(getattr(case, name)) for case in found]) for name in ("local_right", "cloud_right", "cost")]


def test_learning_beats_confidence_where_confidence_says_nothing() -> None:
    import numpy as np

    settings = PolicySettings()
    found = tune(cases(600, 0), settings, "learned", Goal("quality", 0.95), "x")
    unseen = cases(600, 1)
    local, cloud, cost = columns(unseen)
    rows = {
        "learned": np.array(risks(policy_for(settings, "learned", found), unseen)),
        "confidence": np.array([-case.features["logprob_mean"] for case in unseen]),
    }
    again = resampled(rows, local, cloud, cost, rounds=200)
    low, _ = interval([one - other for one, other in zip(again["learned"], again["confidence"], strict=True)])
    assert low > 0.1
    reached = outcome(rows["learned"].tolist(), unseen, found.threshold)
    assert reached["quality"] > 0.9 * reached["cloud_quality"] and reached["deferred"] < 0.9


def test_the_curve_of_chance_is_a_line_and_the_oracles_is_the_best() -> None:
    import numpy as np

    local, cloud, cost = columns(cases(400, 2))
    chance = curve(np.zeros(400), local, cloud, cost)
    oracle = curve(cloud - local, local, cloud, cost)
    assert chance.apgr == pytest.approx(0.5) and oracle.apgr > 0.8
    assert chance.reaching(0.8) == pytest.approx((0.8, 0.008))
    assert oracle.reaching(0.8)[0] < 0.5


def test_a_certified_risk_holds_in_nearly_all_resplits() -> None:
    settings = PolicySettings()
    everyone = cases(3000, 4)
    kept = []
    for round_ in range(60):
        random.Random(round_).shuffle(everyone)
        found = tune(everyone[:600], settings, "learned", Goal("risk", 0.1), "x", str(round_))
        unseen = everyone[600:]
        kept.append(
            outcome(risks(policy_for(settings, "learned", found), unseen), unseen, found.threshold)["kept_wrong"]
        )
    assert sum(kept) / len(kept) <= 0.1


def test_a_threshold_is_chosen_by_risks_that_an_answers_own_outcome_did_not_shape() -> None:
    found = cases(200, 5)
    before = cross_fitted(found, "s")
    for place in range(3):
        other = dataclasses.replace(found[place], local_right=not found[place].local_right, cloud_right=True)
        changed = cross_fitted([*found[:place], other, *found[place + 1 :]], "s")
        assert changed[place] == before[place] and changed != before


def test_what_a_goal_leaves_free_is_all_used() -> None:
    found, settings = cases(300, 6), PolicySettings()
    everyone, half = fitted(found), fitted(halves(found)[0])
    assert tune(found, settings, "learned", Goal("quality", 0.95), "x").weights == everyone["weights"]
    assert tune(found, settings, "learned", Goal("risk", 0.1), "x").weights == half["weights"]
    assert tune(found, settings, "quantile", Goal("risk", 0.3), "x").measured["examples"] == 300


def test_a_certain_risk_holds_for_nearly_every_calibration_set_and_an_expected_one_on_average() -> None:
    """Risks are uniform and a third of answers is a loss at any risk, so that the true risk at t is t / 3."""
    expected, certain = [], []
    for round_ in range(400):
        choose = random.Random(round_)
        risk = [choose.random() for _ in range(150)]
        loss = [choose.random() < 1 / 3 for _ in risk]
        expected.append(conformal_threshold(risk, loss, 0.1) / 3)
        certain.append(certain_threshold(risk, loss, 0.1, 0.95) / 3)
    assert 0.09 < sum(expected) / 400 <= 0.1 and sum(one > 0.1 for one in expected) > 100
    assert sum(one > 0.1 for one in certain) <= 0.05 * 400 + 9  # two standard deviations of 400 draws
    assert sum(certain) / 400 > 0.05


def test_a_certain_risk_needs_answers_enough() -> None:
    # 0.95^58 = 0.051, 0.95^59 = 0.0485
    assert certain_threshold([0.1] * 59, [False] * 59, 0.05, 0.95) == 0.1
    with pytest.raises(CheckFailed, match=r"0\.05 cannot .* certainty of 0\.95 by 58 .* bound is 0\.0503") as refused:
        certain_threshold([0.1] * 58, [False] * 58, 0.05, 0.95)
    assert "at least 59" in str(refused.value.hint)


@pytest.mark.parametrize(("losses", "answers"), [(1, 93), (2, 124), (3, 153)])
def test_so_many_losses_are_allowed_among_so_many_answers(losses: int, answers: int) -> None:
    """The smallest sample sizes for a certainty of 95 % that at most 5 % are losses; 59 without any: the test above."""
    risk = [float(place) for place in range(answers)]
    loss = [place >= answers - losses for place in range(answers)]
    assert certain_threshold(risk, loss, 0.05, 0.95) == answers - 1
    assert certain_threshold(risk[1:], loss[1:], 0.05, 0.95) == answers - 2


@pytest.mark.parametrize("text", ["risk=0.05", "risk=0.05@0.95", "quality=0.9", "cost=0"])
def test_goals_are_read_as_they_are_written(text: str) -> None:
    assert str(parse_goal(text)) == text


@pytest.mark.parametrize("text", ["risk=0.05@1", "risk=0.05@", "risk=@0.9", "quality=0.9@0.9", "cost=1@0.5", "risk=1"])
def test_what_is_no_goal_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no goal"):
        parse_goal(text)


@pytest.mark.parametrize(
    ("expected", "answer", "judge", "right"),
    [
        ("Paris", " Paris\n", "auto", True),
        ('{"a": 1, "b": true}', '{"b":true,"a":1}', "auto", True),
        ('{"a": 1}', '{"a": true}', "auto", False),
        ('{"a": 1, "b": 2}', '{"b":2,"a":1}', "exact", False),
        ("Paris", "It is paris.", "contains", True),
    ],
)
def test_what_is_right(expected: str, answer: str, judge: str, right: bool) -> None:
    assert is_right(expected, answer, judge) == right


def test_settings_keep_their_comments_when_the_policy_changes() -> None:
    text = '# top\n[policy]\nkind = "quantile"  # why\n# calibration = "c.json"\n[budget]\nday-money = 1.0\n'
    changed = with_policy(text, "learned", "k.json")
    assert changed == '# top\n[policy]\nkind = "learned"  # why\ncalibration = "k.json"\n[budget]\nday-money = 1.0\n'


# --- On the command line -------------------------------------------------------------------


def right_answers(asked: dict[str, Any]) -> list[str]:
    return ["yes" if "?" in asked["messages"][-1]["content"] else "no"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A device that says "no" to everything; the right answer to what has a question mark is "yes"."""
    (tmp_path / "a.echo.json").write_text('{"default": "no"}')
    with (tmp_path / "data.jsonl").open("w") as stream:
        for number in range(300):
            asked, answer = (f"is it {number}?", "yes") if number % 3 else (f"it is {number}", "no")
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return tmp_path


def settings_for(folder: Path, cloud: FaultyCloud) -> str:
    cloud.answer = right_answers
    path = folder / "c.toml"
    path.write_text(
        f'[local]\nmodel = "a.echo.json"\n[[cloud]]\nname = "big"\nurl = "{cloud.url}"\nmodel = "m"\n'
        'price-in = 0.001\nprice-out = 0.002\n[policy]\nkind = "on-error"\n[audit]\nfile = "audit.sqlite"\n'
    )
    return str(path)


def test_tune_then_report_then_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(folder / "data.jsonl")
    with faulty_cloud("good") as cloud:
        path = settings_for(folder, cloud)
        assert main(["cascade", "tune", path, "--data", data, "--max-tokens", "8"]) == 2  # costs money
        assert main(["cascade", "tune", path, "--data", data, "--max-cost", "0.0001"]) == 5
        assert main(["cascade", "tune", path, "--data", data, "--dry-run", "--json"]) == 0
        assert not cloud.wire
        capsys.readouterr()
        tuning = ["cascade", "tune", path, "--data", data, "--max-tokens", "8", "--max-cost", "1", "--json"]
        assert main(tuning) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["quality"] >= 0.95 and found["deferred"] == pytest.approx(2 / 3, abs=0.1)
        asked = len(cloud.wire)
        assert main([*tuning, "--goal", "risk=0.001"]) == 5
        assert len(cloud.wire) == asked  # nothing is paid for twice
        pictures = ["--png", str(folder / "r.png"), "--html", str(folder / "r.html")]
        report = ["cascade", "report", path, "--data", data, "--max-tokens", "8", "--max-cost", "1", *pictures]
        assert main(report) == 0
        assert (folder / "r.png").read_bytes()[1:4] == b"PNG" and "APGR" in (folder / "r.html").read_text()
        assert "% deferred" in capsys.readouterr().out
        assert main(["run", path, "is it new?"]) == 0
        assert capsys.readouterr().out == "yes\n"
        assert main(["run", path, "it is new"]) == 0
        assert capsys.readouterr().out == "no\n"
    (folder / "a.echo.json").write_text('{"default": "no", "delay_ms": 0}')
    assert main(["run", path, "is it new?"]) == 0
    assert "stale" in capsys.readouterr().err


def test_a_cloud_that_goes_away_while_tuning_loses_nothing(folder: Path) -> None:
    data = str(folder / "data.jsonl")
    with faulty_cloud("good") as cloud:
        path = settings_for(folder, cloud)
        cloud.answer = lambda asked: right_answers(asked) if len(cloud.wire) <= 40 else [""]
        tuning = ["cascade", "tune", path, "--data", data, "--max-tokens", "8", "--max-cost", "1"]
        assert main(tuning) == 4
        before = len(cloud.wire)
        kept = (folder / "c.answers.jsonl").read_text().count('"cost"')
        cloud.answer = right_answers
        assert kept == 40 and main(tuning) == 0
        assert len(cloud.wire) - before < 300 - 40
    assert read_settings(Path(path)).policy.kind == "learned"


def test_the_model_is_read_once_however_many_questions_there_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import edgeft.cascade.engine as engine

    real, read = engine.digest_of, []
    monkeypatch.setattr(engine, "digest_of", lambda path: read.append(path) or real(path))
    with faulty_cloud("good") as cloud:
        path = settings_for(folder, cloud)
        data = str(folder / "data.jsonl")
        assert main(["cascade", "tune", path, "--data", data, "--max-tokens", "8", "--max-cost", "1"]) == 0
    assert len(read) == 1


# --- A judge ------------------------------------------------------------------------------


def judged(asked: dict[str, Any]) -> list[str]:
    """Grades by the same rule as `right_answers`: is what is between "Answer:" and the scale right for the question?"""
    text = asked["messages"][-1]["content"]
    question, _, rest = text.partition("\n\nAnswer:\n")
    wanted = "yes" if "?" in question.splitlines()[-1] else "no"
    return ["5" if rest.startswith(wanted) else "Grade: 1"]


@pytest.fixture
def asked_only(folder: Path) -> Path:
    """The questions of `folder` without their answers."""
    with (folder / "asked.jsonl").open("w") as stream:
        for number in range(300):
            turn = {"role": "user", "content": f"is it {number}?" if number % 3 else f"it is {number}"}
            stream.write(json.dumps({"messages": [turn]}) + "\n")
    return folder


def with_judge(folder: Path, cloud: FaultyCloud, judge: FaultyCloud) -> list[str]:
    path = settings_for(folder, cloud)
    table = f'[judge]\nname = "judge"\nurl = "{judge.url}"\nmodel = "j"\nprice-in = 1.0\nprice-out = 2.0\n'
    Path(path).write_text(Path(path).read_text() + table)
    data = str(folder / "asked.jsonl")
    return ["cascade", "tune", path, "--data", data, "--judge", "model", "--max-tokens", "8", "--json"]


def test_a_judge_grades_what_has_no_right_answer(asked_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with faulty_cloud("good") as cloud, faulty_cloud("good") as judge:
        judge.answer = judged
        tuning = with_judge(asked_only, cloud, judge)
        assert main(tuning) == 2  # costs money
        capsys.readouterr()
        assert main([*tuning, "--dry-run"]) == 0
        before = json.loads(capsys.readouterr().out)
        assert main([*tuning, "--max-cost", str(before["cost"] * 0.99)]) == 5 and not judge.wire and not cloud.wire
        capsys.readouterr()
        assert main([*tuning, "--max-cost", str(before["cost"] * 1.01)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["cloud_quality"] == 1.0 and found["local_quality"] == pytest.approx(1 / 3, abs=0.12)
        assert found["quality"] >= 0.95 and found["deferred"] == pytest.approx(2 / 3, abs=0.12)
        requests = len(cloud.wire) + len(judge.wire)
        entries = [json.loads(line) for line in (asked_only / "c.answers.jsonl").read_text().splitlines()]
        assert sum(entry.get("cost", 0) for entry in entries) < before["cost"] and requests <= before["requests"]
        assert len(judge.wire) == len({one["key"] for one in entries if "grade" in one})  # each answer once
        assert main([*tuning, "--dry-run"]) == 0
        assert json.loads(capsys.readouterr().out) == {"requests": 0, "cost": 0}
        assert main([*tuning, "--goal", "quality=0.9", "--policy", "boosted", "--max-cost", "0"]) == 0
        assert len(cloud.wire) + len(judge.wire) == requests  # nothing is paid for twice
    assert read_settings(asked_only / "c.toml").policy.kind == "boosted"


def test_what_the_judge_does_not_grade_is_left_out(asked_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with faulty_cloud("good") as cloud, faulty_cloud("good") as judge:
        judge.answer = lambda asked: judged(asked) if "7" not in asked["messages"][-1]["content"] else ["I cannot say."]
        assert main([*with_judge(asked_only, cloud, judge), "--max-cost", "999"]) == 0
        found = json.loads(capsys.readouterr().out)
    assert found["cloud_quality"] == 1.0 and 160 < found["examples"] < 260  # of 300, without sevens


def test_a_judge_that_goes_away_loses_nothing(asked_only: Path) -> None:
    with faulty_cloud("good") as cloud, faulty_cloud("good") as judge:
        judge.answer = lambda asked: judged(asked) if len(judge.wire) <= 30 else [""]
        tuning = [*with_judge(asked_only, cloud, judge), "--max-cost", "999"]
        assert main(tuning) == 4
        kept = (asked_only / "c.answers.jsonl").read_text().count('"grade"')
        asked, judge.answer = len(cloud.wire), judged
        assert kept == 30 and main(tuning) == 0
        assert len(cloud.wire) - asked < 270 - 14


def test_personal_data_does_not_reach_the_judge(tmp_path: Path) -> None:
    from edgeft.cascade.budget import Budget
    from edgeft.cascade.judge import Grader
    from edgeft.cascade.privacy import Guard

    with faulty_cloud("good") as judge:
        with_judge(tmp_path, judge, judge)
        settings = read_settings(tmp_path / "c.toml")
        judge.answer = lambda asked: ["4"]
        grader = Grader(settings, Budget(settings.budget, tmp_path / "s.sqlite"), Guard(settings.privacy))
        grade, _ = grader.grade([{"role": "user", "content": "mail ann@example.org"}], "to ann@example.org", "")
        grader.close()
    assert grade == 4 and "example.org" not in "".join(judge.wire)


@pytest.mark.parametrize(
    ("said", "grade"), [("4", 4), ("Grade: 2.", 2), ("5/5", 5), ("10", None), ("3.5", None), ("", None), ("good", None)]
)
def test_a_grade_is_one_number(said: str, grade: int | None) -> None:
    from edgeft.cascade.judge import _GRADE

    found = _GRADE.search(said)
    assert (int(found.group()) if found else None) == grade


def test_questions_that_are_none_are_said(tmp_path: Path) -> None:
    from edgeft.cascade.judge import load_questions
    from edgeft.errors import DataError

    for line in ("{}", '{"messages": []}', '{"messages": [{"role": "system", "content": "x"}]}', "nothing"):
        (tmp_path / "q.jsonl").write_text(line + "\n")
        with pytest.raises(DataError, match=r"q\.jsonl:1"):
            load_questions(tmp_path / "q.jsonl", "train")
