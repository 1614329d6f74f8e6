"""Reference cases in two parts: what a model learns from, and what it is tried on."""

from collections.abc import Sequence

from fedqc.cases.layouts import CaseFiles
from fedqc.seeding import derive_seed

_PARTS = 4
"""One part in four of the patients is held back."""


def split_references(
    references: Sequence[CaseFiles], seed: int
) -> tuple[tuple[CaseFiles, ...], tuple[CaseFiles, ...]]:
    """Reference cases for training (three quarters of the patients) and held-back ones (a quarter).

    Seed and patients decide, so every phase of a run makes the same split. From two patients on there is one
    at least on either side.
    """
    patients = sorted(
        {case.patient for case in references}, key=lambda patient: derive_seed(seed, "split", patient)
    )
    n_held_back = (len(patients) + 2) // _PARTS
    held_back = set(patients[:n_held_back])
    return (
        tuple(case for case in references if case.patient not in held_back),
        tuple(case for case in references if case.patient in held_back),
    )


def fewest_references(held_back: int) -> int:
    """With references of how many patients, at least, so many of them are held back."""
    return _PARTS * held_back - 2
