"""Generating text: edgeft's session against the bare binding's loop, and what the second turn of a chat waits for.

    python benchmarks/runtime.py [--json] [--model FILE] [--rounds 9]

Decoding: the rival is the shortest loop that llama-cpp-python's low-level interface allows: `llama_decode` of one token
and its greedy sampler, token ids only, no text. edgeft runs on the same library, file, threads and batch sizes, with
all it does for a user: text, stop strings, cancelling, usage. The two take turns token by token, so that noise on a
shared machine hits both; a round's figure is the ratio of median times per token.

Second turn: a chat whose first question has 64, 512 or 2048 tokens, a short answer, a short second question. Only what
is new is evaluated (`…_new_tokens`), so the time to first token does not grow with the first turn, but for what these
few tokens cost to look back at every cached one.

Needs the `device` extra and llama-cpp-python.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.chat import Message, Sampling, Usage
from edgeft.models import resolve
from edgeft.openmp import short_spins
from edgeft.plugins import LoadOptions, Session

with short_spins():  # both sides share one library, and its first loading decides how threads wait
    import llama_cpp

from edgeft.runtimes.amx import crashes_on_amx
from edgeft.runtimes.cores import available_cores, physical_cores

RIVAL = "llama-cpp-python"
TOKENS = 128
"""Decoded per round and side."""
PROMPT = "Once upon a time, in a small village by the sea, there lived"
FIRST_TURNS = (64, 512, 2048)
CONTEXT = 4096
FILLER = "the lamp in the hall is on and the door is shut, "


class BareLoop:
    """What a user of the low-level interface would write, and nothing else."""

    def __init__(self, file: Path) -> None:
        model_params = llama_cpp.llama_model_default_params()
        if crashes_on_amx(Path(llama_cpp.__file__).with_name("lib") / "libllama.so"):
            model_params.use_extra_bufts = False  # as edgeft does on this machine, or the process would end
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, 512, 512
        params.n_threads, params.n_threads_batch = physical_cores(), available_cores()
        if not plugins.load("runtimes", RIVAL).flash_attention:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # as edgeft does; it is faster
        self.context = llama_cpp.llama_init_from_model(self.model, params)

    def tokens(self, prompt: list[int]) -> Iterator[int]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        sampler = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        llama_cpp.llama_sampler_chain_add(sampler, llama_cpp.llama_sampler_init_greedy())
        array = (llama_cpp.llama_token * len(prompt))(*prompt)
        llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(prompt)))
        one = (llama_cpp.llama_token * 1)()
        batch = llama_cpp.llama_batch_get_one(one, 1)
        while True:
            token = llama_cpp.llama_sampler_sample(sampler, self.context, -1)
            yield token
            one[0] = token
            llama_cpp.llama_decode(self.context, batch)


def load(runtime: str, file: Path) -> Session:
    loaded: Session = plugins.load("runtimes", runtime).load(Artifact(file), LoadOptions(context=CONTEXT))
    return loaded


def one_round(bare: BareLoop, session: Session, prompt: list[int]) -> tuple[float, float, int]:
    """Median seconds per token of the bare loop and of edgeft, and how many tokens both said alike."""
    rival, mine = bare.tokens(prompt), session.generate(prompt, Sampling(max_tokens=TOKENS))
    same = next(rival) == next(mine).token  # the first token belongs to the prompt
    rival_s, mine_s, alike = [], [], int(same)
    for _ in range(TOKENS - 1):
        started = time.perf_counter()
        token = next(rival)
        between = time.perf_counter()
        delta = next(mine)
        mine_s.append(time.perf_counter() - between)
        rival_s.append(between - started)
        alike += token == delta.token
        if delta.token is None:
            raise SystemExit("the model ended early; choose another --model")
    return statistics.median(rival_s), statistics.median(mine_s), alike


def decoding(file: Path, rounds: int) -> dict[str, float]:
    bare = BareLoop(file)
    with load(RIVAL, file) as session:
        prompt = session.tokenize(PROMPT)
        results = [one_round(bare, session, prompt) for _ in range(rounds + 1)][1:]
    ratios = [rival / mine for rival, mine, _ in results]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "decode_ratio": round(middle, 4),
        "decode_ratio_q1": round(low, 4),
        "decode_ratio_q3": round(high, 4),
        "decode_tokens_per_s": round(1 / statistics.median(mine for _, mine, _ in results), 1),
        "bare_tokens_per_s": round(1 / statistics.median(rival for rival, _, _ in results), 1),
        "tokens_alike": min(alike for *_, alike in results) / TOKENS,
    }


def first_turn(session: Session, tokens: int) -> list[Message]:
    """A question that the template makes `tokens` long, or a little more."""
    count = 0
    while len(session.render(question := [{"role": "user", "content": FILLER * count + "Say hello."}])) < tokens:
        count += 1
    return question


def ask(session: Session, turn: list[Message]) -> tuple[str, Usage]:
    deltas = list(session.generate(session.render(turn), Sampling(max_tokens=12)))
    usage = deltas[-1].usage
    assert usage is not None
    return "".join(delta.text for delta in deltas), usage


def two_turns(session: Session, tokens: int) -> tuple[Usage, Usage]:
    """Costs of the first and of the second answer."""
    for _ in session.generate(session.tokenize("forget"), Sampling(max_tokens=1)):
        pass  # an unrelated prompt empties the cache
    turn = first_turn(session, tokens)
    answer, first = ask(session, turn)
    _, second = ask(session, [*turn, {"role": "assistant", "content": answer}, {"role": "user", "content": "And now?"}])
    return first, second


def second_turns(file: Path, rounds: int, runtime: str) -> dict[str, float]:
    """Times to first token, and what the second turn waits after a long first turn against a short one."""
    with load(runtime, file) as session:
        costs = [{size: two_turns(session, size) for size in FIRST_TURNS} for _ in range(rounds + 1)][1:]
    short, long = FIRST_TURNS[0], FIRST_TURNS[-1]
    figures: dict[str, float] = {}
    for size in FIRST_TURNS:
        first, second = ([cost[size][turn].ttft_s for cost in costs] for turn in (0, 1))
        figures[f"first_turn_{size}_ttft_ms"] = round(statistics.median(first) * 1000, 1)
        figures[f"second_turn_{size}_ttft_ms"] = round(statistics.median(second) * 1000, 1)
        usage = costs[0][size][1]
        figures[f"second_turn_{size}_new_tokens"] = usage.prompt_tokens - usage.reused_tokens
    growth = [cost[long][1].ttft_s / cost[short][1].ttft_s for cost in costs]
    low, middle, high = statistics.quantiles(growth, n=4)
    figures |= {f"second_turn_{long}_to_{short}": round(middle, 3)}
    figures |= {f"second_turn_{long}_to_{short}_q1": round(low, 3), f"second_turn_{long}_to_{short}_q3": round(high, 3)}
    share = statistics.median(cost[long][1].ttft_s / cost[long][0].ttft_s for cost in costs)
    figures |= {f"second_to_first_turn_{long}": round(share, 4)}
    prefix = runtime.replace("-", "_")
    return {f"{prefix}_{name}": value for name, value in figures.items()}


def table(figures: dict[str, Any]) -> str:
    """A Markdown table of the figures."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    machine = f"{platform.machine()}, {figures['cores']} cores, Python {platform.python_version()}"
    return f"{machine}\n\n| figure | value |\n|---|---|\n{rows}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one flat object")
    parser.add_argument("--model", default="smollm2-135m", help="a GGUF file or the name of one")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    file = resolve(arguments.model, want="gguf").path
    figures = {
        **decoding(file, arguments.rounds),
        **second_turns(file, max(arguments.rounds // 3, 2), RIVAL),
        **second_turns(file, max(arguments.rounds // 3, 2), "xllamacpp"),
        "rounds": arguments.rounds,
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(figures) if arguments.json else table(figures))


if __name__ == "__main__":
    # llama.cpp writes its whole loading log to stderr otherwise; edgeft's own callback comes later.
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    main()
