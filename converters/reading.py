"""The border between a converter and the files of a stranger's model."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

from edgeft.errors import ModelError
from edgeft.plugins import Source


@contextlib.contextmanager
def reading(source: Source) -> Iterator[None]:
    """While a plan is made: settings that are there but of another kind than anyone expects become an error of theirs.

    Raises:
        ModelError
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        folders = f"{source.base} and {source.adapter}" if source.adapter else str(source.base)
        raise ModelError(
            f"the configuration or tokenizer files of {folders} do not make sense: {type(error).__name__}: "
            f"{str(error)[:200]}",
            "Copy or download them again.",
        ) from error
