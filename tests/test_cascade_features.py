"""What is read off an answer and its prompt, and that a fit makes of it what is there and no more."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeft.cascade.answers import Case
from edgeft.cascade.calibration import Calibration, _newton, fit_logistic, read_calibration
from edgeft.cascade.features import BUCKETS, EMBEDDING, NAMES, NGRAM, Token, features, loggable, ngrams
from edgeft.cascade.metrics import curve
from edgeft.cascade.settings import PolicySettings
from edgeft.cascade.tune import Goal, policy_for, risks, tune
from edgeft.errors import ConfigError

SURE, UNSURE = Token(math.log(0.99), (math.log(0.99), math.log(0.005))), Token(math.log(0.4), (math.log(0.4),) * 2)


def filled(prompt: str) -> set[str]:
    return {name for name, value in ngrams(prompt).items() if value}


# --- Features -------------------------------------------------------------------------------


def test_where_and_how_much_an_answer_was_in_doubt() -> None:
    found = features([SURE, SURE, UNSURE], "What is 12 + 345?", True, False)
    assert found["probability_min"] == pytest.approx(0.4)
    assert found["probability_answer"] == pytest.approx(0.99**2 * 0.4)
    assert found["doubtful"] == found["doubtful_half"] == pytest.approx(math.log(2))  # one token
    assert found["doubtful_place"] == pytest.approx(2 / 3)
    assert found["logprob_begin"] == pytest.approx(math.log(0.99)) and found["logprob_end"] == pytest.approx(
        math.log(0.4)
    )
    assert found["doubt_max"] == pytest.approx(math.log(-math.log(0.4)), abs=1e-3)
    assert found["margin_mean"] == pytest.approx(2 * 0.985 / 3) and found["entropy_first"] < found["entropy_max"]


def test_what_a_prompt_is_like() -> None:
    found = features([SURE] * 5, "What is 12 + 345?", True, False)
    assert found["prompt_log_numbers"] == pytest.approx(math.log(3))
    assert found["prompt_log_longest_number"] == pytest.approx(math.log(4))
    assert found["prompt_capitals"] == pytest.approx(1 / 5)
    assert found["prompt_punctuation"] == pytest.approx(2 / 17)
    assert found["prompt_word_length"] == pytest.approx(13 / 5)
    assert found["log_tokens_per_word"] == 0.0  # five tokens for five words


def test_doubts_that_are_small_are_told_apart() -> None:
    """Of a model that is nearly sure everywhere, 0.9999 and 0.99 are as far apart as 0.99 and 0.4."""
    levels = [features([Token(math.log(p))], "", True, False)["doubt_mean"] for p in (0.9999, 0.99, 0.4)]
    assert levels[1] - levels[0] > 3 and levels[2] - levels[1] > 3


@pytest.mark.parametrize("prompt", ["", " \n", "?", "7", "é", "a" * 10_000, "nul\0l"])
@pytest.mark.parametrize("tokens", [(), (Token(-100.0),), (Token(0.0),) * 3])
def test_every_answer_has_the_same_features_and_they_are_numbers(prompt: str, tokens: tuple[Token, ...]) -> None:
    found = features(tokens, prompt, True, False)
    assert set(found) == NAMES
    assert all(math.isfinite(value) for value in found.values())


def test_words_and_pairs_fill_buckets_and_numbers_count_by_their_length() -> None:
    assert len(ngrams("")) == BUCKETS and not filled("")
    assert filled("Add 12 and 5.") == filled("add 34 and 9.") != filled("add 340 and 9.")
    assert filled("after the day") != filled("the day after")
    assert filled("sum") <= filled("sum, then") and filled("sum") != filled("mean")


def test_of_a_long_prompt_both_ends_are_looked_at() -> None:
    text = " ".join(["word"] * 10_000)
    assert filled(f"Sort {text}") > filled(text) < filled(f"{text} backwards")
    assert filled(f"{text} middle {text}") == filled(text)


def test_a_record_tells_no_word() -> None:
    found = loggable({**features([SURE], "my secret", True, False), f"{EMBEDDING}00": 0.5})
    assert "logprob_mean" in found and not any(name.startswith((NGRAM, EMBEDDING)) for name in found)


# --- Fits -----------------------------------------------------------------------------------


def test_the_loss_of_what_was_left_out_is_that_of_fits_without_it() -> None:
    """Rad and Maleki's formula against leaving each of the examples out in turn."""
    choose = np.random.default_rng(0)
    inputs = np.hstack([choose.normal(size=(80, 6)), np.ones((80, 1))])
    target = (choose.random(80) < 1 / (1 + np.exp(-2 * inputs[:, 0]))).astype(float)
    for ridge in (1.0, 10.0):
        _, quick = _newton(inputs, target, np.full(7, ridge), np.zeros(7))
        losses = []
        for place in range(80):
            others = np.arange(80) != place
            weights, _ = _newton(inputs[others], target[others], np.full(7, ridge), np.zeros(7))
            losses.append(np.logaddexp(0, inputs[place] @ weights) - target[place] * (inputs[place] @ weights))
        assert quick == pytest.approx(np.mean(losses), abs=0.003)


def worded(count: int, seed: int, told: bool = True) -> list[Case]:
    """The device cannot "multiply", and is as sure of that as of the rest."""
    choose, found = random.Random(seed), []
    for number in range(count):
        verb = choose.choice(("add", "subtract", "double", "halve", "multiply"))
        wrong = choose.random() < (0.9 if verb == "multiply" else 0.2) if told else choose.random() < 0.35
        tokens = tuple(Token(-choose.expovariate(3)) for _ in range(6))
        others = " ".join(f"x{chr(97 + choose.randrange(26))}{chr(97 + choose.randrange(26))}" for _ in range(4))
        prompt = f"{verb} {choose.randrange(100)} and {choose.randrange(100)} {others}"
        made = features(tokens, prompt, True, False)
        found.append(Case(f"{seed}-{number}", made, tokens, not wrong, choose.random() < 0.97, 0.01))
    return found


def apgr(found: Calibration, unseen: list[Case]) -> float:
    columns = [
        np.array([float(getattr(case, name)) for case in unseen]) for name in ("local_right", "cloud_right", "cost")
    ]
    return curve(np.array(risks(policy_for(PolicySettings(), "learned", found), unseen)), *columns).apgr


def test_a_word_that_tells_what_the_device_cannot_is_found() -> None:
    found = tune(worded(300, 0), PolicySettings(), "learned", Goal("quality", 0.95), "x")
    assert apgr(found, worded(1000, 1)) > 0.63  # 0.5 by anything that knows no words


def test_where_no_word_tells_anything_little_is_made_of_any() -> None:
    cases = worded(300, 2, told=False)
    found = tune(cases, PolicySettings(), "learned", Goal("quality", 0.95), "x")
    policy, unseen = policy_for(PolicySettings(), "learned", found), worded(300, 3, told=False)
    assert np.std(risks(policy, unseen)) < 0.12
    assert abs(np.mean(risks(policy, unseen)) - 0.34) < 0.08


def test_features_that_never_vary_have_no_weight() -> None:
    names, *_ = fit_logistic([{"a": float(n % 7), "b": 1.0} for n in range(40)], [n % 7 > 3 for n in range(40)])
    assert names == ("a",)


# --- Calibrations ---------------------------------------------------------------------------


def known(**changed: Any) -> Calibration:
    return Calibration("learned", 0.5, -1, "x", **changed)


def test_a_calibration_from_before_is_read_as_it_was() -> None:
    """Features that were added since have no weight in it."""
    old = known(names=("logprob_mean", "prompt_digits"), mean=(-1.0, 0.1), scale=(0.5, 0.1), weights=(-1.0, 0.5, 0.2))
    assert old.stale("x", -1) == ""
    made = features([SURE, UNSURE], "add 12 and 5", True, False)
    mean, digits = made["logprob_mean"], made["prompt_digits"]
    expected = -1.0 * (mean + 1.0) / 0.5 + 0.5 * (digits - 0.1) / 0.1 + 0.2
    assert old.probability(made) == pytest.approx(1 / (1 + math.exp(-expected)))


@pytest.mark.parametrize(
    "parts",
    [
        {"names": ("moon_phase",), "mean": (0.0,), "scale": (1.0,), "weights": (1.0, 0.0)},
        {"trees": (["log_tokens", 1.0, ["moon_phase", 0.5, [0.1], [0.2]], [0.3]],)},
    ],
)
def test_a_calibration_with_features_that_are_not_made_here_is_stale(parts: dict[str, Any]) -> None:
    assert "does not make, such as moon_phase" in known(**parts).stale("x", -1)


def test_a_calibration_of_another_schema_is_refused(tmp_path: Path) -> None:
    known().write(tmp_path / "c.json")
    value = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps({**value, "schema": 2}))
    with pytest.raises(ConfigError, match="schema is 2"):
        read_calibration(tmp_path / "c.json")
