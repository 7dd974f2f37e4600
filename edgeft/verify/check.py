"""The thorough comparison of an exported file with the model it was made of."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeft.data.encode import encode_all
from edgeft.data.example import Encoded, Example
from edgeft.plugins import Session, Source
from edgeft.progress import Progress, Silent
from edgeft.verify.advice import Shipped, advice
from edgeft.verify.build_steps import Parts, build
from edgeft.verify.codes import check_codes
from edgeft.verify.corpus import texts
from edgeft.verify.divergence import Divergence, chunks, compare, file_rows, scored_rows
from edgeft.verify.facts import FileFacts, read_facts
from edgeft.verify.ledger import Ledger, measure
from edgeft.verify.report import UNMERGED, Finding, Report, Tolerance, as_trained, check_names, tolerance_for
from edgeft.verify.steps import StepName
from edgeft.verify.text_checks import check_texts, trained_text
from edgeft.verify.torch_reference import TorchReference, load_reference

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BASE_ROWS = 256
"""Rows on which the base is compared too; they are held at once (50 MB for a vocabulary of 49,152)."""

_FELT = 1e-3
"""KL(merged ‖ base) in nats per token above which even a 4-bit file is nearer to the one it was made of."""

_NOTHING = 1e-7
"""Below this, float32 rounding is all there is."""


def verify_file(
    parts: Parts,
    examples: Sequence[Example],
    *,
    tolerance: Mapping[str, float] | None = None,
    nll_training_graph: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare an exported model with the one it was made of, step by step from the trained graph to its runtime.

    Args:
        examples: held-out conversations; the same ones training was evaluated on make the ledger comparable.
        tolerance: changes to the default limits of the file's bits per weight (kl, top1, nll).
        nll_training_graph: from the run's manifest, passed on into the figures.

    Raises:
        MissingDependency: torch is not installed.
        ModelError, DataError, CheckFailed: a part cannot be read, or the file cannot be compared at all.
    """
    started = time.monotonic()
    source, session, facts = parts.source, parts.session, read_facts(parts.artifact)
    check_names(tolerance or {})
    findings = check_texts(source, facts, session, texts())
    encoded = encode_for(source, examples, session.context)
    reference = load_reference(source.base, source.adapter, rounded=source.nf4, gguf=source.gguf, packed=source.packed)
    findings += check_codes(source, parts.artifact)
    ledger = _measure(parts, reference, encoded, all(example.messages for example in examples), progress)
    compared = Compared.of(ledger)
    limits = limits_for(source, facts, compared.nll_reference).with_changes(tolerance or {})
    findings += check_limits(compared, limits)
    figures = _figures(ledger, compared, facts, nll_training_graph)
    if reference.has_adapter:
        finding, more = check_adapter(reference, session, encoded)
        findings.append(finding)
        figures |= more
    shipped = Shipped(source, parts.artifact.is_dir(), bool(parts.adapters), facts.bits_per_weight, parts.bytes)
    seconds = round(time.monotonic() - started, 2)
    return Report(tuple(findings), {**figures, "seconds": seconds}, ledger, advice(ledger, shipped))


def _measure(
    parts: Parts, reference: TorchReference, encoded: Sequence[Encoded], answers: bool, progress: Progress | None
) -> Ledger:
    steps, skipped = build(parts, reference)
    name: StepName = "merged" if reference.merged else "unmerged"
    vocabulary = parts.session.vocabulary
    return measure(steps, name, encoded, vocabulary, skipped=skipped, answers=answers, progress=progress)


def _figures(
    ledger: Ledger, compared: Compared, facts: FileFacts, nll_training_graph: float | None
) -> dict[str, float | int | None]:
    trained, tensors = ledger.row("trained"), ledger.row("tensors")
    return {
        "nll_training_graph": nll_training_graph,
        "nll_trained": trained.nll.value if trained else None,
        f"nll_{ledger.reference}": compared.nll_reference,
        "nll_tensors": tensors.nll.value if tensors else None,
        "nll_file": compared.nll_file,
        "kl": compared.kl,
        "kl_worst_token": ledger.rows[-1].kl_worst,
        "top1_agreement": compared.top1,
        "tokens": ledger.tokens,
        "examples": ledger.examples,
        "bits_per_weight": facts.bits_per_weight,
    }


@dataclass(frozen=True)
class Compared:
    """The figures that limits apply to."""

    kl: float
    top1: float
    nll_reference: float
    nll_file: float
    tokens: int

    @classmethod
    def of(cls, ledger: Ledger) -> Compared:
        """The last step against the reference."""
        reference, last = ledger.row(ledger.reference), ledger.rows[-1]
        assert reference is not None
        return cls(last.kl.value, last.same_top.value, reference.nll.value, last.nll.value, ledger.tokens)


def limits_for(source: Source, facts: FileFacts, nll_reference: float) -> Tolerance:
    """By the file's bits per weight; where nothing was rounded after training, by how activations are rounded."""
    if source.packed:
        return as_trained(nll_reference)
    return UNMERGED if source.gguf else tolerance_for(facts.precision, nll_reference)


def encode_for(source: Source, examples: Sequence[Example], context: int) -> list[Encoded]:
    """Token ids and masks as training made them. Raises: DataError when none fits into the context."""
    text = trained_text(source)
    result = encode_all(examples, text.need_template(), text.tokenize, text.eos_tokens, context)
    return [item for item in result.encoded if scored_rows(item)]


def compare_all(
    reference: TorchReference, session: Session, encoded: Sequence[Encoded], progress: Progress | None = None
) -> Divergence:
    """Sums over all examples."""
    progress = progress or Silent()
    progress.start("Comparing the file with the merged model", len(encoded), "examples")
    total = Divergence()
    try:
        for total in compare(reference, session, encoded):
            progress.advance(1, f"KL {total.kl:.4f}, same next token {total.top1:.1%}")
    finally:
        progress.finish()
    return total


def check_limits(total: Divergence | Compared, limits: Tolerance) -> list[Finding]:
    """KL, next-token agreement and loss against the limits."""
    worse = total.nll_file - total.nll_reference
    return [
        Finding(
            "kl", total.kl <= limits.kl, f"KL(merged ‖ file) over {total.tokens} tokens, nats", total.kl, limits.kl
        ),
        Finding("top1", total.top1 >= limits.top1, "share of equal most probable next tokens", total.top1, limits.top1),
        Finding("nll", worse <= limits.nll, "NLL of the file minus the merged model's, nats", worse, limits.nll),
    ]


def check_adapter(
    reference: TorchReference, session: Session, encoded: Sequence[Encoded]
) -> tuple[Finding, dict[str, float]]:
    """Whether the file is the merged model or, with the adapter lost on the way, the base."""
    spans = list(_first_spans(encoded))
    with reference.without_adapter():
        base = [reference.log_probs(tokens, rows) for tokens, rows in spans]
    merged_base, merged_file, base_file = Divergence(), Divergence(), Divergence()
    for (tokens, rows), plain in zip(spans, base, strict=True):
        merged, file, targets = (
            reference.log_probs(tokens, rows),
            file_rows(session, tokens, rows),
            _targets(tokens, rows),
        )
        merged_base.add(merged, plain, targets)
        merged_file.add(merged, file, targets)
        base_file.add(plain, file, targets)
    figures = {"kl_merged_base": merged_base.kl, "kl_base_file": base_file.kl, "nll_base": base_file.nll_reference}
    return _judge_adapter(merged_base.kl, merged_file.kl, base_file.kl), figures


def _judge_adapter(effect: float, to_merged: float, to_base: float) -> Finding:
    if effect < _NOTHING:
        return Finding("adapter", True, f"the adapter hardly changes the base (KL {effect:.2g}): nothing to tell apart")
    # A weak adapter can be smaller than what quantization does: then only a clear difference is evidence.
    if to_base <= (to_merged if effect >= _FELT else to_merged / 4):
        return Finding(
            "adapter",
            False,
            f"the file is nearer to the base (KL {to_base:.3g}) than to the merged model (KL {to_merged:.3g}): "
            "the adapter did not get into it",
            to_merged,
            to_base,
        )
    return Finding(
        "adapter", True, f"KL {to_merged:.3g} from the merged model, {to_base:.3g} from the base", to_merged, to_base
    )


def _first_spans(encoded: Sequence[Encoded]) -> list[tuple[list[int], Sequence[int]]]:
    spans: list[tuple[list[int], Sequence[int]]] = []
    for example in encoded:
        for rows in chunks(scored_rows(example)):
            spans.append((example.tokens, rows))
            if sum(len(rows) for _, rows in spans) >= _BASE_ROWS:
                return spans
    return spans


def _targets(tokens: Sequence[int], rows: Sequence[int]) -> NDArray[np.int64]:
    import numpy as np

    return np.asarray([tokens[row + 1] for row in rows], dtype=np.int64)
