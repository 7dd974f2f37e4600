"""Every architecture × type, byte for byte: the pairs that every run compares. `make parity` compares all."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import parity_types
import pytest
import reference
import tiny_families
from edgeft.converters.families import FAMILIES
from edgeft.converters.gguf import converter
from reference import Reference
from tiny_families import FamilyCase

KINDS = {family: {"bytes"} for family in tiny_families.BYTES}
for family in tiny_families.PIECES:
    KINDS[family] = KINDS.get(family, set()) | {"pieces"}


@pytest.fixture(scope="module")
def llama_cpp(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    worker = Reference(reference.converter_source(cache), tmp_path_factory.mktemp("reference") / "log.txt")
    yield worker
    worker.close()


@pytest.mark.reference
@pytest.mark.parametrize("case", parity_types.cases(), ids=lambda case: case.label)
def test_tensors_are_the_references(case: FamilyCase, llama_cpp: Reference, tmp_path: Path) -> None:
    converted = parity_types.prepare(case, tmp_path, llama_cpp)
    for target in [pair.target for pair in parity_types.TESTED if pair.case == case]:
        assert parity_types.different(converted, target)[0] == [], target
    shutil.rmtree(tmp_path)


def test_the_pages_made_from_the_tests_are_up_to_date() -> None:
    page = Path(__file__).parent.parent / "docs" / "generate.py"
    result = subprocess.run([sys.executable, str(page), "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_architecture_meets_every_type_with_every_tokenizer_it_has() -> None:
    covered = parity_types.covered()
    families = {family.model_types[0] for family in FAMILIES} & tiny_families.CLASSES.keys()
    assert families | {"qwen3moe", "gemma3"} <= {family for family, _ in covered}
    for family in tiny_families.CLASSES:
        for target in parity_types.TARGETS:
            assert covered[family, target] == KINDS[family], (family, target)


def test_no_type_is_left_out() -> None:
    left_out = set(converter.targets) - set(parity_types.TARGETS)
    assert left_out == {"gguf", "gguf-q4", "gguf-lora", "gguf-lora-f16"}


def test_every_run_compares_every_case_and_every_type() -> None:
    assert {pair.case for pair in parity_types.TESTED} == set(parity_types.cases())
    assert {pair.target for pair in parity_types.TESTED} == set(parity_types.TARGETS)
