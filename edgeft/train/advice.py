"""What to consider before a training starts: the method, and the file that the device will want."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgeft.device import load_profile
from edgeft.forecast.best import GOOD, Choice, best, choices
from edgeft.forecast.find import find_facts
from edgeft.train.grids import TARGETS

if TYPE_CHECKING:
    from edgeft.train.workflow import Prepared

_ROOMY = 2.0
"""Times what the base takes in 16 bits that must be free before `lora` is worth a word."""
_MUCH = 2_000_000
"""Learned tokens from which on training all weights of a small model can be worth its memory."""
_ROUNDED = 5.0
"""Bits per weight below which rounding costs enough to train for it (docs/quantization-aware.md)."""


def advice(prepared: Prepared, device: str | None = None) -> list[str]:
    """Sentences, each with the flag it is about; none where nothing better is known.

    Args:
        device: the profile of the device that the model will run on.

    Raises:
        EdgeftError: no such device, or no forecast of such a model.
    """
    return [*_method(prepared), *(_device(prepared, device) if device else ())]


def _method(prepared: Prepared) -> Iterator[str]:
    config, plan = prepared.config, prepared.plan
    if config.method == "qlora" and plan.device == "cpu" and _room_for_lora(prepared):
        yield "--method lora: memory is plenty, and without unpacking 4 bits a step is about a tenth faster"
    if config.method == "full" and not config.from_scratch and plan.learned_per_epoch < _MUCH:
        learned = f"{plan.learned_per_epoch:,}"
        yield f"--method qlora: {learned} learned tokens are few for all weights; an adapter forgets less"
    if not config.samples and prepared.valid:
        yield "--samples 3: see answers to held-out prompts at each validation, not only a loss"


def _room_for_lora(prepared: Prepared) -> bool:
    from edgeft.train.plan import read_shape

    weights = 2 * read_shape(prepared.base.path).parameters
    return prepared.plan.available_bytes - prepared.plan.memory_bytes > _ROOMY * weights


def _device(prepared: Prepared, name: str) -> Iterator[str]:
    config, profile = prepared.config, load_profile(name)
    choice = best(choices(find_facts(config.model), profile, None, "f16"))
    found = choice.forecast
    needs = f"{found.memory.total / 1e6:,.0f} of {profile.usable / 1e6:,.0f} MB"
    if not found.fits:
        yield f"{name}: even {choice.target} needs {needs}: take a smaller base (edgeft devices fit)"
        return
    bits = f"{choice.bits_per_weight:.1f} bits per weight"
    slow = "" if choice.fluent else ", slower than one reads"
    yield f"{name}: export --to {choice.target} ({bits}) needs {needs}, {found.decode} tokens/s{slow}"
    yield from _rounding(prepared, choice)


def _rounding(prepared: Prepared, choice: Choice) -> Iterator[str]:
    config = prepared.config
    if config.target is not None or config.method == "gguf" or choice.bits_per_weight >= _ROUNDED:
        return
    if choice.target in TARGETS:
        yield f"--for {choice.target} --tune both: train with that file's blocks; most of what rounding costs returns"
    elif choice.bits_per_weight < GOOD:
        yield f"{choice.target} rounds hard: compare edgeft verify with a smaller base in 4 bits"
