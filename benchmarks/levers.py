"""What the levers of a runtime cost and give: how it loads, keys and values, prompt lookup, a chat that is full.

    python benchmarks/levers.py [--json] [--model FILE] [--rounds 3] [--threads 2] [--runtime NAME,…]
                                [--parts loading,divergence,lookup,chat]

Every figure is the median over rounds (quartiles in brackets) of the ratio to the default within the same round: both
sides are loaded at once and take turns, so that noise on a shared machine hits both. Above 1 is faster than the
default.

* Loading another way than by default: prefill of a short and of a long prompt and of a question that follows the long
  one, decoding after each, seconds to load, and the memory that is the process's own (RssAnon) afterwards. Repacking
  shows in Q4_0 and Q4_K files, on ARM in others too.
* Keys and values in q8_0: the bytes of one token's as llama.cpp reports them, and the mean KL divergence over a text.
* Prompt lookup against none, by kind of task; an answer counts as the same when the texts are equal.
* A chat that outgrew its context, turn by turn: how long the first token takes when as few turns as possible are left
  out, against leaving out half.

Needs the `device` extra and llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeft import overflow, plugins
from edgeft.artifact import Artifact
from edgeft.chat import Message, Sampling, Usage
from edgeft.models import resolve
from edgeft.plugins import LoadOptions, Session

RUNTIMES = ("llama-cpp-python", "xllamacpp")
SHORT, LONG = 64, 1000
TOKENS = 48
FILLER = "the lamp in the hall is on and the door is shut, "
TURN = " Which lamp is on now, and who was it that told you so?"
NOTES = "The meeting with Ms Okonkwo-Lindqvist is on 14 March 2026 at 09:45 in room B-217; the budget is 48,250 euros."
RECORD = '{"name": "Okonkwo-Lindqvist", "date": "2026-03-14", "time": "09:45", "room": "B-217", "budget": 48250}'
TASKS: dict[str, tuple[str, ...]] = {
    "repeat what was given": (
        f"Repeat this text word for word: {NOTES}",
        f"Copy this record: {RECORD}",
        f"Write this sentence twice: {NOTES}",
        f"Correct the spelling and give back the whole text: {NOTES.replace('meeting', 'meetign')}",
    ),
    "write something new": (
        "Write a short story about the sea.",
        "Explain what a compiler does.",
        "What is the capital of France, and what is it known for?",
        "Give me five ideas for a birthday present.",
    ),
}
TURNS = 24
CHAT_CONTEXT = 512


def load(runtime: str, file: Path, cores: int, **more: Any) -> Session:
    options = LoadOptions(**{"context": 2048, "threads": cores, "threads_batch": cores, **more})
    loaded: Session = plugins.load("runtimes", runtime).load(Artifact(file), options)
    return loaded


def spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3)}


def ask(session: Session, prompt: list[int], tokens: int) -> tuple[str, Usage]:
    deltas = list(session.generate(prompt, Sampling(max_tokens=tokens)))
    usage = deltas[-1].usage
    assert usage is not None
    return "".join(delta.text for delta in deltas), usage


def forget(session: Session) -> None:
    ask(session, session.tokenize("forget"), 1)


def _filled(session: Session, tokens: int) -> list[int]:
    return (session.tokenize(FILLER) * (tokens // 8))[:tokens]


def loading(runtime: str, file: Path, rounds: int, threads: int) -> dict[str, Any]:
    flash = bool(plugins.load("runtimes", runtime).flash_attention)
    ways: dict[str, dict[str, Any]] = {
        "keys and values in q8_0": {"kv_type": "q8_0"},
        f"flash attention {'off' if flash else 'on'}": {"flash_attention": not flash},
        "no repacking": {"repack": False},
        "no mapping": {"mmap": False},
        "one thread to decode": {"threads": 1},
        "one thread for prompts": {"threads_batch": 1},
    }
    return {name: against_default(runtime, file, rounds, threads, way) for name, way in ways.items()}


def against_default(runtime: str, file: Path, rounds: int, threads: int, way: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    plain, own, seconds = timed_load(runtime, file, threads)
    other, other_own, other_seconds = timed_load(runtime, file, threads, **way)
    with plain, other:
        turn = plain.tokenize(TURN)
        for size in (SHORT, LONG):
            costs = []
            for _ in range(rounds + 1):
                pair = []
                for session in (plain, other):
                    forget(session)
                    whole = ask(session, _filled(session, size), TOKENS)[1]
                    pair.append((whole, ask(session, [*_filled(session, size), *turn], 1)[1]))
                costs.append(pair)
            costs = costs[1:]
            found[f"prefill_{size}"] = spread([mine[0].ttft_s / changed[0].ttft_s for mine, changed in costs])
            found[f"decode_{size}"] = spread(
                [changed[0].decode_tokens_per_s / mine[0].decode_tokens_per_s for mine, changed in costs]
            )
            found[f"turn_{size}"] = spread([mine[1].ttft_s / changed[1].ttft_s for mine, changed in costs])
    return {**found, "load_s": (seconds, other_seconds), "own_mb": (own, other_own)}


def timed_load(runtime: str, file: Path, cores: int, **more: Any) -> tuple[Session, int, float]:
    """A session, the megabytes it added to the process's own, and the seconds it took."""
    before, began = own_memory(), time.monotonic()
    session = load(runtime, file, cores, **more)
    took = round(time.monotonic() - began, 3)
    ask(session, _filled(session, SHORT), 2)
    return session, (own_memory() - before) // 10**6, took


def own_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def divergence(runtime: str, file: Path, _rounds: int, threads: int) -> dict[str, Any]:
    with load(runtime, file, threads) as plain, load(runtime, file, threads, kv_type="q8_0") as small:
        text = plain.tokenize(Path(__file__).read_text(encoding="utf-8"))[:1024]
        ours, theirs = (session.score(text, 512) for session in (small, plain))
        return {
            "bytes_f16": state_bytes(plain) // len(text),
            "bytes_q8_0": state_bytes(small) // len(text),
            "kl": float(np.mean(np.sum(np.exp(theirs) * (theirs - ours), axis=1, dtype=np.float64))),
            "same_first": float(np.mean(theirs.argmax(1) == ours.argmax(1))),
        }


def state_bytes(session: Any) -> int:
    """Bytes of the cached sequence, by llama.cpp's own count."""
    return int(session._lib.llama_state_seq_get_size(session._ctx, 0))


def lookup(runtime: str, file: Path, rounds: int, threads: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with load(runtime, file, threads) as plain, load(runtime, file, threads, lookup=True) as guessing:
        for kind, questions in TASKS.items():
            same, ratios = 0, []
            for at in range(rounds):
                spent = []
                for session in (plain, guessing):
                    said, seconds = [], 0.0
                    for question in questions:
                        prompt = session.render([{"role": "user", "content": question}])
                        text, usage = ask(session, prompt, 2 * TOKENS)
                        said.append(text)
                        seconds += usage.decode_s
                    spent.append((seconds, said))
                (slow, before), (fast, after) = spent
                if at == 0:
                    same = sum(one == other for one, other in zip(before, after, strict=True))
                ratios.append(slow / fast)
            found[kind] = {"speed": spread(ratios), "same": same, "of": len(questions)}
    return found


def full_chat(runtime: str, file: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Mean seconds to the first token over the turns of a chat that is full, for both ways to cut."""
    kept = {"as few as possible": 1.0, "half": overflow.KEPT}
    spent: dict[str, list[float]] = {name: [] for name in kept}
    with load(runtime, file, threads, context=CHAT_CONTEXT) as session:
        for _ in range(rounds):
            for name, share in kept.items():
                overflow.KEPT = share
                forget(session)
                spent[name].append(_chat(session))
    ratios = [few / half for few, half in zip(*spent.values(), strict=True)]
    medians = {name: round(statistics.median(values) * 1000) for name, values in spent.items()}
    return {"ms": medians, "speed": spread(ratios)}


def _chat(session: Session) -> float:
    messages: list[Message] = [{"role": "system", "content": "You answer in one short sentence. " * 4}]
    waited = []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"Turn {turn}: {FILLER * 3}"})
        fitted = overflow.fit(session, messages, "truncate-oldest", 16)
        text, usage = ask(session, fitted.prompt, 4)
        messages.append({"role": "assistant", "content": text})
        if fitted.dropped:
            waited.append(usage.ttft_s)
    return statistics.fmean(waited)


PARTS = {"loading": loading, "divergence": divergence, "lookup": lookup, "chat": full_chat}


def shown(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"


def _of(figures: dict[str, Any], part: str) -> list[tuple[str, Any]]:
    """A part's figures by runtime, for those that were measured."""
    return [(name, figures[name][part]) for name in RUNTIMES if part in figures.get(name, {})]


def table(figures: dict[str, Any]) -> str:
    lines = [
        f"{figures['model']}, {platform.machine()}, {figures['threads']} threads, Python {platform.python_version()}",
        "",
    ]
    lines += [
        "| loaded with | runtime | prefill 64 | prefill 1,000 | next turn after 1,000 | decode after 64 |"
        " decode after 1,000 | load, s | own memory, MB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for runtime, ways in _of(figures, "loading"):
        for name, one in ways.items():
            phases = ("prefill_64", "prefill_1000", "turn_1000", "decode_64", "decode_1000")
            ratios = [shown(one[phase]) for phase in phases]
            load_s, own = (f"{one[key][1]:,} for {one[key][0]:,}" for key in ("load_s", "own_mb"))
            lines.append("| " + " | ".join([name, runtime, *ratios, load_s, own]) + " |")
    lines += ["", "| keys and values in q8_0 | bytes per token | KL, nats | same first choice |", "|---|--:|--:|--:|"]
    for runtime, one in _of(figures, "divergence"):
        cells = (f"{one['bytes_q8_0']:,} for {one['bytes_f16']:,}", f"{one['kl']:.5f}", f"{one['same_first']:.1%}")
        lines.append(f"| {runtime} | " + " | ".join(cells) + " |")
    lines += ["", "| prompt lookup | task | speed | same text |", "|---|---|--:|--:|"]
    for runtime, tasks in _of(figures, "lookup"):
        for kind, one in tasks.items():
            lines.append(f"| {runtime} | {kind} | {shown(one['speed'])} | {one['same']} of {one['of']} |")
    lines += ["", "| full chat | first token, few turns left out | half left out | ratio |", "|---|--:|--:|--:|"]
    for runtime, one in _of(figures, "chat"):
        few, half = one["ms"].values()
        lines.append(f"| {runtime} | {few:,} ms | {half:,} ms | {shown(one['speed'])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--model", default="smollm2-135m", help="a GGUF file or the name of one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas")
    parser.add_argument("--runtime", default=",".join(RUNTIMES), help="with commas")
    arguments = parser.parse_args()
    file = resolve(arguments.model, want="gguf").path
    how = (arguments.rounds, arguments.threads)
    figures: dict[str, Any] = {
        "model": file.name,
        "threads": arguments.threads,
        "cores": len(os.sched_getaffinity(0)),
    }
    for runtime in arguments.runtime.split(","):
        figures[runtime] = {part: PARTS[part](runtime, file, *how) for part in arguments.parts.split(",")}
    print(json.dumps(figures, indent=1) if arguments.json else table(figures))


if __name__ == "__main__":
    main()
