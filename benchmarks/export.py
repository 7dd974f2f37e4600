"""One-pass export against the usual three passes: PEFT merge, llama.cpp convert, llama.cpp quantize.

    python benchmarks/export.py [--json] [--repeat 3] [--work FOLDER]

A randomly initialised 1.07B Llama (hidden 2048, FFN 8192, 16 layers, 32/8 heads, vocabulary 49,152) in bfloat16 with a
rank-16 adapter on all linear layers. Every stage is a process of its own, timed from start to exit with everything it
imports; peak memory is the largest resident set of any process (wait4), bytes written are the sizes of the files each
side leaves behind. Both sides use all cores. The rival gets one merge and one conversion for both quantizations, but
is charged for them each time, as a user would be.

Needs the `train` extra and llama-cpp-python; fetches llama.cpp's converter from its source distribution once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"q4_k_m": 15, "q4_0": 2}
"""Short name of a target -> llama.cpp's `llama_ftype`."""

MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""
QUANTIZE = """
import ctypes, sys, llama_cpp
source, out, file_type, threads = sys.argv[1:]
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = int(file_type), int(threads)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)))
"""
MODEL = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
folder, tokens = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=49152, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.save_pretrained(folder + "/base")
adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
for name, parameter in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter.data, std=0.02)
adapted.save_pretrained(folder + "/adapter")
"""


@dataclass(frozen=True)
class Cost:
    """What processes took: wall and processor seconds, the largest peak resident set and files written, in bytes."""

    seconds: float
    cpu: float
    peak: int
    written: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds, self.cpu + other.cpu, max(self.peak, other.peak), self.written + other.written
        )


def run(command: Sequence[str], output: Path) -> Cost:
    """Run one process to its end. Output goes to stderr only when it fails."""
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = os.posix_spawn(
            command[0],
            list(command),
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, log.fileno(), 1), (os.POSIX_SPAWN_DUP2, log.fileno(), 2)],
        )
        _, status, usage = os.wait4(process, 0)
        seconds = time.perf_counter() - started
        if os.waitstatus_to_exitcode(status):
            log.seek(0)
            sys.exit(f"{' '.join(command)[:200]} failed:\n{log.read().decode()[-3000:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, size(output))


def size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def three_passes(work: Path, source: Path, target: str) -> Cost:
    """The rival's way, one pass after the other."""
    python, merged, bf16, out = sys.executable, work / "merged", work / "bf16.gguf", work / f"rival-{target}.gguf"
    cost = run([python, "-c", MERGE, str(work / "base"), str(work / "adapter"), str(merged)], merged)
    converter = str(source / "convert_hf_to_gguf.py")
    cost += run([python, converter, str(merged), "--outtype", "bf16", "--outfile", str(bf16)], bf16)
    threads = str(len(os.sched_getaffinity(0)))
    cost += run([python, "-c", QUANTIZE, str(bf16), str(out), str(TARGETS[target]), threads], out)
    shutil.rmtree(merged)
    bf16.unlink()
    out.unlink()
    return cost


def one_pass(work: Path, target: str) -> tuple[Cost, int]:
    """edgeft's way, and the size of the output."""
    out = work / f"edgeft-{target}.gguf"
    command = [sys.executable, "-m", "edgeft", "export", str(work / "base"), "--adapter", str(work / "adapter")]
    cost = run([*command, "--to", f"gguf-{target}", "--out", str(out), "--no-verify"], out)
    written = size(out)
    out.unlink()
    return cost, written


def build(work: Path) -> None:
    """The model, the adapter and SmolLM2's tokenizer, which has the same vocabulary."""
    if (work / "adapter" / "adapter_model.safetensors").is_file():
        return
    from edgeft.models import resolve

    run([sys.executable, "-c", MODEL, str(work), "49152"], work)
    tokenizer = resolve("smollm2-135m", want="hf").path
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "edgeft", "special_tokens")):
            shutil.copy(file, work / "base")


def measure(work: Path, source: Path, repeat: int) -> dict[str, Any]:
    """Alternate the two sides `repeat` times; medians, and the spread as (largest - smallest) / median."""
    ours: dict[str, list[Cost]] = {target: [] for target in TARGETS}
    rival: dict[str, list[Cost]] = {target: [] for target in TARGETS}
    output: dict[str, int] = {}
    for _ in range(repeat):
        for target in TARGETS:
            rival[target].append(three_passes(work, source, target))
            cost, output[target] = one_pass(work, target)
            ours[target].append(cost)
            print(f"{target}: {rival[target][-1]} {cost}", file=sys.stderr)
    figures: dict[str, Any] = {}
    for target in TARGETS:
        ratios = [mine.seconds / other.seconds for mine, other in zip(ours[target], rival[target], strict=True)]
        figures[f"wall_ratio_{target}"] = round(statistics.median(ratios), 4)
        figures[f"wall_ratio_{target}_spread"] = round(max(ratios) - min(ratios), 4)
        busy = [mine.cpu / other.cpu for mine, other in zip(ours[target], rival[target], strict=True)]
        figures[f"cpu_ratio_{target}"] = round(statistics.median(busy), 4)
        figures[f"wall_seconds_{target}"] = round(statistics.median(cost.seconds for cost in ours[target]), 2)
        figures[f"rival_wall_seconds_{target}"] = round(statistics.median(cost.seconds for cost in rival[target]), 2)
    peaks = {name: [cost.peak for costs in side.values() for cost in costs] for name, side in
             (("ours", ours), ("rival", rival))}  # fmt: skip
    figures["peak_memory_ratio"] = round(max(peaks["ours"]) / min(peaks["rival"]), 4)
    figures["peak_memory_mb"] = round(max(peaks["ours"]) / 1e6)
    figures["rival_peak_memory_mb"] = round(min(peaks["rival"]) / 1e6)
    written = [ours[target][0].written / output[target] for target in TARGETS]
    figures["bytes_written_ratio"] = round(max(written), 4)
    figures["rival_bytes_written_ratio"] = round(
        max(rival[target][0].written / output[target] for target in TARGETS), 2
    )
    return {**figures, "repeat": repeat, "cores": len(os.sched_getaffinity(0))}


def table(figures: dict[str, Any]) -> str:
    """A Markdown table of the figures."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    machine = f"{platform.machine()}, {figures['cores']} cores, Python {platform.python_version()}"
    return f"{machine}\n\n| figure | value |\n|---|---|\n{rows}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one flat object")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the model and the files (12 GB); default: a new one")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="folder for llama.cpp's source")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import reference

    source = reference.converter_source(arguments.cache)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        build(work)
        figures = measure(work, source, arguments.repeat)
    print(json.dumps(figures) if arguments.json else table(figures))


if __name__ == "__main__":
    main()
