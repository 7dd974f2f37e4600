"""The cascade: who answers, what it costs, what leaves the device, and that nobody is left without an answer."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faulty_cloud import FAULTS, KEY, faulty_cloud

from edgeft.cascade import Cascade, CascadeDelta, Record
from edgeft.cascade.breaker import Breaker
from edgeft.cascade.budget import Budget, Reservation
from edgeft.cascade.cache import AnswerCache, Asked, Found
from edgeft.cascade.calibration import Calibration, conformal_threshold, fit_logistic, read_calibration
from edgeft.cascade.privacy import Guard, Restorer
from edgeft.cascade.settings import (
    TEMPLATE,
    BudgetSettings,
    CacheSettings,
    PrivacySettings,
    ResilienceSettings,
    read_settings,
)
from edgeft.chat import Cancel, Sampling
from edgeft.errors import CheckFailed, ConfigError, EdgeftError
from edgeft.paths import write_text

LOCAL_ANSWER = "the device says so"


def write_cascade(folder: Path, url: str, policy: str = 'kind = "cloud-only"', more: str = "", cloud: str = "") -> Path:
    write_text(folder / "local.echo.json", json.dumps({"default": LOCAL_ANSWER}))
    text = f"""
[local]
model = "local.echo.json"
[[cloud]]
name = "big"
url = "{url}"
model = "m"
key-env = "CASCADE_TEST_KEY"
price-in = 0.01
price-out = 0.02
connect-s = 0.5
first-token-s = 0.3
idle-s = 0.3
total-s = 3.0
{cloud}
[policy]
{policy}
[audit]
file = "audit.sqlite"
{more}
"""
    write_text(folder / "cascade.toml", text)
    return folder / "cascade.toml"


@contextlib.contextmanager
def opened(
    folder: Path, url: str, policy: str = 'kind = "cloud-only"', more: str = "", cloud: str = ""
) -> Iterator[Cascade]:
    with Cascade.open(write_cascade(folder, url, policy, more, cloud)) as cascade:
        yield cascade


def ask(cascade: Cascade, text: str = "hello", tokens: int = 40) -> tuple[str, Record, list[CascadeDelta]]:
    deltas = list(cascade.answer([{"role": "user", "content": text}], Sampling(max_tokens=tokens)))
    record = deltas[-1].record
    assert record is not None and all(delta.record is None for delta in deltas[:-1])
    return "".join(delta.text for delta in deltas), record, deltas


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


# --- Who answers -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "author"),
    [
        ('kind = "local-only"', "local"),
        ('kind = "on-error"', "local"),
        ('kind = "cloud-only"', "big"),
        ('kind = "quantile"\nthreshold = 1.0', "big"),
        ('kind = "quantile"\nthreshold = 9.0', "local"),
        ('kind = "quantile"\nthreshold = 1.0\njudge-tokens = 0', "local"),
        ('kind = "quantile"\nthreshold = 1.0\njudge-tokens = 3', "big"),
        ('kind = "margin"\nthreshold = 0.5', "big"),
        ('kind = "entropy"\nthreshold = 9.0', "local"),
        ('kind = "self-consistency"\nthreshold = 0.5', "local"),
        ('kind = "p-true"\nthreshold = 0.4', "big"),
    ],
)
def test_the_policy_says_who_answers(tmp_path: Path, policy: str, author: str) -> None:
    with faulty_cloud("good") as cloud, opened(tmp_path, cloud.url, policy) as cascade:
        text, record, _ = ask(cascade)
    assert record.authors == [author]
    assert text == (LOCAL_ANSWER if author == "local" else "the cloud says so")
    assert record.left_device == (author == "big") == bool(cloud.wire)


def test_an_early_abort_costs_the_judged_tokens_and_no_more(tmp_path: Path) -> None:
    policy = 'kind = "quantile"\nthreshold = 1.0\njudge-tokens = 3'
    with faulty_cloud("good") as cloud, opened(tmp_path, cloud.url, policy) as cascade:
        _, record, deltas = ask(cascade)
    assert record.local_tokens == 3
    assert {delta.author for delta in deltas if delta.text} == {"big"}


def test_a_device_that_cannot_is_replaced_by_the_cloud(tmp_path: Path) -> None:
    with faulty_cloud("good") as cloud, opened(tmp_path, cloud.url, 'kind = "on-error"') as cascade:
        text, record, _ = ask(cascade, "x" * 5000)  # longer than the context
    assert text == "the cloud says so" and record.reason.startswith("the device could not")


# --- Never stuck --------------------------------------------------------------------


@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"good", "cut", "slow-tokens", "huge", "not-sse"}))
def test_a_cloud_that_fails_before_the_first_word_is_replaced_by_the_device(tmp_path: Path, fault: str) -> None:
    with faulty_cloud(fault) as cloud, opened(tmp_path, cloud.url) as cascade:
        text, record, _ = ask(cascade)
    assert (text, record.authors) == (LOCAL_ANSWER, ["local"])
    assert record.attempts and all(attempt.outcome != "answered" for attempt in record.attempts)


@pytest.mark.parametrize(
    ("mode", "text", "finish"),
    [
        ("stop", "the cloud ", "broken"),
        ("restart-locally", "the cloud " + LOCAL_ANSWER, "stop"),
        ("finish-locally", "the cloud " + LOCAL_ANSWER, "stop"),
    ],
)
def test_a_cloud_that_breaks_off_is_followed_as_the_settings_say(
    tmp_path: Path, mode: str, text: str, finish: str
) -> None:
    policy = f'kind = "cloud-only"\nmid-stream = "{mode}"'
    with faulty_cloud("cut") as cloud, opened(tmp_path, cloud.url, policy) as cascade:
        shown, record, deltas = ask(cascade)
    assert (shown, record.finish) == (text, finish)
    assert any("broke off" in delta.reason for delta in deltas)
    assert [delta.restart for delta in deltas].count(True) == (mode == "restart-locally")
    assert len(cloud.wire) == 1  # no other try once text was shown


def test_no_connection_is_remembered(tmp_path: Path) -> None:
    with opened(tmp_path, closed_port()) as cascade:
        first, second = ask(cascade)[1], ask(cascade)[1]
    assert [each.outcome for each in first.attempts] == ["offline"]
    assert second.attempts[0].ms == 0 and second.total_ms < 100


def test_a_server_that_asks_to_wait_is_left_alone(tmp_path: Path) -> None:
    with faulty_cloud("429-long") as cloud, opened(tmp_path, cloud.url) as cascade:
        ask(cascade)
        assert ask(cascade)[1].attempts[0].outcome == "asked to wait (429)"
    assert len(cloud.wire) == 1


def test_an_answer_without_end_is_cut(tmp_path: Path) -> None:
    with faulty_cloud("huge") as cloud, opened(tmp_path, cloud.url) as cascade:
        text, record, _ = ask(cascade)
    assert record.finish == "length" and len(text) < 40 * 64 + 20_000


def test_neither_device_nor_cloud_is_a_stated_refusal(tmp_path: Path) -> None:
    with opened(tmp_path, closed_port()) as cascade:
        with pytest.raises(EdgeftError):
            ask(cascade, "x" * 5000)
        assert cascade.audit.records()[0]["finish"] == "refused"


def test_the_log_has_an_answers_features_but_not_which_words_were_asked(tmp_path: Path) -> None:
    with opened(tmp_path, closed_port(), 'kind = "quantile"\nthreshold = 9.0') as cascade:
        ask(cascade, "hello there")
        logged = cascade.audit.records()[0]["features"]
    assert logged["prompt_log_words"] == pytest.approx(1.0986, abs=1e-4)
    assert not any(name.startswith("ngram") for name in logged)


def test_a_reader_who_leaves_ends_the_request(tmp_path: Path) -> None:
    with faulty_cloud("slow-tokens", slow_s=0.1) as cloud, opened(tmp_path, cloud.url) as cascade:
        cancel = Cancel()
        threading.Timer(0.15, cancel.set).start()
        began = time.monotonic()
        last = list(cascade.answer([{"role": "user", "content": "hi"}], Sampling(), cancel))[-1].record
    assert last is not None and last.finish == "cancel" and time.monotonic() - began < 1.0


def test_a_circuit_opens_tries_one_and_closes() -> None:
    now = [0.0]
    breaker = Breaker(ResilienceSettings(failures=2, open_s=10), lambda: now[0])
    for _ in range(2):
        assert breaker.admit() == ""
        breaker.failed()
    assert breaker.admit() == "open circuit"
    now[0] = 11
    assert breaker.admit() == "" and breaker.admit() == "open circuit"  # one tries, no second
    breaker.failed()
    assert breaker.admit() == "open circuit"
    now[0] = 22
    assert breaker.admit() == ""
    breaker.succeeded()
    assert breaker.admit() == ""


# --- Budgets ------------------------------------------------------------------------


def test_a_spent_budget_makes_the_device_answer(tmp_path: Path) -> None:
    with (
        faulty_cloud("good") as cloud,
        opened(tmp_path, cloud.url, more="[budget]\nday-money = 0.001") as cascade,
    ):
        records = [ask(cascade, tokens=20)[1] for _ in range(12)]
        spent = cascade.budget.spent()["day"][0]
    assert records[0].authors == ["big"] and records[-1].authors == ["local"]
    assert "budget" in records[-1].reason and spent <= 0.001


def test_spending_outlives_the_process_and_a_clock_that_is_set_back(tmp_path: Path) -> None:
    now = [1_700_000_000.0]
    settings = BudgetSettings(day_money=1.0)
    budget = Budget(settings, tmp_path / "s.sqlite", lambda: now[0])
    assert isinstance(budget.reserve(0.9, 1), Reservation)
    budget.close()
    again = Budget(settings, tmp_path / "s.sqlite", lambda: now[0])
    assert again.reserve(0.2, 1) == "the day's budget of money"
    now[0] -= 5 * 86400
    assert again.reserve(0.2, 1) == "the day's budget of money"
    now[0] += 7 * 86400
    assert isinstance(again.reserve(0.2, 1), Reservation)


def test_answers_are_reused_until_they_expire(tmp_path: Path) -> None:
    now = [0.0]
    cache = AnswerCache(CacheSettings(expire_s=10, entries=2), lambda: now[0])
    for key in "abc":
        cache.put(Asked(key, "", key), "big", key)
    assert cache.get(Asked("a", "", "a")) is None
    assert cache.get(Asked("c", "", "c")) == Found("big", "c", 1.0)
    now[0] = 11
    assert cache.get(Asked("c", "", "c")) is None
    with faulty_cloud("good") as cloud, opened(tmp_path, cloud.url, more="[cache]\nexpire-s = 60") as cascade:
        assert ask(cascade)[0] == ask(cascade)[0]
    assert len(cloud.wire) == 1


# --- Soak -----------------------------------------------------------------------------


def soak(folder: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_TEST_KEY", KEY)
    limit = 0.00015 * count
    more = (
        f"[budget]\nday-money = {limit}\n"
        "[resilience]\nopen-s = 0.05\noffline-s = 0.05\nretry-wait-s = 0.05\nqueue-s = 0.1\nfailures = 40"
    )
    ids: list[str] = []
    jumps = random.Random(1)
    with (
        faulty_cloud(slow_s=0.35) as cloud,
        opened(folder, cloud.url, more=more, cloud="retries = 1\nconcurrency = 8") as cascade,
    ):
        cascade.budget._clock = lambda: time.time() + jumps.choice([0, 0, 0, 7200, -7200])
        breaker = cascade.clouds._lines[0].breaker
        # Left alone for 30 s, the cloud would see no more of the faults.
        breaker.hold = lambda seconds, why: breaker.let_go()  # type: ignore[method-assign]

        def one(number: int) -> Record:
            text, record, deltas = ask(cascade, f"request {number}, mail user{number}@example.org")
            assert text and sum(delta.record is not None for delta in deltas) == 1
            assert record.finish in ("stop", "length", "broken")
            return record

        with ThreadPoolExecutor(8) as pool:
            records = list(pool.map(one, range(count)))
        ids = [record.id for record in records]
        logged = [each["id"] for each in cascade.audit.records(count + 10)]
        spent, dearest = cascade.budget.spent()["day"][0], max(record.cost for record in records)
        wire = "\n".join(cloud.wire)
    print(f"{len(cloud.wire)} requests to the cloud, spent {spent:.4f} of {limit:.4f}")
    print(Counter(attempt.outcome for record in records for attempt in record.attempts))
    assert sorted(logged) == sorted(ids) and len(set(ids)) == count
    assert spent <= limit + dearest and len(cloud.wire) > count / 4
    assert "example.org" not in wire
    everything = b"".join(file.read_bytes() for file in folder.iterdir())
    assert KEY.encode() not in everything and b"example.org" not in everything
    assert any(record.authors == ["big"] for record in records) and any(
        record.authors == ["local"] for record in records
    )


def test_every_one_of_500_requests_is_answered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soak(tmp_path, 500, monkeypatch)


@pytest.mark.slow
def test_every_one_of_10_000_requests_is_answered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soak(tmp_path, int(os.environ.get("CASCADE_SOAK", "10000")), monkeypatch)


# --- Privacy --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('local-only = ["project \\\\w+"]', {"role": "user", "content": "about project apollo"}),
        ('topics = ["diagnosis"]', {"role": "user", "content": "my Diagnosis is"}),
        ("", {"role": "system", "content": "[local-only] be brief"}),
        ("", {"role": "user", "content": "hi", "local-only": True}),
    ],
)
def test_what_is_pinned_never_leaves(tmp_path: Path, more: str, message: dict[str, Any]) -> None:
    with faulty_cloud("good") as cloud, opened(tmp_path, cloud.url, more=f"[privacy]\n{more}") as cascade:
        messages = [message, {"role": "user", "content": "hi"}]
        record = list(cascade.answer(messages, Sampling()))[-1].record
    assert record is not None and not record.left_device and not cloud.wire


def conversations(count: int, seed: int) -> Iterator[tuple[list[dict[str, str]], list[str]]]:
    choose = random.Random(seed)
    for number in range(count):
        secrets = [
            f"user{number}.{choose.randrange(10**6)}@mail{choose.randrange(99)}.example.org",
            f"{choose.randrange(1, 223)}.{choose.randrange(256)}.{choose.randrange(256)}.{choose.randrange(1, 255)}",
            f"{choose.randrange(200, 665)}-{choose.randrange(10, 99)}-{choose.randrange(1000, 9999)}",
            f"tok_{choose.randrange(10**12):012d}",
        ]
        chosen = choose.sample(secrets, choose.randrange(1, 5))
        before, after = choose.choice([("", ""), ("(", ")"), ("<", ">"), ("is ", "."), ("„", "“"), ("\n", "\n")])
        text = " and ".join(f"here {before}{secret}{after}" for secret in chosen)
        yield [{"role": "system", "content": "Be brief. [EMAIL_1]"}, {"role": "user", "content": text}], chosen


def test_no_seeded_secret_is_sent_and_what_comes_back_is_restored() -> None:
    guard = Guard(PrivacySettings(secrets=(r"tok_\d{12}",)))
    choose = random.Random(3)
    for messages, secrets in conversations(5000, 0):
        redaction = guard.redaction()
        sent = redaction.messages(messages)
        wire = "\n".join(message["content"] for message in sent)
        assert not [secret for secret in secrets if secret in wire], wire
        restorer, restored, rest = redaction.restorer(), "", sent[1]["content"]
        while rest:
            size = choose.randrange(1, 9)
            restored, rest = restored + restorer.push(rest[:size]), rest[size:]
        assert restored + restorer.flush() == messages[1]["content"]


def test_what_was_found_once_is_replaced_wherever_it_is() -> None:
    redaction = Guard(PrivacySettings()).redaction()
    sent = redaction.messages(
        [{"role": "user", "content": "see v10.20.30.40x"}, {"role": "user", "content": "10.20.30.40"}]
    )
    assert [message["content"] for message in sent] == ["see v[IP_ADDRESS_1]x", "[IP_ADDRESS_1]"]


def test_a_key_is_not_sent_in_the_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_TEST_KEY", KEY)
    with pytest.raises(EdgeftError, match="not encrypted"):
        Cascade.open(write_cascade(tmp_path, "http://cloud.example.org/v1"))


def test_only_the_beginning_of_a_name_is_held_back() -> None:
    restorer = Restorer({"[EMAIL_1]": "a@b.c", "[EMAIL_12]": "d@e.f"})
    assert restorer.push("hi [x") == "hi [x"
    assert restorer.push(" [EMA") == " "
    assert restorer.push("IL_1") == ""
    assert restorer.push("2] and [") == "d@e.f and "
    assert restorer.flush() == "["


# --- Settings and calibration ------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "big"', 'name = "big"\nkey = "sk-1"', "key has no place here"),
        ('kind = "cloud-only"', 'kind = "cloudonly"', "policy.kind must be one of"),
        ("price-in = 0.01", 'price-in = "x"', "must be float"),
        ("price-in = 0.01", "prise-in = 0.01", "unknown key prise-in"),
        ("idle-s = 0.3", "idle-s = -1", "at least 0"),
        ('name = "big"', 'name = "local"', "names of their own"),
        ('kind = "cloud-only"', 'kind = "learned"', "needs a calibration"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = write_cascade(tmp_path, "http://127.0.0.1:1/v1")
    write_text(path, path.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=said):
        read_settings(path)


def test_what_init_writes_can_be_read(tmp_path: Path) -> None:
    text = TEMPLATE.format(model='"a"', url='"http://127.0.0.1:1/v1"', name='"m"', policies="…")
    write_text(tmp_path / "c.toml", text)
    assert read_settings(tmp_path / "c.toml").policy.kind == "quantile"


def test_a_calibration_for_another_model_is_stale(tmp_path: Path) -> None:
    write_cascade(tmp_path, "http://127.0.0.1:1/v1")
    Calibration("quantile", 9.0, -1, "another").write(tmp_path / "k.json")
    assert read_calibration(tmp_path / "k.json").artifact == "another"
    with opened(tmp_path, closed_port(), 'kind = "quantile"\ncalibration = "k.json"') as cascade:
        assert "changed" in cascade.stale and "stale" in ask(cascade)[1].reason


def test_the_regression_learns_what_there_is() -> None:
    choose = random.Random(0)
    rows = [{"a": choose.gauss(0, 1), "b": choose.gauss(0, 1), "c": 1.0} for _ in range(400)]
    target = [row["a"] + 0.3 * choose.gauss(0, 1) > 0 for row in rows]
    names, mean, scale, weights = fit_logistic(rows, target)
    found = Calibration("learned", 0.5, -1, "x", names, mean, scale, weights)
    right = sum((found.probability(row) > 0.5) == want for row, want in zip(rows, target, strict=True))
    assert right / len(rows) > 0.85


def test_the_conformal_threshold_keeps_the_risk_and_says_what_it_cannot() -> None:
    choose = random.Random(0)
    losses = []
    for _ in range(1000):
        risk = [choose.random() for _ in range(200)]
        loss = [choose.random() < value for value in risk]
        threshold = conformal_threshold(risk[:100], loss[:100], 0.1)
        kept = [bad and value <= threshold for value, bad in zip(risk[100:], loss[100:], strict=True)]
        losses.append(sum(kept) / 100)
    assert 0.07 < sum(losses) / len(losses) <= 0.1
    with pytest.raises(CheckFailed, match=r"the bound is 0\.0099"):
        conformal_threshold([0.1] * 100, [False] * 100, 0.005)
