from collections import Counter

import numpy as np
import pytest
import torch
from fedqc_simulations.noise import (
    LARGEST_DSC,
    choose_spoiled,
    deal_kinds,
    habit_params,
    habits,
    spoil,
    spoil_with,
)
from numpy.typing import NDArray
from scipy import ndimage

from fedqc.degradation.annotator import ANNOTATOR_KINDS, SwappedClasses
from fedqc.degradation.samples import LabelFactory, Recipe
from fedqc.metrics.overlap import overlap

REGIONS = ((1,), (2,), (1, 2))
Label = NDArray[np.uint8]


@pytest.fixture
def label() -> Label:
    label = np.zeros((20, 22, 18), dtype=np.uint8)
    label[4:14, 5:16, 4:13] = 2
    label[6:12, 7:13, 6:11] = 1
    label[16:19, 2:5, 2:6] = 1
    return label


@pytest.fixture
def donor(label: Label) -> Label:
    return np.ascontiguousarray(label[:, ::-1])


def dsc(label: Label, reference: Label) -> float:
    return float(overlap(torch.from_numpy(label)[None], torch.from_numpy(reference)[None], REGIONS).mean)


def test_half_of_the_sites_have_a_habit_each_another() -> None:
    assert habits(["a", "b", "c", "d", "e", "f", "g", "h"], 2) == {
        "a": "swapped-classes",
        "b": "over-contouring",
        "c": "shift",
        "d": "swapped-classes",
    }
    assert habits(["a", "b", "c", "d"], 1) == {"a": "over-contouring", "b": "shift"}  # nothing to swap
    assert habits(["a", "b", "c"], 2) == {"a": "swapped-classes"}
    assert habits(["a"], 2) == {"a": "swapped-classes"}


def test_habits_are_sized_for_the_structure() -> None:
    axes = np.indices((24, 24, 24)) - 11.5
    ball = (np.sqrt((axes**2).sum(axis=0)) <= 8).astype(np.uint8)
    rng = np.random.default_rng(0)
    assert habit_params("swapped-classes", ball, rng) == {"first": 1, "second": 2, "both": 1}
    assert habit_params("over-contouring", ball, rng)["distance"] == pytest.approx(0.25 * 8, rel=0.02)
    voxels = [habit_params("shift", ball, rng)["voxels"] for _ in range(20)]
    lengths = [float(np.linalg.norm(v)) for v in voxels]
    assert np.mean(lengths) == pytest.approx(0.45 * 8, abs=0.3)
    assert len({tuple(v) for v in voxels}) > 10  # in any direction


def test_a_share_of_the_cases_is_spoiled() -> None:
    ids = [f"case-{number}" for number in range(20)]
    chosen = choose_spoiled(ids, 0.35, np.random.default_rng(0))
    assert len(chosen) == len(set(chosen)) == 7
    assert set(chosen) < set(ids)
    assert chosen == choose_spoiled(ids, 0.35, np.random.default_rng(0))
    assert chosen != choose_spoiled(ids, 0.35, np.random.default_rng(1))
    assert choose_spoiled(ids, 0.0, np.random.default_rng(0)) == []
    assert choose_spoiled([], 0.5, np.random.default_rng(0)) == []


def test_kinds_are_dealt_evenly_and_each_case_can_fall_back_on_all_of_them() -> None:
    ids = [str(number) for number in range(3 * len(ANNOTATOR_KINDS))]
    dealt = deal_kinds(ids, np.random.default_rng(0))
    assert list(dealt) == ids
    assert Counter(kinds[0] for kinds in dealt.values()) == dict.fromkeys(ANNOTATOR_KINDS, 3)
    assert all(sorted(kinds) == sorted(ANNOTATOR_KINDS) for kinds in dealt.values())
    starts = {deal_kinds(ids, np.random.default_rng(seed))["0"][0] for seed in range(30)}
    assert len(starts) > 5  # a site with few cases does not always get the same kinds


@pytest.mark.parametrize("kind", ANNOTATOR_KINDS)
def test_a_spoiled_label_is_as_bad_as_promised_and_replays(label: Label, donor: Label, kind: str) -> None:
    kept = label.copy()
    spoiled = spoil(label, donor, [kind], REGIONS, np.random.default_rng(0))
    assert spoiled is not None
    assert np.array_equal(label, kept)
    assert spoiled.kind == kind
    assert spoiled.dsc == pytest.approx(dsc(spoiled.label, label))
    assert spoiled.dsc <= LARGEST_DSC
    assert spoiled.label.any()
    again = LabelFactory([label, donor], REGIONS).make([Recipe(0, kind, spoiled.params)])
    assert np.array_equal(again.label[0].numpy(), spoiled.label)


def test_kinds_are_tried_in_their_order(label: Label, donor: Label) -> None:
    single = np.minimum(label, 1)
    kinds = ["swapped-classes", "shift", "over-contouring"]
    first = spoil(label, donor, kinds, REGIONS, np.random.default_rng(0))
    second = spoil(single, donor, kinds, REGIONS, np.random.default_rng(0))
    assert first is not None
    assert second is not None
    assert (first.kind, second.kind) == ("swapped-classes", "shift")


def test_what_is_never_bad_enough_is_not_taken(label: Label, donor: Label) -> None:
    centred = np.zeros((16, 16, 16), dtype=np.uint8)
    centred[4:12, 4:12, 4:12] = 1  # symmetric, so that a flip changes nothing
    assert spoil(centred, centred, ["left-right-flip"], REGIONS, np.random.default_rng(0)) is None
    assert spoil(label, label, ["another-patient"], REGIONS, np.random.default_rng(0)) is None
    nothing = np.zeros_like(donor)  # an empty label would be found without any model
    assert spoil(label, nothing, ["another-patient"], REGIONS, np.random.default_rng(0)) is None


def test_spoiling_with_a_habit(label: Label) -> None:
    swapped = spoil_with(label, SwappedClasses.kind, {"first": 1, "second": 2, "both": 1}, REGIONS)
    assert swapped is not None
    assert np.array_equal(swapped.label, np.array([0, 2, 1], dtype=np.uint8)[label])
    assert swapped.dsc == pytest.approx(1 / 3)  # no core, no rim, all of the whole
    moved = spoil_with(label, "shift", {"voxels": [0, 4, -2]}, REGIONS)
    assert moved is not None
    assert np.array_equal(moved.label, ndimage.shift(label, (0, 4, -2), order=0))
    assert moved.dsc == pytest.approx(dsc(moved.label, label))
    assert spoil_with(label, "shift", {"voxels": [0, 0, 0]}, REGIONS) is None
    assert spoil_with(label, "shift", {"voxels": [99, 0, 0]}, REGIONS) is None
