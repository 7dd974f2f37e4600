"""What prompts are about, by a local embedder: learned where it tells something, bound to it, and written nowhere."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_cloud import FaultyCloud, faulty_cloud
from test_cascade_cache import static_model
from test_cascade_features import apgr

from edgeft.cascade import Cascade
from edgeft.cascade.answers import Case
from edgeft.cascade.calibration import Calibration, read_calibration
from edgeft.cascade.edit import edited
from edgeft.cascade.embedder import Embedder
from edgeft.cascade.features import Token, features
from edgeft.cascade.projection import fit_projection
from edgeft.cascade.settings import PolicySettings
from edgeft.cascade.tune import Goal, cross_fitted, fitted, grown, halves, policy_for, risks, tune
from edgeft.chat import Sampling
from edgeft.cli.main import main
from edgeft.errors import ConfigError

NOTHING = np.random.default_rng(0).normal(size=(600, 11)) / 4
WORDS = [f"{a}{b}{c}" for a in "bdfklmpr" for b in "aeiou" for c in "bdfgklmnprstvxz"]
VECTORS = {word: (1.0 if at % 2 else -1.0, *NOTHING[at]) for at, word in enumerate(WORDS)}
"""The first dimension says what the device gets wrong; there are so many words that hardly any comes twice."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return static_model(tmp_path_factory.mktemp("model") / "static", VECTORS)


def asked(choose: random.Random, hard: bool) -> str:
    return " ".join(choose.choice(WORDS[hard::2]) for _ in range(3))


def cases(count: int, seed: int, folder: Path) -> list[Case]:
    """Answers of a device that is as sure of what it gets wrong as of the rest."""
    choose, found, embedder = random.Random(seed), [], Embedder(folder)
    for number in range(count):
        hard = choose.random() < 0.4
        tokens = tuple(Token(-choose.expovariate(3)) for _ in range(6))
        prompt, local = asked(choose, hard), choose.random() < (0.1 if hard else 0.9)
        made = features(tokens, prompt, True, False)
        found.append(Case(f"{seed}-{number}", made, tokens, local, True, 0.01, embedder.vector(prompt)))
    return found


def blind(found: list[Case]) -> list[Case]:
    return [dataclasses.replace(case, vector=None) for case in found]


def made(found: list[Case], kind: str = "learned") -> Calibration:
    """Without a threshold."""
    parts = {"learned": fitted, "boosted": grown}[kind](found)
    return Calibration(kind, 0.5, -1, "x", embedder="e" if parts["projection"] else "", **parts)


# --- What is learned -----------------------------------------------------------------------


def test_what_a_prompt_is_about_is_learned_where_nothing_else_tells(folder: Path) -> None:
    known, unseen = cases(150, 0, folder), cases(300, 1, folder)
    with_it, without = apgr(made(known), unseen), apgr(made(blind(known)), blind(unseen))
    assert with_it > 0.7 and without < 0.6  # hashed words tell a little


@pytest.mark.parametrize("kind", ["learned", "boosted"])
def test_risks_are_the_same_when_a_calibration_is_read_again(tmp_path: Path, folder: Path, kind: str) -> None:
    known = [dataclasses.replace(case, features={"sure": case.tokens[0].logprob}) for case in cases(80, 2, folder)]
    before = made(known, kind)
    before.write(tmp_path / "c.json")
    after = read_calibration(tmp_path / "c.json")
    assert after == before and after.projection is not None and len(after.projection.components) == 12
    text = json.loads((tmp_path / "c.json").read_text())["projection"]
    assert max(len(f"{abs(number):.12g}".replace("0.", "").lstrip("0").split("e")[0]) for number in text["mean"]) <= 6
    one, other = (risks(policy_for(PolicySettings(), kind, each), known) for each in (before, after))
    assert one == pytest.approx(other, abs=1e-6)
    assert one != pytest.approx(risks(policy_for(PolicySettings(), kind, after), blind(known)), abs=0.01)


def test_of_an_answer_whose_risk_chooses_the_threshold_the_fit_saw_no_embedding(folder: Path) -> None:
    known = cases(100, 3, folder)
    before = cross_fitted(known)
    other = dataclasses.replace(known[0], vector=-3 * np.ones(12, np.float32))
    same = [one == two for one, two in zip(before, cross_fitted([other, *known[1:]]), strict=True)]
    assert 8 <= sum(same) <= 40  # those of its own fold
    found = tune(known, PolicySettings(), "learned", Goal("risk", 0.2), "x", embedder="e")
    assert found.projection == fitted(halves(known)[0])["projection"] and found.embedder == "e"


@pytest.mark.parametrize(("count", "kept"), [(5, 1), (40, 9), (41, 10), (400, 16)])
def test_components_are_few_beside_prompts(count: int, kept: int) -> None:
    found = fit_projection([*np.random.default_rng(0).normal(size=(count, 64)), None])
    assert found is not None and len(found.components) == kept
    assert set(found.features(None).values()) == {0.0}  # what an average prompt has


def test_where_prompts_do_not_differ_there_is_no_projection() -> None:
    one = np.ones(8, np.float32) / np.sqrt(8).astype(np.float32)
    assert fit_projection([]) is fit_projection([None] * 50) is fit_projection([one] * 50) is None


# --- Bound to its embedder -------------------------------------------------------------------


def test_a_calibration_holds_for_its_embedder_only(folder: Path) -> None:
    known = cases(100, 4, folder)
    found = made(known)
    without = tune(blind(known), PolicySettings(), "learned", Goal("risk", 0.2), "x", embedder="e")
    assert found.stale("x", -1, "e") == ""
    assert "another embedder" in found.stale("x", -1, "f")
    assert "embedder is not in the settings" in found.stale("x", -1)
    assert without.stale("x", -1) == without.stale("x", -1, "f") == without.embedder == ""
    assert "such as embedding_00" in dataclasses.replace(found, projection=None).stale("x", -1, "e")


def test_another_table_or_tokenizer_is_another_embedder(tmp_path: Path, folder: Path) -> None:
    words = list(VECTORS.items())
    others = (dict([*words[:-1], ("other", words[-1][1])]), {**VECTORS, WORDS[0]: [2.0] * 12})
    found = {Embedder(static_model(tmp_path / str(at), each)).digest for at, each in enumerate((*others, VECTORS))}
    assert len(found) == 3 and Embedder(folder).digest in found


@pytest.mark.parametrize(
    "projection", [7, {}, {"mean": [0.0], "components": []}, {"mean": [0.0], "components": [[1.0, 2.0]]}]
)
def test_a_projection_that_is_none_is_refused(tmp_path: Path, projection: Any) -> None:
    Calibration("learned", 0.5, -1, "x").write(tmp_path / "c.json")
    value = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps({**value, "projection": projection}))
    with pytest.raises(ConfigError, match="is not a calibration"):
        read_calibration(tmp_path / "c.json")


# --- On the command line ---------------------------------------------------------------------


def settings_for(tmp_path: Path, cloud: FaultyCloud) -> tuple[Path, list[str]]:
    """A device that says "no" to everything, which is wrong for words of one kind; and how it is tuned."""
    choose, path = random.Random(0), tmp_path / "c.toml"
    cloud.answer = lambda said: ["yes" if said["messages"][-1]["content"].split()[0] in WORDS[1::2] else "no"]
    (tmp_path / "a.echo.json").write_text('{"default": "no"}')
    with (tmp_path / "data.jsonl").open("w") as stream:
        for number in range(60):
            turns = [("user", asked(choose, number % 2 > 0)), ("assistant", "yes" if number % 2 else "no")]
            stream.write(json.dumps({"messages": [{"role": who, "content": text} for who, text in turns]}) + "\n")
    path.write_text(
        f'[local]\nmodel = "a.echo.json"\n[[cloud]]\nname = "big"\nurl = "{cloud.url}"\nmodel = "m"\n'
        '[policy]\nkind = "on-error"\n[cache]\nexpire-s = 60\nnear = 1.0\nembedder = "./static"\n'
        '[audit]\nfile = "audit.sqlite"\n'
    )
    return path, ["cascade", "tune", str(path), "--data", str(tmp_path / "data.jsonl"), "--max-cost", "0", "--json"]


def name_embedder(path: Path, name: str) -> None:
    path.write_text(edited(path.read_text(), {"policy.embedder": name}, path))


def test_answers_that_were_kept_are_tuned_with_an_embedder_and_it_decides(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "static").symlink_to(folder)
    static_model(tmp_path / "other", {"word": [1.0] * 12})
    with faulty_cloud("good") as cloud:
        path, tuning = settings_for(tmp_path, cloud)
        assert main(tuning) == 0
        without = json.loads(capsys.readouterr().out)
        requests, answers = len(cloud.wire), (tmp_path / "c.answers.jsonl").read_text()
        name_embedder(path, "static")
        assert main(tuning) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(cloud.wire) == requests and (tmp_path / "c.answers.jsonl").read_text() == answers
        assert found["examples"] == without["examples"]
        assert found["deferred"] < 0.6 < 0.7 < without["deferred"]
        choose = random.Random(1)
        with Cascade.open(path) as cascade:
            assert not cascade.stale and cascade.cache._embed == cascade.embedder.vector  # loaded once
            for hard in (True, False) * 2:
                *_, last = cascade.answer([{"role": "user", "content": asked(choose, hard)}], Sampling(max_tokens=8))
                assert last.record.authors == ["big" if hard else "local"]
            assert "embedding" not in json.dumps(cascade.audit.records(10))
        assert b"embedding" not in (tmp_path / "audit.sqlite").read_bytes()
        for name, why in (("other", "another embedder"), ("", "embedder is not in the settings")):
            name_embedder(path, name)
            with Cascade.open(path) as cascade:
                assert why in cascade.stale and cascade.policy.name == "on-error"


def test_what_an_embedder_needs_is_said_before_anybody_is_asked(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_cloud("good") as cloud:
        path, tuning = settings_for(tmp_path, cloud)
        path.write_text(path.read_text().replace("near = 1.0", "near = 0.0"))
        name_embedder(path, "missing")
        assert main(tuning) == 2 and "is no static embedding model" in capsys.readouterr().err
        name_embedder(path, str(folder))
        monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
        assert main(tuning) == 3 and "edgeft[near]" in capsys.readouterr().err
        assert not cloud.wire
