"""Every family: a file computes what transformers computes from the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import parity_cases as parity
import pytest
import tiny_families
from tiny_families import FamilyCase

from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.plugins import LoadOptions

TOKENS = np.random.default_rng(0).integers(3, 256, 80).tolist()
"""More than the windows (8) and the original contexts (64) of the tiny models."""


def transformers_log_probabilities(model: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = loaded(torch.tensor([TOKENS])).logits[0]
    return logits.log_softmax(-1).numpy()


def file_log_probabilities(file: Path) -> np.ndarray:
    with plugins.load("runtimes", "xllamacpp").load(Artifact(file), LoadOptions()) as session:
        return np.asarray(session.score(TOKENS))


def divergence(expected: np.ndarray, got: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence per token, nats."""
    return float((np.exp(expected) * (expected - got)).sum(-1).mean())


@pytest.mark.parametrize("case", tiny_families.COMPUTED, ids=lambda case: case.label)
def test_a_file_computes_what_transformers_does(case: FamilyCase, tmp_path: Path) -> None:
    model = tiny_families.build(tmp_path / "model", case, spread=0.2)
    expected = transformers_log_probabilities(model)
    got = file_log_probabilities(parity.export(model, "gguf-f16", tmp_path / "model.gguf"))
    assert np.std(expected) > 0.3, "a model that says the same of every token would prove nothing"
    assert divergence(expected, got) < 1e-3
    assert (expected.argmax(-1) == got.argmax(-1)).mean() > 0.95
