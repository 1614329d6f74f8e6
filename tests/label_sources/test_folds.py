import hashlib
from collections import Counter
from collections.abc import Callable

import pytest

from fedqc.cases.volumes import Case
from fedqc.errors import TrainingError
from fedqc.label_sources.folds import folds_of, out_of_fold

MakeCase = Callable[..., Case]
PATIENTS = [f"patient-{number}" for number in range(11)]


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_are_as_large_as_each_other(folds: int) -> None:
    for n_patients in range(1, 12):
        sizes = Counter(folds_of(PATIENTS[:n_patients], 0, folds).values())
        every = [sizes[fold] for fold in range(folds)]
        assert sum(every) == n_patients
        assert max(every) - min(every) <= 1


def test_patients_are_dealt_in_the_order_of_their_hashes() -> None:
    def hashed(patient: str) -> str:
        return hashlib.sha256(f"7\x1ffold\x1f{patient}".encode()).hexdigest()

    expected = {patient: position % 3 for position, patient in enumerate(sorted(PATIENTS, key=hashed))}
    assert folds_of(PATIENTS, 7, 3) == expected


def test_neither_order_nor_repetition_matters_but_the_seed_does() -> None:
    folds = folds_of(PATIENTS, 0, 2)
    assert folds_of([*reversed(PATIENTS), *PATIENTS], 0, 2) == folds
    assert folds_of(PATIENTS, 1, 2) != folds


def test_every_case_is_segmented_once_by_what_never_saw_its_patient(make_case: MakeCase) -> None:
    cases = [make_case(f"{patient}-{visit}", patient=patient) for visit in "ab" for patient in PATIENTS]
    segmented = []
    for fold in range(3):
        train_on, to_segment = out_of_fold(cases, fold, 7, 3)
        assert {folds_of(PATIENTS, 7, 3)[case.patient] for case in to_segment} == {fold}
        assert not {case.patient for case in train_on} & {case.patient for case in to_segment}
        assert {case.id for case in [*train_on, *to_segment]} == {case.id for case in cases}
        for part in (train_on, to_segment):
            ids = [case.id for case in part]
            assert ids == [case.id for case in cases if case.id in ids]  # in the order given
        segmented += [case.id for case in to_segment]
    assert sorted(segmented) == sorted(case.id for case in cases)


def test_more_folds_than_patients(make_case: MakeCase) -> None:
    cases = [make_case("first"), make_case("second")]
    parts = [out_of_fold(cases, fold, 0, 5) for fold in range(5)]
    assert [len(to_segment) for _, to_segment in parts] == [1, 1, 0, 0, 0]
    assert [len(train_on) for train_on, _ in parts] == [1, 1, 2, 2, 2]
    assert [len(part) for part in out_of_fold([], 0, 0, 2)] == [0, 0]


@pytest.mark.parametrize(("patients", "folds"), [(["one", "one"], 2), (["one", "two"], 1)])
def test_nothing_left_to_train_on(make_case: MakeCase, patients: list[str], folds: int) -> None:
    cases = [make_case(f"case-{number}", patient=patient) for number, patient in enumerate(patients)]
    with pytest.raises(TrainingError, match=rf"all 2 in {folds} fold\(s\) are of {len(set(patients))} pat"):
        out_of_fold(cases, 0, 0, folds)
