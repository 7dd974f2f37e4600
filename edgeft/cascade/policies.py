"""When to ask the cloud: small rules that turn what is known of a local answer into one number, the risk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from edgeft.cascade.boosted import boosted
from edgeft.cascade.calibration import Calibration
from edgeft.cascade.features import Token, quantile
from edgeft.cascade.settings import PolicySettings
from edgeft.errors import ConfigError

if TYPE_CHECKING:
    from edgeft.cascade.embedder import Vector

Extra = Literal["", "samples", "p-true"]


@dataclass(frozen=True)
class Evidence:
    """A local answer, as far as it was judged."""

    answer: str
    tokens: Sequence[Token]
    features: Mapping[str, float]
    samples: Sequence[str] = ()
    """More answers to the same, sampled; only where the policy asks for them."""
    p_true: float | None = None
    """Probability the model gives to its own answer being right."""
    vector: Vector | None = None
    """Of the prompt, by the policy's embedder; None without one."""


class Policy(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def extra(self) -> Extra:
        """What it needs beyond the answer's own log-probabilities."""

    def risk(self, evidence: Evidence) -> float:
        """The higher, the more the cloud is worth asking."""


@dataclass(frozen=True)
class Constant:
    """The same for every answer: never, or always."""

    name: str
    value: float
    extra: Extra = ""

    def risk(self, evidence: Evidence) -> float:
        return self.value


@dataclass(frozen=True)
class Quantile:
    """Chow-Quantile: the negative of a quantile of the token log-probabilities; 0 is the least certain token."""

    level: float
    name: str = "quantile"
    extra: Extra = ""

    def risk(self, evidence: Evidence) -> float:
        return -quantile([token.logprob for token in evidence.tokens], self.level)


@dataclass(frozen=True)
class Margin:
    """1 less a low quantile of the margins between the best and the second-best token."""

    level: float
    name: str = "margin"
    extra: Extra = ""

    def risk(self, evidence: Evidence) -> float:
        return 1.0 - quantile([token.margin for token in evidence.tokens], self.level) if evidence.tokens else 0.0


@dataclass(frozen=True)
class Entropy:
    """A high quantile of the entropies (nats)."""

    level: float
    name: str = "entropy"
    extra: Extra = ""

    def risk(self, evidence: Evidence) -> float:
        return quantile([token.entropy for token in evidence.tokens], 1.0 - self.level)


@dataclass(frozen=True)
class SelfConsistency:
    """The share of further answers that differ from this one, spaces and case aside."""

    name: str = "self-consistency"
    extra: Extra = "samples"

    def risk(self, evidence: Evidence) -> float:
        own = _plain(evidence.answer)
        others = [_plain(sample) for sample in evidence.samples]
        return sum(other != own for other in others) / len(others) if others else 0.0


@dataclass(frozen=True)
class PTrue:
    """1 less the probability of "Yes", asked with one token (Kadavath et al. 2022, arXiv 2207.05221)."""

    name: str = "p-true"
    extra: Extra = "p-true"

    def risk(self, evidence: Evidence) -> float:
        return 0.5 if evidence.p_true is None else 1.0 - evidence.p_true


@dataclass(frozen=True)
class Learned:
    """P(local wrong and cloud right), by a logistic regression on the features."""

    calibration: Calibration
    name: str = "learned"
    extra: Extra = ""

    def risk(self, evidence: Evidence) -> float:
        return self.calibration.probability(self.calibration.projected(evidence.features, evidence.vector))


def make_policy(settings: PolicySettings, calibration: Calibration | None) -> Policy:
    """Raises: ConfigError when the policy needs a calibration and there is none."""
    if settings.kind == "learned":
        if calibration is None or not calibration.weights:
            raise ConfigError("the learned policy has no calibration", "edgeft cascade tune makes one.")
        return Learned(calibration)
    if settings.kind == "boosted":
        return boosted(calibration)
    makers: Mapping[str, Callable[[], Policy]] = {
        "local-only": lambda: Constant("local-only", -math.inf),
        "cloud-only": lambda: Constant("cloud-only", math.inf),
        "on-error": lambda: Constant("on-error", -math.inf),
        "quantile": lambda: Quantile(settings.quantile),
        "margin": lambda: Margin(settings.quantile),
        "entropy": lambda: Entropy(settings.quantile),
        "self-consistency": SelfConsistency,
        "p-true": PTrue,
    }
    return makers[settings.kind]()


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
