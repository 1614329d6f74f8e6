"""Folds of patients, so that a segmenter only segments cases that it has not learned from."""

import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np

from fedqc.cases.memo import digest
from fedqc.cases.volumes import Case
from fedqc.errors import TrainingError
from fedqc.lazy import Chosen
from fedqc.seeding import derive_seed


def folds_of(patients: Iterable[str], seed: int, folds: int) -> dict[str, int]:
    """The fold of each patient, from 0.

    Patients are dealt in turn in the order of their hashes: the folds' sizes differ by one at most, however
    few patients there are, and the order in which they are named does not matter. A patient who comes or goes
    may move others to another fold.
    """
    order = sorted(set(patients), key=lambda patient: (derive_seed(seed, "fold", patient), patient))
    return {patient: position % folds for position, patient in enumerate(order)}


def out_of_fold(cases: Sequence[Case], fold: int, seed: int, folds: int) -> tuple[Chosen[Case], Chosen[Case]]:
    """The cases to train on and the cases to segment, both in the order given; no patient has cases in both.

    Over all folds, each case is segmented once. With more folds than patients, some have none to segment.

    Raises:
        TrainingError: there are cases to segment, but none is left to train on.
    """
    patients = [case.patient for case in cases]
    fold_of = folds_of(patients, seed, folds)
    train_on = Chosen(cases, [i for i, patient in enumerate(patients) if fold_of[patient] != fold])
    to_segment = Chosen(cases, [i for i, patient in enumerate(patients) if fold_of[patient] == fold])
    if to_segment and not train_on:
        raise TrainingError(
            f"no case is left to train a segmenter on: all {len(cases)} in {folds} fold(s) are of "
            f"{len(fold_of)} patient(s), and none may be segmented by what learned from the same patient; "
            "it takes two patients and two folds at least"
        )
    return train_on, to_segment


def learned_from(cases: Iterable[Case]) -> str:
    """SHA-256 of what a segmenter learns from: whose cases these are, and their labels, in any order."""
    return digest(sorted(map(_digest, cases)))


def _digest(case: Case) -> str:
    """By the label: hashing images too would take seconds."""
    known = hashlib.sha256(json.dumps([case.id, case.patient, case.label.shape]).encode())
    known.update(np.ascontiguousarray(case.label).data)
    return known.hexdigest()
