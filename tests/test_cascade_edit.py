"""Single values of `cascade.toml` change and nothing else does; the commands that show what settings do."""

from __future__ import annotations

import io
import json
import random
import tomllib
from pathlib import Path

import pytest
from test_cascade_tune import cases

from edgeft.cascade.calibration import read_calibration
from edgeft.cascade.edit import edited, keys, read_value, said
from edgeft.cascade.settings import PolicySettings, parse_settings, read_settings
from edgeft.cascade.tune import Goal, at_threshold, cross_fitted, outcome, tune
from edgeft.cli.main import main
from edgeft.errors import ConfigError, UsageError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cascade.toml"
    assert main(["cascade", "init", str(path), "--model", "a.echo.json"]) == 0
    return path


def test_one_value_changes_and_every_comment_stays(file: Path) -> None:
    before = file.read_text()
    assert main(["cascade", "set", str(file), "policy.threshold=0.5", "cloud.1.retries=7"]) == 0
    after = file.read_text()
    changed = [(a, b) for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
    assert [b for _, b in changed] == [
        "retries = 7",
        "threshold = 0.5              # the cloud is asked when the policy's risk is above this",
    ]
    settings = read_settings(file)
    assert settings.policy.threshold == 0.5 and settings.cloud[0].retries == 7


def test_any_value_of_any_key_is_written_as_it_is_read(file: Path) -> None:
    """Whatever is typed comes back from the file, in whatever order values change."""
    choose = random.Random(0)
    text = file.read_text()
    values = {"float": 0.25, "int": 3, "bool": False, "str": 'a "#" b', "tuple[str, ...]": ("a#b", '"c\\\\d"')}
    for key in choose.sample(keys(read_settings(file)), len(keys(read_settings(file)))):
        value = {
            "policy.kind": "margin",
            "policy.mid-stream": "stop",
            "cloud.1.url": "http://127.0.0.1:9/v1",
            "policy.judge-tokens": 4,
            "cache.near": 0.0,  # anything above needs an embedder
        }.get(key.name, values[key.kind])
        assert read_value(key.name, said(value)) == value
        text = edited(text, {key.name: value}, file)
        table, _, name = key.name.rpartition(".")
        found = tomllib.loads(text)[table.split(".")[0]]
        found = (found[0] if isinstance(found, list) else found)[name]
        assert (tuple(found) if isinstance(found, list) else found) == value
    assert text.count("# a") == file.read_text().count("# a") and "# in a row, after which" in text


@pytest.mark.parametrize(
    ("text", "changes", "result"),
    [
        ("[local]\nmodel='m'", {"budget.day-money": 1.0}, "[local]\nmodel='m'\n\n[budget]\nday-money = 1.0\n"),
        (
            "[local]\nmodel='m' # which\n[privacy]\ntopics = [\n  'a', # one\n  'b',\n] # two\nredact = false\n",
            {"privacy.topics": ("c",), "local.model": "n"},
            '[local]\nmodel = "n" # which\n[privacy]\ntopics = ["c"] # two\nredact = false\n',
        ),
    ],
)
def test_files_written_by_hand(text: str, changes: dict[str, object], result: str) -> None:
    assert edited(text, changes, Path("c.toml")) == result


def test_what_cannot_be_is_refused_and_the_file_stays(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file.read_text()
    assert main(["cascade", "set", str(file), "policy.kind=guess"]) == 2
    assert "policy.kind must be one of" in capsys.readouterr().err
    for change in (
        "policy.quantile=much",
        "policy.quantil=1",
        "cloud.0.retries=1",
        "cloud.2.retries=1",
        "policy",
        "privacy.redact=maybe",
    ):
        assert main(["cascade", "set", str(file), change]) == 2
    assert file.read_text() == before
    with pytest.raises(ConfigError, match="written in a way"):
        edited('local = {model = "m"}\n', {"local.model": "n"}, file)
    with pytest.raises(UsageError, match="no key"):
        read_value("cloud.x.retries", "1")


def test_the_threshold_moves_along_the_curve_that_was_measured(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, answers = PolicySettings(), cases(180, 0)  # the curve keeps at most 200 points
    found = tune(answers, settings, "learned", Goal("quality", 0.95), "x")
    risk = cross_fitted(answers)
    for threshold in (found.curve[0][0], 0.2, found.threshold, found.curve[-1][0]):
        wanted = outcome(risk, answers, threshold)
        _, deferred, quality, cost = at_threshold(found, threshold)
        assert (deferred, quality, cost) == pytest.approx((wanted["deferred"], wanted["quality"], wanted["cost"]))

    found.write(file.with_name("c.json"))
    changes = {"policy.kind": "learned", "policy.calibration": "c.json"}
    file.write_text(edited(file.read_text(), changes, file))
    assert main(["cascade", "threshold", str(file), "--to", "0.2", "--dry-run"]) == 0
    assert read_calibration(file.with_name("c.json")) == found
    capsys.readouterr()
    assert main(["cascade", "threshold", str(file), "--to", "0.2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    again = read_calibration(file.with_name("c.json"))
    assert again.threshold == shown["threshold"] == 0.2 and again.curve == found.curve
    assert again.measured["quality"] == shown["quality"] == pytest.approx(outcome(risk, answers, 0.2)["quality"])
    assert main(["cascade", "threshold", str(file)]) == 0


def test_what_would_leave_the_device(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datafog")
    file.write_text(edited(file.read_text(), {"privacy.topics": ("salary",)}, file))
    monkeypatch.setattr("sys.stdin", io.StringIO("write to ada@example.org\n"))
    assert main(["cascade", "privacy", str(file)]) == 0
    assert capsys.readouterr().out == "write to [EMAIL_1]\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("my salary"))
    assert main(["cascade", "privacy", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pinned"] == "topic 'salary'"


def test_what_was_spent(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgeft.cascade.budget import Budget

    file.write_text(edited(file.read_text(), {"audit.file": "audit.sqlite"}, file))
    settings = parse_settings(file.read_text(), file)
    capsys.readouterr()
    assert main(["cascade", "budget", str(file), "--json"]) == 0
    assert not settings.spending_file.exists()
    budget = Budget(settings.budget, settings.spending_file)
    budget.reserve(0.125, 40)
    budget.close()
    assert main(["cascade", "budget", str(file), "--json"]) == 0
    before, after = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [each["money"] for each in before] == [0, 0]
    assert after[0] == {"period": "day", "money": 0.125, "money_limit": 0.5, "tokens": 40, "tokens_limit": 0}
