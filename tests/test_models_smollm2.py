"""The model that needs no hub: pulled from a package, imported for training."""

from pathlib import Path

import pytest

from edgeft.models import ALIASES, weights_digest
from edgeft.models.store import read_sidecar
from edgeft.paths import sha256_file

pytestmark = pytest.mark.model


def test_the_pulled_file_is_the_known_one(smollm2_gguf: Path) -> None:
    assert sha256_file(smollm2_gguf) == ALIASES["smollm2-135m"].sha256
    assert read_sidecar(smollm2_gguf.parent)["licence"] == "Apache-2.0"


def test_the_imported_directory_says_where_it_comes_from(smollm2_hf: Path, smollm2_gguf: Path) -> None:
    sidecar = read_sidecar(smollm2_hf)
    assert sidecar["imported_from"] == smollm2_gguf.name
    assert sidecar["sha256"] == ALIASES["smollm2-135m"].sha256
    assert len(weights_digest(smollm2_hf)) == 64
