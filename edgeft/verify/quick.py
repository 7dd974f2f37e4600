"""The check that every export ends with: seconds, a small sample, and torch only where it is installed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from edgeft.data.encode import encode_all
from edgeft.data.example import Encoded, Example
from edgeft.plugins import Session, Source
from edgeft.progress import Progress
from edgeft.verify import torch_reference
from edgeft.verify.check import check_adapter, check_limits, compare_all, limits_for
from edgeft.verify.codes import check_codes
from edgeft.verify.corpus import PLAIN, texts
from edgeft.verify.divergence import chunks, file_rows, scored_rows
from edgeft.verify.facts import FileFacts, read_facts
from edgeft.verify.report import Finding
from edgeft.verify.text_checks import check_texts, trained_text

SAMPLE = 4
"""Conversations that are scored."""


def quick_check(
    artifact: Path,
    source: Source,
    session: Session,
    *,
    examples: Sequence[Example] = (),
    progress: Progress | None = None,
) -> list[Finding]:
    """Tokenizer, template and finite values of a file; with torch, also its distance from the merged model.

    Args:
        artifact: the file that `session` has loaded.
        examples: some of the data the adapter was trained for; without any, a few plain sentences are scored.

    Raises:
        ModelError, DataError: a part cannot be read, or the file cannot be compared at all.
    """
    facts = read_facts(artifact)
    findings = check_texts(source, facts, session, texts())
    sample = _sample(source, examples, session.context)
    findings.append(check_finite(session, sample[0]))
    if not findings[-1].ok:
        return findings
    if not torch_reference.available():
        return [*findings, Finding("kl", True, "not compared: torch is not installed", skipped=True)]
    return findings + _check_weights(source, artifact, facts, session, sample, progress)


def _sample(source: Source, examples: Sequence[Example], context: int) -> list[Encoded]:
    text = trained_text(source)
    if examples and text.template is not None:
        chosen = itertools.islice(examples, SAMPLE)
        result = encode_all(chosen, text.template, text.tokenize, text.eos_tokens, context)
        return [item for item in result.encoded if scored_rows(item)]
    encoded = [text.tokenize(sentence) for sentence in PLAIN]
    return [Encoded(tokens, [True] * len(tokens)) for tokens in encoded]


def check_finite(session: Session, example: Encoded) -> Finding:
    """Whether the file computes numbers at all: a damaged scale somewhere makes every logit NaN."""
    import numpy as np

    rows = next(chunks(scored_rows(example)))
    values = file_rows(session, example.tokens, rows)
    ok = bool(np.isfinite(values).all())
    return Finding("finite", ok, "log-probabilities are finite" if ok else "log-probabilities are not finite")


def _check_weights(
    source: Source,
    artifact: Path,
    facts: FileFacts,
    session: Session,
    sample: Sequence[Encoded],
    progress: Progress | None,
) -> list[Finding]:
    reference = torch_reference.load_reference(
        source.base, source.adapter, rounded=source.nf4, gguf=source.gguf, packed=source.packed
    )
    total = compare_all(reference, session, sample, progress)
    findings = [*check_codes(source, artifact), *check_limits(total, limits_for(source, facts, total.nll_reference))]
    if reference.has_adapter:
        findings.append(check_adapter(reference, session, sample)[0])
    return findings
