"""Ternary models: round trip, a ternary model and its 16-bit twin from scratch, and retrofits against 4-bit files.

    python benchmarks/ternary.py --work FOLDER [--only REGEX] [--seconds N] [--list] [--json]

Twins: a Llama with 4 layers of width 256 (SHAPE), the first 2048 tokens of SmolLM2's tokenizer, random weights, the
same seed for both. One is trained with `--for gguf-tq2_0`, the other with `--method full`: the same data in the same
order, the same steps. For each, two learning rates are tried for TUNE of a pass with seed 0, and the better one by
validation loss is taken for all seeds.

The data are commands of the demo's generator, from the words and sentence templates of its training split, without a
time ("at ten past six"): the demo's 1,900 examples do not teach a model that has never read a word, and times take it
longer than all the rest. Validation and test hold commands that no training command equals, even without its
politeness, capitals and full stop. "exact" is on those; "exact_official" is on the demo's own test split, whose words
and templates are held out on purpose, to be known from pretraining, and which has times.

Retrofits: the 16-bit twin trained on into ternary weights with itself as the teacher, and SmolLM2-135M on general text
(the Python language reference), where rows of 576 leave a quarter of the weights ternary, against an adapter that was
trained on the same text for 4 bits. Files named "fit" have at most the bytes of the ternary file, with types that
`edgeft export --fit` chooses.

Every cell is kept in FOLDER/cells.json as soon as it is known; trainings stop after --seconds and continue the next
time. The cells "speed" time decoding and want the machine to themselves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantization_aware import keep, read_cells, text_pieces, write_lines

MODEL = "smollm2-135m"
SHAPE = {
    "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 2048, "max_position_embeddings": 512,
}  # fmt: skip
TRAIN, HELD_OUT, SEEDS_OF_DATA = 24_000, 300, 15
EPOCHS, TUNE, STEP_TOKENS = 3.0, 0.2, 1024
SEEDS = (0, 1, 2)
RATES = (1e-3, 2e-3)
KINDS: Mapping[str, dict[str, Any]] = {"ternary": {"target": "gguf-tq2_0"}, "full": {}}
TEXT_TRAIN, TEXT_TEST = 77, 24

Cells = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs, files and cells.json")
    parser.add_argument("--only", default=".", help="regular expression: compute the cells whose names it fits")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further cell after so long")
    parser.add_argument("--list", action="store_true", help="list the cells and whether they are known")
    parser.add_argument("--json", action="store_true", help="print one JSON object without line breaks")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    prepare_data(options.work)
    known = read_cells(options.work)
    if options.list:
        print("\n".join(f"{'+' if name in known else '-'} {name}" for name in plan()))
        return
    compute(options)
    figures = report(read_cells(options.work))
    print(json.dumps(figures) if options.json else json.dumps(figures, indent=1))


def compute(options: argparse.Namespace) -> None:
    from edgeft.train import Interrupted

    deadline = time.monotonic() + options.seconds
    for name, cell in plan().items():
        left = deadline - time.monotonic()
        if name in read_cells(options.work) or not re.search(options.only, name) or left < 20:
            continue
        print(name, f"{left:.0f} s left", file=sys.stderr, flush=True)
        # A training writes a checkpoint and is continued the next time.
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, min(left, 1e6))
        try:
            keep(options.work, name, cell(options.work))
        except Interrupted:
            return
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def plan() -> dict[str, Callable[[Path], Any]]:
    """Name of a cell -> how to compute it, in an order in which each finds what it needs."""
    cells: dict[str, Callable[[Path], Any]] = {}
    for kind in KINDS:
        for rate in RATES:
            cells[f"tune/{kind}/{rate:g}"] = lambda work, kind=kind, rate=rate: tune_cell(work, kind, rate)
    for seed in SEEDS:
        for kind in KINDS:
            cells[f"train/{kind}-{seed}"] = lambda work, kind=kind, seed=seed: train_cell(work, kind, seed)
    cells["retrofit/small"] = retrofit_small
    twins = [name for seed in SEEDS for name in (f"ternary-{seed}-tq2_0", f"full-{seed}-f16")]
    for name in (*twins, "full-0-q4", "full-0-fit", "small-tq2_0"):
        cells[f"file/{name}"] = lambda work, name=name: file_cell(work, name)
    cells["round-trip"] = round_trip
    cells["retrofit/smollm2"] = retrofit_smollm2
    cells["retrofit/lora"] = retrofit_lora
    for name in ("smollm2-tq2_0", "lora-q4_0", "lora-fit"):
        cells[f"text/{name}"] = lambda work, name=name: text_cell(work, name)
    for name in ("ternary-0-tq2_0", "full-0-q4", "full-0-fit", "smollm2-tq2_0", "lora-q4_0", "lora-fit"):
        cells[f"speed/{name}"] = lambda work, name=name: speed_cell(work, name)
    return cells


# --- Data -----------------------------------------------------------------------


def prepare_data(work: Path) -> None:
    if (work / "text" / "test.jsonl").is_file():
        return
    held_out, lines = generated()
    write_lines(work / "data", "train", lines[:TRAIN])
    write_lines(work / "data", "valid", held_out[:HELD_OUT])
    write_lines(work / "data", "test", held_out[HELD_OUT:])
    (work / "shape.json").write_text(json.dumps(SHAPE))
    pieces = [json.dumps({"text": piece}) for piece in text_pieces()]
    write_lines(work / "text", "test", pieces[:TEXT_TEST])
    write_lines(work / "text", "train", pieces[TEXT_TEST:][:TEXT_TRAIN])


def generated() -> tuple[list[str], list[str]]:
    """Held-out and training conversations: no time in any command, and no command of one side differs from one of the
    other by politeness, capitals or a full stop alone. Shuffled."""
    from edgeft.data.smart_home import generate

    by_core: dict[str, dict[str, str]] = {}
    first, generate.SEED, whole = generate.SEED, generate.SEED, generate.INTENTS
    generate.INTENTS = {name: dataclasses.replace(intent, timed=False) for name, intent in whole.items()}
    for number in range(SEEDS_OF_DATA):
        generate.SEED = first + number
        for command in generate.commands("train"):
            pairs = (("system", generate.SYSTEM), ("user", command.text), ("assistant", command.call.json()))
            line = json.dumps({"messages": [{"role": role, "content": said} for role, said in pairs]})
            by_core.setdefault(command.core.lower(), {})[command.text] = line
    generate.SEED, generate.INTENTS = first, whole
    cores = sorted(by_core)
    random.Random(0).shuffle(cores)
    held_out = [next(iter(by_core[core].values())) for core in cores[: 2 * HELD_OUT]]
    lines = [line for core in cores[2 * HELD_OUT :] for line in by_core[core].values()]
    random.Random(0).shuffle(lines)
    return held_out, lines


# --- Twins ----------------------------------------------------------------------


def twin(work: Path, kind: str, rate: float, epochs: float, out: Path, seed: int = 0) -> Any:
    from edgeft.train import TrainConfig

    settings: dict[str, Any] = {"patience": 0, "keep": 1, "save_every": 400, "batch_tokens": STEP_TOKENS, **KINDS[kind]}
    return TrainConfig(
        MODEL, str(work / "data"), out, method="full", from_scratch=str(work / "shape.json"), learning_rate=rate,
        epochs=epochs, seed=seed, **settings,
    )  # fmt: skip


def run_training(config: Any) -> dict[str, Any]:
    from edgeft.train import read_config, train

    resume = (config.out / "config.toml").is_file()
    outcome = train(read_config(config.out) if resume else config, resume=resume)
    return {"steps": outcome.steps, "seconds": round(outcome.seconds, 1), **outcome.manifest.evaluation}


def tune_cell(work: Path, kind: str, rate: float) -> dict[str, Any]:
    return run_training(twin(work, kind, rate, TUNE, work / "runs" / f"tune-{kind}-{rate:g}"))


def train_cell(work: Path, kind: str, seed: int) -> dict[str, Any]:
    """With the rate that was best in tuning."""
    cells = read_cells(work)
    rate = min(RATES, key=lambda rate: cells[f"tune/{kind}/{rate:g}"]["best_val_loss"])
    config = twin(work, kind, rate, EPOCHS, work / "runs" / f"{kind}-{seed}", seed)
    return {"rate": rate, **run_training(config)}


def retrofit_small(work: Path) -> dict[str, Any]:
    """The 16-bit twin into ternary weights in a tenth of a pass, half of the loss its own distribution."""
    from edgeft.train import TrainConfig

    config = TrainConfig(
        str(work / "runs" / "full-0" / "model"), str(work / "data"), work / "runs" / "small", method="full",
        target="gguf-tq2_0", teacher=0.5, learning_rate=1e-3, epochs=TUNE, patience=0, keep=1, save_every=100,
        batch_tokens=STEP_TOKENS,
    )  # fmt: skip
    return run_training(config)


def retrofit_smollm2(work: Path) -> dict[str, Any]:
    from edgeft.train import TrainConfig

    config = TrainConfig(
        MODEL, str(work / "text"), work / "runs" / "smollm2", method="full", target="gguf-tq2_0", teacher=0.5,
        learning_rate=2e-4, epochs=2, patience=0, keep=1, save_every=10, batch_tokens=512, micro_tokens=256,
    )  # fmt: skip
    return run_training(config)


def retrofit_lora(work: Path) -> dict[str, Any]:
    """What it is measured against: an adapter on the same text, trained for 4 bits."""
    from edgeft.train import TrainConfig

    config = TrainConfig(
        MODEL, str(work / "text"), work / "runs" / "lora", method="lora", target="gguf-q4_0", epochs=2, patience=0,
        keep=1, save_every=20, batch_tokens=512, micro_tokens=512,
    )  # fmt: skip
    return run_training(config)


# --- Files ----------------------------------------------------------------------


def write(work: Path, name: str) -> Path:
    """The file `<run>-<target>`; "fit" has at most the bytes of the ternary file it stands beside."""
    from edgeft import export as workflow
    from edgeft.progress import Silent

    out = work / "files" / f"{name}.gguf"
    out.parent.mkdir(exist_ok=True)
    if out.is_file():
        return out
    run, how = name.rsplit("-", 1)
    extra: dict[str, Any] = {}
    if how == "fit":
        small = run == "full-0"
        extra["bytes"] = write(work, "ternary-0-tq2_0" if small else "smollm2-tq2_0").stat().st_size
        data, matrix = work / ("data" if small else "text"), out.with_suffix(".imatrix")
        extra["imatrix"] = workflow.calibrate(
            workflow.find(str(work / "runs" / run), None, Silent()), str(data), matrix
        )
    prepared = workflow.prepare(
        str(work / "runs" / run), "gguf" if how == "fit" else f"gguf-{how}", out=out, extra=extra
    )
    workflow.export(prepared, Silent())
    return out


def file_cell(work: Path, name: str) -> dict[str, Any]:
    from edgeft.data.load import load_split
    from edgeft.evaluate import predict, reference_nll
    from edgeft.sessions import open_session

    file, found = write(work, name), {}
    with open_session(str(file)).session as session:
        test = load_split(str(work / "data"), "test")
        for key, examples in (("exact", test), ("exact_official", load_split("smart-home", "test"))):
            found[key] = [int(answer.exact) for answer in predict(session, examples, whole=False)]
        return {"bytes": file.stat().st_size, "nll": reference_nll(session, file, test), **found}


def round_trip(work: Path) -> dict[str, Any]:
    """Trained weights, file and llama.cpp: equal blocks, and greedy answers of the graph in float32."""
    import torch
    import transformers

    from edgeft import export as workflow
    from edgeft.chat import Sampling
    from edgeft.data.load import load_split
    from edgeft.progress import Silent
    from edgeft.sessions import open_session
    from edgeft.verify.codes import check_codes

    file, run, same, length = write(work, "ternary-0-tq2_0"), work / "runs" / "ternary-0", 0, 48
    (codes,) = check_codes(workflow.find(str(run), None, Silent()).source, file)
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    examples = load_split(str(work / "data"), "test")[:50]
    with open_session(str(file)).session as session:
        for example in examples:
            ids = session.render(example.messages[:-1])
            said = [delta.token for delta in session.generate(ids, Sampling(max_tokens=length, temperature=0.0))]
            made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=length)[0][len(ids) :].tolist()
            ends = {model.config.eos_token_id}
            same += [token for token in said if token is not None] == [token for token in made if token not in ends]
    return {"codes": codes.detail, "equal": codes.value, "same_greedy_answers": same, "answers": len(examples)}


def text_cell(work: Path, name: str) -> dict[str, Any]:
    """Loss on held-out general text, in llama.cpp."""
    from edgeft.data.encode import encode_all
    from edgeft.data.load import load_split
    from edgeft.models import resolve
    from edgeft.models.text import load_text_side
    from edgeft.sessions import open_session
    from edgeft.verify.divergence import file_nll

    text, file = load_text_side(resolve(MODEL, want="hf").path), write(work, name)
    examples = load_split(str(work / "text"), "test")
    encoded = encode_all(examples, text.need_template(), text.tokenize, text.eos_tokens).encoded
    with open_session(str(file)).session as session:
        nll, tokens = file_nll(session, encoded)
    return {"bytes": file.stat().st_size, "nll": nll, "tokens": tokens}


def speed_cell(work: Path, name: str) -> dict[str, Any]:
    """Median decoding speed over 15 answers of 32 tokens."""
    import statistics

    from edgeft.chat import Sampling
    from edgeft.sessions import open_session

    rates = []
    opened = open_session(str(write(work, name)))
    with opened.session as session:
        ids = session.render([{"role": "user", "content": "please dim the lamp in the kitchen"}])
        for _ in range(15):
            deltas = list(session.generate(ids, Sampling(max_tokens=32, temperature=0.0)))
            rates += [delta.usage.decode_tokens_per_s for delta in deltas if delta.usage]
    return {"tokens_per_s": round(statistics.median(rates), 1), "runtime": opened.runtime}


# --- Report ---------------------------------------------------------------------


def report(cells: Cells) -> dict[str, Any]:
    return {
        "tuning": {name: cells[name]["best_val_loss"] for name in cells if name.startswith("tune/")},
        "training": {name: cells[name] for name in cells if name.startswith(("train/", "retrofit/"))},
        "files": {name: line(cells, name) for name in cells if name.startswith(("file/", "text/"))},
        "twins": twins(cells),
        "round_trip": cells.get("round-trip"),
        "verdicts": verdicts(cells),
    }


def line(cells: Cells, name: str) -> dict[str, Any]:
    cell = cells[name]
    shares = {key: round(sum(cell[key]) / len(cell[key]), 4) for key in ("exact", "exact_official") if key in cell}
    speed = cells.get(f"speed/{name.split('/')[1]}", {}).get("tokens_per_s")
    return {"bytes": cell["bytes"], "nll": round(cell["nll"], 4), **shares, "tokens_per_s": speed}


def twins(cells: Cells) -> dict[str, Any] | None:
    """Exact match of the ternary twins as a share of the 16-bit ones', over the seeds that are known.

    The interval is a paired bootstrap over commands; a drawn command counts with all seeds.
    """
    import numpy as np

    names = {seed: (f"file/ternary-{seed}-tq2_0", f"file/full-{seed}-f16") for seed in SEEDS}
    seeds = [seed for seed in SEEDS if set(names[seed]) <= cells.keys()]
    if not seeds:
        return None
    ternary, full = (np.array([cells[names[seed][side]]["exact"] for seed in seeds]) for side in (0, 1))
    drawn = np.random.default_rng(0).integers(0, full.shape[1], (10_000, full.shape[1]))
    shares = ternary.sum(0)[drawn].sum(1) / np.maximum(1, full.sum(0)[drawn].sum(1))
    low, high = np.percentile(shares, [2.5, 97.5])
    found = {"share": ternary.sum() / full.sum(), "low": low, "high": high}
    each = {f"share_seed_{seed}": a.sum() / b.sum() for seed, a, b in zip(seeds, ternary, full, strict=True)}
    return {"seeds": len(seeds), **{key: round(float(value), 4) for key, value in (found | each).items()}}


def verdicts(cells: Cells) -> dict[str, str]:
    from edgeft.ternary_verdict import Figures, verdict

    def figures(name: str) -> Figures | None:
        known = next((cells[at] for at in (f"file/{name}", f"text/{name}") if at in cells), None)
        speed = cells.get(f"speed/{name}", {}).get("tokens_per_s")
        return Figures(name, known["bytes"], known["nll"], speed) if known else None

    others = ("full-0-q4", "full-0-fit")
    pairs = [(ternary, other) for ternary in ("ternary-0-tq2_0", "small-tq2_0") for other in others]
    pairs += [("smollm2-tq2_0", other) for other in ("lora-q4_0", "lora-fit")]
    found = {}
    for ternary, other in pairs:
        both = figures(ternary), figures(other)
        if both[0] and both[1]:
            found[f"{ternary} against {other}"] = verdict(dataclasses.replace(both[0], name=ternary), both[1])
    return found


if __name__ == "__main__":
    main()
