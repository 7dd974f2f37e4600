"""One ledger over every way to ship a run: how far each file is from the trained model, and how sure that is.

    python benchmarks/ledger.py RUN --work FOLDER [--only q4,q4_0,…] [--imatrix FILE] [--examples N] [--json]

Exports RUN (a QLoRA run of `edgeft demo`) to every target, and a q4_0 base for its adapter alone. All are scored on the
run's held-out data against base and adapter merged in float32: first the file's tensors in torch, then the file in its
runtime. What the trained graph and the merged model say is computed once and kept in FOLDER (4 bytes per token and
vocabulary entry: 1 GB for the demo); what each file says is kept token by token, so that a second call only makes the
table. Differences are paired: the same examples, the same bootstrap draws. `fit-q4_0` stands for types chosen tensor by
tensor in the bytes of the q4_0 file; it needs the importance matrix that `edgeft imatrix RUN` makes. `w16-q4_0` and the
like are merged into the base's own weights (`--merge-base w16`); all others, and the merge that everything is measured
against, into those weights rounded to NF4 and back.

Needs the `train` and `onnx-export` extras.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.data.example import Encoded
from edgeft.export import Origin, find
from edgeft.plugins import AdapterScale
from edgeft.progress import Silent
from edgeft.verify.bootstrap import Draws, Interval
from edgeft.verify.steps import LogProbs, Step

ROOT = Path(__file__).resolve().parent.parent
MAIN = ("bf16", "q8_0", "q4_0", "q4_k_m", "q4", "onnx-q4", "lora")
FIXED = ("q4_0", "q4_1", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")
"""llama.cpp's 4-bit mixtures."""
OWN = "q4"
FITTED = ("fit-q4_0", "fit-q4", "fit-q4_k_m")
W16 = "w16-"
"""Before a target's name: merged into the base as it is."""
RUNTIMES = {"onnx-q4": "onnxruntime-genai"}
LLAMA = "xllamacpp"
"""One binding for all GGUF files; prebuilt, so others can repeat it."""


@dataclass(frozen=True)
class Shipment:
    """What a device gets."""

    name: str
    file: Path
    adapter: Path | None = None
    base: Path | None = None

    @property
    def bytes(self) -> int:
        from edgeft.artifact import size_of

        return size_of(self.file) + (size_of(self.adapter) if self.adapter else 0)


def edgeft(*arguments: object) -> None:
    from edgeft.cli.main import main

    if main([str(argument) for argument in arguments]):
        sys.exit(f"edgeft {' '.join(map(str, arguments))} failed")


def shipment(name: str, run: str, origin: Origin, work: Path, imatrix: Path | None) -> Shipment:
    """The files of one target, made when they are not there."""
    if name == "lora":
        base, adapter = work / "base-q4_0.gguf", work / "adapter.gguf"
        if not base.is_file():
            edgeft("export", origin.source.base, "--to", "gguf-q4_0", "--out", base, "--no-verify")
        if not adapter.is_file():
            edgeft("export", run, "--to", "gguf-lora", "--out", adapter, "--no-verify")
        return Shipment(name, base, adapter)
    if name.startswith("fit-"):
        same_size = shipment(name.removeprefix("fit-"), run, origin, work, None)
        out = work / f"{name}.gguf"
        if not out.is_file():
            wanted = ("--fit", f"{same_size.bytes / 1e6:.6f}MB", "--imatrix", imatrix)
            edgeft("export", run, *wanted, "--out", out, "--no-verify")
        return Shipment(name, out)
    directory = name.startswith("onnx")
    out = work / (f"{name}-onnx" if directory else f"{name}.gguf")
    if not out.exists():
        into = ("--merge-base", "w16") if name.startswith(W16) else ()
        target = name if directory else f"gguf-{name.removeprefix(W16)}"
        edgeft("export", run, "--to", target, *into, "--out", out, "--no-verify")
    return Shipment(name, out)


class Kept:
    """A step's log-probabilities on the disk: computed once, in the order of the examples, then read."""

    def __init__(self, file: Path, rows: int, vocabulary: int, compute: Any) -> None:
        self._file, self._shape, self._compute = file, (rows, vocabulary), compute
        self._at = 0

    def fill(self, encoded: Sequence[Encoded]) -> None:
        if self._file.is_file():
            return
        temporary = self._file.with_suffix(".tmp")
        held = np.memmap(temporary, np.float32, "w+", shape=self._shape)
        log_probs, at = self._compute(), 0
        for number, (tokens, rows) in enumerate(spans(encoded)):
            held[at : at + len(rows)] = log_probs(tokens, rows)
            at += len(rows)
            if number % 20 == 0:
                print(f"{self._file.name}: {at / self._shape[0]:.0%}", file=sys.stderr)
        held.flush()
        temporary.rename(self._file)

    def log_probs(self, tokens: Sequence[int], rows: Sequence[int]) -> NDArray[np.float32]:
        held = np.memmap(self._file, np.float32, "r", shape=self._shape)
        found = np.array(held[self._at : self._at + len(rows)])
        self._at += len(rows)
        return found


def spans(encoded: Sequence[Encoded]) -> Iterator[tuple[list[int], Sequence[int]]]:
    """The spans `edgeft.verify.ledger` scores."""
    from edgeft.verify.divergence import chunks, scored_rows

    for example in encoded:
        for rows in chunks(scored_rows(example)):
            yield example.tokens, rows


class Bench:
    """A run, its held-out tokens, and the two steps that all targets share."""

    def __init__(self, run: str, work: Path, examples: int | None, imatrix: Path | None = None) -> None:
        from edgeft.verify.check import encode_for
        from edgeft.verify.divergence import scored_rows
        from edgeft.verify.examples import held_out

        self.run, self.work, self.imatrix, self.origin = run, work, imatrix, find(run, None, Silent())
        held, notes = held_out(self.origin.run)
        print(*notes, sep="\n", file=sys.stderr)
        self.encoded = encode_for(self.origin.source, held[:examples], 2048)
        self.rows = sum(len(scored_rows(example)) for example in self.encoded)
        self.vocabulary = _vocabulary(self.origin.source.base)

    def shared(self) -> list[Step]:
        """The trained graph and the merge, from the disk."""
        found = []
        for name, compute in (("trained", self._trained), ("merged", self._merged)):
            kept = Kept(self.work / f"{name}-{self.rows}.f32", self.rows, self.vocabulary, compute)
            kept.fill(self.encoded)
            found.append(Step("trained" if name == "trained" else "merged", kept.log_probs))
        return found

    def _trained(self) -> LogProbs:
        from edgeft.verify.trained_graph import load_trained

        assert self.origin.run is not None
        return load_trained(self.origin.run, self.origin.source).log_probs

    def _merged(self) -> LogProbs:
        from edgeft.verify.torch_reference import load_reference

        source = self.origin.source
        return load_reference(source.base, source.adapter, rounded=source.nf4).log_probs

    def measure(self, name: str) -> Path:
        """Score one target; what every token got, as .npz."""
        result = self.work / f"{name}-{self.rows}.npz"
        if result.is_file():
            return result
        from edgeft.sessions import open_session
        from edgeft.verify.ledger import score
        from edgeft.verify.steps import in_runtime

        ship = shipment(name, self.run, self.origin, self.work, self.imatrix)
        adapters = [AdapterScale(ship.adapter)] if ship.adapter else []
        tensors = [Step("tensors", self._tensors(ship, adapters))] if name in MAIN else []
        with open_session(str(ship.file), RUNTIMES.get(name, LLAMA), adapters=adapters).session as session:
            steps = [*self.shared(), *tensors, Step("file", in_runtime(session))]
            scores = score(steps, "merged", self.encoded, self.vocabulary, _Progress(name))
        arrays: dict[str, Any] = {"owner": scores.owner, "bytes": ship.bytes}
        for step, found in zip(steps, scores.steps, strict=True):
            arrays |= {f"{step.name}_{key}": value for key, value in vars(found).items() if value is not None}
        np.savez(result.with_suffix(".tmp.npz"), **arrays)
        result.with_suffix(".tmp.npz").rename(result)
        return result

    def _tensors(self, ship: Shipment, adapters: Sequence[AdapterScale]) -> LogProbs:
        from edgeft.verify.gguf_tensors import load_gguf_tensors
        from edgeft.verify.onnx_tensors import load_onnx_tensors
        from edgeft.verify.torch_reference import load_reference

        source = self.origin.source
        if ship.file.is_dir():
            merged = load_reference(source.base, source.adapter, rounded=source.nf4)
            return load_onnx_tensors(ship.file, merged).log_probs
        return load_gguf_tensors(ship.file, source.base, adapters).log_probs


class _Progress(Silent):
    def __init__(self, name: str) -> None:
        self._name, self._done = name, 0

    def advance(self, amount: float, note: str = "", /) -> None:
        self._done += 1
        if self._done % 20 == 0:
            print(f"{self._name}: {self._done} examples, {note}", file=sys.stderr)


def _vocabulary(base: Path) -> int:
    return int(json.loads((base / "config.json").read_text())["vocab_size"])


# --- The table -----------------------------------------------------------------------


Found = Mapping[str, NDArray[Any]]


def figures(found: Found, step: str = "file") -> dict[str, Any]:
    """The figures of one step of one target, with intervals."""
    draws = Draws(found["owner"])
    wrong = np.bincount(found["owner"], weights=~found[f"{step}_right"], minlength=draws.examples)
    made: dict[str, Any] = {
        "nll": draws.per_token(found[f"{step}_nll"]),
        "kl": draws.per_token(found[f"{step}_kl"]),
        "kl_p99": draws.percentile(found[f"{step}_kl"], 0.99),
        "same_top": draws.per_token(found[f"{step}_same"]),
        "exact": draws.per_example(wrong == 0),
    }
    return made


def difference(found: Found, other: Found, key: str = "file_kl") -> Interval:
    """How much `other` has more of a figure, paired."""
    return Draws(found["owner"]).per_token(other[key] - found[key])


def shown(interval: Interval, form: str) -> str:
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def row(name: str, size: float | None, made: Mapping[str, Interval]) -> str:
    cells = [
        name,
        "" if size is None else f"{size / 1e6:.1f}",
        shown(made["nll"], ".4f"),
        f"{np.exp(made['nll'].value):.4f}",
        shown(made["kl"], ".5f"),
        shown(made["kl_p99"], ".2g"),
        shown(made["same_top"], ".2%"),
        shown(made["exact"], ".1%"),
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| | MB | NLL | perplexity | KL, mean | KL, 99 % | same top token | exact match |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|"
)
TITLES = {
    "q4": "`gguf-q4`",
    "onnx-q4": "`onnx-q4`, onnxruntime-genai",
    "lora": "`gguf-lora` beside a q4_0 base",
    "fit-q4_0": "`--fit`, in the bytes of q4_0",
    "fit-q4": "`--fit`, in the bytes of gguf-q4",
    "fit-q4_k_m": "`--fit`, in the bytes of q4_k_m",
}


def tables(results: Mapping[str, Found]) -> str:
    first = next(iter(results.values()))
    lines = [HEAD]
    lines += [row("as trained (NF4 base, bfloat16)", None, figures(first, "trained"))]
    lines += [row("merged, not quantized (float32)", None, figures(first, "merged"))]
    for name, found in results.items():
        title = TITLES.get(name.removeprefix(W16), f"`gguf-{name.removeprefix(W16)}`")
        title += ", merged into 16 bits" if name.startswith(W16) else ""
        if "tensors_kl" in found:
            lines.append(row(f"{title}: its tensors", None, figures(found, "tensors")))
        lines.append(row(title, float(found["bytes"]), figures(found)))
    text = "\n".join(lines)
    if OWN in results:
        text += "\n\n" + against(results)
    return text


def against(results: Mapping[str, Found]) -> str:
    """`gguf-q4` against every fixed mixture."""
    own = results[OWN]
    lines = ["| `gguf-q4` against | MB more | its KL − ours | its NLL − ours |", "|---|--:|--:|--:|"]
    for name in (*FIXED, *FITTED):
        if name in results:
            other = results[name]
            more = (float(other["bytes"]) - float(own["bytes"])) / 1e6
            kl, nll = difference(own, other), difference(own, other, "file_nll")
            title = TITLES.get(name, f"`gguf-{name}`")
            lines.append(f"| {title} | {more:+.1f} | {shown(kl, '+.5f')} | {shown(nll, '+.5f')} |")
    return "\n".join(lines)


def flat(results: Mapping[str, Found]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, found in results.items():
        made[f"{name}_bytes"] = int(found["bytes"])
        for key, interval in figures(found).items():
            made |= {f"{name}_{key}{end}": v for end, v in (("", interval.value), ("_low", interval.low),
                                                            ("_high", interval.high))}  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", help="a finished QLoRA run")
    parser.add_argument("--work", type=Path, required=True, help="folder for files and scores (4 GB)")
    parser.add_argument("--only", help="targets, with commas; default: all")
    parser.add_argument("--imatrix", type=Path, help="importance matrix of the run, for fit-q4_0 and the like")
    parser.add_argument("--examples", type=int, help="the first N held-out examples only")
    parser.add_argument("--json", action="store_true", help="print one flat object")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.run, work, arguments.examples, arguments.imatrix)
    fitted = FITTED if arguments.imatrix else ()
    names = arguments.only.split(",") if arguments.only else list(dict.fromkeys((*MAIN, *FIXED, *fitted)))
    results = {name: np.load(bench.measure(name)) for name in names}
    if arguments.json:
        print(json.dumps(flat(results)))
        return
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}")
    print(f"{len(bench.encoded)} examples, {bench.rows} tokens; 95 % intervals\n")
    print(tables(results))


if __name__ == "__main__":
    main()
