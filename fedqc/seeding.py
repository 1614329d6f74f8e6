"""Random generators from one seed and a few names, the same on every machine and in any order of work."""

import hashlib

import numpy as np


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the piece of work called `names` in a run with `seed`."""
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for the piece of work called `names` in a run with `seed`."""
    return np.random.default_rng(derive_seed(seed, *names))
