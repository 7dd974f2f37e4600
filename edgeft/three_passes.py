"""The long way, for models edgeft has no page for: merge with PEFT, convert and quantize with the user's llama.cpp.

Each pass reads and writes the whole model, so it takes the time, memory and disk that `edgeft.export` saves.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeft import __version__
from edgeft.artifact import Artifact, Manifest, manifest_path, write_manifest
from edgeft.errors import MissingDependency, ModelError, UsageError, WriteError
from edgeft.export import Origin
from edgeft.models.gguf_header import read_header
from edgeft.paths import parse_json, sha256_file
from edgeft.progress import Progress

_UNQUANTIZED = ("F32", "F16", "BF16")
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "generation_config")
_GET = (
    "git clone https://github.com/ggml-org/llama.cpp && cmake -B build && cmake --build build --target llama-quantize"
)


@dataclass(frozen=True)
class Tools:
    """The parts of a llama.cpp checkout that are needed."""

    convert: Path
    quantize: Path | None
    """None when the target is not quantized."""


@dataclass(frozen=True)
class Passes:
    """What will be run, in this order."""

    origin: Origin
    tools: Tools
    out: Path
    target: str
    type: str
    """llama.cpp's name of the target."""

    def commands(self, work: Path) -> list[list[str]]:
        """The converter's command, and the quantizer's when there is one; the last one writes `work/result.gguf`."""
        source = self.origin.source
        model = work / "merged" if source.adapter else source.base
        result = work / "result.gguf"
        plain = result if self.tools.quantize is None else work / "bf16.gguf"
        kind = "bf16" if self.tools.quantize else self.type.lower()
        convert = [sys.executable, str(self.tools.convert), str(model), "--outtype", kind, "--outfile", str(plain)]
        if self.tools.quantize is None:
            return [convert]
        return [convert, [str(self.tools.quantize), str(plain), str(result), self.type]]


def plan(origin: Origin, target: str, out: Path, checkout: Path | None) -> Passes:
    """Find the tools and say what will be run.

    Raises:
        UsageError: a target that is no GGUF.
        MissingDependency: no checkout, or one without the converter or the built quantizer.
    """
    if origin.source.packed is not None:
        raise UsageError(
            f"{origin.name} was trained for {target}: three passes would round it anew", "Leave out --engine."
        )
    kind, _, name = target.partition("-")
    if kind != "gguf":
        raise UsageError(f"--engine llama.cpp makes GGUF files, not {target}", "Use --to gguf-q4_k_m, for instance.")
    type_ = "Q4_K_M" if name == "q4" else name.upper()
    return Passes(origin, find_tools(checkout, quantize=type_ not in _UNQUANTIZED), out, target, type_)


def find_tools(checkout: Path | None, *, quantize: bool) -> Tools:
    """Raises: MissingDependency."""
    if checkout is None:
        raise MissingDependency("--engine llama.cpp needs a checkout of llama.cpp", f"{_GET}, then --llama-cpp DIR")
    convert = checkout / "convert_hf_to_gguf.py"
    if not convert.is_file():
        raise MissingDependency(f"{checkout} is no checkout of llama.cpp: it has no {convert.name}", _GET)
    if not quantize:
        return Tools(convert, None)
    name = "llama-quantize.exe" if os.name == "nt" else "llama-quantize"
    folders = (checkout / "build" / "bin", checkout / "build" / "bin" / "Release", checkout / "bin", checkout)
    built = next((folder / name for folder in folders if (folder / name).is_file()), None) or shutil.which(name)
    if built is None:
        hint = f"cd {checkout} && cmake -B build && cmake --build build --target llama-quantize"
        raise MissingDependency(f"{checkout} has no {name}, and neither has the PATH", hint)
    return Tools(convert, Path(built))


def run(passes: Passes, progress: Progress) -> Artifact:
    """Merge, convert, quantize; then the file's manifest.

    Raises:
        ModelError: one of the passes failed; its last words are in the message.
        WriteError: the folder cannot be written.
        MissingDependency: torch, transformers or peft is not installed.
    """
    out = passes.out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
            work = Path(name)
            commands = passes.commands(work)
            progress.start("Merging, converting, quantizing", len(commands) + 1, "passes")
            try:
                if passes.origin.source.adapter:
                    merge(passes.origin, work / "merged")
                progress.advance(1)
                for command in commands:
                    _call(command)
                    progress.advance(1)
            finally:
                progress.finish()
            manifest_path(out).unlink(missing_ok=True)
            (work / "result.gguf").replace(out)
    except OSError as error:
        raise WriteError.from_os_error(error, out) from error
    manifest = _manifest(passes)
    write_manifest(out, manifest)
    return Artifact(out, manifest)


def merge(origin: Origin, folder: Path, *, rounded: bool = True) -> None:
    """The merged model, in bfloat16 or in float32, with the tokenizer and the chat template it was trained with."""
    from edgeft.verify.torch_reference import load_reference

    source = origin.source
    load_reference(source.base, source.adapter, rounded=source.nf4).save(folder, rounded=rounded)
    for part in (source.base, source.adapter):
        for file in part.iterdir() if part else ():
            if file.name.startswith(_TOKENIZER) and file.is_file():
                shutil.copy(file, folder)
    if source.chat_template is not None:
        _set_template(folder, source.chat_template)


def _set_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if file.is_file():
        # llama.cpp's converter prefers the field, which may be older.
        config = parse_json(file.read_text(encoding="utf-8"))
        config.pop("chat_template", None)
        file.write_text(json.dumps(config), encoding="utf-8")


def _call(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode:
        said = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise ModelError(f"llama.cpp failed: {said}", f"The command was: {' '.join(command)}")


def _manifest(passes: Passes) -> Manifest:
    origin, header = passes.origin, read_header(passes.out)
    types: dict[str, int] = {}
    for tensor in header.tensors:
        types[tensor.type] = types.get(tensor.type, 0) + tensor.elements
    weights = sum(types.values())
    adapter, template = origin.source.adapter, header.chat_template
    return Manifest(
        format="gguf",
        target=passes.target,
        types=types,
        parameters=weights,
        bits_per_weight=8 * sum(tensor.bytes for tensor in header.tensors) / weights,
        bytes=passes.out.stat().st_size,
        sha256=sha256_file(passes.out),
        base={"reference": origin.source.reference, "path": str(origin.source.base), "digest": origin.base_digest},
        adapter={"path": str(adapter), "digest": sha256_file(adapter / "adapter_model.safetensors")}
        if adapter
        else None,
        run=str(origin.run.path) if origin.run else None,
        system=origin.run.manifest().data.get("system") if origin.run else None,
        licence=origin.licence,
        chat_template_sha256=hashlib.sha256(template.encode()).hexdigest() if template else None,
        notes=(f"made by {passes.tools.convert.parent} in three passes, rounded to bfloat16 in between",),
        edgeft_version=__version__,
    )
