"""Parts of the server by themselves: turns in the queue, calls in a text, rates, the request log, what is drift."""

from __future__ import annotations

import asyncio
import http.server
import itertools
import json
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import Route

from edgeft.cli.main import main
from edgeft.errors import UsageError, WriteError
from edgeft.monitor import Limits, psi, read_reference, reference, report
from edgeft.paths import home
from edgeft.request_log import Rated, Request, RequestLog, read_log
from edgeft.serve.app import Server, make_app
from edgeft.serve.catalogue import Catalogue, parse_split
from edgeft.serve.fair import FairQueue, QueueFull
from edgeft.serve.gate import Gate, check_binding, is_loopback
from edgeft.serve.metrics import Metrics
from edgeft.serve.openapi import description
from edgeft.serve.recorder import Recorder
from edgeft.serve.tools import CallReader
from edgeft.serve.work import Failed

# --- Queue --------------------------------------------------------------------


def test_clients_take_turns() -> None:
    async def order() -> list[str]:
        queue: FairQueue[str] = FairQueue(10)
        for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
            queue.put(item[0], item)
        return [await queue.get() for _ in range(6)]

    assert asyncio.run(order()) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_full_queue_takes_no_more_until_one_left() -> None:
    async def run() -> None:
        queue: FairQueue[int] = FairQueue(2)
        queue.put("a", 1)
        queue.put("b", 2)
        with pytest.raises(QueueFull):
            queue.put("c", 3)
        assert queue.remove("a", 1) and not queue.remove("a", 1)
        queue.put("c", 3)
        assert [await queue.get(), await queue.get()] == [2, 3] and len(queue) == 0

    asyncio.run(run())


# --- Calls of tools -----------------------------------------------------------

CALL = '{"name": "light", "arguments": {"room": "hall"}}'


def read(text: str, cuts: list[int]) -> tuple[str, list[Any]]:
    reader, out = CallReader(["light"]), ""
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for begin, end in itertools.pairwise(edges):
        out += reader.push(text[begin:end])
    rest, calls = reader.finish()
    return out + rest, [json.loads(call["function"]["arguments"]) for call in calls]


@given(st.lists(st.integers(0, 200), max_size=12))
def test_calls_are_found_wherever_the_text_is_cut(cuts: list[int]) -> None:
    hall = {"room": "hall"}
    assert read(CALL, cuts) == ("", [hall])
    assert read(f"[{CALL}, {CALL}]", cuts) == ("", [hall, hall])
    assert read(f"  <tool_call>\n{CALL}\n</tool_call><tool_call>{CALL}</tool_call>", cuts) == ("", [hall, hall])
    assert read(f"Yes. <tool_call>[{CALL}]</tool_call>", cuts) == ("Yes. ", [hall])
    for text in ("plain", "{not json", "<tool", "a < b", "<tool_call>{}</tool_call>", '{"name": "other"}', "[1, 2]"):
        assert read(text, cuts) == (text, [])


# --- Keys and rates -----------------------------------------------------------


def test_who_can_be_reached_needs_a_key() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9")))
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", "localhost.example.org"):
        with pytest.raises(UsageError, match="no key"):
            check_binding(host, ())
        check_binding(host, ("k" * 16,))


def test_a_rate_allows_a_minutes_worth_at_once_and_then_its_speed() -> None:
    gate = Gate((), 60)
    for _ in range(60):
        gate.admit("a", 0.0)
    with pytest.raises(Failed) as refused:
        gate.admit("a", 0.5)
    assert refused.value.status == 429 and refused.value.retry_after == 1
    gate.admit("a", 1.5)
    gate.admit("b", 0.5)


def test_a_split_gives_its_share() -> None:
    split = parse_split("both=a,b,0.25")
    chosen = [split.choose(f"client {number}") for number in range(4000)]
    assert abs(chosen.count("b") / 4000 - 0.25) < 0.03
    for wrong in ("both", "both=a", "=a,b", "both=a,b,2", "both=a,b,x"):
        with pytest.raises(UsageError, match="not a split"):
            parse_split(wrong)


# --- The description ----------------------------------------------------------


def test_the_description_has_every_route_and_no_other() -> None:
    metrics = Metrics()
    app = make_app(Server(Catalogue({}, {}), Gate((), None), Recorder(metrics), metrics))
    routes = {
        (route.path.replace(":path", ""), method.lower())
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    paths = description()["paths"]
    assert {(path, method) for path, item in paths.items() for method in item} == routes


# --- The log and what it says -------------------------------------------------


def request(number: int, **values: Any) -> Request:
    made = Request(f"id-{number}", float(number), "m", "m", "c", 200, "stop", ttft_ms=100.0, tokens_per_s=50.0)
    return replace(made, **values)


def test_the_log_keeps_so_many(tmp_path: Path) -> None:
    with RequestLog(tmp_path / "log.sqlite", kept=5) as log:
        for number in range(12):
            log.add(request(number))
        log.prune()
        assert [rated.request.id for rated in log.since(0)] == [f"id-{number}" for number in range(7, 12)]
        assert log.since(9, 10)[0].request == request(9)
    assert (tmp_path / "log.sqlite").stat().st_mode & 0o077 == 0
    (tmp_path / "text").write_text("no database " * 1000)
    with pytest.raises(WriteError, match="cannot use the request log"):
        RequestLog(tmp_path / "text")


def test_the_audit_log_of_a_cascade_is_read_too(tmp_path: Path) -> None:
    audit = pytest.importorskip("edgeft.cascade.audit")
    types = pytest.importorskip("edgeft.cascade.types")
    settings = pytest.importorskip("edgeft.cascade.settings").AuditSettings()
    log = audit.AuditLog(tmp_path / "audit.sqlite", settings)
    log.add(types.Record("1", 5.0, "cloud", reason="quantile: risk 2 above 1", cost=0.5, ttft_ms=9.0, total_ms=20.0))
    log.add(types.Record("2", 6.0, confidence=-0.5, total_ms=20.0))
    log.add(types.Record("3", 7.0, finish="refused", error="offline"))
    log.close()
    first, second, third = (rated.request for rated in read_log(tmp_path / "audit.sqlite"))
    assert (first.deferral, first.cost, first.ttft_ms) == ("quantile", 0.5, 9.0)
    assert (second.deferral, second.confidence, third.status) == (None, -0.5, 503)


def drawn(count: int, mean: float, seed: int) -> list[Rated]:
    chance = random.Random(seed)
    return [Rated(request(number, ttft_ms=chance.gauss(mean, 10)), None) for number in range(count)]


def test_drift_is_seen_and_chance_is_not() -> None:
    usual = reference(drawn(1000, 100, 0))
    alerts = [report(drawn(60, 100, seed), usual, Limits()).alerts for seed in range(1, 101)]
    assert sum(map(bool, alerts)) <= 3
    moved = report(drawn(60, 115, 1), usual, Limits())
    assert len(moved.alerts) == 1 and moved.alerts[0].startswith("ttft_ms has drifted")


def test_psi_is_the_formula() -> None:
    assert psi([10, 10], [10, 10]) == 0
    # (p - q) ln(p / q) with half a count added to every bin: p = 30.5/41, q = 20.5/41.
    assert psi([20, 20], [30, 10]) == pytest.approx(10 / 41 * 0.39729 + 10 / 41 * 0.66914, rel=1e-3)


def test_errors_feedback_and_cost_raise_alerts() -> None:
    rated = [Rated(request(number, cost=0.01, deferral="unsure"), -1) for number in range(20)]
    rated += [Rated(request(99, status=500, ttft_ms=None, tokens_per_s=None), None) for _ in range(5)]
    made = report(rated, reference([]), Limits(deferrals=0.5, ttft_ms=50, cost=0.1))
    assert len(made.alerts) == 5 and made.deferrals == {"unsure": 20} and made.error_rate == 0.2


def test_monitor_ends_with_5_and_calls_the_webhook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import time

    posted: list[Any] = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with RequestLog(home() / "requests.sqlite") as log:
        for number in range(100):
            log.add(request(number, at=time.time() - 60))
    usual = tmp_path / "usual.json"
    assert main(["monitor", "--save-baseline", str(usual)]) == 0
    assert read_reference(usual).counts["ttft_ms"]
    assert main(["monitor", "--baseline", str(usual), "--json"]) == 0
    hook = http.server.HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{hook.server_port}/"
    assert main(["monitor", "--max-ttft", "50", "--webhook", url]) == 5
    assert posted[0]["alerts"] == ["the first token took 100 ms (95 %), above 50 ms"]
    hook.shutdown()
    hook.server_close()
    assert main(["monitor", "--max-ttft", "50", "--webhook", url]) == 5
    assert "did not take the alert" in capsys.readouterr().err
    assert main(["monitor", "--log", str(tmp_path / "none")]) == 2


def test_spans_carry_no_text() -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from edgeft.serve.telemetry import exporter

    spans = InMemorySpanExporter()
    export = exporter(spans)
    export(request(1, total_ms=20.0, messages="secret", answer="secret"))
    export(request(2, status=500, error="model_crashed"))
    assert export.flush()  # type: ignore[attr-defined]
    first, second = spans.get_finished_spans()
    assert first.attributes and first.attributes["gen_ai.request.model"] == "m" and "secret" not in first.to_json()
    assert first.end_time - first.start_time == 20_000_000  # type: ignore[operator]
    assert not second.status.is_ok
