"""Many streams at once, for minutes, some left half read: is memory flat, and does every reader get its own text?

    python benchmarks/soak.py [--seconds 300] [--streams 64] [--model FILE] [--json]

Without a model the echo runtime answers, whose text is known. With one, every request forces its own word by a JSON
schema. Memory is the resident size of the server and of the model's process, from a fifth of the time on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from serving import Serving, serving

LEFT = 0.3
"""Share of streams that are left half read."""


@dataclass
class Tally:
    whole: int = 0
    left: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)


def request(model: str, word: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "stream": True, "max_tokens": 200}
    if model == "echo":
        return {**body, "messages": [{"role": "user", "content": expected(model, word)}]}
    schema = {"type": "object", "properties": {"id": {"const": word}}, "required": ["id"]}
    shape = {"type": "json_schema", "json_schema": {"name": "id", "schema": schema}}
    return {**body, "messages": [{"role": "user", "content": f"My id is {word}."}], "response_format": shape}


def expected(model: str, word: str) -> str:
    return f"{word} " * 10 if model == "echo" else word


async def one(address: tuple[str, int], model: str, chance: random.Random, tally: Tally) -> None:
    word = f"{chance.getrandbits(48):012x}"
    body = json.dumps(request(model, word)).encode()
    reader, writer = await asyncio.open_connection(*address)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    begun, text, events = time.perf_counter(), "", 0
    leave = chance.randrange(1, 60) if chance.random() < LEFT else None
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        while line := await asyncio.wait_for(reader.readline(), 300):
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                tally.errors.append(event["error"]["message"])
                return
            part = event["choices"][0]["delta"].get("content")
            if part:
                tally.first_s += [] if text else [time.perf_counter() - begun]
                text += part
                events += 1
            if leave is not None and events >= leave:
                tally.left += 1
                tally.wrong += not fits(model, word, text, whole=False)
                return
        tally.whole += 1
        tally.wrong += not fits(model, word, text, whole=True)
    except (OSError, TimeoutError) as error:
        tally.errors.append(f"{type(error).__name__}: {error}")
    finally:
        writer.close()


def fits(model: str, word: str, text: str, whole: bool) -> bool:
    if model == "echo":
        return text == expected(model, word) if whole else expected(model, word).startswith(text)
    return not whole or json.loads(text) == {"id": word}


def memory_mb(server: Serving, worker: int) -> float:
    return sum(_resident(process) for process in (server.process.pid, worker))


def _resident(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


async def soak(server: Serving, model: str, streams: int, seconds: float) -> tuple[Tally, list[float]]:
    parts = urlsplit(server.url)
    address, tally, end = (str(parts.hostname), int(parts.port or 0)), Tally(), time.monotonic() + seconds

    async def client(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            await one(address, model, chance, tally)

    tasks = [asyncio.create_task(client(seed)) for seed in range(streams)]
    worker, memory = server.worker(), []
    while time.monotonic() < end:
        await asyncio.sleep(1)
        memory.append(memory_mb(server, worker))
    await asyncio.gather(*tasks)
    return tally, memory


def figures(tally: Tally, memory: list[float]) -> dict[str, Any]:
    settled = memory[len(memory) // 5 :]
    tenth = max(len(settled) // 10, 1)
    begin, end = statistics.mean(settled[:tenth]), statistics.mean(settled[-tenth:])
    return {
        "whole": tally.whole,
        "left": tally.left,
        "wrong": tally.wrong,
        "errors": len(tally.errors),
        "first_error": tally.errors[0] if tally.errors else None,
        "memory_begin_mb": round(begin, 1),
        "memory_end_mb": round(end, 1),
        "memory_growth": round(end / begin - 1, 4),
        "ttft_p50_ms": round(statistics.median(tally.first_s) * 1000, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--model", help="a GGUF file; default: the echo runtime")
    parser.add_argument("--json", action="store_true", help="print one flat object")
    arguments = parser.parse_args()
    name = "model" if arguments.model else "echo"
    what = [f"model={arguments.model}"] if arguments.model else ["echo", "--runtime", "echo"]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), *what, "--queue", str(2 * arguments.streams)) as server,
    ):
        tally, memory = asyncio.run(soak(server, name, arguments.streams, arguments.seconds))
    found = {"streams": arguments.streams, "seconds": arguments.seconds, **figures(tally, memory)}
    print(json.dumps(found) if arguments.json else "\n".join(f"{key:<18} {value}" for key, value in found.items()))
    return 0 if not found["wrong"] and not found["errors"] and found["memory_growth"] <= 0.05 else 5


if __name__ == "__main__":
    sys.exit(main())
