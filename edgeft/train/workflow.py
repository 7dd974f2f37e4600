"""From a configuration to a finished run: plan, train (or continue), keep the best, score it, write the manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import __version__
from edgeft.data.check import require_variety
from edgeft.data.encode import EncodedSet, encode_all
from edgeft.data.example import Encoded, Example
from edgeft.data.load import dataset_digest, load_split, resolve_dataset, split_files
from edgeft.errors import DataError, MissingDependency, ModelError, UsageError, WriteError, require
from edgeft.models import ResolvedModel
from edgeft.models.text import TextSide, load_text_side
from edgeft.openmp import TRAINING, short_spins
from edgeft.paths import sync_directory
from edgeft.progress import Progress, Silent
from edgeft.run import Run, RunManifest
from edgeft.train.base import Gguf, base_record, find_base
from edgeft.train.config import TrainConfig, write_config
from edgeft.train.ternary_settings import is_ternary

if TYPE_CHECKING:
    from edgeft.train.evaluation import Evaluation
    from edgeft.train.hardware import Hardware
    from edgeft.train.packing import Schedule
    from edgeft.train.plan import TrainPlan
    from edgeft.train.trainer import PackedTrainer, Session

_MODULES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "psutil")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: a checkpoint was written; `command` continues."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.command = f"edgeft train --resume {run}"


@dataclass(frozen=True)
class Prepared:
    """All that is known before the model is loaded."""

    config: TrainConfig
    base: ResolvedModel
    """A Hugging Face directory; for the method "gguf" without weights."""
    gguf: Gguf | None
    """The file that is trained on, for the method "gguf"."""
    text: TextSide
    train: list[Encoded]
    valid: list[Encoded]
    held_out: list[Encoded]
    held_out_split: str | None
    system: str | None
    """The system prompt that every training example has, if there is one."""
    hardware: Hardware
    plan: TrainPlan
    schedule: Schedule
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    run: Run
    manifest: RunManifest
    steps: int
    tokens: int
    seconds: float


def prepare(config: TrainConfig, progress: Progress | None = None) -> Prepared:
    """Find the model, encode the data, and plan; nothing is written.

    Raises:
        MissingDependency, UsageError, ModelError, DataError: before any time is spent.
    """
    for module in (*_MODULES, *(("bitsandbytes",) if config.method == "qlora" else ())):
        if importlib.util.find_spec(module) is None:
            raise MissingDependency(f"{module} is not installed", "pip install 'edgeft[train]'")
    with short_spins(TRAINING):
        import torch  # noqa: F401  (its threads learn here how long to spin)
    from edgeft.train.hardware import detect, keep_freed_memory
    from edgeft.train.loading import check_base
    from edgeft.train.plan import make_plan, read_shape

    base, gguf = find_base(config, progress)
    if gguf is None:
        check_base(base.path)
    text, shape = load_text_side(base.path), read_shape(base.path)
    shape = dataclasses.replace(shape, packed=gguf.layer_bytes if gguf else None)
    limit = min(config.max_length or shape.context, shape.context)
    keep_freed_memory()
    hardware = detect(config.device, config.dtype)
    notes: list[str] = []
    examples = load_split(config.data, "train")
    require_variety(examples, f"the train split of {config.data}")
    train = _encode(examples, text, limit, "training", notes)
    splits = {name: _encode(items, text, limit, name, notes) for name, items in _held_out(config.data).items()}
    valid = splits.get("valid", [])
    name = "test" if splits.get("test") else "valid" if valid else None
    held_out = splits[name] if name else []
    if not valid:
        notes.append("no validation split: no early stopping, the last weights are kept")
    plan, schedule = make_plan(config, shape, hardware, train, valid)
    if is_ternary(config):
        from edgeft.train.ternary_notes import ternary_notes

        notes += ternary_notes(config, base.path)
    system = _system(examples)
    return Prepared(
        config, base, gguf, text, train, valid, held_out, name, system, hardware, plan, schedule, tuple(notes)
    )


def _held_out(data: str) -> dict[str, list[Example]]:
    """The valid and test splits that exist; a single file may be too small to have them."""
    path = resolve_dataset(data)
    if path.is_dir():
        return {name: load_split(data, name) for name in ("valid", "test") if name in split_files(path)}
    found = {}
    for name in ("valid", "test"):
        with contextlib.suppress(DataError):
            found[name] = load_split(data, name)
    return found


def _encode(examples: Sequence[Example], text: TextSide, limit: int, name: str, notes: list[str]) -> list[Encoded]:
    from edgeft.chat import ChatTemplate

    needs_template = any(example.text is None for example in examples)
    template = text.need_template() if needs_template else text.template or ChatTemplate("")
    made: EncodedSet = encode_all(examples, template, text.tokenize, text.eos_tokens, limit)
    if made.too_long:
        notes.append(f"{len(made.too_long)} {name} examples are longer than {limit} tokens and are left out")
    notes += [f"{count} {name} examples: {note} (see edgeft.data.encode)" for note, count in made.notes.items()]
    return made.encoded


def _system(examples: Sequence[Example]) -> str | None:
    """The one system prompt all conversations begin with."""
    prompts = {
        example.messages[0].get("content") if example.messages and example.messages[0]["role"] == "system" else None
        for example in examples
    }
    only = prompts.pop() if len(prompts) == 1 else None
    return only if isinstance(only, str) else None


def train(
    config: TrainConfig,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    prepared: Prepared | None = None,
) -> Outcome:
    """Train, or continue an interrupted run; a finished one is returned as it is.

    Args:
        resume: `config.out` is an existing run; without it, it must not exist.
        prepared: what `prepare(config)` returned, if it was already called.

    Raises:
        Interrupted: Ctrl-C; everything up to the last step is kept.
        EdgeftError: see `prepare`; `Diverged` when the loss is not finite; `WriteError` when the disk is full.
    """
    run = Run(config.out.absolute())
    if resume and run.finished:
        return _finished(run)
    if not resume and _in_use(run.path):
        raise UsageError(f"{run.path} exists already", f"Continue it with --resume {config.out}, or choose another.")
    ready = prepared or prepare(config, progress)
    _create(run, config)
    from edgeft.models.quiet import quiet_libraries

    with quiet_libraries():
        return _train(run, ready, progress or Silent())


def _in_use(folder: Path) -> bool:
    """Whether anything is there; a temporary file that a kill left behind does not count."""
    return folder.exists() and any(
        not (item.name.startswith(".") and item.suffix == ".tmp") for item in folder.iterdir()
    )


def _create(run: Run, config: TrainConfig) -> None:
    """The configuration comes first: a folder without it holds nothing, one with it can be resumed."""
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        if not (run.path / "config.toml").is_file():
            write_config(run.path / "config.toml", config)
        (run.path / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise WriteError.from_os_error(error, run.path) from error


def _train(run: Run, ready: Prepared, progress: Progress) -> Outcome:
    from edgeft.train.loading import not_finite
    from edgeft.train.recorder import Recorder
    from edgeft.train.trainer import Diverged, Session

    config = ready.config
    recorder, folder = Recorder(run), run.path / "checkpoints"
    session = Session(config, ready.plan, ready.schedule, ready.train, ready.valid, folder, recorder, progress)
    progress.start("load the model", None)
    session.state.base = ready.gguf.sha256 if ready.gguf else None
    file = ready.gguf.file if ready.gguf else None
    trainer = _trainer(config, ready.base.path, ready.hardware, session, file)
    try:
        _run_steps(trainer, session, run)
    except Diverged as error:
        bad = not_finite(ready.base.path) if ready.gguf is None else None
        if bad is None:
            raise
        raise ModelError(f"{bad} is NaN or infinite", "The base is damaged: copy or download it again.") from error
    if session.state.best_step is not None:
        trainer.load_weights(folder / "best")
    if trainer.aware is not None:
        trainer.aware.at_step(ready.schedule.steps)
    result = _score(trainer, ready, progress)
    _save_result(run, trainer, ready)
    manifest = _manifest(ready, result, session)
    run.write_manifest(manifest)
    (run.path / "finish").unlink(missing_ok=True)
    recorder.event("finished", **manifest.evaluation)
    _draw(run)
    return Outcome(run, manifest, ready.schedule.steps, session.state.tokens, session.state.elapsed_s)


def trainer_for(config: TrainConfig, base: Path, examples: Sequence[Encoded]) -> PackedTrainer:
    """A trainer for encoded examples that writes below `config.out`, as `train` sets one up; for benchmarks."""
    from edgeft.train.hardware import detect, keep_freed_memory
    from edgeft.train.plan import make_plan, read_shape
    from edgeft.train.recorder import Recorder
    from edgeft.train.trainer import Session

    keep_freed_memory()
    hardware = detect(config.device, config.dtype)
    plan, schedule = make_plan(config, read_shape(base), hardware, examples, [])
    run = Run(config.out)
    session = Session(config, plan, schedule, examples, [], run.path / "checkpoints", Recorder(run), Silent())
    return _trainer(config, base, hardware, session)


def _trainer(
    config: TrainConfig, base: Path, hardware: Hardware, session: Session, gguf: Path | None = None
) -> PackedTrainer:
    transformers = require("transformers", "train")
    from edgeft.train import fused
    from edgeft.train.loading import add_adapter, load_base
    from edgeft.train.trainer import PackedTrainer

    transformers.set_seed(config.seed)
    model = load_base(base, config, hardware, gguf)
    if config.method != "full" and config.tune != "scales":
        model = add_adapter(model, config, base)
    aware = None
    if config.target is not None:
        from edgeft.train.grids import make_aware

        aware = make_aware(config, model, base, session.schedule.steps)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, local_files_only=True)
    trainer = PackedTrainer(model, tokenizer, session)
    if config.method != "full" or config.target:
        fused.install(trainer.model)
    if aware is not None:
        aware.install(trainer.model)
        trainer.aware = aware
        if is_ternary(config):
            from edgeft.train.ternary_update import prepare_ternary

            prepare_ternary(trainer, config, base, hardware)
    return trainer


def _run_steps(trainer: PackedTrainer, session: Session, run: Run) -> None:
    """Train from the newest intact checkpoint, or from the beginning."""
    from edgeft.train import checkpoint
    from edgeft.train.trainer import TrainState

    checkpoint.sweep(session.folder)
    last = checkpoint.latest(session.folder)
    step = 0
    if last is not None:
        stored = checkpoint.read_state(last)
        base = session.state.base
        session.state, step = TrainState(**stored["progress"]), stored["step"]
        if session.state.base != base:
            raise ModelError(
                f"{session.config.model} is not the file that {run.path} was trained on so far",
                "Restore it, or start a new run.",
            )
        trainer.load_weights(last)
    session.recorder.rewind(step)
    session.recorder.event("resumed" if last else "started", step=step, steps=session.schedule.steps)
    if session.state.finished or (last is not None and run.asked_to_finish):
        return
    session.progress.start("train", session.schedule.steps, "steps")
    session.progress.advance(step)
    try:
        with _checkpoint_on_interrupt(session):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    except Exception as error:
        session.recorder.event("failed", reason=str(error))
        raise
    finally:
        session.progress.finish()
    if not session.state.finished:
        session.recorder.event("interrupted")
        raise Interrupted(Path(os.path.relpath(run.path)))


@contextlib.contextmanager
def _checkpoint_on_interrupt(session: Session) -> Iterator[None]:
    """The first Ctrl-C lets the step end and writes a checkpoint; the second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: Any) -> None:
        session.stop_requested = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _score(trainer: PackedTrainer, ready: Prepared, progress: Progress) -> Evaluation | None:
    import torch

    from edgeft.train.evaluation import evaluate

    if not ready.held_out:
        return None
    progress.start(f"score the {ready.held_out_split} split", None)
    autocast = torch.bfloat16 if ready.plan.autocast else None
    result = evaluate(trainer.model, ready.held_out, ready.plan.micro_tokens, autocast)
    progress.finish()
    return result


def _save_result(run: Run, trainer: PackedTrainer, ready: Prepared) -> None:
    """adapter/ in PEFT's layout, or model/ after full fine-tuning; the folder appears when it is complete."""
    if trainer.aware is not None:
        _save_folder(run.packed, trainer.aware.save)
    if ready.config.tune == "scales":
        return
    if ready.config.method == "full":
        _save_folder(run.path / "model", lambda folder: _save_model(folder, trainer, ready))
    else:
        _save_folder(run.path / "adapter", lambda folder: _save_adapter(folder, trainer.model))


def _save_adapter(folder: Path, model: Any) -> None:
    """What PEFT knows; trained scales are in packed/."""
    from edgeft.train.aware_gguf import SCALES

    known = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(f".{SCALES}")}
    model.save_pretrained(folder, state_dict=known)


def _save_model(folder: Path, trainer: PackedTrainer, ready: Prepared) -> None:
    import torch

    if trainer.aware is None:
        trainer.model.to(torch.bfloat16)  # the values of a file that was trained for need their float32
    trainer.model.save_pretrained(folder)
    for file in ready.base.path.iterdir():
        if file.is_file() and not (folder / file.name).exists() and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)


def _save_folder(final: Path, save: Callable[[Path], object]) -> None:
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        save(temporary)
        (temporary / "README.md").unlink(missing_ok=True)  # a model card for a hub, without content
        for file in temporary.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_directory(final.parent)
    except OSError as error:
        raise WriteError.from_os_error(error, final) from error


def _manifest(ready: Prepared, result: Evaluation | None, session: Session) -> RunManifest:
    config = ready.config
    evaluation: dict[str, float] = {}
    if result is not None:
        evaluation = {"nll_training_graph": result.nll, "tokens": result.tokens}
    if session.state.best_nll is not None:
        evaluation |= {"best_val_loss": session.state.best_nll, "best_step": session.state.best_step or 0}
    return RunManifest(
        method=config.method,
        base=base_record(config, ready.base.path, ready.gguf),
        data={
            "reference": config.data,
            "path": str(resolve_dataset(config.data)),
            "digest": dataset_digest(config.data),
            "held_out": ready.held_out_split,
            "system": ready.system,
        },
        chat_template=ready.text.template.source if ready.text.template else "",
        seed=config.seed,
        versions={"edgeft": __version__, **{name: importlib.metadata.version(name) for name in _MODULES}},
        evaluation=evaluation,
        licence=ready.base.licence,
        target=config.target,
    )


def _draw(run: Run) -> None:
    from edgeft.train.curve import write_png

    write_png(run, run.path / "loss.png")


def _finished(run: Run) -> Outcome:
    last = {}
    for line in run.metrics():
        last.update(line)
    return Outcome(run, run.manifest(), last.get("step", 0), last.get("tokens", 0), last.get("elapsed_s", 0.0))
