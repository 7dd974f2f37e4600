"""Runtimes for a board's own processor: what is compiled, what is inside, and what a bundle takes."""

from __future__ import annotations

import json
import random
import shutil
import signal
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import tiny_gguf
from click.testing import CliRunner

from edgeft.bundle import Target
from edgeft.cli.toolchain_build import build as command
from edgeft.device import load_profile
from edgeft.errors import EdgeftError, MissingDependency, ModelError, UsageError
from edgeft.package import build, cross_build, kernels, runtime, target, wheels

needs_compiler = pytest.mark.skipif(
    bool(cross_build.missing_tools()), reason="apt-get install g++-aarch64-linux-gnu cmake"
)
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
PI5 = Target("rpi5-8g", "aarch64", "3.13", "2.41")
DOTPROD = "armv8.2-a+dotprod"

# --- What is in machine code ------------------------------------------------

ASSEMBLY = {
    "sdot v1.4s, v2.16b, v3.16b": "sdot",
    "sdot v31.2s, v30.8b, v29.8b": "sdot",
    "sdot v1.4s, v2.16b, v3.4b[3]": "sdot",
    "sdot v7.2s, v8.8b, v31.4b[1]": "sdot",
    "udot v1.4s, v2.16b, v3.16b": "udot",
    "udot v1.4s, v2.16b, v17.4b[2]": "udot",
    "usdot v1.4s, v2.16b, v3.16b": "usdot",
    "smmla v1.4s, v2.16b, v3.16b": "smmla",
    "ummla v31.4s, v30.16b, v29.16b": "ummla",
    "usmmla v1.4s, v2.16b, v3.16b": "usmmla",
}
OTHERS = (
    "smlal v1.4s, v2.4h, v3.4h",
    "smull v0.8h, v1.8b, v2.8b",
    "mla v1.4s, v2.4s, v3.4s",
    "mul v1.4s, v2.4s, v3.s[3]",
    "fmla v1.4s, v2.4s, v3.4s",
    "fmla v1.4s, v2.4s, v3.s[1]",
    "fmlal v1.4s, v2.4h, v3.4h",
    "sqdmulh v1.4s, v2.4s, v3.s[1]",
    "add x0, x1, x2",
    "ldr q0, [x1, 16]",
    "ret",
)
"""Neighbours of the encodings, which must not be counted."""


@needs_compiler
def test_the_assembler_s_instructions_are_counted_and_no_others(tmp_path: Path) -> None:
    lines = [*ASSEMBLY, *OTHERS] * 3
    random.Random(1).shuffle(lines)
    (tmp_path / "x.s").write_text("\n".join([".arch armv8.6-a+i8mm+dotprod+fp16fml", ".text", *lines, ""]))
    subprocess.run(["aarch64-linux-gnu-as", "-o", tmp_path / "x.o", tmp_path / "x.s"], check=True)
    wanted = dict.fromkeys(kernels.NAMES, 0)
    for name in ASSEMBLY.values():
        wanted[name] += 3
    assert kernels.scan(tmp_path / "x.o") == wanted


@needs_compiler
@pytest.mark.skipif(EMULATOR is None, reason="apt-get install qemu-user-static")
@pytest.mark.parametrize(("processor", "ends"), [("cortex-a76", 0), ("cortex-a72", -signal.SIGILL)])
def test_what_is_counted_ends_a_program_on_a_processor_without_it(
    processor: str, ends: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the bundle's test under emulation rests on: a Raspberry Pi 4's processor is emulated without dot products,
    and a program is stopped by the first one."""
    lines = (".arch armv8.2-a+dotprod", ".globl _start", "_start:", "sdot v1.4s, v2.16b, v3.16b")
    leave = ("mov x0, 0", "mov x8, 93", "svc 0", "")  # exit(0)
    (tmp_path / "x.s").write_text("\n".join([*lines, *leave]))
    subprocess.run(["aarch64-linux-gnu-as", "-o", tmp_path / "x.o", tmp_path / "x.s"], check=True)
    subprocess.run(["aarch64-linux-gnu-ld", "-o", tmp_path / "x", tmp_path / "x.o"], check=True)
    assert kernels.scan(tmp_path / "x")["sdot"] == 1
    monkeypatch.chdir(tmp_path)  # where a core file would go
    assert EMULATOR is not None
    assert subprocess.run([EMULATOR, "-cpu", processor, tmp_path / "x"], check=False).returncode == ends


def elf(words: list[int], machine: int = 183) -> bytes:
    """A library with one executable section of these words, and the same words as data, which are not code."""
    code = struct.pack(f"<{len(words)}I", *words)
    sections = b"".join(struct.pack("<IIQQQQIIQQ", 0, 1, flags, 0, 64, len(code), 0, 0, 4, 0) for flags in (6, 3))
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 0, 64 + len(code), 0, 64, 0, 0, 64, 2, 0)  # fmt: skip # noqa: E501
    return head + code + sections


def test_code_is_counted_and_data_is_not(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(elf([0x4E839441, 0xD65F03C0, 0x6E839441]))
    assert {name: count for name, count in kernels.scan(tmp_path / "x.so").items() if count} == {"sdot": 1, "udot": 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a 64-bit ELF file"),
        (b"\x7fELF\x02\x01", "is damaged"),
        (elf([0x4E839441], machine=62), "is for another processor"),
        (elf([0x4E839441])[:-70], "is damaged"),
    ],
)
def test_what_is_no_library_for_arm(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(content)
    with pytest.raises(ModelError, match=said):
        kernels.scan(tmp_path / "x.so")


# --- Building ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "march"),
    [("rpi5-8g", DOTPROD), ("rpi4-2g", "armv8-a"), ("rpi-zero-2-w", "armv8-a"), ("jetson-orin-nano-8g", DOTPROD)],
)
def test_what_is_compiled_for(device: str, march: str) -> None:
    assert cross_build.march_of(load_profile(device)) == march


def test_other_processors_are_refused() -> None:
    with pytest.raises(UsageError, match="cross-building is for aarch64"):
        cross_build.march_of(load_profile("n100-16g"))


SOURCE = """\
#include <arm_neon.h>
int llama(const signed char * a) {
#ifdef __ARM_FEATURE_DOTPROD
    return vaddvq_s32(vdotq_s32(vdupq_n_s32(0), vld1q_s8(a), vld1q_s8(a + 16)));
#else
    return vaddlvq_s8(vld1q_s8(a));
#endif
}
"""
CMAKE = """\
cmake_minimum_required(VERSION 3.14)
project(tiny C CXX)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_library(llama llama.c)
target_compile_options(llama PRIVATE -march=${GGML_CPU_ARM_ARCH})
"""


def sdist(folder: Path, source: str = SOURCE) -> Path:
    """Laid out as llama-cpp-python's, with a library that compiles in a second."""
    top = folder / "llama_cpp_python-0.3.36"
    vendor = top / "vendor" / "llama.cpp"
    vendor.mkdir(parents=True)
    (top / "llama_cpp").mkdir()
    for name, text in {
        "PKG-INFO": "Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\nLicense: MIT\n",
        "LICENSE.md": "MIT",
        "llama_cpp/__init__.py": "",
        "vendor/llama.cpp/LICENSE": "MIT",
        "vendor/llama.cpp/CMakeLists.txt": CMAKE,
        "vendor/llama.cpp/llama.c": source,
    }.items():
        (top / name).write_text(text)
    with tarfile.open(folder / "source.tar.gz", "w:gz") as archive:
        archive.add(top, top.name)
    return folder / "source.tar.gz"


@needs_compiler
@pytest.mark.parametrize(("march", "expected"), [(DOTPROD, 1), ("armv8-a", 0)])
def test_a_wheel_is_built_checked_and_kept(march: str, expected: int, tmp_path: Path) -> None:
    built = cross_build.build(march, sdist=sdist(tmp_path))
    assert built.wheel.name.startswith("llama_cpp_python-0.3.36-py3-none-manylinux_2_")
    assert built.wheel.name.endswith("_aarch64.whl")
    assert built.kernels["sdot"] == expected
    assert cross_build.cached(march) == built
    described = wheels.describe(built.wheel)
    assert (described.name, described.version, described.licence) == ("llama_cpp_python", "0.3.36", "MIT")
    with zipfile.ZipFile(built.wheel) as archive:
        assert {"llama_cpp/__init__.py", "llama_cpp/lib/libllama.so"} <= set(archive.namelist())
    built.wheel.write_bytes(b"rotten")
    assert cross_build.cached(march) is None


@needs_compiler
def test_what_does_not_compile_says_where(tmp_path: Path) -> None:
    with pytest.raises(EdgeftError, match=r"compiling failed: .*llama\.c:1.*error"):
        cross_build.build("armv8-a", sdist=sdist(tmp_path, "int wrong = ;"))
    assert cross_build.cached("armv8-a") is None


@needs_compiler
def test_a_library_without_its_kernels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"compiled for .* but holds no sdot"):
        cross_build.build(DOTPROD, sdist=sdist(tmp_path, "int llama(void) { return 0; }"))
    assert cross_build.cached(DOTPROD) is None


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency) as raised:
        cross_build.build(DOTPROD)
    assert "g++-aarch64-linux-gnu" in (raised.value.hint or "")


def test_an_archive_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_build, "missing_tools", list)
    (tmp_path / "x.tar.gz").write_bytes(b"no")
    with pytest.raises(ModelError, match="is not a source archive"):
        cross_build.build(DOTPROD, sdist=tmp_path / "x.tar.gz")


@needs_compiler
def test_the_command_builds_once(tmp_path: Path) -> None:
    words = ["llama-cpp", "--device", "rpi5", "--sdist", str(sdist(tmp_path)), "--json"]
    found = [json.loads(CliRunner().invoke(command, words, catch_exceptions=False).stdout) for _ in range(2)]
    assert [one["cached"] for one in found] == [False, True]
    assert found[0]["march"] == DOTPROD
    assert found[0]["kernels"]["sdot"] == 1


# --- What a bundle takes ----------------------------------------------------


def built_before(march: str, glibc: int = 35) -> Path:
    """As if a wheel had been cross-built."""
    place = cross_build.folder(march)
    place.mkdir(parents=True)
    wheel = place / f"llama_cpp_python-0.3.36-py3-none-manylinux_2_{glibc}_aarch64.whl"
    info = "llama_cpp_python-0.3.36.dist-info"
    metadata = b"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\n"
    wheels.write_wheel(wheel, info, {f"{info}/METADATA": metadata, "llama_cpp/lib/libllama.so": elf([0x4E839441])})
    about = cross_build._about(cross_build.Built(wheel, march, {"sdot": 1}))
    (place / "build.json").write_text(json.dumps(about))
    return wheel


def projects(choice: runtime.Choice) -> set[str]:
    return {runtime.project(text) for text in choice.requirements}


def test_a_bundle_takes_the_wheel_of_its_processor() -> None:
    wheel = built_before(DOTPROD)
    choice = runtime.choose("gguf", PI5)
    assert (choice.runtime, choice.wheels, choice.warnings) == ("llama-cpp-python", (wheel,), ())
    assert "xllamacpp" not in projects(choice)
    assert {"numpy", "jinja2"} <= projects(choice)


def test_without_it_the_bundle_says_what_is_lost() -> None:
    choice = runtime.choose("gguf", PI5)
    assert choice.runtime == "xllamacpp"
    assert "xllamacpp" in projects(choice)
    assert "holds no dot-product instructions, which rpi5-8g has" in choice.warnings[0]
    assert "edgeft toolchain build llama-cpp --device rpi5-8g" in choice.warnings[0]


@pytest.mark.parametrize(
    ("format_", "on", "lost"),
    [
        ("gguf", Target("rpi4-2g", "aarch64", "3.13", "2.41"), False),
        ("gguf", Target("local", "x86_64", "3.11", "2.36"), False),
        ("gguf", Target("mine", "aarch64", "3.11", "2.36"), True),
        ("onnx", PI5, False),
    ],
)
def test_where_something_is_lost(format_: str, on: Target, lost: bool) -> None:
    assert bool(runtime.choose(format_, on).warnings) == lost


def test_a_wheel_for_a_newer_system_is_not_taken() -> None:
    built_before(DOTPROD, glibc=42)
    choice = runtime.choose("gguf", PI5)
    assert choice.runtime == "xllamacpp"
    assert "needs glibc 2.42, the device has 2.41" in choice.warnings[0]


def test_a_wheel_of_one_s_own_comes_first(tmp_path: Path) -> None:
    wheel = built_before(DOTPROD).rename(tmp_path / "llama_cpp_python-0.3.36-py3-none-any.whl")
    choice = runtime.choose("gguf", PI5, [wheel])
    assert (choice.runtime, choice.wheels) == ("llama-cpp-python", (wheel,))
    assert "xllamacpp" not in projects(choice)


def test_boards_that_differ_in_memory_alone_have_one_name() -> None:
    assert target.target_of("rpi5") == Target("rpi5", "aarch64", "3.13", "2.41")
    with pytest.raises(UsageError, match="no device 'laptop'"):
        target.target_of("laptop")


def test_the_manifest_names_the_runtime_of_the_bundle(tmp_path: Path) -> None:
    built_before(DOTPROD)
    model = tiny_gguf.write_scripted(tmp_path / "model.gguf", tiny_gguf.chain_of("x"))
    content = build.plan(build.Request(model, target.target_of("rpi5"), "pet", "1"))
    assert content.runtime.runtime == "llama-cpp-python"


def test_the_tools_are_the_ones_that_are_run() -> None:
    assert [tool for tool in cross_build._TOOLS if not shutil.which(tool)] == cross_build.missing_tools()
