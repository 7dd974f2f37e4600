"""What `run`, `chat` and `eval` share: options made from the settings, opening a model, answers Ctrl-C stops."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeft import config
from edgeft.chat import Cancel, Delta, Message, Sampling, TokenIds
from edgeft.errors import UsageError

if TYPE_CHECKING:
    from edgeft.plugins import AdapterScale, Session
    from edgeft.sessions import Opened

Command = TypeVar("Command", bound=Callable[..., Any])

_PREFIX = "run."
_KEYS = [key for key in config.SCHEMA if key.name.startswith(_PREFIX)]


def adapter_option(command: Command) -> Command:
    """`--adapter FILE[=SCALE]`, as often as there are adapters."""
    text = "LoRA adapter (GGUF, see docs/adapters.md); repeatable."
    return click.option("--adapter", "adapters", multiple=True, metavar="FILE[=SCALE]", help=text)(command)


def by_option(command: Command) -> Command:
    """`--by WHO`: who of a cascade answers."""
    text = "Who of a cascade answers: whom its policy chooses, or always the device or the cloud."
    choice = click.Choice(("policy", "device", "cloud"))
    return click.option("--by", type=choice, default="policy", show_default=True, help=text)(command)


def ask_for(opened: Opened, who: str) -> None:
    """Raises: UsageError when it is no cascade, or `who` nobody."""
    if who not in ("policy", "device", "cloud"):
        raise UsageError(f"{who or 'nobody'} cannot answer", "Say policy, device or cloud.")
    if hasattr(opened.session, "by"):
        opened.session.by = who
    elif who != "policy":
        raise UsageError("only of a cascade one can say who answers", "Give a cascade.toml: edgeft cascade init.")


def run_options(command: Command) -> Command:
    """One flag for every `run.*` setting. A flag that is not given is None: `settings` looks further."""
    for key in reversed(_KEYS):
        name = key.name.removeprefix(_PREFIX)
        text = f"{key.help}  [{key.variable}; default: {key.default}]"
        command = click.option(f"--{name}", _parameter(name), type=_click_type(key), default=None, help=text)(command)
    return command


def _parameter(name: str) -> str:
    return "run_" + name.replace("-", "_")


def _click_type(key: config.Key) -> click.ParamType[Any]:
    if key.choices:
        return click.Choice(key.choices)
    if key.type is int:
        return click.IntRange(min=None if key.minimum is None else int(key.minimum))
    if key.type is float:
        return click.FloatRange(min=key.minimum)
    return click.STRING


def settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The `run.*` settings by their short names: flag > environment > project > user > default.

    Raises:
        ConfigError: a bad file or environment variable.
    """
    values = config.load()
    chosen = {}
    for key in _KEYS:
        name = key.name.removeprefix(_PREFIX)
        flag = flags.get(_parameter(name))
        chosen[name] = values[key.name].value if flag is None else flag
    return chosen


def sampling(values: Mapping[str, Any], **more: Any) -> Sampling:
    names = ("max-tokens", "temperature", "top-k", "top-p", "min-p", "repeat-penalty", "seed")
    return Sampling(**{name.replace("-", "_"): values[name] for name in names}, **more)


def open_model(reference: str, values: Mapping[str, Any], adapters: list[AdapterScale]) -> Opened:
    """Load a model as the settings say. Raises: what `open_session` raises; ModelError for a wrong adapter."""
    from edgeft.cli._output import ConsoleProgress
    from edgeft.sessions import load_options, open_session

    if reference.endswith(".toml"):
        from edgeft.cascade import is_cascade

        if is_cascade(reference):
            return _open_cascade(reference, adapters)
    return open_session(reference, str(values["runtime"]), load_options(values), ConsoleProgress(), adapters=adapters)


def _open_cascade(reference: str, adapters: list[AdapterScale]) -> Opened:
    from edgeft.cascade.session import open_cascade
    from edgeft.cli._output import ConsoleProgress, note

    heard = lambda author, reason: note(f"[{author}: {reason}]")  # noqa: E731
    opened = open_cascade(Path(reference), adapters, ConsoleProgress(), heard)
    if stale := opened.session.cascade.stale:  # type: ignore[attr-defined]
        note(f"the calibration is stale: {stale}; the device answers. edgeft cascade tune makes a new one.")
    return opened


def explain(opened: Opened) -> None:
    """Say on stderr how the last answer of a cascade came about, or with what settings a model runs and why."""
    import json

    from edgeft.cli._output import note

    record = getattr(opened.session, "record", None)
    if record is not None:
        note(json.dumps(record.as_dict(), indent=2, ensure_ascii=False))
        return
    for choice in opened.choices:
        note(f"{choice.name}: {choice.value} ({choice.reason})")


def fitted(opened: Opened, messages: Sequence[Message], answer: int) -> TokenIds:
    """The prompt of a conversation; what was left out is said on stderr."""
    from edgeft.cli._output import note
    from edgeft.overflow import fit

    found = fit(opened.session, messages, opened.overflow, answer)
    if found.note:
        note(found.note)
    return found.prompt


def show_notes(session: Session) -> None:
    """What the runtime has to say beside its answer, on stderr."""
    from edgeft.cli._output import note

    for text in getattr(session, "notes", ()):
        note(text)


def system_prompt(given: str | None, opened: Opened) -> str | None:
    """What `--system` says ("" is none), else what the model was trained with, which is then noted."""
    from edgeft.cli._output import note

    if given is not None:
        return given or None
    trained = opened.system
    if trained:
        note(f"system prompt, from the model's training (--system changes it): {trained}")
    return trained


def parse_adapter(text: str) -> AdapterScale:
    """`FILE` or `FILE=SCALE`. Raises: UsageError when there is no such file."""
    from edgeft.plugins import AdapterScale

    path, _, scale = text.rpartition("=")
    if path and not Path(text).exists():
        with contextlib.suppress(ValueError):
            return AdapterScale(_existing(path), _finite(float(scale)))
    return AdapterScale(_existing(text))


def _finite(scale: float) -> float:
    if not math.isfinite(scale):
        raise UsageError(f"an adapter's scale cannot be {scale}")
    return scale


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise UsageError(f"no adapter file {path}", "Give an adapter in GGUF format: --adapter FILE or FILE=SCALE.")
    return Path(path)


def stream(session: Session, prompt: TokenIds, how: Sampling) -> Generator[Delta, None, None]:
    """Generate; Ctrl-C ends the answer early, with the text so far and usage that says "cancel".

    Close it before the session: leaving it early waits until the thread has let go of the model.

    The work is done in a thread: a signal handler cannot run while the main thread is inside llama.cpp, and a long
    prompt keeps it there for seconds.
    """
    cancel: Cancel = Cancel()
    deltas: SimpleQueue[Delta | None] = SimpleQueue()

    def work() -> None:
        try:
            for delta in session.generate(prompt, how, cancel):
                deltas.put(delta)
        finally:
            deltas.put(None)

    with ThreadPoolExecutor(1) as pool, _on_interrupt(cancel.set):
        done = pool.submit(work)
        try:
            while (delta := deltas.get()) is not None:
                yield delta
            done.result()
        finally:
            # Whatever ended this, such as a reader that went away: nobody wants the rest.
            cancel.set()


@contextlib.contextmanager
def _on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
