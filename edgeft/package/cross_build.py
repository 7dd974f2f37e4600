"""llama.cpp for a board's own processor: cross-compiled here, cached as a wheel, and looked into.

PyPI's aarch64 wheel of xllamacpp is built for every 64-bit Arm and has no dot-product instruction; llama-cpp-python has
no wheel at all. Debian's cross compiler makes one: only libllama and ggml, without OpenMP (a Raspberry Pi may lack
libgomp1, and a bundle must not need apt) and with the C++ library inside.
"""

from __future__ import annotations

import email.parser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeft import paths
from edgeft.device import DeviceProfile
from edgeft.errors import EdgeftError, MissingDependency, ModelError, UsageError, WriteError
from edgeft.progress import Progress, Silent

from . import kernels, wheels

PROJECT = "llama-cpp-python"
VERSION = "0.3.36"
"""The release whose C structures the runtimes know."""
_TOOLS = ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", "cmake")
_INSTALL = "apt install g++-aarch64-linux-gnu cmake ninja-build"
_SOURCES = Path("vendor", "llama.cpp")
_FEATURES = {"asimddp": "dotprod", "i8mm": "i8mm"}
"""As Linux' cpuinfo says -> as GCC's -march does. Both make ggml use other kernels."""
_OPTIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "CMAKE_SYSTEM_NAME=Linux",
    "CMAKE_SYSTEM_PROCESSOR=aarch64",
    "CMAKE_C_COMPILER=aarch64-linux-gnu-gcc",
    "CMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
    # Wheels hold no links: libllama.so must ask for libggml.so, not for libggml.so.0.
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",
    "CMAKE_INSTALL_RPATH=$ORIGIN",
    "CMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "CMAKE_SHARED_LINKER_FLAGS=-static-libstdc++ -static-libgcc -Wl,--strip-all",
    "BUILD_SHARED_LIBS=ON",
    "GGML_NATIVE=OFF",
    "GGML_CCACHE=OFF",
    "GGML_OPENMP=OFF",
    *(f"LLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TOOLS", "TESTS", "EXAMPLES", "SERVER", "APP", "UI")),
    "LLAMA_OPENSSL=OFF",
    "LLAMA_CURL=OFF",
)


@dataclass(frozen=True)
class Built:
    """A cross-compiled wheel."""

    wheel: Path
    march: str
    kernels: Mapping[str, int]
    """Instruction -> how often it is in the machine code."""


def march_of(profile: DeviceProfile) -> str:
    """What GCC must compile for, such as armv8.2-a+dotprod. Raises: UsageError for other processors than 64-bit Arm."""
    if profile.architecture != "aarch64":
        raise UsageError(
            f"{profile.title} has a processor of type {profile.architecture}; cross-building is for aarch64",
            "pip install llama-cpp-python compiles on such a machine itself.",
        )
    features = [name for isa, name in _FEATURES.items() if isa in profile.isa]
    # Dot products came as an option of Armv8.2 (Arm ARM, A2.5), matrix multiplication of 8-bit integers of 8.6.
    base = "armv8.6-a" if "i8mm" in features else "armv8.2-a" if features else "armv8-a"
    return "+".join([base, *features])


def expected_kernels(march: str) -> tuple[str, ...]:
    """Instructions that must be inside a library compiled for it."""
    return tuple(name for feature, name in (("dotprod", "sdot"), ("i8mm", "smmla")) if feature in march.split("+"))


def folder(march: str) -> Path:
    return paths.home() / "wheels" / "llama-cpp" / march


def cached(march: str) -> Built | None:
    """The wheel built before, if it is still what was built."""
    try:
        about = json.loads((folder(march) / "build.json").read_text(encoding="utf-8"))
        wheel = folder(march) / str(about["wheel"])
        if about["version"] != VERSION or paths.sha256_file(wheel) != about["sha256"]:
            return None
        return Built(wheel, march, dict(about["kernels"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def missing_tools() -> list[str]:
    return [tool for tool in _TOOLS if shutil.which(tool) is None]


def build(march: str, *, sdist: Path | None = None, jobs: int | None = None, progress: Progress | None = None) -> Built:
    """Compile, pack, and prove what is inside.

    Args:
        sdist: the source archive; fetched with pip when it is not given.
        jobs: compiler processes at a time; default: one per core.

    Raises:
        MissingDependency: no cross compiler. EdgeftError: fetching or compiling failed.
        ModelError: the libraries do not hold the instructions they were compiled for.
    """
    if missing := missing_tools():
        raise MissingDependency(f"{missing[0]} is not installed", f"On Debian: {_INSTALL}")
    shown, started = progress or Silent(), time.monotonic()
    place = folder(march)
    try:
        with wheels.temporary_folder(place) as temporary:
            work = Path(temporary)
            source = _unpacked(sdist or _fetch(work, shown), work)
            libraries = _compile(source, work / "build", march, jobs or os.cpu_count() or 1, shown)
            wheel = pack(source, libraries, work)
            found = check(wheel, march)
            place.mkdir(exist_ok=True)
            wheel.replace(place / wheel.name)
    except OSError as error:
        raise WriteError.from_os_error(error, place) from error
    finally:
        shown.finish()
    built = Built(place / wheel.name, march, dict(found))
    seconds = round(time.monotonic() - started)
    paths.write_json(place / "build.json", _about(built) | {"seconds": seconds})
    return built


def _about(built: Built) -> dict[str, object]:
    return {
        "version": VERSION,
        "march": built.march,
        "wheel": built.wheel.name,
        "sha256": paths.sha256_file(built.wheel),
        "kernels": dict(built.kernels),
    }


def _fetch(work: Path, progress: Progress) -> Path:
    progress.start("Fetching the source", None)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PROJECT]
    _run([*command, "--dest", str(work), f"{PROJECT}=={VERSION}"], work, "pip cannot fetch the source")
    return next(work.glob("*.tar.gz"))


def _unpacked(sdist: Path, work: Path) -> Path:
    """The source's folder. Raises: ModelError when it is not an sdist of llama-cpp-python."""
    try:
        with tarfile.open(sdist) as archive:
            archive.extractall(work, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise ModelError(f"{sdist} is not a source archive: {error}") from error
    found = [path.parent for path in work.glob("*/PKG-INFO") if (path.parent / _SOURCES).is_dir()]
    if len(found) != 1:
        raise ModelError(f"{sdist} is not a source archive of {PROJECT}")
    return found[0]


def _compile(source: Path, build: Path, march: str, jobs: int, progress: Progress) -> list[Path]:
    """libllama and the libraries it needs."""
    options = [f"-D{option}" for option in (*_OPTIONS, f"GGML_CPU_ARM_ARCH={march}")]
    if shutil.which("ccache"):
        options += [f"-DCMAKE_{language}_COMPILER_LAUNCHER=ccache" for language in ("C", "CXX")]
    options += ["-G", "Ninja"] if shutil.which("ninja") else []
    progress.start(f"Compiling llama.cpp for {march}", None)
    _run(["cmake", "-S", str(source / _SOURCES), "-B", str(build), *options], source.parent, "cmake failed")
    _run(["cmake", "--build", str(build), "--target", "llama", "-j", str(jobs)], source.parent, "compiling failed")
    return sorted((build / "bin").glob("*.so"))


def _run(command: Sequence[str], work: Path, failed: str) -> None:
    # Relative paths in ccache's keys: the folder has another name each time.
    environment = {"CCACHE_BASEDIR": str(work), "CCACHE_NOHASHDIR": "1", **os.environ}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stdout.splitlines()
        said = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)] or lines[-3:]
        raise EdgeftError(f"{failed}: " + "; ".join(said[:3]))


def pack(source: Path, libraries: Sequence[Path], into: Path) -> Path:
    """A wheel of the Python files of the source and the compiled libraries (PEP 427)."""
    metadata = (source / "PKG-INFO").read_bytes()
    about = email.parser.BytesParser().parsebytes(metadata)
    tag = f"py3-none-manylinux_2_{newest_glibc(libraries)}_aarch64"
    info = f"{about['Name']}-{about['Version']}.dist-info"
    content = {
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: edgeft\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(),
        f"{info}/licenses/LICENSE.md": (source / "LICENSE.md").read_bytes(),
        f"{info}/licenses/llama.cpp.txt": (source / _SOURCES / "LICENSE").read_bytes(),
    }
    for file in sorted((source / "llama_cpp").rglob("*.py")):
        content[file.relative_to(source).as_posix()] = file.read_bytes()
    content |= {f"llama_cpp/lib/{library.name}": library.read_bytes() for library in libraries}
    wheel = into / f"{about['Name']}-{about['Version']}-{tag}.whl"
    wheels.write_wheel(wheel, info, content)
    return wheel


def newest_glibc(libraries: Sequence[Path]) -> int:
    """The minor version of the oldest C library they run on: the newest symbol version they ask for (PEP 600)."""
    asked = [int(minor) for library in libraries for minor in re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes())]
    return max(asked, default=17)


def check(wheel: Path, march: str) -> Counter[str]:
    """The wheel's instructions. Raises: ModelError when those it was compiled for are not there."""
    found = kernels.scan(wheel)
    for name in expected_kernels(march):
        if not found[name]:
            raise ModelError(f"{wheel.name} was compiled for {march} but holds no {name} instruction")
    return found
