"""Hedged requests: whoever begins first answers, the other stops, both are paid for, no budget is passed."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_cloud import FaultyCloud, faulty_cloud
from test_cascade import ask, write_cascade

from edgeft.cascade import Cascade
from edgeft.cascade.hedge import Pace
from edgeft.chat import Cancel, Sampling
from edgeft.paths import write_text

SECOND = """
[[cloud]]
name = "other"
url = "{url}"
model = "m"
key-env = "CASCADE_TEST_KEY"
price-in = 0.01
price-out = 0.02
retries = 0
connect-s = 0.5
first-token-s = 5.0
idle-s = 0.5
total-s = 6.0
"""
HEDGE = "[resilience]\nhedge-percentile = 90.0\nhedge-s = 0.1\n"


@contextlib.contextmanager
def two(folder: Path, first: FaultyCloud, second: FaultyCloud, more: str = "", hedge: str = HEDGE) -> Iterator[Cascade]:
    path = write_cascade(folder, first.url, more=hedge + more, cloud="retries = 0" + SECOND.format(url=second.url))
    write_text(path, path.read_text().replace("first-token-s = 0.3", "first-token-s = 5.0"))
    with Cascade.open(path) as cascade:
        yield cascade


def words(*said: str) -> Any:
    return lambda asked: list(said)


def outcomes(record: Any) -> list[tuple[str, str]]:
    return [(attempt.endpoint, attempt.outcome) for attempt in record.attempts]


def test_a_slow_endpoint_is_outrun_by_the_next_and_told_to_stop(tmp_path: Path) -> None:
    with (
        faulty_cloud("slow-headers", slow_s=3.0) as slow,
        faulty_cloud("good") as quick,
        two(tmp_path, slow, quick) as cascade,
    ):
        quick.answer = words("the ", "quick ", "one")
        begun = time.monotonic()
        text, record, _ = ask(cascade)
        took = time.monotonic() - begun
        audited = cascade.audit.records()[0]
        spent = cascade.budget.spent()["day"]
    assert (text, record.authors, record.finish) == ("the quick one", ["other"], "stop")
    assert took < 2.5  # nobody waited for the slow one
    assert outcomes(record) == [("big", "outrun"), ("other", "answered")]
    assert [attempt["outcome"] for attempt in audited["attempts"]] == ["outrun", "answered"]
    assert (len(slow.wire), len(quick.wire)) == (1, 1)
    # Both were sent, so both are paid for: the prompt of the one that lost, all of the one that won.
    prompt = 8 + len("hello") // 3
    assert record.cost == pytest.approx((prompt * 0.01 + 5 * 0.01 + 3 * 0.02) / 1000)
    assert spent == (pytest.approx(record.cost), record.cloud_tokens)


def test_an_endpoint_that_begins_in_time_is_asked_alone(tmp_path: Path) -> None:
    hedge = HEDGE.replace("0.1", "5.0")
    with faulty_cloud("good") as first, faulty_cloud("good") as second, two(tmp_path, first, second, "", hedge) as both:
        records = [ask(both)[1] for _ in range(10)]
    assert all(outcomes(record) == [("big", "answered")] for record in records) and not second.wire


def test_once_it_has_begun_a_slow_answer_is_nobody_elses(tmp_path: Path) -> None:
    with (
        faulty_cloud("slow-tokens", slow_s=0.2) as slow,
        faulty_cloud("good") as quick,
        two(tmp_path, slow, quick) as cascade,
    ):
        text, record, _ = ask(cascade)
    assert (text, record.authors, quick.wire) == ("the cloud says so", ["big"], [])


def test_the_first_may_still_win(tmp_path: Path) -> None:
    with (
        faulty_cloud("slow-headers", slow_s=0.4) as first,
        faulty_cloud("slow-headers", slow_s=4.0) as second,
        two(tmp_path, first, second) as cascade,
    ):
        begun = time.monotonic()
        text, record, _ = ask(cascade)
    assert text == "the cloud says so" and time.monotonic() - begun < 3.5
    assert outcomes(record) == [("big", "answered"), ("other", "outrun")]


@pytest.mark.parametrize("fault", ["500", "malformed", "empty", "reset", "401"])
def test_one_that_fails_leaves_the_answer_to_the_other(tmp_path: Path, fault: str) -> None:
    with faulty_cloud(fault) as bad, faulty_cloud("good") as good:
        with two(tmp_path, bad, good) as cascade:
            text, record, _ = ask(cascade)
        assert text == "the cloud says so" and record.authors == ["other"]
    with faulty_cloud("slow-headers", slow_s=0.5) as slow, faulty_cloud(fault) as bad:
        (tmp_path / "again").mkdir()
        with two(tmp_path / "again", slow, bad) as cascade:
            text, record, _ = ask(cascade)
        assert text == "the cloud says so" and record.authors == ["big"]
        assert [endpoint for endpoint, _ in outcomes(record)] == ["big", "other"]


def test_when_both_fail_the_device_answers(tmp_path: Path) -> None:
    with faulty_cloud("500") as one, faulty_cloud("503") as other, two(tmp_path, one, other) as cascade:
        text, record, _ = ask(cascade)
    assert (text, record.authors) == ("the device says so", ["local"])
    assert len(outcomes(record)) == 2


def test_a_second_request_that_the_budget_does_not_bear_is_not_made(tmp_path: Path) -> None:
    # At most: 9 prompt tokens and 40 of the answer, 0.00089; one fits, two do not.
    for limit in ("day-money = 0.0012", "request-money = 0.0012", "request-tokens = 60"):
        folder = tmp_path / limit.split()[0]
        folder.mkdir()
        with (
            faulty_cloud("slow-headers", slow_s=0.5) as slow,
            faulty_cloud("good") as quick,
            two(folder, slow, quick, f"[budget]\n{limit}\n") as cascade,
        ):
            text, record, _ = ask(cascade)
        assert text == "the cloud says so" and record.authors == ["big"]
        assert outcomes(record) == [("big", "answered"), ("other", "budget")] and not quick.wire


def test_many_at_once_never_pass_the_budget(tmp_path: Path) -> None:
    limit = 0.02
    with (
        faulty_cloud("good", "slow-headers", slow_s=0.3, seed=1) as one,
        faulty_cloud("good", "slow-headers", "500", slow_s=0.3, seed=2) as other,
        two(tmp_path, one, other, f"[budget]\nday-money = {limit}\n", HEDGE.replace("0.1", "0.05")) as cascade,
    ):
        records: list[Any] = []
        threads = [threading.Thread(target=lambda: records.append(ask(cascade)[1])) for _ in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sent = len(one.wire), len(other.wire)
        spent = cascade.budget.spent()["day"][0]
    assert len(records) == 30 and all(record.authors for record in records)
    assert spent <= limit and spent == pytest.approx(sum(record.cost for record in records))
    assert all(sent) and any(("other", "answered") in outcomes(record) for record in records)


def test_a_reader_who_leaves_stops_both(tmp_path: Path) -> None:
    with (
        faulty_cloud("slow-headers", slow_s=3.0) as one,
        faulty_cloud("slow-headers", slow_s=3.0) as other,
        two(tmp_path, one, other) as cascade,
    ):
        cancel = Cancel()
        found: list[Any] = []
        messages = [{"role": "user", "content": "hi"}]
        thread = threading.Thread(target=lambda: found.extend(cascade.answer(messages, Sampling(), cancel)))
        thread.start()
        end = time.monotonic() + 10
        while not (one.wire and other.wire):
            assert time.monotonic() < end
            time.sleep(0.01)
        begun = time.monotonic()
        cancel.set()
        thread.join(10)
        assert time.monotonic() - begun < 2
    assert found[-1].record.finish == "cancel" and not any(delta.text for delta in found)


def test_what_is_unusual_is_learnt_from_the_endpoint_itself() -> None:
    pace = Pace()
    for _ in range(19):
        pace.began(1.0)
    assert pace.unusual(95, 2.5) == 2.5
    for number in range(81):
        pace.began(number / 10)
    assert pace.unusual(0, 2.5) == 0.0 and 7.0 < pace.unusual(95, 2.5) < 8.0
