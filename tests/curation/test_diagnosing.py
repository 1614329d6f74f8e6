from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute, choose_compute
from fedqc.curation.diagnosing import corrected_label, diagnose, diagnose_cases
from fedqc.curation.diagnosis import Diagnosis, Kind
from fedqc.degradation.annotator import (
    AnotherPatient,
    InventedComponent,
    LeftRightFlip,
    MissedComponent,
    OverContouring,
    Shift,
    SlicesLeftOut,
    SwappedClasses,
    UnderContouring,
)
from fedqc.degradation.base import Degradation
from fedqc.geometry import sides_of
from fedqc.methods.base import Method, Score
from fedqc.metrics.overlap import overlap
from fedqc.task import Task

TASK = Task(
    name="blobs",
    modalities=("t1",),
    classes={"head": (1,), "tail": (2,), "node": (3,)},
    regions={"head": ("head",), "tail": ("tail",), "node": ("node",)},
    spacing=(1.0, 1.0, 2.0),
    size=(32, 32, 24),
)
Label = NDArray[np.uint8]


def ball(centre: tuple[float, float, float], half: tuple[float, float, float]) -> NDArray[np.bool_]:
    axes = np.meshgrid(*(np.arange(side) for side in TASK.size), indexing="ij")
    distance = np.square([(x - c) / h for x, c, h in zip(axes, centre, half, strict=True)]).sum(axis=0)
    return np.asarray(distance <= 1)


@pytest.fixture(scope="module")
def reference() -> Label:
    label = np.zeros(TASK.size, np.uint8)
    label[ball((11, 18, 11), (6, 7, 4))] = 1
    label[ball((11, 10, 12), (5, 4, 3)) & (label == 0)] = 2
    label[ball((20, 22, 14), (3, 3, 2.5))] = 3
    return label


@pytest.fixture(scope="module")
def corrected(reference: Label) -> Label:
    """What a model might say: the reference, but for every fifth voxel of its border."""
    rng = np.random.default_rng(0)
    moved = np.where(rng.uniform(size=reference.shape) < 0.2, np.roll(reference, 1, axis=1), reference)
    assert 0.005 < (moved != reference).sum() / (reference > 0).sum() < 0.2
    return moved


def spoiled(degradation: Degradation, label: Label, params: dict[str, Any]) -> Label:
    return degradation.apply(torch.from_numpy(label)[None], [params])[0].numpy()


SIDES = sides_of(TASK.spacing)
KNOWN: list[tuple[Kind, Degradation, dict[str, Any], str]] = [
    (Kind.UNDER, UnderContouring(SIDES), {"distance": 2.0}, "2.0 mm inside"),
    (Kind.OVER, OverContouring(SIDES), {"distance": 3.0}, "3.0 mm outside"),
    (Kind.MISSED, MissedComponent(), {"class": 3, "voxel": [20, 22, 14]}, "a piece of node"),
    (Kind.MISSED, MissedComponent(), {"class": 1, "voxel": [11, 18, 11]}, "a piece of head"),
    (
        Kind.INVENTED,
        InventedComponent(SIDES),
        {"class": 2, "centres": [25.0, 8.0, 6.0], "axes": [4.0, 3.0, 3.0]},
        "a piece of tail",
    ),
    (
        Kind.SWAPPED,
        SwappedClasses(),
        {"first": 1, "second": 2, "both": 1},
        "head is called tail, tail is called head",
    ),
    (Kind.SWAPPED, SwappedClasses(), {"first": 1, "second": 2, "both": 0}, "head is called tail"),
    (
        Kind.SLICES,
        SlicesLeftOut(),
        {"axis": 2, "slices": [8, 10, 12, 14, 16]},
        "5 of 10 axial slices are not labelled",
    ),
    (Kind.SLICES, SlicesLeftOut(), {"axis": 0, "slices": [4, 5, 6, 7, 8, 9]}, "sagittal slices"),
    (Kind.FLIP, LeftRightFlip(), {}, "flipped left to right"),
    (
        Kind.SHIFT,
        Shift(),
        {"voxels": [3, -2, 1]},
        "3.0 mm to the right, 2.0 mm to the back, 2.0 mm to the top",
    ),
]


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known[3])
def test_every_kind_of_error_is_named(
    known: tuple[Kind, Degradation, dict[str, Any], str], reference: Label, corrected: Label
) -> None:
    kind, degradation, params, said = known
    label = spoiled(degradation, reference, params)
    found, undone = diagnose(label, corrected, TASK)
    assert found.kind is kind
    assert said in found.found
    assert found.explains > 0.7
    if kind in {Kind.FLIP, Kind.SHIFT} or (kind is Kind.SWAPPED and params["both"]):
        assert undone is not None
        np.testing.assert_array_equal(undone[1], reference)
    else:  # what was lost, nobody can give back
        assert undone is None
    # Of the reference itself an error explains all, but for balls that touch it, and ties between classes.
    exactly, _ = diagnose(label, reference, TASK)
    assert exactly.kind is kind
    assert exactly.explains == pytest.approx(1.0, abs={Kind.INVENTED: 0.25, Kind.OVER: 0.03}.get(kind, 1e-9))


def test_other_axes_are_flipped_too(reference: Label, corrected: Label) -> None:
    found, undone = diagnose(np.flip(reference, (1, 2)), corrected, TASK)
    assert (found.kind, found.found) == (Kind.FLIP, "flipped back to front and bottom to top")
    assert undone is not None
    assert undone[0] == "flip it back to front and bottom to top"
    np.testing.assert_array_equal(undone[1], reference)


def test_what_nothing_explains_is_anothers(reference: Label, corrected: Label) -> None:
    other = np.zeros_like(reference)
    other[ball((12, 14, 12), (9, 3, 7))] = 1
    other[ball((8, 21, 11), (3, 4, 8)) & (other == 0)] = 3
    label = spoiled(AnotherPatient([torch.from_numpy(other)]), reference, {"donor": 0})
    found, undone = diagnose(label, corrected, TASK)
    assert (found.kind, undone) == (Kind.ANOTHER, None)


def test_what_differs_little_is_no_other_patients(reference: Label) -> None:
    rng = np.random.default_rng(1)
    ragged = np.where(rng.uniform(size=reference.shape) < 0.3, np.roll(reference, 1, axis=0), reference)
    assert 0.9 < overlap_of(ragged, reference) < 0.96
    found, undone = diagnose(ragged, reference, TASK)
    assert (found.kind, undone) == (Kind.UNCLEAR, None)


def test_the_contour_of_one_class_may_be_wrong(reference: Label) -> None:
    """Where two classes touch, too."""
    wide = reference.copy()
    wide[ndimage.binary_dilation(reference == 2, iterations=2) & (reference == 1)] = 2
    found, _ = diagnose(wide, reference, TASK)
    assert found.kind is Kind.OVER
    assert found.found.startswith("the contour of tail runs")
    narrow = np.where(ndimage.binary_erosion(reference == 1) | (reference != 1), reference, 0).astype(
        np.uint8
    )
    found, _ = diagnose(narrow, reference, TASK)
    assert found.kind is Kind.UNDER
    assert found.found.startswith("the contour of head runs")


def test_a_class_that_is_not_there_can_be_a_wrong_name(reference: Label) -> None:
    only = np.where(reference == 1, reference, 0).astype(np.uint8)
    label = np.where(only == 1, 2, 0).astype(np.uint8)
    found, undone = diagnose(label, only, TASK)
    assert (found.kind, found.found) == (Kind.SWAPPED, "head is called tail")
    assert undone is not None
    assert undone[0] == "call tail head"
    np.testing.assert_array_equal(undone[1], only)


def test_labels_without_any_voxel(reference: Label) -> None:
    nothing = np.zeros_like(reference)
    assert diagnose(nothing, reference, TASK)[0].kind is Kind.MISSED
    invented = np.where(reference == 3, reference, 0)
    assert diagnose(invented, nothing, TASK)[0].kind is Kind.INVENTED
    for same in (nothing, reference):
        found, undone = diagnose(same, same, TASK)
        assert (found.kind, found.explains, undone) == (Kind.UNCLEAR, 0, None)


def test_error_maps_correct_a_label_where_there_is_no_other_way(reference: Label) -> None:
    label = np.where(reference == 1, 2, reference).astype(np.uint8)
    maps = {
        name: (((label == index) != (reference == index)) * 0.9).astype(np.float32)
        for index, name in enumerate(TASK.classes, 1)
    }
    np.testing.assert_array_equal(
        corrected_label(label, Score("", 0.5, {}, class_error_maps=maps), TASK), reference
    )
    binary = Score("", 0.5, {}, (label != reference).astype(np.float32))
    assert corrected_label(label, binary, TASK) is None  # wrong is known there, but not what is right
    one = TASK.model_copy(update={"classes": {"head": (1,)}})
    only = (reference == 1).astype(np.uint8)
    score = Score("", 0.5, {}, np.where(only > 0, 0.8, 0.1).astype(np.float32))
    np.testing.assert_array_equal(corrected_label(np.zeros_like(only), score, one), only)
    assert corrected_label(label, Score("", 0.5, {}), TASK) is None


def overlap_of(label: Label, other: Label) -> float:
    return float(2 * ((label == other) & (label > 0)).sum() / ((label > 0).sum() + (other > 0).sum()))


class Knowing:
    """Knows the right label of a case, and so its quality."""

    name = "knowing"
    task = TASK

    def __init__(self, right: Label, *, tells: bool = True) -> None:
        self.right, self.tells = right, tells
        self.seen: list[Label] = []

    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int = 8
    ) -> Iterator[Score]:
        for case in cases:
            self.seen.append(case.label)
            label, right = (torch.from_numpy(np.array(one))[None] for one in (case.label, self.right))
            quality = overlap(label, right, TASK.region_indices()).mean.item()
            yield Score(case.id, quality, {}, corrected=self.right if self.tells else None)


def diagnosed(method: Knowing, labels: dict[str, Label]) -> dict[str, Diagnosis | None]:
    image = np.zeros((1, *TASK.size), np.float32)
    cases = [
        Case(name, name, image, label, np.eye(4), TASK.size, np.eye(4)) for name, label in labels.items()
    ]
    found = diagnose_cases(cast("Method", method), nn.Identity(), cases, choose_compute("cpu"))
    return {case.id: diagnosis for case, diagnosis in found}


def test_a_file_is_flipped_about_its_own_middle(reference: Label) -> None:
    """Which is not that of the case, where the image was cropped."""
    beside = 7  # voxels that were cut off at the left more than at the right
    affine = np.eye(4)
    affine[0, 3] = beside
    flipped = np.zeros_like(reference)
    in_file = np.concatenate([np.zeros((beside, *reference.shape[1:]), np.uint8), reference])
    flipped[:] = in_file[::-1][beside:]
    shape = (TASK.size[0] + beside, *TASK.size[1:])
    image = np.zeros((1, *TASK.size), np.float32)
    case = Case("a", "a", image, flipped, affine, shape, np.eye(4))
    (found,) = (
        one
        for _, one in diagnose_cases(
            cast("Method", Knowing(reference)), nn.Identity(), [case], choose_compute("cpu")
        )
    )
    assert found is not None
    assert (found.kind, found.explains) == (Kind.FLIP, 1)


def test_a_repair_is_offered_where_scoring_says_that_it_mends(reference: Label) -> None:
    method = Knowing(reference)
    swapped = spoiled(SwappedClasses(), reference, {"first": 1, "second": 2, "both": 1})
    eroded = spoiled(UnderContouring(SIDES), reference, {"distance": 2.0})
    found = diagnosed(method, {"a": swapped, "b": eroded, "c": np.flip(reference, 0)})
    assert [one and one.kind for one in found.values()] == [Kind.SWAPPED, Kind.UNDER, Kind.FLIP]
    assert found["a"] is not None
    assert found["a"].repair is not None
    assert found["a"].repair.how == "call tail head, call head tail"
    assert found["a"].repair.quality == 1.0
    assert found["b"] is not None
    assert found["b"].repair is None
    assert len(method.seen) == 5  # each once, and again what could be undone
    assert diagnosed(Knowing(reference, tells=False), {"a": swapped}) == {"a": None}


def test_a_repair_that_does_not_mend_is_not_offered(
    reference: Label, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Knowing(reference)
    flipped = np.flip(reference, 0)
    score = method.score
    monkeypatch.setattr(method, "score", lambda *args: (replace(one, quality=0.3) for one in score(*args)))
    found = diagnosed(method, {"a": flipped})["a"]
    assert found is not None
    assert (found.kind, found.repair) == (Kind.FLIP, None)
