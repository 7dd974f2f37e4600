"""What an importance matrix is worth: the same file without it, with it, and with types it chose, on unseen text."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import export
from edgeft.data.example import Encoded
from edgeft.errors import DataError
from edgeft.export import Origin, merged
from edgeft.plugins import ConvertOptions, Session
from edgeft.progress import Progress, Silent
from edgeft.sessions import open_session
from edgeft.verify.check import encode_for
from edgeft.verify.divergence import Divergence, Reference, file_rows, scored_rows
from edgeft.verify.examples import held_out

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TARGET = "gguf-q4"
EXAMPLES = 32
_VALUES = 1 << 26
"""Log-probabilities of the model held at once: 256 MB in float32."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class FileLoss:
    """One file against the merged model."""

    name: str
    bytes: int
    kl: float
    """Mean KL(model ‖ file), nats per token."""
    saved: tuple[float, float] | None = None
    """95 % interval of what that is below the first file's; from a paired bootstrap over examples."""

    def as_dict(self) -> dict[str, Any]:
        return {"file": self.name, "bytes": self.bytes, "kl": self.kl, "saved": self.saved}


def measure_gain(
    origin: Origin, imatrix: Path, data: str | None = None, examples: int = EXAMPLES, progress: Progress | None = None
) -> list[FileLoss]:
    """`gguf-q4` without and with the matrix, and a file of its size with types chosen by the matrix.

    Raises:
        DataError: the data set has no split that was held back.
        MissingDependency: torch or a runtime is not installed.
    """
    from edgeft.verify.torch_reference import load_reference

    progress = progress or Silent()
    if origin.source.gguf is not None:
        origin = merged(origin, progress)
    source = origin.source
    encoded = encode_for(source, held_out(origin.run, data)[0][:examples], context=2048)
    reference = load_reference(source.base, source.adapter, rounded=source.nf4)
    found = _Loss(encoded, reference)
    progress.start("Measuring the gain", 3, "files")
    try:
        with tempfile.TemporaryDirectory(prefix="edgeft-") as folder:
            for name, target, extra in _files(imatrix):
                file = Path(folder) / "file.gguf"
                if "bytes" in extra:
                    extra["bytes"] = found.files[0].bytes
                _write(origin, target, file, extra)
                found.add(name, file)
                progress.advance(1)
    finally:
        progress.finish()
    return found.files


def _files(imatrix: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    yield TARGET, TARGET, {}
    yield f"{TARGET} with the matrix", TARGET, {"imatrix": imatrix}
    yield "types chosen for this size", "gguf", {"imatrix": imatrix, "bytes": None}


def _write(origin: Origin, target: str, file: Path, extra: dict[str, Any]) -> None:
    converter = export.converter_for(target)
    converter.convert(converter.plan(origin.source, target, ConvertOptions(file, extra=extra)), Silent())


class _Loss:
    """The model's answers, and each file's distance from them."""

    def __init__(self, encoded: Sequence[Encoded], reference: Reference) -> None:
        import numpy as np

        self.files: list[FileLoss] = []
        self._examples: list[tuple[list[int], list[int], NDArray[np.float32]]] = []
        room = _VALUES
        for one in encoded:
            rows = scored_rows(one)
            answers = reference.log_probs(one.tokens, rows)
            room -= answers.size
            if room < 0 and self._examples:
                break
            self._examples.append((one.tokens, rows, answers))
        if not self._examples:
            raise DataError("the held-out examples have nothing to measure on")
        self._tokens = np.array([len(rows) for _, rows, _ in self._examples])
        self._first: NDArray[np.float64] | None = None

    def add(self, name: str, file: Path) -> None:
        import numpy as np

        with open_session(str(file)).session as session:
            sums = np.array([self._distance(session, *example) for example in self._examples])
        kl = max(0.0, float(sums.sum() / self._tokens.sum()))
        saved = None if self._first is None else self._interval(self._first - sums)
        self._first = sums if self._first is None else self._first
        self.files.append(FileLoss(name, file.stat().st_size, kl, saved))

    def _distance(self, session: Session, tokens: list[int], rows: list[int], answers: NDArray[np.float32]) -> float:
        import numpy as np

        found = Divergence()
        targets = np.asarray([tokens[row + 1] for row in rows])
        found.add(answers, file_rows(session, tokens, rows), targets)
        return found.kl * found.tokens

    def _interval(self, saved: NDArray[np.float64]) -> tuple[float, float]:
        import numpy as np

        picks = np.random.default_rng(0).integers(0, len(saved), (_RESAMPLES, len(saved)))
        low, high = np.percentile(saved[picks].sum(1) / self._tokens[picks].sum(1), [2.5, 97.5])
        return float(low), float(high)
