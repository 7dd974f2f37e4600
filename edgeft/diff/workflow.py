"""Set two artifacts against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.artifact import Artifact, size_of
from edgeft.data.example import Encoded
from edgeft.diff import gguf_files, onnx_directories
from edgeft.diff.report import Changed, Difference, Logits, TensorDifference
from edgeft.errors import MissingDependency, UsageError
from edgeft.models.adapter_file import is_adapter
from edgeft.models.gguf_header import GgufHeader, read_header
from edgeft.plugins import AdapterScale, Session
from edgeft.progress import Progress, Silent
from edgeft.sessions import AUTO, find_artifact, open_session
from edgeft.verify.corpus import PLAIN, texts
from edgeft.verify.divergence import Divergence, chunks, file_rows, scored_rows

if TYPE_CHECKING:
    from edgeft.data.example import Example


@dataclass(frozen=True)
class Side:
    """One of the two."""

    artifact: Artifact
    header: GgufHeader | None
    """None for a directory."""

    @property
    def path(self) -> Path:
        return self.artifact.path

    @property
    def adapter(self) -> bool:
        return self.header is not None and is_adapter(self.header)

    @property
    def format(self) -> str:
        return "gguf adapter" if self.adapter else "gguf" if self.header else "onnx"

    @property
    def template(self) -> str | None:
        if self.header is not None:
            return self.header.chat_template
        file = self.path / "chat_template.jinja"
        return file.read_text(encoding="utf-8") if file.is_file() else None

    @property
    def bits_per_weight(self) -> float | None:
        if self.header is not None:
            return round(self.header.bits_per_weight, 3)
        return round(self.artifact.manifest.bits_per_weight, 3) if self.artifact.manifest else None

    @property
    def types(self) -> dict[str, int]:
        if self.header is not None:
            return self.header.type_mix
        return dict(self.artifact.manifest.types) if self.artifact.manifest else {}


@dataclass(frozen=True)
class Wanted:
    """What to compare, beyond headers."""

    examples: Sequence[Example] = ()
    """Held-out examples whose answers are scored; without any, a few plain sentences."""
    tensors: bool = True
    logits: bool = True
    base: Path | None = None
    """What adapters go onto."""
    runtime: str = AUTO


def compare(a: str, b: str, wanted: Wanted, progress: Progress | None = None) -> Difference:
    """Everything that sets `b` apart from `a`.

    Raises:
        UsageError, ModelError: one of them cannot be found or read.
        MissingDependency: no library with ggml, for tensors of a GGUF.
    """
    progress = progress or Silent()
    left, right = (_side(reference, progress) for reference in (a, b))
    notes: list[str] = []
    found = _tensors(left, right, notes, progress) if wanted.tensors else []
    tokenizer, logits = "not compared", None
    if wanted.logits:
        tokenizer, logits = _answers(left, right, wanted, notes, progress)
    return Difference(
        a=str(left.path),
        b=str(right.path),
        formats=(left.format, right.format),
        bytes=(size_of(left.path), size_of(right.path)),
        bits_per_weight=(left.bits_per_weight, right.bits_per_weight),
        metadata=tuple(_metadata(left, right, notes)),
        template=gguf_files.template(left.template, right.template),
        types=tuple(gguf_files.types(left.types, right.types)) if left.format == right.format else (),
        tensors=tuple(found),
        tokenizer=tokenizer,
        logits=logits,
        notes=tuple(notes),
    )


def _side(reference: str, progress: Progress) -> Side:
    artifact = find_artifact(reference, progress=progress)
    if artifact.path.is_dir() and not (artifact.path / "genai_config.json").is_file():
        raise UsageError(f"{reference} is not a GGUF file and not an ONNX directory")
    return Side(artifact, None if artifact.path.is_dir() else read_header(artifact.path))


def _metadata(a: Side, b: Side, notes: list[str]) -> list[Changed]:
    if a.header and b.header:
        return list(gguf_files.metadata(a.header, b.header))
    if a.header or b.header:
        notes.append("metadata, types and tensors are not compared between GGUF and ONNX")
        return []
    return list(onnx_directories.metadata(a.path, b.path))


def _tensors(a: Side, b: Side, notes: list[str], progress: Progress) -> list[TensorDifference]:
    if a.header and b.header:
        progress.start("Comparing tensors", len(a.header.tensors), "tensors")
        made = []
        try:
            for tensor in gguf_files.tensors(a.header, b.header):
                made.append(tensor)
                progress.advance(1, tensor.name)
        finally:
            progress.finish()
        return made
    if a.header or b.header:
        return []
    from edgeft.models.onnx_values import OnnxFile

    try:
        return list(onnx_directories.tensors(OnnxFile(a.path), OnnxFile(b.path)))
    except MissingDependency as error:
        notes.append(f"tensors are not compared: {error.message} ({error.hint})")
        return []


def _answers(a: Side, b: Side, wanted: Wanted, notes: list[str], progress: Progress) -> tuple[str, Logits | None]:
    """What became of the tokenizers, and what both say about the same tokens."""
    if (a.adapter or b.adapter) and wanted.base is None:
        notes.append("answers are not compared: an adapter has none without its base (--base FILE)")
        return "not compared", None
    try:
        with _open(a, wanted, progress) as one, _open(b, wanted, progress) as other:
            tokenizer = "same" if _same_tokenizer(one, other) else "different"
            if one.vocabulary != other.vocabulary:
                notes.append(f"answers are not compared: {one.vocabulary} tokens against {other.vocabulary}")
                return "different", None
            return tokenizer, _logits(one, other, _encoded(a, one, wanted), progress)
    except MissingDependency as error:
        notes.append(f"answers are not compared: {error.message}")
        return "not compared", None


def _open(side: Side, wanted: Wanted, progress: Progress) -> Session:
    if side.adapter:
        return open_session(
            str(wanted.base), wanted.runtime, progress=progress, adapters=[AdapterScale(side.path)]
        ).session
    runtime = AUTO if side.header is None else wanted.runtime
    return open_session(str(side.path), runtime, progress=progress, needs="scores").session


def _same_tokenizer(a: Session, b: Session) -> bool:
    return all(a.tokenize(text, special=True) == b.tokenize(text, special=True) for _, text in texts())


def _encoded(side: Side, session: Session, wanted: Wanted) -> list[Encoded]:
    if not wanted.examples:
        plain = [session.tokenize(text)[: session.context] for text in PLAIN]
        return [Encoded(tokens, [True] * len(tokens)) for tokens in plain]
    from edgeft.data.encode import encode_all
    from edgeft.verify.facts import read_facts
    from edgeft.verify.text_checks import session_tokenize

    facts = read_facts(wanted.base if side.adapter and wanted.base else side.path)
    if facts.template is None:
        raise UsageError(f"{side.path} has no chat template: its examples cannot be written", "Leave out --data.")
    tokenize = session_tokenize(session)
    return encode_all(wanted.examples, facts.template, tokenize, facts.ends, session.context).encoded


def _logits(a: Session, b: Session, encoded: Sequence[Encoded], progress: Progress) -> Logits:
    import numpy as np

    total = Divergence()
    progress.start("Comparing answers", len(encoded), "texts")
    try:
        for example in encoded:
            for rows in chunks(scored_rows(example)):
                targets = np.asarray([example.tokens[row + 1] for row in rows])
                one, other = (file_rows(session, example.tokens, rows) for session in (a, b))
                total.add(one, other, targets)
            progress.advance(1, f"KL {total.kl:.4f}")
    finally:
        progress.finish()
    return Logits(
        len(encoded), total.tokens, total.kl, max(total.worst_kl, 0.0), total.top1, total.nll_reference, total.nll_file
    )
