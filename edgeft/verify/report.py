"""What a verification found, and how much a file may differ from the model it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgeft.errors import UsageError
from edgeft.verify.ledger import Ledger


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it held, and the figure with its limit where there is one."""

    name: str
    ok: bool
    detail: str
    value: float | None = None
    limit: float | None = None
    skipped: bool = False
    """True when it could not be looked at; `detail` says why. Such a finding is ok."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ok": self.ok,
            "value": self.value,
            "limit": self.limit,
            "skipped": self.skipped,
            "detail": self.detail,
        }


@dataclass(frozen=True)
class Tolerance:
    """Limits for a file against the merged model, on the same tokens."""

    kl: float
    """Mean KL(merged ‖ file) in nats per token."""
    top1: float
    """Least share of tokens whose most probable next token is the same."""
    nll: float
    """How much the file's NLL may exceed the merged model's, in nats per token."""

    def with_changes(self, changes: Mapping[str, float]) -> Tolerance:
        """Raises: UsageError for a name that is not a limit."""
        check_names(changes)
        return replace(self, **changes)


def check_names(changes: Mapping[str, float]) -> None:
    """Raises: UsageError for a name that is not a limit."""
    unknown = set(changes) - {"kl", "top1", "nll"}
    if unknown:
        raise UsageError(f"no tolerance named {', '.join(sorted(unknown))}", "There are: kl, top1, nll.")


@dataclass(frozen=True)
class Allowance:
    """Limits of a class of files: a constant, and a part in proportion to how unsure the merged model is.

    Rounding weights moves logits by about the same amount everywhere. Where the model is sure, that changes next to
    nothing; where it hesitates, it changes much. The merged model's NLL on the data tells which of the two it is.
    """

    bits: float
    """Least bits per weight of the class."""
    kl: tuple[float, float]
    disagreement: tuple[float, float]
    nll: tuple[float, float]

    def limits(self, nll_merged: float) -> Tolerance:
        def allowed(pair: tuple[float, float]) -> float:
            return pair[0] + pair[1] * nll_merged

        return Tolerance(allowed(self.kl), max(0.0, 1 - allowed(self.disagreement)), allowed(self.nll))


_CLASSES = (
    Allowance(12.0, kl=(0.001, 0.002), disagreement=(0.005, 0.01), nll=(0.015, 0.01)),
    Allowance(7.5, kl=(0.004, 0.01), disagreement=(0.01, 0.03), nll=(0.02, 0.03)),
    Allowance(5.75, kl=(0.02, 0.08), disagreement=(0.03, 0.1), nll=(0.03, 0.2)),
    Allowance(4.0, kl=(0.1, 0.2), disagreement=(0.05, 0.16), nll=(0.15, 0.2)),
    Allowance(0.0, kl=(0.2, 0.5), disagreement=(0.1, 0.2), nll=(0.2, 0.5)),
)
"""See docs/verify.md for the measurements these leave room above."""


UNMERGED = Tolerance(kl=0.01, top1=0.99, nll=0.005)
"""For an adapter beside the very file it was trained on: all that differs is how activations are rounded."""


_AS_TRAINED = Allowance(0.0, kl=(0.003, 0.003), disagreement=(0.01, 0.02), nll=(0.005, 0.005))
"""Measured on SmolLM2-135M in Q4_0, equal in every block: KL 0.0030 and 97.0 % the same next token at a loss of 2.75.
llama.cpp multiplies with activations in 8 bits; in torch's arithmetic the same file has KL 0 and 100 %."""


def as_trained(nll: float) -> Tolerance:
    """The limits of a file that holds the very weights of the trained graph, for a model with that loss on the data."""
    return _AS_TRAINED.limits(nll)


def tolerance_for(bits_per_weight: float, nll_merged: float) -> Tolerance:
    """The default limits of a file with that many bits per weight, for a model with that loss on the data."""
    return next(allowance for allowance in _CLASSES if bits_per_weight >= allowance.bits).limits(nll_merged)


@dataclass(frozen=True)
class Report:
    """Everything `edgeft verify` measured."""

    findings: tuple[Finding, ...]
    figures: Mapping[str, float | int | None] = field(default_factory=dict)
    """nll_training_graph (by the run), nll_trained, nll_merged or nll_unmerged, nll_tensors, nll_file, nll_base, kl,
    kl_worst_token, top1_agreement, tokens, examples, bits_per_weight, seconds."""
    ledger: Ledger | None = None
    """Every step, with intervals."""
    advice: str = ""
    """The step that loses most, and what to try."""

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.ok]

    @property
    def losses(self) -> dict[str, float]:
        """The losses, stage by stage."""
        stages = ("nll_training_graph", "nll_merged", "nll_unmerged", "nll_file")
        return {stage: value for stage in stages if (value := self.figures.get(stage)) is not None}

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"ok": self.ok, **self.figures}
        if self.ledger is not None:
            found |= {"ledger": self.ledger.as_dict(), "advice": self.advice}
        return {**found, "findings": [finding.as_dict() for finding in self.findings]}
