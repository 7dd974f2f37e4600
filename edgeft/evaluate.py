"""How well a deployed file does on held-out examples: what it answers, how sure it is of the references, how fast."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft.artifact import read_manifest, size_of
from edgeft.chat import Cancel, Sampling, Usage
from edgeft.data.encode import encode_all
from edgeft.data.example import Example
from edgeft.errors import DataError
from edgeft.paths import parse_json
from edgeft.plugins import Session
from edgeft.progress import Progress, Silent
from edgeft.verify.divergence import file_nll
from edgeft.verify.facts import read_facts
from edgeft.verify.text_checks import session_tokenize

METRICS = ("exact-match", "nll", "speed")


@dataclass(frozen=True)
class Prediction:
    """One held-out example and what the model made of it."""

    index: int
    prompt: str
    """The last message before the answer."""
    expected: str
    answer: str
    exact: bool
    json_match: bool | None
    """Whether both are the same JSON value, whatever its spacing and key order; None when the reference is no JSON."""
    usage: Usage

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "usage": self.usage.as_dict()}


def predict(
    session: Session, examples: Sequence[Example], progress: Progress | None = None, *, whole: bool = True
) -> Iterator[Prediction]:
    """Answer every conversation greedily, as a device would; references decide how long an answer may get.

    Args:
        whole: False ends an answer as soon as it cannot match any more, which is all that exact match needs: a model
            that has not learned the task is judged by its first token instead of by its longest ramblings.

    Raises:
        DataError: when no example is a conversation.
        ModelError: no chat template, or a prompt that does not fit.
    """
    chats = [(index, example) for index, example in enumerate(examples) if example.messages]
    if not chats:
        raise DataError("there is no conversation to answer: plain text has no reference answers")
    longest = max(len(session.tokenize(_reference(example))) for _, example in chats)
    # Twice the longest reference: enough to see a wrong answer whole, not enough to wait for one that never ends.
    sampling = Sampling(max_tokens=2 * longest + 8, temperature=0.0)
    progress = progress or Silent()
    progress.start("Answering held-out examples", len(chats), "examples")
    right = 0
    try:
        for number, (index, example) in enumerate(chats, 1):
            prediction = _predict(session, index, example, sampling, whole)
            right += prediction.exact
            progress.advance(1, f"{right}/{number} right")
            yield prediction
    finally:
        progress.finish()


def _predict(session: Session, index: int, example: Example, sampling: Sampling, whole: bool) -> Prediction:
    prompt = session.render(example.messages[:-1], list(example.tools) or None)
    expected = _reference(example).strip()
    text, usage, cancel = "", None, Cancel()
    for delta in session.generate(prompt, sampling, cancel):
        text += delta.text
        usage = delta.usage or usage
        if not whole and not _may_match(expected, text):
            cancel.set()
    assert usage is not None
    answer = text.strip()
    asked = str(example.messages[-2].get("content") or "") if len(example.messages) > 1 else ""
    return Prediction(index, asked, expected, answer, answer == expected, json_match(expected, answer), usage)


def _may_match(expected: str, text: str) -> bool:
    """Whether an answer that begins with `text` can still equal `expected`, spaces around it aside."""
    seen = text.lstrip()
    return expected.startswith(seen) or seen.rstrip() == expected


def _reference(example: Example) -> str:
    return str(example.messages[-1].get("content") or "")


def json_match(expected: str, answer: str) -> bool | None:
    """Whether two texts are the same JSON value; None when the expected one is not JSON."""
    try:
        wanted = parse_json(expected)
    except ValueError:
        return None
    try:
        return _canonical(parse_json(answer)) == _canonical(wanted)
    except ValueError:
        return False


def _canonical(value: Any) -> str:
    # Through text: in Python 1 == True, in JSON they differ.
    return json.dumps(value, sort_keys=True)


def evaluate_file(
    session: Session,
    artifact: Path,
    examples: Sequence[Example],
    *,
    metrics: Sequence[str] = METRICS,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[Prediction]]:
    """The figures of a model on held-out examples, and every answer.

    Args:
        artifact: the file that `session` has loaded.
        metrics: some of exact-match, nll and speed; speed is measured on the answers.

    Returns:
        exact_match and json_match (shares), nll (nats per learned token), ttft_ms and decode_tokens_per_s (medians),
        examples, seconds; those that were not asked for are null.
    """
    started = time.monotonic()
    answering = {"exact-match", "speed"} & set(metrics)
    whole = "speed" in metrics
    predictions = list(predict(session, examples, progress, whole=whole)) if answering else []
    figures: dict[str, Any] = {
        "exact_match": _share([p.exact for p in predictions]) if "exact-match" in metrics else None,
        "json_match": _share([p.json_match for p in predictions]) if "exact-match" in metrics and whole else None,
        "nll": reference_nll(session, artifact, examples) if "nll" in metrics else None,
        **(speed([p.usage for p in predictions]) if "speed" in metrics else {}),
        "examples": len(examples),
        "bytes": size_of(artifact),
    }
    return {**figures, "seconds": round(time.monotonic() - started, 2)}, predictions


def _share(verdicts: Sequence[bool | None]) -> float | None:
    known = [verdict for verdict in verdicts if verdict is not None]
    return sum(known) / len(known) if known else None


def reference_nll(session: Session, artifact: Path, examples: Sequence[Example]) -> float | None:
    """Mean NLL of the reference answers by the file, in nats per token; None where no template can be read."""
    if artifact.suffix != ".gguf" and not (artifact.is_dir() and read_manifest(artifact)):
        return None
    facts = read_facts(artifact)
    if facts.template is None:
        return None
    encoded = encode_all(examples, facts.template, session_tokenize(session), facts.ends, session.context)
    value, _ = file_nll(session, encoded.encoded)
    return value


def speed(usages: Sequence[Usage]) -> Mapping[str, float | None]:
    """Medians: time to the first token, and decode speed of the answers with at least two tokens."""
    rates = [usage.decode_tokens_per_s for usage in usages if usage.completion_tokens > 1]
    return {
        "ttft_ms": round(1000 * statistics.median(usage.ttft_s for usage in usages), 2) if usages else None,
        "decode_tokens_per_s": round(statistics.median(rates), 2) if rates else None,
    }
