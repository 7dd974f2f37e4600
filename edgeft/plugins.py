"""The three plug-in families: their protocols, and a registry that lists names without importing anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from edgeft.artifact import Artifact
from edgeft.chat import Cancel, Delta, Message, Sampling, TokenIds
from edgeft.errors import PluginError, UsageError, require
from edgeft.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Family = Literal["converters", "runtimes", "devices"]

BUILT_IN: Mapping[Family, Mapping[str, str]] = {
    "converters": {
        "gguf": "edgeft.converters.gguf:converter",
        "onnx": "edgeft.converters.onnx:converter",
        "litert": "edgeft.converters.litert:converter",
        "executorch": "edgeft.converters.executorch:converter",
    },
    "runtimes": {
        "llama-cpp-python": "edgeft.runtimes.llama_cpp_python:runtime",
        "xllamacpp": "edgeft.runtimes.xllamacpp:runtime",
        "onnxruntime-genai": "edgeft.runtimes.onnxruntime_genai:runtime",
        "onnxruntime": "edgeft.runtimes.onnxruntime:runtime",
        "litert-lm": "edgeft.runtimes.litert_lm:runtime",
        "litert": "edgeft.runtimes.litert:runtime",
        "executorch": "edgeft.runtimes.executorch:runtime",
        "transformers": "edgeft.runtimes.transformers:runtime",
        "openai": "edgeft.runtimes.openai:runtime",
        "llama-server": "edgeft.runtimes.llama_server:runtime",
        "echo": "edgeft.runtimes.echo:runtime",
    },
    "devices": {"catalogue": "edgeft.devices.catalogue:source", "own": "edgeft.devices.own:source"},
}
"""Name -> "module:attribute". A static table: reading entry points alone costs 47 ms."""


@dataclass(frozen=True)
class Support:
    """Whether something can be done here; if not, why and what to install."""

    ok: bool
    reason: str = ""
    install: str | None = None


@runtime_checkable
class Checked(Protocol):
    """A plug-in of any family that needs more than its own module, and can tell whether it is there."""

    def ready(self) -> Support:
        """Whether the packages it works with can be loaded."""


# --- Converters ---------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One thing a converter can make."""

    name: str
    description: str
    bits_per_weight: float
    """Nominal; a plan has the real figure for a given model."""
    runtimes: tuple[str, ...]
    directory: bool = False
    """Whether the artifact is a folder, not a file."""
    suffix: str = ""
    """What its name ends with, where that is not the converter's own name."""


@dataclass(frozen=True)
class Source:
    """What to convert: a Hugging Face directory and, optionally, a PEFT adapter directory."""

    base: Path
    adapter: Path | None = None
    reference: str = ""
    """How the user named the base."""
    chat_template: str | None = None
    """The template used in training, when it differs from the base's own."""
    nf4: bool = False
    """Merge into the base as QLoRA trained on it: the layers' linear weights rounded to NF4 and back."""
    packed: Path | None = None
    """Weights as the file is to store them, of a run that was trained for it (`edgeft.models.packed`)."""
    gguf: Path | None = None
    """The GGUF that the adapter was trained on and stays beside; `base` then has its text side only, no weights."""


@dataclass(frozen=True)
class ConvertOptions:
    out: Path
    round: Literal["none", "bf16", "f16"] = "none"
    """Rounding of merged weights before quantization; "bf16" reproduces merge -> convert -> quantize."""
    threads: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorPlan:
    name: str
    shape: tuple[int, ...]
    """Row-major, as in the source: (rows, columns)."""
    type: str
    bytes: int
    note: str = ""
    """Why the type is not the one the recipe would give."""


@dataclass(frozen=True)
class Plan:
    """What a conversion will do; made from headers alone, no weights read."""

    target: str
    source: Source
    options: ConvertOptions
    tensors: tuple[TensorPlan, ...]
    bytes: int
    parameters: int
    bits_per_weight: float
    warnings: tuple[str, ...] = ()
    seconds: float | None = None
    """Rough estimate for this machine."""
    details: Any = None
    """The converter's own working state."""


class Converter(Protocol):
    targets: Mapping[str, Target]

    def plan(self, source: Source, target: str, options: ConvertOptions) -> Plan:
        """Raises: UnsupportedModel, ModelError, UsageError."""

    def convert(self, plan: Plan, progress: Progress) -> Artifact:
        """Write the artifact and its manifest, atomically. Raises: ModelError, WriteError."""


# --- Runtimes -----------------------------------------------------------------


KvType = Literal["f16", "q8_0"]
Overflow = Literal["refuse", "truncate-oldest"]


LOADING = ("mmap", "repack", "flash_attention")
"""Options of how a file is loaded that a runtime has to name, in `loading`, to be given them."""


@dataclass(frozen=True)
class LoadOptions:
    """How to load. None means: chosen by the runtime, which can say why."""

    context: int | None = None
    """Tokens of context; None: the model's own, at most 4096."""
    threads: int | None = None
    """Threads that decode."""
    threads_batch: int | None = None
    """Threads that prefill."""
    batch: int = 512
    parallel: int = 1
    """Answers decoded together, each with `context` tokens of its own, where the runtime can; see `streams`."""
    mmap: bool | None = None
    """Map the file instead of copying it. See `LOADING`."""
    repack: bool | None = None
    """Copy weights into the order that the kernels for prompts want."""
    flash_attention: bool | None = None
    kv_type: KvType | None = None
    """How keys and values are stored. Only for runtimes that name it in `kv_types`."""
    lookup: bool | None = None
    """Guess tokens from what was said before and compute several at once. Only for runtimes with `lookup`."""
    overflow: Overflow = "refuse"
    """What becomes of a conversation that does not fit. Whoever renders it applies it (`edgeft.overflow`)."""
    state: Path | None = None
    """Folder where the state of system prompts is kept between sessions, prompts included; None: nowhere."""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterScale:
    path: Path
    scale: float = 1.0


class Session(AbstractContextManager["Session"], Protocol):
    """A loaded model. Used by one thread at a time."""

    context: int
    vocabulary: int

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> TokenIds:
        """Prompt tokens by the artifact's own template. Raises: ModelError when it has none."""

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> TokenIds:
        """`special`: read control tokens in the text as such; `bos`: apply the model's own BOS rule."""

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of tokens; control tokens become nothing."""

    def generate(self, prompt: TokenIds, sampling: Sampling, cancel: Cancel | None = None) -> Iterator[Delta]:
        """Stream the answer; the last delta carries `usage`.

        The stream may be left at any point; it cannot be read on once the session was used for something else.
        Raises: ModelError when the prompt does not fit.
        """

    def score(self, tokens: TokenIds, start: int = 0) -> NDArray[np.float32]:
        """Next-token log-probabilities, natural log.

        Row i is the distribution after token `start + i`: shape (len(tokens) - start, vocabulary).
        """

    def set_adapters(self, adapters: Sequence[AdapterScale]) -> None:
        """Replace the active adapters. Raises: ModelError when one does not belong to this base."""

    def close(self) -> None: ...


def streams(session: Session) -> int:
    """Answers that a session makes at a time: so many threads may be in `generate`. Its optional `parallel`, else 1.

    With more than one, other members may be used meanwhile, but for `set_adapters`, and `score` may be refused.
    """
    return int(getattr(session, "parallel", 1))


Capability = Literal["tokens", "raw", "seeds", "logprobs", "scores", "json", "adapters", "reuse", "memory"]
"""What runtimes can do more or less of:

tokens: prompts and answers are the model's own token ids, one per delta.  raw: prompts that are no conversation.
seeds: a sampled answer repeats.  logprobs: `Sampling.top_logprobs`.  scores: `Session.score`.  json: `json_schema`.
adapters: `set_adapters`.  reuse: a prompt's cached prefix is not computed again.  memory: `close` frees the model.
"""

CAPABILITIES: frozenset[Capability] = frozenset(get_args(Capability))


def capabilities(runtime: Runtime) -> frozenset[Capability]:
    """What a runtime can do: everything but what it declares in `lacks` (capability -> why), where it has that."""
    return CAPABILITIES - set(getattr(runtime, "lacks", ()))


@dataclass(frozen=True)
class Choice:
    """A setting a session runs with, and why. Sessions that can tell have `choices`."""

    name: str
    value: str
    reason: str


def check_levers(runtime: Runtime, options: LoadOptions) -> None:
    """Raises: UsageError for a setting that the runtime would not follow."""
    kinds = getattr(runtime, "kv_types", ())
    if options.kv_type and options.kv_type not in kinds:
        raise UsageError(
            f"{runtime.name} cannot store keys and values as {options.kv_type}",
            f"It can: {', '.join(kinds)}." if kinds else "Leave out --kv-type, or take llama-cpp-python or xllamacpp.",
        )
    if options.lookup and not getattr(runtime, "lookup", False):
        raise UsageError(
            f"{runtime.name} has no prompt lookup", "Leave out --lookup, or take llama-cpp-python or xllamacpp."
        )
    for name in LOADING:
        if getattr(options, name) is not None and name not in getattr(runtime, "loading", ()):
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{runtime.name} has no {flag}", f"Leave out {flag}, or take llama-cpp-python or xllamacpp."
            )
    if options.overflow != "refuse" and "raw" not in capabilities(runtime):
        raise UsageError(
            f"{runtime.name} cannot count a prompt's tokens, so no turns can be left out", "Take --overflow refuse."
        )


class Runtime(Protocol):
    name: str

    def supports(self, artifact: Artifact) -> Support: ...

    def load(self, artifact: Artifact, options: LoadOptions) -> Session:
        """Raises: ModelError, MissingDependency."""


# --- Devices ------------------------------------------------------------------


class DeviceSource(Protocol):
    """Where profiles of devices come from (`edgeft.device.DeviceProfile`, which lies above this module)."""

    def names(self) -> Sequence[str]: ...

    def load(self, name: str) -> Any:
        """Raises: ConfigError."""


# --- Registry -----------------------------------------------------------------


@runtime_checkable
class EntryPoint(Protocol):
    """The part of `importlib.metadata.EntryPoint` that is used."""

    name: str
    value: str

    def load(self) -> Any: ...


def _entry_points(family: Family) -> Iterable[EntryPoint]:
    from importlib.metadata import entry_points

    return entry_points(group=f"edgeft.{family}")


def built_in_names(family: Family) -> list[str]:
    return list(BUILT_IN[family])


def names(family: Family) -> list[str]:
    """All plug-ins of a family, built-ins first. Imports none of them.

    Raises:
        PluginError: when a third party claims a name that is taken.
    """
    found = built_in_names(family)
    for point in sorted(_entry_points(family), key=lambda point: point.name):
        if point.name in found:
            raise PluginError(
                f"the {family[:-1]} name {point.name!r} is taken and also claimed by {point.value}",
                "Uninstall one of the two packages, or ask its author to choose another name.",
            )
        found.append(point.name)
    return found


def load(family: Family, name: str) -> Any:
    """Import one plug-in.

    Raises:
        PluginError: unknown name, or the plug-in cannot be imported.
        MissingDependency: a built-in's package is not installed.
    """
    target = BUILT_IN[family].get(name)
    if target is not None:
        module, attribute = target.split(":")
        return getattr(require(module, _EXTRA[family]), attribute)
    for point in _entry_points(family):
        if point.name == name:
            return _load_third_party(family, point)
    raise PluginError(f"no {family[:-1]} named {name!r}", f"There are: {', '.join(names(family))}.")


_EXTRA: Mapping[Family, str] = {"converters": "export", "runtimes": "device", "devices": "device"}


def _load_third_party(family: Family, point: EntryPoint) -> Any:
    try:
        plugin = point.load()
    except Exception as error:  # a stranger's code: whatever it raises becomes one typed message
        raise PluginError(f"the {family[:-1]} {point.name!r} ({point.value}) cannot be imported: {error}") from error
    missing = [member for member in _REQUIRED[family] if not hasattr(plugin, member)]
    if missing:
        raise PluginError(f"the {family[:-1]} {point.name!r} ({point.value}) lacks {', '.join(missing)}")
    return plugin


_REQUIRED: Mapping[Family, tuple[str, ...]] = {
    "converters": ("targets", "plan", "convert"),
    "runtimes": ("name", "supports", "load"),
    "devices": ("names", "load"),
}
