"""A real cascade on this machine: is a learned policy better than confidence, and is a certified risk kept?

    python benchmarks/cascade.py --work FOLDER [--questions 600] [--only heavy|light|answers|report] [--json]

Tasks made by code, each with easy and hard questions (`cascade_questions.py`). The cloud is SmolLM2-135M trained on
them (Q8_0) behind `edgeft serve` on loopback; the device is the same base trained on a part of that (Q4_0), in edgeft's
own runtime. Each question is asked once on both sides by the code behind `edgeft cascade tune`. Everything is kept in
FOLDER, so that a stopped run goes on; a step can be computed alone with --only, and a report of the first questions is
made with a smaller --questions once these are answered.

What the device was trained on, which tasks are asked and how long lists are was chosen by development questions
(--purpose development), which are not among the reported ones: the device should be right on 40 to 60 %.

Each of five seeds splits a task's questions in two: on the first half a policy is tuned, on the second it is judged.
APGR is the mean over seeds. Intervals: the middle 95 % of 2,000 resamples of the questions, each question kept or left
in all five splits and in both policies at once, so that the overlap of the splits does not narrow them. They are of
the policies as tuned: what another tuning set would have changed shows in the seeds only.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade_questions import Purpose, examples

from edgeft.cascade.answers import AnswerFile, Case, Collector
from edgeft.cascade.metrics import curve, interval
from edgeft.cascade.settings import PolicySettings
from edgeft.cascade.tune import Goal, choose, fitted, fitted_policy, grown, halves, outcome, policy_for, risks
from edgeft.errors import CheckFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

MODEL, TARGETS = "smollm2-135m", {"heavy": "gguf-q8_0", "light": "gguf-q4_0"}
EXAMPLES: Mapping[str, Mapping[str, int]] = {
    "heavy": {"home": 800, "dates": 900, "orders": 600, "sort": 900},
    "light": {"home": 150, "dates": 200, "orders": 120, "sort": 400},
}
"""Those of the light model are the first of the heavy one's."""
ASKED = "dates,orders,sort"
"""Of 40 development questions of "home" the device had 10 right: too few, and its answers are the longest."""
MAX_TOKENS, STEP_TOKENS, RATE, RANK = 64, 512, 2e-3, 16
SEEDS, RESPLITS, ROUNDS = range(5), 1000, 2000
ALPHAS = (0.05, 0.1, 0.15)
"""Certified risks: shares of answers kept though wrong, while the cloud's was right."""
CERTAINTIES = (0.95, 0.99)
"""Of the measured half, which is a sample itself, the first is broken more often than in one of twenty."""
LOGPROBS = {"mean": "logprob_mean", "sum": "logprob_sum", "least": "logprob_q00"}
"""Of the answer's tokens: Chow-Average, Chow-Sum (the probability of the whole answer) and the least certain one."""
CONFIDENCES, SIGNALS = ("mean", "sum"), (*LOGPROBS, "quantile", "margin", "entropy")
BATCH = 25
"""Questions between two lines of progress."""

CASCADE = """schema = 1
[local]
model = "light.gguf"
threads = {threads}
[[cloud]]
name = "heavy"
url = "{url}/v1"
model = "{heavy}"
price-in = 0.00015
price-out = 0.0006
[policy]
kind = "on-error"
[privacy]
redact = false
[audit]
enabled = false
"""

# --- The two models -------------------------------------------------------------


def make_model(work: Path, name: str) -> None:
    """Train and export, unless the file is there."""
    from edgeft import export
    from edgeft.paths import write_text
    from edgeft.progress import Silent
    from edgeft.train import TrainConfig, read_config, train

    file, run, data = work / f"{name}.gguf", work / "runs" / name, work / f"train-{name}"
    if file.is_file():
        return
    lessons = [one for task, count in EXAMPLES[name].items() for one in examples(task, "training", count)]
    random.Random(0).shuffle(lessons)
    data.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"messages": list(one.messages)}) + "\n" for one in lessons)
    write_text(data / "train.jsonl", "".join(lines))
    resume = (run / "config.toml").is_file()
    config = TrainConfig(
        MODEL, str(data), run, method="lora", rank=RANK, epochs=1.0, learning_rate=RATE, batch_tokens=STEP_TOKENS,
        micro_tokens=STEP_TOKENS, save_every=20, keep=1,
    )  # fmt: skip
    done = train(read_config(run) if resume else config, resume=resume)
    print(f"{name}: {done.steps} steps, {done.tokens} tokens, {done.seconds:.0f} s", file=sys.stderr, flush=True)
    export.export(export.prepare(str(run), TARGETS[name], out=file), Silent())


# --- Answers --------------------------------------------------------------------


def answer(work: Path, tasks: Sequence[str], purpose: Purpose, questions: int, threads: int) -> dict[str, list[Case]]:
    """Both sides' answers, of every task; asked where they are not yet known. The server's port changes nothing."""
    import tempfile

    from edgeft.artifact import digest_of
    from edgeft.paths import write_text

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from serving import serving

    with tempfile.TemporaryDirectory() as folder:
        options = ("--threads", str(threads), "--threads-batch", str(threads), "--no-log")
        # Answers are kept under the model's name: another file's are not to be taken for this one's.
        heavy = f"heavy-{digest_of(work / 'heavy.gguf')[:8]}"
        with serving(Path(folder), f"{heavy}={work / 'heavy.gguf'}", *options) as server:
            file = work / f"cascade-{'-'.join(tasks)}.toml"
            write_text(file, CASCADE.format(url=server.url, heavy=heavy, threads=threads))
            return {task: collect(file, task, purpose, questions) for task in tasks}


def collect(file: Path, task: str, purpose: Purpose, questions: int) -> list[Case]:
    from edgeft.cascade import Cascade
    from edgeft.progress import Silent

    asked, found = examples(task, purpose, questions), list[Case]()
    began = time.monotonic()
    with Cascade.open(file, calibrated=False) as cascade:
        answers = AnswerFile(file.parent / f"answers-{task}.jsonl")
        collector = Collector(cascade, answers, MAX_TOKENS, "exact")
        for start in range(0, questions, BATCH):
            found += collector.collect(asked[start : start + BATCH], 1.0, Silent())
            seconds = time.monotonic() - began
            print(f"{task}: {len(found)} of {questions} answered, {seconds:.0f} s", file=sys.stderr, flush=True)
    return found


# --- Report ---------------------------------------------------------------------


def report(cases: Mapping[str, Sequence[Case]], resplits: int = RESPLITS, rounds: int = ROUNDS) -> dict[str, Any]:
    tasks = {task: judged(every, rounds) for task, every in cases.items()}
    above = [each["above"]["confidence"] for each in tasks.values()]
    return {
        "tasks": tasks,
        "learned_apgr": sum(each["apgr"]["learned"] for each in tasks.values()) / len(tasks),
        "tasks_above_confidence": sum(each["low"] > 0 for each in above),
        "risk": {task: kept(every, resplits) for task, every in cases.items()},
    }


def split(cases: Sequence[Case], seed: int) -> tuple[list[int], list[int]]:
    """Places of the half that is tuned on, and of the half that is judged on."""
    places = list(range(len(cases)))
    random.Random(seed).shuffle(places)
    return places[: len(cases) // 2], places[len(cases) // 2 :]


def judged(cases: Sequence[Case], rounds: int) -> dict[str, Any]:
    """APGR of every policy over the seeds, and how far the learned one is above confidence and the best signal.

    Confidence is the better of the two that are used for it, and the best signal the best of all, as the judged halves
    show: a choice that nobody could make beforehand, in favour of what is to be beaten.
    """
    import numpy as np

    local, cloud, cost = columns(cases)
    splits = [split(cases, seed) for seed in SEEDS]
    found = [policy_risks(cases, tuned) for tuned, _ in splits]
    held = [np.array(test) for _, test in splits]

    def apgr(name: str, weights: NDArray[np.int64]) -> float:
        each = []
        for risk, test in zip(found, held, strict=True):
            rows = np.repeat(test, weights[test])
            each.append(curve(risk[name][rows], local[rows], cloud[rows], cost[rows]).apgr)
        return float(np.mean(each))

    def asked_at(name: str, share: float) -> float:
        each = (
            curve(risk[name][test], local[test], cloud[test], cost[test])
            for risk, test in zip(found, held, strict=True)
        )
        return float(np.mean([one.reaching(share)[0] for one in each]))

    generator, size = np.random.default_rng(0), len(cases)
    figures = {name: apgr(name, np.ones(size, dtype=np.int64)) for name in found[0]}
    rivals = {"confidence": max(CONFIDENCES, key=figures.__getitem__), "signal": max(SIGNALS, key=figures.__getitem__)}
    again: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        weights = np.bincount(generator.integers(0, size, size), minlength=size)
        learned = apgr("learned", weights)
        for name, rival in rivals.items():
            again[name].append(learned - apgr(rival, weights))
    return {
        "questions": size,
        "local_quality": float(local.mean()),
        "cloud_quality": float(cloud.mean()),
        "worth_asking": float(((local == 0) & (cloud == 1)).mean()),
        "apgr": figures,
        "rivals": rivals,
        "above": {
            name: dict(
                zip(("mean", "low", "high"), (figures["learned"] - figures[rivals[name]], *interval(each)), strict=True)
            )
            for name, each in again.items()
        },
        "asked_for_95": {name: asked_at(name, 0.95) for name in figures},
    }


def columns(cases: Sequence[Case]) -> tuple[Floats, Floats, Floats]:
    import numpy as np

    local, cloud, cost = np.array([(case.local_right, case.cloud_right, case.cost) for case in cases], float).T
    return local, cloud, cost


def policy_risks(cases: Sequence[Case], tuned: Sequence[int]) -> dict[str, Floats]:
    """Of all cases, by policies that saw only those at `tuned`."""
    import numpy as np

    local, cloud, _ = columns(cases)
    seen = [cases[place] for place in tuned]
    fits = {"learned": fitted(seen), "boosted": grown(seen)}
    found = {name: np.array(risks(fitted_policy(name, parts), cases)) for name, parts in fits.items()}
    for name in ("quantile", "margin", "entropy"):
        found[name] = np.array(risks(policy_for(PolicySettings(), name), cases))
    for name, feature in LOGPROBS.items():
        found[name] = np.array([-case.features[feature] for case in cases])
    return {**found, "random": np.zeros(len(cases)), "oracle": cloud - local}


def kept(cases: Sequence[Case], resplits: int) -> dict[str, Any]:
    """Tuned for a risk again and again: how often the judged half stays within it, by each promise.

    The steps of `tune`, with one fit for all goals.
    """
    goals = [Goal("risk", alpha, sure) for alpha in ALPHAS for sure in (None, *CERTAINTIES)]
    found: dict[str, list[dict[str, float]]] = {str(goal): [] for goal in goals}
    refused: dict[str, str] = {}
    for seed in range(resplits):
        tuned, test = split(cases, 1000 + seed)
        fit, hold = halves([cases[place] for place in tuned], str(seed))
        policy = fitted_policy("learned", fitted(fit))
        unseen = [cases[place] for place in test]
        risk, risk_unseen = risks(policy, hold), risks(policy, unseen)
        for goal in goals:
            try:
                threshold = choose(risk, hold, goal)
            except CheckFailed as failure:
                refused[str(goal)] = failure.message
            else:
                found[str(goal)].append(outcome(risk_unseen, unseen, threshold))
    return {str(goal): promise(found[str(goal)], goal.value, refused.get(str(goal))) for goal in goals}


def promise(found: Sequence[Mapping[str, float]], alpha: float, refusal: str | None) -> dict[str, Any]:
    """A re-split whose calibration half was too small for the goal promised nothing, and is counted apart."""
    count = len(found)
    if not count:
        return {"promised": 0, "refused": refusal}
    return {
        "promised": count,
        "within": sum(each["kept_wrong"] <= alpha for each in found) / count,
        "mean_risk": math.fsum(each["kept_wrong"] for each in found) / count,
        "mean_deferred": math.fsum(each["deferred"] for each in found) / count,
    }


def tables(figures: Mapping[str, Any]) -> str:
    """As Markdown."""
    tasks = figures["tasks"]
    above = (
        f"above confidence with an interval without zero on {figures['tasks_above_confidence']} of {len(tasks)} tasks"
    )
    summary = f"Learned: mean APGR {figures['learned_apgr']:.3f}, {above}."
    return "\n\n".join([accuracies(tasks), summary, signals(tasks), promises(figures["risk"])])


def accuracies(tasks: Mapping[str, Any]) -> str:
    names = (
        "task",
        "questions",
        "device",
        "cloud",
        "worth asking",
        "learned",
        "confidence only",
        "best signal",
        "oracle",
    )
    lines = [row((*names, "learned above confidence", "above the best signal", "asked for 95 % of the gap"))]
    lines.append("|---" * 12 + "|")
    for task, each in tasks.items():
        apgr, rivals = each["apgr"], each["rivals"]
        shares = [f"{each[name]:.1%}" for name in ("local_quality", "cloud_quality", "worth_asking")]
        against = [f"{apgr[rival]:.3f} ({rival})" for rival in rivals.values()]
        above = ["{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**one) for one in each["above"].values()]
        asked = " against ".join(f"{each['asked_for_95'][name]:.0%}" for name in ("learned", rivals["confidence"]))
        learned, oracle = (f"{apgr[name]:.3f}" for name in ("learned", "oracle"))
        lines.append(row((task, each["questions"], *shares, learned, *against, oracle, *above, asked)))
    return "\n".join(lines)


def signals(tasks: Mapping[str, Any]) -> str:
    names = ("learned", "boosted", *SIGNALS, "random", "oracle")
    lines = [row(("APGR", *names)), "|---" * (1 + len(names)) + "|"]
    lines += [row((task, *(f"{each['apgr'][name]:.3f}" for name in names))) for task, each in tasks.items()]
    return "\n".join(lines)


def promises(risk: Mapping[str, Any]) -> str:
    names = ("task", "goal", "re-splits with a promise", "kept", "mean risk", "asked")
    lines = [row(names), "|---" * len(names) + "|"]
    for task, goals in risk.items():
        for goal, one in goals.items():
            known = (one["within"], one["mean_risk"], one["mean_deferred"]) if one["promised"] else ()
            cells = [f"{value:.1%}" for value in known] or ["refused", "", ""]
            lines.append(row((task, f"`{goal}`", one["promised"], *cells)))
    return "\n".join(lines)


def row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs, models and answers")
    parser.add_argument("--questions", type=int, default=600, help="per task")
    parser.add_argument("--only", choices=("heavy", "light", "answers", "report"), help="this step alone")
    parser.add_argument("--purpose", choices=("development", "reported"), default="reported", help="which questions")
    parser.add_argument("--tasks", default=ASKED)
    parser.add_argument("--threads", type=int, default=0, help="of each model; 0: one per core")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    for name in TARGETS:
        if options.only in (None, name):
            make_model(work, name)
    if options.only in TARGETS:
        return
    cases = answer(work, options.tasks.split(","), options.purpose, options.questions, options.threads)
    if options.only == "answers":
        return
    figures = report(cases)
    print(json.dumps(figures) if options.json else tables(figures))


if __name__ == "__main__":
    main()
