"""Reverse classification accuracy on phantoms: what must be found right, what must not, and who is asked."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - as its own documentation has it
import torch
from numpy.typing import NDArray
from scipy import ndimage

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import QCConfig, RCAConfig
from fedqc.errors import DataError, TrainingError
from fedqc.label_sources.forest import body
from fedqc.lazy import Lazy
from fedqc.methods import neighbours
from fedqc.methods.base import RoundPlan
from fedqc.methods.calibration import MonotoneMap
from fedqc.methods.neighbours import Neighbours, appearance, weight_of_place
from fedqc.methods.rca import RCAMethod
from fedqc.methods.registration import Registration, register
from fedqc.metrics.overlap import overlap
from fedqc.task import Task

SIZE = (24, 22, 20)
REGIONS = ((1,), (2,))
COMPUTE = Compute(torch.device("cpu"), torch.float32)
Form = Literal["features", "registration"]
FORMS: tuple[Form, ...] = ("features", "registration")


@pytest.fixture
def task() -> Task:
    return Task(
        name="phantom",
        modalities=("T1",),
        classes={"front": (1,), "back": (2,)},
        regions={"front": ("front",), "back": ("back",)},
        spacing=(1.0, 1.0, 1.0),
        size=SIZE,
    )


def phantom(number: int, shift: Sequence[float] = (0, 0, 0), *, patient: str | None = None) -> Case:
    """A head in which two half ellipsoids of different brightness lie, with a little noise."""
    grid = np.indices(SIZE) - (np.array(SIZE) / 2 + shift).reshape(3, 1, 1, 1)
    head = (grid**2 / np.array([11, 10, 9]).reshape(3, 1, 1, 1) ** 2).sum(axis=0) < 1
    inside = (grid**2 / np.array([7, 5, 4]).reshape(3, 1, 1, 1) ** 2).sum(axis=0) < 1
    label = np.where(inside, np.where(grid[0] > 0, 1, 2), 0).astype(np.uint8)
    looks = ndimage.gaussian_filter(np.select([label == 1, label == 2], [3.0, 2.0], 0.0), 0.6)
    noise = np.random.default_rng(number).normal(0, 0.1, SIZE)
    image = ((looks - 1 + noise) * head).astype(np.float32)[None]
    return Case(
        id=f"case-{number}",
        patient=f"patient-{number}" if patient is None else patient,
        image=image,
        label=label,
        affine=np.eye(4),
        native_shape=SIZE,
        native_affine=np.eye(4),
    )


def make(task: Task, cases: Sequence[Case], form: Form = "features", **options: Any) -> RCAMethod:
    clock: Callable[[], float] = options.pop("clock", lambda: 0.0)
    rca = RCAConfig(form=form, **{"voxels": 1500, **options})
    method = RCAMethod(task, QCConfig(method="rca", rca=rca), clock=clock)
    method.references = cases
    return method


def swapped(label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.array([0, 2, 1], dtype=np.uint8)[label]


def faint(number: int, shift: Sequence[float] = (0, 0, 0)) -> Case:
    """A phantom that hardly stands out from its noise."""
    case = phantom(number, shift)
    noise = np.random.default_rng(number).normal(0, 1, SIZE)
    return replace(case, image=((case.image / 3 + noise) * (case.image != 0)).astype(np.float32))


class Scripted:
    """A comparison that says what it is told to, by reference."""

    def __init__(self, dsc: Sequence[Sequence[float]], present: Sequence[Sequence[bool]]) -> None:
        self.dsc, self.present = dsc, present
        self.asked: list[int] = []

    def prepare(self, index: int) -> None:
        pass

    def begin(
        self, case: Case, labels: Sequence[NDArray[np.uint8]]
    ) -> Callable[[int], tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        def compare(index: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
            self.asked.append(index)
            return np.array([self.dsc[index]] * len(labels), dtype=np.float32), np.array(self.present[index])

        return compare


# ----------------------------------------------------------------------------------------- carrying labels


@pytest.mark.parametrize("form", FORMS)
def test_a_label_carried_onto_its_own_image_is_the_same(task: Task, form: Form) -> None:
    case = phantom(0)
    found = make(task, [replace(case, id="twin", patient="twin")], form).estimate(case, [case.label], COMPUTE)
    assert found.compared == ("twin",)
    np.testing.assert_allclose(found.regions, 1, atol=0.08 if form == "features" else 0)
    np.testing.assert_allclose(found.mean, found.regions.mean(axis=1), atol=1e-6)


def test_registration_finds_how_a_phantom_was_moved(task: Task) -> None:
    moved, fixed = phantom(0, (1.5, -2, 1)), phantom(1)
    before = overlap(torch.from_numpy(moved.label)[None], torch.from_numpy(fixed.label)[None], REGIONS)
    dsc, present = Registration([fixed], REGIONS).begin(moved, [moved.label])(0)
    assert before.mean[0] < 0.7
    assert dsc.min() > 0.9
    assert present.all()


def test_registration_heeds_the_voxel_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same phantom on a grid of twice the voxel size along one axis lies in the same place."""
    fixed = phantom(0)
    coarse = replace(
        fixed,
        id="coarse",
        image=fixed.image[:, ::2],
        label=fixed.label[::2],
        affine=np.diag([2.0, 1.0, 1.0, 1.0]),
    )

    def at_once(moving: "sitk.Image", to: "sitk.Image", threads: int) -> "sitk.Transform":
        assert (moving.GetSpacing(), to.GetSpacing()) == ((2, 1, 1), (1, 1, 1))
        moved = register(moving, to, threads)
        np.testing.assert_allclose(moved.TransformPoint((12, 11, 10)), (12, 11, 10), atol=0.7)
        return sitk.Transform(3, sitk.sitkIdentity)

    monkeypatch.setattr("fedqc.methods.registration.register", at_once)
    dsc, _ = Registration([fixed], REGIONS).begin(coarse, [coarse.label])(0)
    assert dsc.min() > 0.85


def test_registration_comes_to_the_same_each_time() -> None:
    case, reference = phantom(0, (1, 0, -1)), phantom(1)
    first, second = (Registration([reference], REGIONS).begin(case, [case.label])(0)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("form", FORMS)
def test_worse_labels_have_lower_estimates(task: Task, form: Form) -> None:
    case, references = phantom(0), [phantom(1, (1, 0, 0)), phantom(2, (0, -1, 1))]
    labels = [case.label, np.roll(case.label, 2, axis=1), np.roll(case.label, 4, axis=1), swapped(case.label)]
    method = make(task, references, form)
    together = method.estimate(case, labels, COMPUTE)
    right, near, far, wrong = together.mean
    assert right > 0.85
    assert right > near + 0.1
    assert near > far + 0.1
    assert wrong < 0.15
    alone = method.estimate(case, labels[1:2], COMPUTE)
    np.testing.assert_allclose(alone.mean[0], near, atol=0.05 if form == "features" else 0)


def test_neighbours_vote_as_by_hand() -> None:
    """All voxels of both cases, and the Gaussian written out."""
    case, reference = faint(0), faint(1, (1, 0, 0))
    ours = Neighbours([reference], REGIONS, voxels=10**5, position=7.0)
    dsc, _ = ours.begin(case, [case.label])(0)

    inside = [body(one) | (one.label > 0) for one in (case, reference)]
    looks = [appearance(one)[:, mask].T for one, mask in zip((case, reference), inside, strict=True)]
    spread = looks[0].std(axis=0)
    places = []
    for mask in inside:
        where = np.argwhere(mask)
        places.append((where - where.min(axis=0)) / (where.max(axis=0) - where.min(axis=0)))
    found = np.zeros(SIZE, dtype=np.uint8)
    votes = np.eye(3)[case.label[inside[0]]]
    for voxel, look, place in zip(np.argwhere(inside[1]), looks[1], places[1], strict=True):
        distance = (((looks[0] - look) / spread) ** 2).mean(axis=1) + 49 * ((places[0] - place) ** 2).sum(
            axis=1
        )
        weight = np.exp(-(distance - distance.min()) / (2 * 0.2**2))
        found[tuple(voxel)] = (weight @ votes).argmax()
    near = np.zeros(SIZE, dtype=bool)
    low, high = np.argwhere(reference.label).min(axis=0) - 5, np.argwhere(reference.label).max(axis=0) + 6
    near[tuple(slice(max(0, a), b) for a, b in zip(low, high, strict=True))] = True
    expected = overlap(
        torch.from_numpy(found * near)[None], torch.from_numpy(reference.label)[None], REGIONS
    ).dsc[0]
    np.testing.assert_allclose(dsc[0], expected, atol=1e-2)  # features are kept in half precision


@pytest.fixture
def lookalikes() -> tuple[Case, Case, NDArray[np.bool_]]:
    """Two cases with one class each, and half of what is near it."""
    case, reference = (replace(one, label=np.minimum(one.label, 1)) for one in (phantom(0), phantom(1)))
    near = (ndimage.grey_dilation(case.label, size=(9, 9, 9)) > case.label) & (case.image[0] != 0)
    return case, reference, near & (np.random.default_rng(0).random(SIZE) < 0.5)


def test_drawn_voxels_of_the_case_stand_for_those_that_are_not(
    lookalikes: tuple[Case, Case, NDArray[np.bool_]],
) -> None:
    """Of what looks like the label most is background, though most of what is drawn is not."""
    case, reference, others = lookalikes
    assert np.count_nonzero(others) > 1.5 * np.count_nonzero(case.label)

    def alike(one: Case) -> NDArray[np.float32]:
        return np.array([(one.label > 0) | others], dtype=np.float32)

    ours = Neighbours([reference], ((1,),), alike, voxels=900, position=0)
    assert ours.begin(case, [case.label])(0)[0] == 0


def test_drawn_voxels_of_a_reference_stand_for_those_that_are_not(
    lookalikes: tuple[Case, Case, NDArray[np.bool_]],
) -> None:
    case, reference, others = lookalikes

    def wrong_in_the_reference(one: Case) -> NDArray[np.float32]:
        return np.array([(one.label > 0) | (others & (one is reference))], dtype=np.float32)

    ours = Neighbours([reference], ((1,),), wrong_in_the_reference, voxels=900, position=0)
    n_label, n_found = (np.count_nonzero(one) for one in (reference.label, (reference.label > 0) | others))
    expected = 2 * n_label / (n_label + n_found)
    np.testing.assert_allclose(ours.begin(case, [case.label])(0)[0], expected, atol=0.03)


def test_other_features_can_take_the_place_of_intensities(task: Task) -> None:
    """Features that tell everything make any right label perfect, without a place."""
    rca = RCAConfig(position=0, voxels=1500)
    shown: list[str] = []

    def oracle(case: Case) -> NDArray[np.float32]:
        shown.append(case.id)
        return np.stack([case.label == 1, case.label == 2]).astype(np.float32)

    method = RCAMethod(task, QCConfig(rca=rca), features=oracle)
    method.references = [phantom(1, (2, 2, 2)), phantom(2)]
    case = phantom(0, (-2, 0, 1))
    for label, expected in ((case.label, 1.0), (swapped(case.label), 0.0)):
        np.testing.assert_allclose(method.estimate(case, [label], COMPUTE).regions, expected, atol=1e-6)
    assert shown.count("case-1") == 1  # a reference is looked at once


@pytest.mark.parametrize(
    ("shifts", "expected"),
    [
        ([-4, 0, 4], 0.2 / np.sqrt(np.mean([(4 / (side - 1)) ** 2 for side in SIZE]))),  # a variance of 16
        ([0, 0, 0], 10.0),  # never more than that
        ([0], 0.0),  # one says nothing
    ],
)
def test_a_place_weighs_the_more_the_less_references_vary_in_it(
    shifts: list[int], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedqc.methods.neighbours.body", lambda case: np.ones(SIZE, dtype=bool))
    cases = []
    for shift in shifts:
        label = np.zeros(SIZE, np.uint8)
        label[tuple(slice(10 + shift, 12 + shift) for _ in SIZE)] = 1
        cases.append(replace(phantom(0), label=label))
    assert weight_of_place([*cases, replace(cases[0], label=np.zeros(SIZE, np.uint8))]) == pytest.approx(
        expected
    )


def test_the_weight_is_that_of_the_references_where_nobody_sets_it(task: Task) -> None:
    references = [phantom(number, (shift, 0, 0)) for number, shift in enumerate((-4, 3, 0, -1))]
    case = phantom(9, (-1, 0, 0))
    label = [references[3].label]
    unset, same, other = (
        make(task, references, position=position).estimate(case, label, COMPUTE).regions
        for position in (None, weight_of_place(references), 0.0)
    )
    np.testing.assert_array_equal(unset, same)
    assert not np.array_equal(unset, other)


@pytest.mark.parametrize(("together", "looks"), [(True, 2), (False, 3)])
def test_labels_of_one_image_are_judged_together_or_alone(task: Task, together: bool, looks: int) -> None:
    shown: list[str] = []
    right = {case.id: case.label for case in (phantom(1, (2, 2, 2)), phantom(2), phantom(8), phantom(9))}

    def oracle(case: Case) -> NDArray[np.float32]:
        shown.append(case.id)
        return np.stack([right[case.id] == 1, right[case.id] == 2]).astype(np.float32)

    rca = RCAConfig(position=0, voxels=1500)
    method = RCAMethod(task, QCConfig(rca=rca), together=together, features=oracle)
    method.references = [phantom(1, (2, 2, 2)), phantom(2)]
    first, second = phantom(8), phantom(9)
    cases = [first, replace(first, label=swapped(first.label)), second, replace(first, label=first.label)]
    scores = list(method.score(method.build(0), cases, COMPUTE))
    assert [score.case_id for score in scores] == ["case-8", "case-8", "case-9", "case-8"]
    assert [score.quality for score in scores] == pytest.approx([1, 0, 1, 1], abs=1e-5)
    assert shown.count("case-8") == looks


# ------------------------------------------------------------------------------------- who is compared with


def test_nobody_is_compared_with_their_own_cases(task: Task) -> None:
    references = [phantom(0), phantom(1, patient="patient-0"), phantom(2), phantom(3, patient="")]
    method = make(task, references)
    found = method.estimate(phantom(9, patient="patient-0"), [references[0].label], COMPUTE)
    assert set(found.compared) == {"case-2", "case-3"}
    unknown = method.estimate(phantom(3, patient=""), [references[0].label], COMPUTE)
    assert set(unknown.compared) == {"case-0", "case-1", "case-2"}
    with pytest.raises(DataError, match="case-5: none of 2 reference cases is of another patient"):
        make(task, references[:2]).estimate(phantom(5, patient="patient-0"), [references[0].label], COMPUTE)


def test_whose_references_are_all_of_the_same_patient_is_told_before_anything_is_compared(task: Task) -> None:
    method = make(task, [phantom(0), phantom(1, patient="patient-0")])

    def files(name: str, patient: str) -> CaseFiles:
        return CaseFiles(name, patient, (), None)

    assert method.cannot_judge(files("case-9", "patient-9")) is None
    assert method.cannot_judge(files("case-9", "")) is None
    reason = method.cannot_judge(files("case-9", "patient-0"))
    assert reason is not None
    assert "case-9: none of 2 reference cases is of another patient" in reason
    method.references = [phantom(0), phantom(2)]
    assert method.cannot_judge(files("case-9", "patient-0")) is None


def test_the_most_similar_references_are_compared(task: Task) -> None:
    references = [phantom(number, (shift, 0, 0)) for number, shift in enumerate((-4, 3, 0, -1))]
    found = make(task, references, references=2).estimate(
        phantom(9, (-1, 0, 0)), [references[3].label], COMPUTE
    )
    assert found.compared == ("case-3", "case-2")


class Slow(Lazy[Case]):
    """References each of which takes ten seconds to read."""

    def __init__(self, cases: Sequence[Case], passed: list[float]) -> None:
        self.cases, self.passed = cases, passed

    def __len__(self) -> int:
        return len(self.cases)

    def make(self, index: int) -> Case:
        self.passed.append(10)
        return self.cases[index]


@pytest.mark.parametrize(
    ("form", "own", "seconds", "expected"),
    [
        ("features", 0, 0.5, 1),
        ("features", 0, 2.5, 3),
        ("features", 2, 2.5, 1),  # the case's own voxels are drawn for it alone
        ("features", 0, None, 4),
        ("registration", 0, 2.5, 3),
    ],
)
def test_time_is_kept_but_one_reference_is_compared(
    *,
    task: Task,
    monkeypatch: pytest.MonkeyPatch,
    form: Form,
    own: float,
    seconds: float | None,
    expected: int,
) -> None:
    """A comparison takes a second. References are not on the clock: they are got ready once for all cases."""
    passed: list[float] = []
    by_hand = neighbours._weighted_dice

    def compared(*known: Any) -> Any:
        passed.append(1)
        return by_hand(*known)

    def registered(*_: Any) -> "sitk.Transform":
        passed.append(1)
        return sitk.Transform(3, sitk.sitkIdentity)

    def looks(case: Case) -> NDArray[np.float32]:
        passed.append(own if case.id == "case-0" else 10)
        return appearance(case)

    monkeypatch.setattr(neighbours, "_weighted_dice", compared)
    monkeypatch.setattr("fedqc.methods.registration.register", registered)
    rca = RCAConfig(form=form, voxels=200, seconds=seconds)
    method = RCAMethod(task, QCConfig(rca=rca), features=looks, clock=lambda: sum(passed))
    method.references = Slow([phantom(number) for number in range(1, 5)], passed)
    first, again = (method.estimate(phantom(0), [phantom(0).label], COMPUTE) for _ in range(2))
    assert len(first.compared) == expected
    assert again.compared == first.compared
    np.testing.assert_array_equal(again.regions, first.regions)


def test_each_region_has_its_best_reference(task: Task) -> None:
    method = make(task, [phantom(1), phantom(2), phantom(3)])
    case = phantom(0)
    method.estimate(case, [case.label], COMPUTE)
    present = [[True, True], [True, True], [False, True]]
    method._comparison = Scripted([[0.3, 0.9], [0.7, 0.1], [1.0, 0.2]], present)
    found = method.estimate(case, [case.label], COMPUTE)
    np.testing.assert_allclose(found.regions, [[0.7, 0.9]])  # what a reference does not hold proves nothing
    np.testing.assert_allclose(found.mean, [0.8])


@pytest.mark.parametrize(
    ("references_with_it", "label", "regions", "mean"),
    [
        (3, 2, [0.0, 0.5], 0.25),  # missed: nearly all references hold it
        (1, 2, [1.0, 0.5], 0.5),  # right to be missing, and no share in the mean
        (3, 0, [0.0, 0.0], 0.0),
    ],
)
def test_a_region_that_a_label_lacks(
    task: Task, references_with_it: int, label: int, regions: list[float], mean: float
) -> None:
    method = make(task, [phantom(number) for number in range(1, 5)])
    case = phantom(0)
    method.estimate(case, [case.label], COMPUTE)
    present = [[index < references_with_it, True] for index in range(4)]
    method._comparison = Scripted([[0.0 if there else 1.0, 0.5] for there, _ in present], present)
    without = np.where(case.label == 2, label, 0).astype(np.uint8)
    found = method.estimate(case, [without], COMPUTE)
    np.testing.assert_allclose(found.regions, [regions])
    np.testing.assert_allclose(found.mean, [mean])


# ------------------------------------------------------------------------------------------------ as a method


def test_calibration_brings_estimates_to_the_true_quality(task: Task) -> None:
    rng = np.random.default_rng(0)
    references = [phantom(number, rng.uniform(-2, 2, 3).tolist()) for number in range(8)]
    method = make(task, references, voxels=300)
    network = method.build(0)
    assert method.stages() == ()
    case = phantom(9, (1, 1, 0))
    (before,) = method.score(network, [case], COMPUTE)
    raw = method.estimate(case, [case.label], COMPUTE)
    assert before.quality == pytest.approx(raw.mean[0], abs=1e-6)
    assert list(before.regions.values()) == pytest.approx(raw.regions[0].tolist(), abs=1e-6)

    steps: list[tuple[int, int]] = []
    method.fit(network, references, COMPUTE, rng, lambda *step: steps.append(step))
    assert steps[-1] == (8, 8)
    after, wrong = method.score(network, [case, replace(case, label=swapped(case.label))], COMPUTE)
    assert (after.case_id, list(after.regions)) == ("case-9", ["front", "back"])
    assert after.quality > before.quality
    assert after.quality > 0.88
    assert wrong.quality < 0.3
    maps = [part for part in network.modules() if isinstance(part, MonotoneMap)]
    assert len(maps) == 3
    assert not list(network.parameters())


def test_without_others_nothing_is_calibrated(task: Task) -> None:
    method = make(task, [phantom(0)])
    network = method.build(0)
    method.fit(network, [phantom(0)], COMPUTE, np.random.default_rng(0))
    for name, values in method.build(0).state_dict().items():
        assert torch.equal(values, network.state_dict()[name])


def test_there_is_nothing_to_train(task: Task) -> None:
    method = make(task, [])
    plan = RoundPlan(seed=0, site="here", round=1, rounds=1, steps=1, batch_size=1)
    with pytest.raises(TrainingError, match="nothing to train"):
        method.train_round(method.build(0), [], plan, COMPUTE)


def test_new_references_take_the_place_of_old_ones(task: Task) -> None:
    method = make(task, [phantom(1)])
    case = phantom(0)
    assert method.estimate(case, [case.label], COMPUTE).compared == ("case-1",)
    method.references = [phantom(2)]
    assert method.estimate(case, [case.label], COMPUTE).compared == ("case-2",)


def test_threads_of_the_process_are_left_as_they_were(task: Task) -> None:
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    case = phantom(0)
    make(task, [phantom(1)], "registration", threads=2).estimate(case, [case.label], COMPUTE)
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == before
