"""`edgeft train`: fine-tune a base model, or continue an interrupted run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeft.cli._output import ConsoleProgress, dry_run_option, json_option, made, note, print_json
from edgeft.errors import UsageError

if TYPE_CHECKING:
    from edgeft.config import Value
    from edgeft.train import Outcome, TrainConfig
    from edgeft.train.workflow import Prepared

_EXAMPLES = """\b
Examples:
  edgeft train --model smollm2-135m --data smart-home
  edgeft train --model ./Qwen3-0.6B --data chats.jsonl --rank 32 --epochs 2
  edgeft train --model smollm2-135m --data smart-home --dry-run
  edgeft train --model base-q4.gguf --data smart-home     an adapter for that very file
  edgeft train --model smollm2-135m --data smart-home --for gguf-q4_0     what is trained is what ships
  edgeft train --model smollm2-135m --data smart-home --from-scratch small.json --for gguf-tq2_0     ternary
  edgeft train --resume runs/smart-home-1
"""


@click.command(epilog=_EXAMPLES)
@click.option("--model", metavar="M", help="Base model: a folder, a .gguf, hf:org/name or an alias.")
@click.option("--data", metavar="D", help="Data set: a file, a prepared folder or a built-in name.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. Default: runs/<data>-<number>.")
@click.option("--resume", type=click.Path(path_type=Path), help="Continue this run; its own settings apply.")
@click.option(
    "--method",
    type=click.Choice(["qlora", "lora", "full", "gguf"]),
    help="What is trained. Default: qlora; gguf for a .gguf file.",
)
@click.option(
    "--for",
    "target",
    metavar="TARGET",
    help="Train through the rounding of this export target, such as gguf-q4_0; docs/quantization-aware.md.",
)
@click.option("--quantize-after", type=float, help="With --for: share of the steps before rounding begins. Default: 0.")
@click.option(
    "--tune",
    type=click.Choice(["adapter", "scales", "both"]),
    help="With --for: an adapter, the scales of the rounded base's blocks, or both. Default: adapter.",
)
@click.option(
    "--teacher", type=float, help="With --for: share of the loss that keeps to the unrounded model. Default: 0."
)
@click.option(
    "--from-scratch",
    is_flag=False,
    flag_value="base",
    metavar="[SHAPE]",
    help="Random weights, in the base's shape or that of a JSON file; docs/ternary.md.",
)
@click.option("--ramp", type=float, help="Ternary: share of the steps in which rounding grows. Default: 0.2.")
@click.option(
    "--ternary-scale", type=click.Choice(["row", "tensor", "block"]), help="Ternary: what has a scale. Default: row."
)
@click.option(
    "--activations", type=click.Choice(["8", "16"]), help="Ternary: bits of layers' inputs in training. Default: 16."
)
@click.option("--rank", type=click.IntRange(1), help="Rank of the adapter. Default: 16.")
@click.option("--alpha", type=float, help="Scale of the adapter is alpha / rank. Default: twice the rank.")
@click.option("--dropout", type=float, help="Dropout before the adapter. Default: 0.")
@click.option("--target-modules", help="Layers with an adapter, comma separated. Default: all linear layers.")
@click.option("--rslora", is_flag=True, help="Scale by alpha / sqrt(rank): for high ranks.")
@click.option("--dora", is_flag=True, help="Train magnitudes too (DoRA): slower, sometimes better at low rank.")
@click.option("--epochs", type=float, help="Passes over the data. Default: 3.")
@click.option("--learning-rate", type=float, help="Peak learning rate. Default: 1e-3 for adapters, 2e-5 for full.")
@click.option("--scheduler", type=click.Choice(["cosine", "linear", "constant"]), help="Default: cosine.")
@click.option("--warmup", type=float, help="Share of the steps with rising learning rate. Default: 0.05.")
@click.option("--weight-decay", type=float, help="Default: 0.")
@click.option("--max-grad-norm", type=float, help="Gradients are clipped to this norm. Default: 1.")
@click.option("--batch-tokens", type=click.IntRange(1), help="Tokens per optimizer step. Default: by data size.")
@click.option("--micro-tokens", type=click.IntRange(1), help="Tokens per pass; less takes less memory.")
@click.option("--max-length", type=click.IntRange(8), help="Longest example in tokens. Default: the model's context.")
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    default=None,
    help="Recompute activations: much less memory, a third more time. Default: only if needed.",
)
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float32"]), help="Default: by hardware.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Default: a GPU if there is one.")
@click.option("--eval-every", type=click.IntRange(1), help="Steps between validations.")
@click.option(
    "--patience", type=click.IntRange(0), help="Validations without gain before stopping; 0: never. Default: 3."
)
@click.option("--save-every", type=click.IntRange(1), help="Steps between checkpoints.")
@click.option("--keep", type=click.IntRange(1), help="Checkpoints to keep. Default: 2.")
@click.option("--seed", type=int, help="Same seed, same run. Default: 0.")
@click.option("--samples", type=click.IntRange(0), help="Held-out prompts to answer at each validation. Default: 0.")
@click.option(
    "--ship-to", "device_profile", metavar="DEVICE", help="Say which file that device wants, and how to train for it."
)
@click.option("--finish", is_flag=True, help="With --resume: train no further, keep what the run has learned.")
@json_option
@dry_run_option
def train(
    model: str | None,
    data: str | None,
    out: Path | None,
    resume: Path | None,
    device_profile: str | None,
    finish: bool,
    as_json: bool,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Fine-tune a base model on a data set.

    Learns the assistant's answers only, through the model's own chat template. Before it starts it says what it will
    take; a run that cannot fit into memory is refused. A kill at any instant loses the steps since the last
    checkpoint and nothing else.
    """
    from edgeft import train as workflow
    from edgeft.train.advice import advice
    from edgeft.train.workflow import Interrupted

    config = _resumed(resume, model, data, flags) if resume else _configured(model, data, out, flags)
    if finish and _asked_to_finish(resume, dry_run):
        return
    progress = ConsoleProgress()
    prepared, told = None, []
    try:
        if dry_run or not _is_finished(config):
            prepared = workflow.prepare(config, progress)
            told = advice(prepared, device_profile)
            _show_plan(prepared, told)
        if dry_run and prepared is not None:
            if as_json:
                print_json({**_plan_dict(prepared), "advice": told})
            return
        made(config.out)
        outcome = workflow.train(config, progress, resume=resume is not None, prepared=prepared)
    except Interrupted as stopped:
        progress.finish()
        note(f"\nstopped after a checkpoint; continue with:\n  {stopped.command}")
        raise
    finally:
        progress.finish()
    if as_json:
        print_json(_outcome_dict(outcome))
    else:
        _report(outcome)


def _asked_to_finish(resume: Path | None, dry_run: bool) -> bool:
    """Ask the run to end where it is; whether a job that trains it does the rest."""
    from edgeft import jobs
    from edgeft.run import Run

    if resume is None:
        raise UsageError("--finish needs the run that is meant", "edgeft train --resume RUN --finish")
    place = resume.absolute()
    training = [job for job in jobs.list_jobs() if job.made == place and not job.state.ended]
    if dry_run:
        note(f"would end {resume} where it is and keep what it has learned")
    elif training:
        jobs.finish(training[-1])
        note(f"job {training[-1].id} ends after this step; edgeft jobs watch {training[-1].id}")
    else:
        Run(place).ask_to_finish()
    return dry_run or bool(training)


def _configured(model: str | None, data: str | None, out: Path | None, flags: dict[str, Any]) -> TrainConfig:
    from edgeft import config as settings
    from edgeft.train import TrainConfig

    if not model or not data:
        raise UsageError("edgeft train needs --model and --data", "Or --resume RUN to continue an interrupted run.")
    chosen = {name: value for name, value in flags.items() if value is not None}
    values = settings.load()
    chosen.setdefault("method", _method(model, values["train.method"], chosen))
    for name in ("rank", "learning_rate"):
        chosen.setdefault(name, values[f"train.{name.replace('_', '-')}"].value)
    if "activations" in chosen:
        chosen["activations"] = int(chosen["activations"])
    if "from_scratch" in chosen:
        chosen["from_scratch"] = _absolute(chosen["from_scratch"])
    if "target_modules" in chosen:
        chosen["target_modules"] = tuple(name.strip() for name in chosen["target_modules"].split(","))
    return TrainConfig(model=_absolute(model), data=_absolute(data), out=out or _free_folder(data), **chosen)


def _method(model: str, setting: Value, chosen: dict[str, Any]) -> str:
    """Who names a GGUF file wants that file to ship: it is trained on as it is, unless somebody said otherwise."""
    path, target = Path(model).expanduser(), chosen.get("target")
    if chosen.get("from_scratch"):
        return "full"
    if target is not None and setting.origin == "default":
        from edgeft.train.grids import default_method

        return default_method(target)
    if setting.origin == "default" and path.suffix == ".gguf" and path.is_file():
        note(f"note: training on {path.name} itself, which stays as it is (--method qlora imports it instead)")
        return "gguf"
    return str(setting.value)


def _absolute(reference: str) -> str:
    """A path that a resume from another folder still finds; names stay names."""
    from edgeft.data.load import BUILT_IN

    path = Path(reference).expanduser()
    return str(path.absolute()) if path.exists() and reference not in BUILT_IN else reference


def _free_folder(data: str) -> Path:
    return next(
        path for number in itertools.count(1) if not (path := Path("runs") / f"{Path(data).stem}-{number}").exists()
    )


def _resumed(resume: Path, model: str | None, data: str | None, flags: dict[str, Any]) -> TrainConfig:
    from edgeft.train import read_config

    given = [name for name, value in {"model": model, "data": data, **flags}.items() if value not in (None, False)]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(f"--resume continues with the run's own settings; leave out {names}")
    return read_config(resume)


def _is_finished(config: TrainConfig) -> bool:
    from edgeft.run import Run

    return Run(config.out).finished


def _show_plan(prepared: Prepared, told: Sequence[str]) -> None:
    plan, config = prepared.plan, prepared.config
    note(
        f"{config.method} of {config.model} on {config.data}: {plan.examples} examples, "
        f"{plan.tokens_per_epoch} tokens ({plan.learned_per_epoch} learned) x {config.epochs:g} epochs, "
        f"{plan.steps} steps"
    )
    note(f"  memory      about {plan.memory_bytes / 1e9:.1f} of {plan.available_bytes / 1e9:.1f} GB available")
    note(f"  time        about {_duration(plan.seconds)}")
    for choice, reason in plan.reasons.items():
        note(f"  {choice:<11} {reason}" if choice != "time" else f"              ({reason})")
    for text in prepared.notes:
        note(f"  note        {text}")
    for text in told:
        note(f"  advice      {text}")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _plan_dict(prepared: Prepared) -> dict[str, Any]:
    plan = asdict(prepared.plan)
    return {"out": str(prepared.config.out), **plan, "notes": list(prepared.notes)}


def _outcome_dict(outcome: Outcome) -> dict[str, Any]:
    run, manifest = outcome.run, outcome.manifest
    return {
        "run": str(run.path),
        "adapter": str(run.adapter) if run.adapter else None,
        "steps": outcome.steps,
        "tokens_trained": outcome.tokens,
        "seconds": round(outcome.seconds, 1),
        **manifest.evaluation,
    }


def _report(outcome: Outcome) -> None:
    from edgeft.train.curve import terminal_curve

    evaluation = outcome.manifest.evaluation
    curve = terminal_curve(outcome.run)
    if curve:
        click.echo(curve)
    if "nll_training_graph" in evaluation:
        click.echo(
            f"held-out loss {evaluation['nll_training_graph']:.4f} nats per token ({evaluation['tokens']} tokens)"
        )
    target = "" if outcome.manifest.method == "gguf" or outcome.manifest.target else " --to gguf-q4"
    click.echo(f"run           {outcome.run.path}\nnext          edgeft export {outcome.run.path}{target}")
