"""The tree, the wheel and the import floors are what docs/architecture.md says."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAMILIES = ("converters", "runtimes", "devices")
HEAVY = ("torch", "transformers", "numpy", "textual", "rich", "jinja2", "gguf", "xllamacpp", "llama_cpp", "datasets")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_in_tree() -> set[str]:
    folders = {
        init.parent.relative_to(ROOT) for top in ("edgeft", *FAMILIES) for init in (ROOT / top).rglob("__init__.py")
    }
    return {".".join(folder.parts if folder.parts[0] == "edgeft" else ("edgeft", *folder.parts)) for folder in folders}


def test_every_package_is_declared(project: dict) -> None:
    assert set(project["tool"]["setuptools"]["packages"]) == packages_in_tree()


def test_wheel_holds_edgeft_alone_and_all_of_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"edgeft"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    expected = {path if path.startswith("edgeft/") else f"edgeft/{path}" for path in tracked if in_package(path)}
    assert names == expected


def in_package(path: str) -> bool:
    return path.split("/")[0] in ("edgeft", *FAMILIES) and not path.endswith((".md", ".gitkeep"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_cannot_be_imported_twice(family: str) -> None:
    result = subprocess.run([sys.executable, "-c", f"import {family}"], cwd=ROOT, capture_output=True, text=True)
    assert f"import edgeft.{family} instead of {family}" in result.stderr


def modules_after(code: str) -> set[str]:
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sorted(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT / "tests",
    )
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["config", "path"], ["models", "list", "--json"]],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    loaded = modules_after(f"from edgeft.cli.main import main; main({arguments!r})")
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize(
    "verb", ["chat", "run", "train", "export", "verify", "diff", "eval", "data", "models", "doctor", "demo"]
)
def test_help_of_a_verb_imports_no_numeric_library(verb: str) -> None:
    loaded = modules_after(f"from edgeft.cli.main import main; main([{verb!r}, '--help'])")
    assert not loaded & {"torch", "transformers", "numpy", "gguf", "xllamacpp", "llama_cpp"}


def test_imports_only_go_down() -> None:
    executable = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([executable, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
