"""What the server adds to the bare runtime: time per decoded token, and time to the first one.

    python benchmarks/serve.py [--json] [--model smollm2-135m] [--rounds 15]
    python benchmarks/serve.py --streams [--model FILE] [--rounds 3]

The rival is edgeft's own session in this process, on the same file, runtime and threads, without a server. The two
take turns, the order changing, each round with a prompt of its own; a round's figure is the ratio of its two decode
times, or the difference of its two times to the first token, from the request to the first text in the client's hands.
Rendering the template counts on both sides. The first token is timed in four times as many rounds of one token each:
the prompt phase varies by more than what the server adds. `echo` is the server's own share alone, with no model.

`--streams`: what continuous batching gains. Eight requests are sent at once to servers that write 1, 4 and 8 answers at
a time, in turns; a figure is all tokens over the time from the first request to the last token. One request alone
shows what places cost that nobody uses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import socket
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgeft.chat import Message, Sampling
from edgeft.models import resolve
from edgeft.plugins import Session
from edgeft.sessions import open_session

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from serving import serving

TOKENS = 128
_TEXT = re.compile(rb'"content":"([^"])')
_COUNT = re.compile(rb'"completion_tokens":(\d+)')
PLACES = (1, 4, 8)
QUESTION = "Tell me a long story about a lighthouse keeper, the sea and a storm. Begin with the number {}."


def bare(session: Session, messages: list[Message], tokens: int) -> tuple[float, float, int]:
    """Seconds to the first token, seconds per token after it, and how many there were."""
    begun, first, last, count = time.perf_counter(), 0.0, 0.0, 0
    for delta in session.generate(session.render(messages), Sampling(max_tokens=tokens)):
        if delta.token is not None:
            last = time.perf_counter()
            first = first or last
            count += 1
    return first - begun, (last - first) / max(count - 1, 1), count


def served(address: str, messages: list[Message], tokens: int, model: str = "model") -> tuple[float, float, int]:
    """A client that does as little as one can while the answer comes: what it costs is not the server's."""
    body = {"model": model, "messages": messages, "stream": True, "max_tokens": tokens, "temperature": 0}
    body["stream_options"] = {"include_usage": True}
    data = json.dumps(body).encode()
    host, port = address.rsplit(":", 1)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n\r\n"
    came: list[tuple[float, bytes]] = []
    begun = time.perf_counter()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + data)
        while piece := connection.recv(1 << 16):
            came.append((time.perf_counter(), piece))
    texts = [at for at, piece in came if _TEXT.search(piece)]
    found = _COUNT.search(b"".join(piece for _, piece in came))
    assert found is not None, came
    count = int(found[1])
    return texts[0] - begun, (texts[-1] - texts[0]) / max(count - 1, 1), count


Round = tuple[tuple[float, float, int], tuple[float, float, int]]
"""Without and with the server."""


def rounds(address: str, session: Session, count: int, tokens: int) -> list[Round]:
    results = []
    for number in range(count + 1):
        messages: list[Message] = [{"role": "user", "content": QUESTION.format(1000 * tokens + number)}]
        if number % 2:
            with_server = served(address, messages, tokens)
            without = bare(session, messages, tokens)
        else:
            without = bare(session, messages, tokens)
            with_server = served(address, messages, tokens)
        results.append((without, with_server))
    return results[1:]


def figures(decoded: list[Round], first: list[Round]) -> dict[str, Any]:
    ratios = [server[1] / alone[1] for alone, server in decoded]
    waits = [(server[0] - alone[0]) * 1000 for alone, server in first]
    low, middle, high = statistics.quantiles(ratios, n=4)
    early, median, late = statistics.quantiles(waits, n=4)
    return {
        "decode_time_ratio": round(middle, 4),
        "decode_time_ratio_q1": round(low, 4),
        "decode_time_ratio_q3": round(high, 4),
        "ttft_added_ms": round(median, 2),
        "ttft_added_ms_q1": round(early, 2),
        "ttft_added_ms_q3": round(late, 2),
        "bare_tokens_per_s": round(1 / statistics.median(alone[1] for alone, _ in decoded), 1),
        "served_tokens_per_s": round(1 / statistics.median(server[1] for _, server in decoded), 1),
        "bare_ttft_ms": round(statistics.median(alone[0] for alone, _ in first) * 1000, 1),
        "served_ttft_ms": round(statistics.median(server[0] for _, server in first) * 1000, 1),
        "tokens": min(count for pair in decoded for *_, count in pair),
        "rounds": len(decoded),
        "rounds_ttft": len(first),
        "cores": len(os.sched_getaffinity(0)),
    }


def alone(folder: Path, count: int) -> float:
    """Milliseconds to the first token of a model that takes no time: the server's own share."""
    with serving(folder, "echo", "--runtime", "echo") as server:
        address = urlsplit(server.url).netloc
        asked: list[Message] = [{"role": "user", "content": QUESTION.format(1)}]
        times = [served(address, asked, 1, "echo")[0] for _ in range(count + 1)][1:]
    return round(statistics.median(times) * 1000, 2)


def crowd(address: str, requests: int, number: int) -> tuple[float, float]:
    """Tokens a second of all requests together, and the median time to the first token (s)."""
    messages = [[{"role": "user", "content": QUESTION.format(1000 * number + n)}] for n in range(requests)]
    begun = time.perf_counter()
    with ThreadPoolExecutor(requests) as pool:
        found = list(pool.map(lambda one: served(address, one, TOKENS), messages))
    seconds = time.perf_counter() - begun
    return sum(count for *_, count in found) / seconds, statistics.median(first for first, *_ in found)


def together(file: Path, folder: Path, count: int) -> dict[str, Any]:
    """Median, over the rounds, of what 8 requests and 1 request see."""
    seen: dict[str, list[tuple[float, float]]] = {}
    with contextlib.ExitStack() as stack:
        servers = {}
        for places in PLACES:
            own = folder / str(places)
            own.mkdir()
            servers[places] = stack.enter_context(serving(own, f"model={file}", "--parallel", str(places)))
        for number in range(count + 1):
            for places, requests in [*((places, 8) for places in PLACES), (1, 1), (8, 1)]:
                found = crowd(urlsplit(servers[places].url).netloc, requests, 10 * number + places + requests)
                if number:  # the first round warms up
                    seen.setdefault(f"{requests} requests, --parallel {places}", []).append(found)
        cache = {p: next(e["cache_mb"] for e in servers[p].events() if e["event"] == "model") for p in PLACES}
    figures: dict[str, Any] = {"rounds": count, "tokens": TOKENS, "cores": len(os.sched_getaffinity(0))}
    for name, values in seen.items():
        figures[f"{name}: tokens/s"] = round(statistics.median(speed for speed, _ in values), 1)
        figures[f"{name}: first token (ms)"] = round(statistics.median(first for _, first in values) * 1000)
    return {**figures, **{f"--parallel {places}: cache (MB)": size for places, size in cache.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one flat object")
    parser.add_argument("--model", default="smollm2-135m", help="a GGUF file or the name of one")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--streams", action="store_true", help="many answers at a time against one after another")
    arguments = parser.parse_args()
    given = Path(arguments.model)
    file = given.absolute() if given.is_file() else resolve(arguments.model, want="gguf").path
    with tempfile.TemporaryDirectory() as folder:
        if arguments.streams:
            found = together(file, Path(folder), arguments.rounds)
        else:
            with serving(Path(folder), f"model={file}") as server, open_session(str(file)).session as session:
                address = urlsplit(server.url).netloc
                decoded = rounds(address, session, arguments.rounds, TOKENS)
                found = figures(decoded, rounds(address, session, 4 * arguments.rounds, 1))
            found["echo_ttft_ms"] = alone(Path(folder), 4 * arguments.rounds)
    machine = f"{platform.machine()}, {found['cores']} cores, Python {platform.python_version()}"
    rows = "\n".join(f"| {name} | {value} |" for name, value in found.items())
    print(json.dumps(found) if arguments.json else f"{machine}\n\n| figure | value |\n|---|---|\n{rows}")


if __name__ == "__main__":
    main()
