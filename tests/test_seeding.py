import hashlib

import numpy as np
import pytest

from fedqc.seeding import derive_seed, generator


def test_the_seed_is_the_first_63_bits_of_a_hash_of_seed_and_names() -> None:
    digest = hashlib.sha256(b"7\x1ftrain\x1fhospital-1\x1f3").hexdigest()
    assert derive_seed(7, "train", "hospital-1", 3) == int(digest[:16], 16) // 2


@pytest.mark.parametrize(
    "other", [(1, "ab", "c"), (0, "a", "bc"), (0, "abc"), (0, "ab", "c", ""), (0, "c", "ab"), (0,)]
)
def test_every_piece_of_work_has_a_seed_of_its_own(other: tuple[int, str]) -> None:
    assert derive_seed(*other) != derive_seed(0, "ab", "c")


def test_seeds_fit_into_63_bits_and_use_them() -> None:
    seeds = [derive_seed(0, number) for number in range(200)]
    assert len(set(seeds)) == 200
    assert min(seeds) >= 0
    assert 2**62 < max(seeds) < 2**63


def test_a_generator_depends_on_nothing_but_its_names() -> None:
    alone = generator(3, "noise", "a").random(5)
    generator(3, "noise", "b").random(100)
    np.random.default_rng(0).random()
    assert np.array_equal(generator(3, "noise", "a").random(5), alone)
    assert not np.array_equal(generator(3, "noise", "b").random(5), alone)
