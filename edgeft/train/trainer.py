"""TRL's SFT trainer on edgeft's batches, loss, checkpoints and records."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from edgeft.data.example import Encoded
from edgeft.errors import EdgeftError
from edgeft.progress import Progress
from edgeft.train import checkpoint, memory
from edgeft.train.aware import Aware
from edgeft.train.batch import Batch, batch_nll, collate
from edgeft.train.config import TrainConfig
from edgeft.train.evaluation import evaluate
from edgeft.train.packing import Schedule
from edgeft.train.plan import TrainPlan
from edgeft.train.recorder import Recorder
from edgeft.train.samples import prompts, sampled


class Diverged(EdgeftError):
    """The loss is not a number any more."""


@dataclass
class TrainState:
    """What a resume needs to know beyond tensors; stored in every checkpoint."""

    tokens: int = 0
    """Tokens trained on so far; there is no padding, so all of them are useful."""
    elapsed_s: float = 0.0
    """Over all sessions of the run."""
    best_nll: float | None = None
    best_step: int | None = None
    without_gain: int = 0
    """Validations since the best."""
    finished: bool = False
    base: str | None = None
    """SHA-256 of the GGUF that is trained on, where it is one."""


@dataclass
class Session:
    """What a trainer works on and reports to."""

    config: TrainConfig
    plan: TrainPlan
    schedule: Schedule
    train: Sequence[Encoded]
    valid: Sequence[Encoded]
    folder: Path
    """Checkpoints go here."""
    recorder: Recorder
    progress: Progress
    state: TrainState = field(default_factory=TrainState)
    stop_requested: bool = False
    """Set by a signal handler: write a checkpoint after this step, and stop."""


class _Packs(torch.utils.data.Dataset):  # type: ignore[misc]
    def __init__(self, schedule: Schedule, examples: Sequence[Encoded]) -> None:
        self._packs, self._prefix, self._examples = schedule.packs, schedule.prefix, examples

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> Batch:
        return collate([self._examples[member] for member in self._packs[index]], self._prefix)


class PackedTrainer(SFTTrainer):  # type: ignore[misc]
    """One pack is one micro-batch; the schedule fixes all of them before step 0."""

    def __init__(self, model: Any, tokenizer: Any, session: Session) -> None:
        self.session = session
        self.aware: Aware | None = None
        self.teacher: Any = None
        """The base as it was, where ternary training has it teach."""
        # TRL rounds the adapter of a quantized model to bfloat16; small updates would be lost in it.
        kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(
            model=model,
            args=_arguments(session),
            train_dataset=_dataset(session.train),
            eval_dataset=_dataset(session.valid) if session.valid else None,
            processing_class=tokenizer,
            data_collator=lambda batches: batches[0],
        )
        for name, parameter in self.model.named_parameters():
            if name in kept:
                parameter.data = kept[name].to(parameter.device)
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True
        self._autocast = torch.bfloat16 if session.plan.autocast else None
        self._step_started = time.perf_counter()
        self._step_tokens = 0
        self._closed_step = -1

    # Batches

    def get_train_dataloader(self) -> Any:
        self._step_started = time.perf_counter()
        packs = _Packs(self.session.schedule, self.session.train)
        return torch.utils.data.DataLoader(packs, batch_size=1, shuffle=False, collate_fn=self.data_collator)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: Any) -> int:
        return max(1, sum(len(batch["targets"]) for batch in batch_samples))

    # Loss

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: int | None = None
    ) -> Any:
        """Mean over all learned tokens of the optimizer step, however they fall into micro-batches."""
        self._step_tokens += int(inputs["tokens"])
        self._tell_step()
        with torch.autocast(self.args.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            nll = self._nll(inputs)
        return nll / (num_items_in_batch or max(1, len(inputs["targets"])))

    def _nll(self, inputs: Batch) -> Any:
        share, aware = self.session.config.teacher, self.aware
        if share and self.teacher is not None:
            from edgeft.train.ternary_teacher import taught_nll

            return taught_nll(self.model, self.teacher, inputs, share)
        if not share or aware is None or not aware.ships:
            return batch_nll(self.model, inputs)
        from edgeft.train.distillation import distilled_nll

        return distilled_nll(self.model, inputs, aware.exact(), share)

    def _tell_step(self) -> None:
        if self.aware is not None:
            self.aware.at_step(self.state.global_step)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate walks over all parameters on every step, and nothing reads it

    # Records

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs:
            return
        session, now, step = self.session, time.perf_counter(), self.state.global_step
        seconds, self._step_started = now - self._step_started, now
        speed = self._step_tokens / seconds
        session.state.tokens += self._step_tokens
        session.state.elapsed_s += seconds
        self._step_tokens = 0
        if not np.isfinite(logs["loss"]) or not np.isfinite(logs["grad_norm"]):
            raise _diverged(session, step)
        session.recorder.metric(
            step=step,
            epoch=round(session.schedule.epoch_at(step), 4),
            loss=logs["loss"],
            lr=logs["learning_rate"],
            grad_norm=logs["grad_norm"],
            tokens=session.state.tokens,
            tokens_per_s=round(speed, 1),
            memory_peak_bytes=memory.peak(self.args.device.type),
            elapsed_s=round(session.state.elapsed_s, 3),
            left_s=round(session.state.elapsed_s / step * (session.schedule.steps - step), 1),
        )
        left = session.schedule.steps - step
        session.progress.advance(1, f"loss {logs['loss']:.4f} · {speed:.0f} tokens/s · {_clock(left * seconds)} left")

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        step = self.state.global_step
        if step == self._closed_step:
            return  # transformers asks again at the end of the only epoch
        if self.session.stop_requested or step >= self.session.schedule.steps:
            self.control.should_save = True
            self.control.should_training_stop = True
        if step >= self.session.schedule.steps or self._asked_to_finish(step):
            self.control.should_evaluate = bool(self.session.valid)
            self.session.state.finished = True
        self._closed_step = step
        super()._maybe_log_save_evaluate(*args, **kwargs)
        now = time.perf_counter()
        self.session.state.elapsed_s += now - self._step_started
        self._step_started = now

    def _asked_to_finish(self, step: int) -> bool:
        """Whether to keep what has been learned so far as the result."""
        if not self.session.recorder.run.asked_to_finish:
            return False
        self.session.recorder.event("finished early", step=step)
        self.control.should_save = self.control.should_training_stop = True
        return True

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate, remember the best weights, and stop when there was no gain for long."""
        session, state, step = self.session, self.session.state, self.state.global_step
        self._tell_step()
        result = evaluate(self.model, session.valid, session.plan.micro_tokens, self._autocast)
        epoch = round(session.schedule.epoch_at(step), 4)
        session.recorder.metric(step=step, epoch=epoch, val_loss=result.nll)
        session.recorder.event("evaluation", step=step, val_loss=result.nll)
        self._sample(step)
        if self.aware is not None and not self.aware.ships:
            return {"eval_loss": result.nll}  # of a graph that is not the one to ship
        if state.best_nll is None or result.nll < state.best_nll:
            state.best_nll, state.best_step, state.without_gain = result.nll, step, 0
            weights = {"weights.safetensors": self.kept_weights()}
            checkpoint.write(session.folder, checkpoint.BEST, weights, {"step": step, "val_loss": result.nll})
        else:
            state.without_gain += 1
        if session.config.patience and state.without_gain >= session.config.patience:
            session.recorder.event("stopped early", step=step, best_step=state.best_step)
            self.control.should_save = self.control.should_training_stop = state.finished = True
        return {"eval_loss": result.nll}

    def _sample(self, step: int) -> None:
        """Answer the held-out prompts that are asked at each validation."""
        session = self.session
        if asked := prompts(session.valid, session.config.samples, session.plan.micro_tokens):
            given = sampled(self.model, self.processing_class, asked, self._autocast)
            session.recorder.event("samples", step=step, samples=given)

    # Checkpoints

    def trained_weights(self) -> dict[str, Any]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def kept_weights(self) -> dict[str, Any]:
        """The trained weights as checkpoints keep them; ternary training has latent ones behind those of the model."""
        latents: dict[str, Any] = getattr(self.aware, "latents", {})
        return {name: latents.get(name, parameter) for name, parameter in self.trained_weights().items()}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        session, step = self.session, self.state.global_step
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        moments = {
            f"{names[id(parameter)]}|{key}": value
            for parameter, entries in self.optimizer.state.items()
            for key, value in entries.items()
        }
        state = {
            "step": step,
            "progress": asdict(session.state),
            "scheduler": self.lr_scheduler.state_dict(),
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "python_random": random.getstate(),
            "trainer": asdict(self.state),
        }
        tensors = {
            "weights.safetensors": self.kept_weights(),
            "optimizer.safetensors": moments,
            "random.safetensors": _generator_states(),
        }
        checkpoint.write(session.folder, checkpoint.step_name(step), tensors, state)
        checkpoint.prune(session.folder, session.config.keep)
        session.recorder.event("checkpoint", step=step)

    def load_weights(self, path: Path) -> None:
        """Trained weights from a checkpoint, into the parameters of the same names."""
        stored = checkpoint.read_tensors(path, "weights.safetensors")
        with torch.no_grad():
            for name, weights in self.kept_weights().items():
                weights.copy_(stored[name])
        if self.aware is not None:
            self.aware.moved()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_weights(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        moments = _read(checkpoint, "optimizer.safetensors")
        state = _state(checkpoint)
        for name, parameter in self.trained_weights().items():
            if f"{name}|step" not in moments:
                continue  # it had no gradient yet
            entries = {key: moments[f"{name}|{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            # Adam keeps its step counter wherever it made it; the moments live with their parameter.
            self.optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in entries.items()
            }
        self.lr_scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, state["learning_rates"], strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        version, internal, gauss = _state(checkpoint)["python_random"]
        random.setstate((version, tuple(internal), gauss))
        states = _read(checkpoint, "random.safetensors")
        torch.random.set_rng_state(states["cpu"])
        if torch.cuda.is_available() and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])


def _read(folder: str, file: str) -> dict[str, Any]:
    return checkpoint.read_tensors(Path(folder), file)


def _state(folder: str) -> dict[str, Any]:
    return checkpoint.read_state(Path(folder))


def _generator_states() -> dict[str, Any]:
    states = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _arguments(session: Session) -> SFTConfig:
    config, plan = session.config, session.plan
    return SFTConfig(
        output_dir=str(session.folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=session.schedule.per_step,
        num_train_epochs=1,  # the schedule holds the packs of all epochs
        learning_rate=config.effective_learning_rate,
        lr_scheduler_type=config.scheduler if config.scheduler != "constant" else "constant_with_warmup",
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=plan.gradient_checkpointing,
        bf16=False,  # the model computes in its own dtype
        use_cpu=plan.device == "cpu",
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if session.valid else "no",
        eval_steps=plan.eval_every,
        save_strategy="steps",
        save_steps=plan.save_every,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _dataset(examples: Sequence[Encoded]) -> Dataset:
    """The examples as TRL wants to see them; `get_train_dataloader` packs them."""
    labels = [
        [token if known else -100 for token, known in zip(example.tokens, example.learned, strict=True)]
        for example in examples
    ]
    return Dataset.from_dict({"input_ids": [example.tokens for example in examples], "labels": labels})


def _diverged(session: Session, step: int) -> Diverged:
    last = checkpoint.latest(session.folder)
    kept = f"{last.name} is the last good checkpoint" if last else "there is no checkpoint yet"
    rate = session.config.effective_learning_rate
    return Diverged(
        f"the loss is not finite at step {step} of {session.schedule.steps}; {kept} in {session.folder}",
        f"Train again with a lower --learning-rate (it was {rate:g}), or look for damaged data.",
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
