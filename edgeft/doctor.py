"""What this installation can do: versions, extras, plug-ins and hardware, found without importing any of them."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from edgeft import __version__, plugins
from edgeft.errors import EdgeftError
from edgeft.paths import home

EXTRAS: dict[str, tuple[str, ...]] = {
    "device": ("xllamacpp", "numpy", "jinja2"),
    "export": ("gguf", "safetensors", "tokenizers"),
    "train": ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "matplotlib", "psutil"),
    "tui": ("textual", "textual_plotext"),
    "deploy": ("asyncssh", "cryptography", "zstandard"),
    "cloud": ("httpx2",),
    "serve": ("starlette", "uvicorn", "prometheus_client"),
    "otel": ("opentelemetry",),
    "bench": ("matplotlib",),
    "cascade": ("keyring",),
    "near": ("safetensors", "tokenizers"),
    "onnx": ("onnxruntime", "onnxruntime_genai", "numpy", "jinja2", "tokenizers"),
    "litert": ("litert_lm", "ai_edge_litert", "numpy", "jinja2", "tokenizers"),
    "onnx-export": ("onnx", "onnx_ir", "torch", "transformers"),
}
"""Extra -> the modules it brings, as in pyproject.toml (a test compares the two)."""

_ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve")


@dataclass(frozen=True)
class ExtraReport:
    name: str
    missing: tuple[str, ...]

    @property
    def install(self) -> str | None:
        return f"pip install 'edgeft[{self.name}]'" if self.missing else None


@dataclass(frozen=True)
class PluginReport:
    family: str
    name: str
    error: str | None
    hint: str | None


def extras() -> list[ExtraReport]:
    """Which extras are whole; `find_spec` only, nothing is imported."""
    return [
        ExtraReport(name, tuple(module for module in modules if importlib.util.find_spec(module) is None))
        for name, modules in EXTRAS.items()
    ]


def plugin_reports() -> list[PluginReport]:
    """Every plug-in, loaded once to see whether it can be, and asked whether it has what it needs."""
    reports = []
    for family in plugins.BUILT_IN:
        for name in plugins.names(family):
            try:
                plugin = plugins.load(family, name)
                state = plugin.ready() if isinstance(plugin, plugins.Checked) else plugins.Support(True)
                reports.append(PluginReport(family, name, state.reason or None, state.install))
            except EdgeftError as error:
                reports.append(PluginReport(family, name, error.message, error.hint))
    return reports


def machine() -> dict[str, object]:
    """System, cores, instruction sets that matter for inference, memory in GiB, and where edgeft keeps its files."""
    return {
        "edgeft": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": available_cores(),
        "isa": isa_features(),
        "memory_gib": memory_gib(),
        "home": str(home()),
    }


def available_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)


def isa_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Instruction-set extensions from Linux' cpuinfo ("flags" on x86, "Features" on ARM); empty elsewhere."""
    if not cpuinfo.is_file():
        return []
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.lower().startswith(("flags", "features")):
            present = set(line.split(":", 1)[1].split())
            return [name for name in _ISA if name in present]
    return []


def memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
