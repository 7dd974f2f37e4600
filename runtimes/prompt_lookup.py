"""Guessing the next tokens from what was said before: prompt-lookup decoding.

The guesses are what followed the last tokens when they stood there before (Saxena 2023, "Prompt Lookup Decoding"). The
model then computes all of them in one batch and keeps those that it would have chosen itself, so the guesses decide how
fast an answer comes and not what it says.
"""

from __future__ import annotations

from collections.abc import Sequence

ORDER = 3
"""Tokens that must stand together for the next ones to be guessed. Not tuned."""
LONGEST = 6
"""Tokens guessed at once. Not tuned."""


class PromptLookup:
    def __init__(self, prompt: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """Tokens that stand together -> the place after their latest occurrence, the end of the text left out."""
        self.extend(prompt)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            if end >= ORDER:
                self._after[tuple(self._tokens[end - ORDER :])] = end
            self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """At most `most` tokens that may come next; none where the last ones are new."""
        at = self._after.get(tuple(self._tokens[-ORDER:]))
        return [] if at is None or most < 1 else self._tokens[at : at + min(most, LONGEST)]
