"""Models by name: what a reference means, and the store where fetched and imported models live."""

from __future__ import annotations

from edgeft.models.aliases import ALIASES, Alias
from edgeft.models.references import ResolvedModel, resolve, weights_digest

__all__ = ["ALIASES", "Alias", "ResolvedModel", "resolve", "weights_digest"]
