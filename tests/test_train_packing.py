from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from edgeft.train.packing import best_fit_decreasing, schedule

LENGTHS = st.lists(st.integers(1, 120), min_size=1, max_size=60)


@given(LENGTHS)
def test_every_example_is_packed_once_and_no_pack_overflows(lengths: list[int]) -> None:
    packs = best_fit_decreasing(lengths, 100, range(len(lengths)))
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for pack in packs:
        assert sum(lengths[index] for index in pack) <= 100 or len(pack) == 1


@given(LENGTHS)
def test_packs_are_near_the_smallest_possible_number(lengths: list[int]) -> None:
    short = [min(length, 100) for length in lengths]
    packs = best_fit_decreasing(short, 100, range(len(short)))
    assert len(packs) <= 11 / 9 * -(-sum(short) // 100) * 2 + 1
    # No two packs could have been one.
    loads = sorted(sum(short[index] for index in pack) for pack in packs)
    assert len(loads) < 2 or loads[0] + loads[1] > 100


def test_each_epoch_sees_every_example_in_other_company() -> None:
    lengths = [10, 20, 30, 40] * 10
    made = schedule(lengths, 100, per_step=2, epochs=2, seed=7)
    first, second = made.packs[: made.packs_per_epoch], made.packs[made.packs_per_epoch :]
    for packs in (first, second):
        assert Counter(index for pack in packs for index in pack) == Counter(range(40))
    assert first != second


def test_the_seed_decides_the_order() -> None:
    lengths = list(range(1, 50))
    assert schedule(lengths, 100, 1, 2, seed=1) == schedule(lengths, 100, 1, 2, seed=1)
    assert schedule(lengths, 100, 1, 2, seed=1) != schedule(lengths, 100, 1, 2, seed=2)


def test_half_an_epoch_takes_half_of_its_packs() -> None:
    made = schedule([50] * 40, 100, per_step=1, epochs=1.5, seed=0)
    assert made.packs_per_epoch == 20
    assert made.steps == 30
    assert made.epoch_at(30) == 1.5
