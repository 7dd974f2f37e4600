"""What every session does alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from edgeft.errors import ModelError, UsageError

if TYPE_CHECKING:
    from types import TracebackType


class ClosingSession:
    """A session that a `with` block closes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model. Calling it again does nothing."""
        raise NotImplementedError


def check_score(tokens: int, start: int, context: int) -> None:
    """Raise `UsageError` where nothing is to be scored, `ModelError` where `tokens` do not fit into `context`."""
    if not 0 <= start < tokens:
        raise UsageError(f"nothing to score: start {start} of {tokens} tokens")
    if tokens > context:
        raise ModelError(f"{tokens} tokens to score; the context holds {context}")
