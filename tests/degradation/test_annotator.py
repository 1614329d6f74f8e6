import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from fedqc.degradation import annotator
from fedqc.degradation.annotator import (
    ANNOTATOR_KINDS,
    REACH,
    AnotherPatient,
    InventedComponent,
    LeftRightFlip,
    MissedComponent,
    OverContouring,
    Shift,
    SlicesLeftOut,
    StaleLabel,
    SwappedClasses,
    UnderContouring,
    annotator_errors,
)
from fedqc.degradation.base import Degradation, Params, radius, smooth_field
from fedqc.geometry import Region, whole

FACES = ndimage.generate_binary_structure(3, 1)


def one(degradation: Degradation, label: Tensor, params: Params) -> Tensor:
    return degradation.apply(label[None], [params])[0]


def draws(degradation: Degradation, label: Tensor, count: int) -> list[Params]:
    rng = np.random.default_rng(0)
    return [degradation.make_params(rng, label) for _ in range(count)]


# ------------------------------------------------------------------------------------------- what all share


@pytest.fixture(params=ANNOTATOR_KINDS)
def degradation(request: pytest.FixtureRequest, labels: Tensor) -> Degradation:
    return annotator_errors(list(labels))[request.param]


def test_every_kind_changes_the_label_and_replays_exactly(degradation: Degradation, label: Tensor) -> None:
    params = draws(degradation, label, 6)
    kept = label.clone()
    results = [one(degradation, label, p) for p in params]
    assert torch.equal(label, kept)
    assert sum(bool((result != label).any()) for result in results) >= 4
    for result, p in zip(results, params, strict=True):
        assert (result.dtype, result.shape) == (torch.uint8, label.shape)
        assert set(torch.unique(result).tolist()) <= {0, 1, 2}
        assert torch.equal(one(degradation, label, json.loads(json.dumps(p))), result)


@pytest.mark.parametrize("kind", [UnderContouring, OverContouring, StaleLabel])
def test_contours_move_in_a_part_of_the_volume_as_they_do_in_all_of_it(
    kind: type[annotator._MovedContour],
) -> None:
    degradation, changes = kind(), 0
    small = torch.zeros(1, 40, 36, 30, dtype=torch.uint8)
    small[0, 3:9, 20:30, 22:30] = 1  # at two faces of the volume, or nearly
    small[0, 5:8, 24:28, 25:30] = 2
    region = whole(small.shape[1:])
    for params in draws(degradation, small[0], 6):
        everywhere = degradation.move(small, [params], region, small.shape[1:])
        assert torch.equal(degradation.apply(small, [params]), everywhere)
        changes += not torch.equal(everywhere, small)
    assert changes >= 4


def test_a_batch_gives_what_its_labels_give_alone(degradation: Degradation, labels: Tensor) -> None:
    rng = np.random.default_rng(1)
    params = [degradation.make_params(rng, label) for label in labels]
    together = degradation.apply(labels, params)
    for label, p, result in zip(labels, params, together, strict=True):
        assert torch.equal(one(degradation, label, p), result)


def test_the_generator_decides_the_parameters(degradation: Degradation, label: Tensor) -> None:
    first, again = (draws(degradation, label, 5) for _ in range(2))
    torch.manual_seed(0)
    assert first == again
    if not isinstance(degradation, LeftRightFlip):  # there is nothing to draw
        assert any(params != first[0] for params in first[1:])


def test_what_can_go_wrong_with_a_label_without_foreground(degradation: Degradation, label: Tensor) -> None:
    empty = torch.zeros_like(label)
    assert degradation.applies_to(label)
    assert degradation.applies_to(empty) == isinstance(degradation, AnotherPatient)


def test_every_kind_is_there_once_under_its_name(labels: Tensor) -> None:
    errors = annotator_errors(list(labels))
    assert tuple(errors) == ANNOTATOR_KINDS
    assert all(error.kind == name for name, error in errors.items())


# ------------------------------------------------------------------------------------- contours and distances


@pytest.mark.parametrize("distance", [1.0, 1.5, 2.7, 5.0])
def test_under_contouring_loses_what_is_near_the_background(label: Tensor, distance: float) -> None:
    depth = ndimage.distance_transform_edt(label.numpy() > 0)
    expected = np.where(depth > distance, label.numpy(), 0)
    np.testing.assert_array_equal(one(UnderContouring(), label, {"distance": distance}).numpy(), expected)


def test_under_contouring_by_one_voxel_is_an_erosion(label: Tensor) -> None:
    eroded = ndimage.binary_erosion(label.numpy() > 0, FACES)
    assert eroded.any()
    np.testing.assert_array_equal(one(UnderContouring(), label, {"distance": 1.0}).numpy() > 0, eroded)


@pytest.mark.parametrize("kind", [UnderContouring, OverContouring, StaleLabel])
def test_contours_do_not_move_across_slices_that_are_thicker_than_the_distance(
    kind: type[Degradation],
) -> None:
    stack = torch.zeros(24, 24, 8, dtype=torch.uint8)
    stack[6:18, 6:18, 2:6] = 1
    params = {"distance": 3.0, "growth": 1.0 if kind is StaleLabel else 0.0, "seed": 0}
    thick, cube = one(kind((1.0, 1.0, 6.7)), stack, params), one(kind(), stack, params)
    slices = [set((label > 0).any(dim=0).any(dim=0).nonzero()[:, 0].tolist()) for label in (thick, cube)]
    assert slices[0] == {2, 3, 4, 5} != slices[1]
    assert (thick != stack).any()


def test_errors_have_one_size_in_all_directions_of_space() -> None:
    stack = torch.zeros(40, 40, 12, dtype=torch.uint8)
    stack[10:30, 10:30, 4:8] = 1
    sides = (1.0, 1.0, 5.0)
    moves = np.array([params["voxels"] for params in draws(Shift(sides), stack, 60)])
    assert np.abs(moves[:, 2]).max() <= 1.1 * radius(stack, sides) / 5 + 0.5
    assert np.abs(moves[:, :2]).max() > 4
    axes = np.concatenate(
        [np.reshape(p["axes"], (-1, 3)) for p in draws(InventedComponent(sides), stack, 60)]
    )
    assert axes[:, 0].mean() / axes[:, 2].mean() == pytest.approx(5, rel=0.15)


def test_another_patient_is_no_other_scan_of_the_same(labels: Tensor) -> None:
    swap = AnotherPatient(list(labels), ["p", "p", *(f"q{n}" for n in range(len(labels) - 2))])
    mine = swap.for_patient("p")
    assert {p["donor"] for p in draws(mine, labels[0], 40)} == set(range(2, len(labels)))
    assert 1 in {p["donor"] for p in draws(swap, labels[0], 40)}  # where nobody says whose it is
    assert not AnotherPatient(list(labels[:2]), ["p", "p"]).for_patient("p").applies_to(labels[0])


def test_under_contouring_never_takes_everything() -> None:
    thin = torch.zeros(16, 16, 16, dtype=torch.uint8)
    thin[3:13, 3:13, 8:10] = 1
    # Deeper than the reach, so that depths are not exact, and with distances drawn beyond it.
    plate = torch.zeros(100, 100, 28, dtype=torch.uint8)
    plate[:, :, 1:27] = 1
    assert 0.4 * radius(plate) > REACH + 2
    for label in (thin, plate):
        for params in draws(UnderContouring(), label, 12):
            assert one(UnderContouring(), label, params).any(), params


@pytest.mark.parametrize("distance", [1.0, 1.5, 3.2, 6.0])
def test_over_contouring_gives_the_surroundings_the_nearest_class(label: Tensor, distance: float) -> None:
    result = one(OverContouring(), label, {"distance": distance}).numpy()
    before = label.numpy()
    to_class = np.stack([ndimage.distance_transform_edt(before != k) for k in (1, 2)])
    np.testing.assert_array_equal(result > 0, to_class.min(axis=0) <= distance)
    np.testing.assert_array_equal(result[before > 0], before[before > 0])
    for index in (1, 2):
        where = (before == 0) & (result == index)
        assert where.any()
        np.testing.assert_array_equal(to_class[index - 1][where], to_class.min(axis=0)[where])


def test_over_contouring_by_one_voxel_is_a_dilation(label: Tensor) -> None:
    dilated = ndimage.binary_dilation(label.numpy() > 0, FACES)
    np.testing.assert_array_equal(one(OverContouring(), label, {"distance": 1.0}).numpy() > 0, dilated)


def test_contours_move_by_a_share_of_the_radius_within_the_reach(label: Tensor) -> None:
    wide = torch.ones(80, 80, 80, dtype=torch.uint8)
    for degradation, share in ((UnderContouring(), 0.4), (OverContouring(), 0.5), (StaleLabel(), 0.6)):
        small = [params["distance"] for params in draws(degradation, label, 40)]
        assert max(small) <= max(1.0, share * radius(label))
        assert len(set(small)) > 10
        assert max(params["distance"] for params in draws(degradation, wide, 5)) <= REACH


def test_a_stale_label_grows_here_and_shrinks_there(label: Tensor) -> None:
    params = {"distance": 3.0, "growth": -0.1, "seed": 11}
    field = smooth_field([11], 1, 5, label.shape, torch.device("cpu"))[0, 0].numpy()
    before = label.numpy()
    outside, inside = (ndimage.distance_transform_edt(mask) for mask in (before == 0, before > 0))
    expected = outside - inside <= 3.0 * (field - 0.1)
    result = one(StaleLabel(), label, params).numpy()
    np.testing.assert_array_equal(result > 0, expected)
    assert ((result > 0) & (before == 0)).any()
    assert ((result == 0) & (before > 0)).any()
    both = (result > 0) & (before > 0)
    np.testing.assert_array_equal(result[both], before[both])


def test_a_stale_label_without_local_change_is_contoured_evenly(
    label: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flat(seeds: Sequence[int], channels: int, *_: object, region: Region) -> Tensor:
        return torch.zeros(len(seeds), channels, *(side.stop - side.start for side in region))

    monkeypatch.setattr(annotator, "smooth_field", flat)
    same = one(StaleLabel(), label, {"distance": 4.0, "growth": 0.0, "seed": 0})
    assert torch.equal(same, label)
    grown = one(StaleLabel(), label, {"distance": 4.0, "growth": 0.5, "seed": 0})
    assert torch.equal(grown, one(OverContouring(), label, {"distance": 2.0}))
    shrunk = one(StaleLabel(), label, {"distance": 4.6, "growth": -0.5, "seed": 0})
    assert torch.equal(shrunk, one(UnderContouring(), label, {"distance": 2.29}))


# ----------------------------------------------------------------------------------------------- components


def test_a_missed_component_is_one_piece_of_one_class(label: Tensor) -> None:
    island = one(MissedComponent(), label, {"class": 1, "voxel": [17, 19, 4]})
    expected = label.clone()
    expected[16:19, 18:21, 3:6] = 0
    assert torch.equal(island, expected)
    whole_class = one(MissedComponent(), label, {"class": 2, "voxel": [13, 7, 6]})
    assert torch.equal(whole_class, torch.where(label == 2, 0, label))


def test_any_piece_can_be_missed_and_large_ones_are_more_often(label: Tensor) -> None:
    left = [one(MissedComponent(), label, params) for params in draws(MissedComponent(), label, 60)]
    missed_island = sum(bool((result == 0)[17, 19, 4]) for result in left)
    missed_body = sum(bool((result == 0)[5, 6, 5]) for result in left)
    missed_second = sum(bool((result == 0)[13, 7, 6]) for result in left)
    assert missed_island + missed_body + missed_second == 60
    assert 0 < missed_island < missed_body
    assert 18 < missed_second < 42  # the class is drawn first


def test_a_component_can_be_missed_only_where_something_is_left() -> None:
    label = torch.zeros(8, 8, 8, dtype=torch.uint8)
    label[1:3, 1:3, 1:3] = 1
    assert not MissedComponent().applies_to(label)
    label[3, 3, 3] = 1  # hangs on by a corner
    assert not MissedComponent().applies_to(label)
    label[6, 6, 6] = 1
    assert MissedComponent().applies_to(label)
    label[6, 6, 6] = 2
    assert MissedComponent().applies_to(label)


def test_an_invented_component_is_an_ellipsoid_in_the_background(label: Tensor) -> None:
    params = {"class": 2, "centres": [4, 19, 10, 6, 8, 8], "axes": [2, 2, 2, 1, 3, 1]}
    result = one(InventedComponent(), label, params)
    index = np.indices(label.shape)
    ball = sum((index[axis] - centre) ** 2 for axis, centre in enumerate((4, 19, 10))) <= 4
    assert ball.sum() == 33
    np.testing.assert_array_equal((result != label).numpy(), ball)  # the second lies inside the structure
    assert (result[torch.from_numpy(ball)] == 2).all()


def test_invented_components_keep_to_their_bounds(label: Tensor) -> None:
    counts = set()
    for params in draws(InventedComponent(), label, 60):
        axes, centres = np.reshape(params["axes"], (-1, 3)), np.reshape(params["centres"], (-1, 3))
        assert axes.shape == centres.shape
        counts.add(len(axes))
        assert (axes > 0).all()
        assert (axes <= 1.1 * 1.4 * radius(label)).all()
        assert (centres >= 0.15 * np.array(label.shape)).all()
        assert (centres <= 0.85 * np.array(label.shape)).all()
        result = one(InventedComponent(), label, params)
        assert torch.equal(result[label > 0], label[label > 0])
    assert counts == {1, 2, 3}


# --------------------------------------------------------------------------------- classes, slices, position


def test_swapped_classes(label: Tensor) -> None:
    both = one(SwappedClasses(), label, {"first": 1, "second": 2, "both": 1})
    assert torch.equal(both, torch.tensor([0, 2, 1], dtype=torch.uint8)[label.long()])
    renamed = one(SwappedClasses(), label, {"first": 2, "second": 1, "both": 0})
    assert torch.equal(renamed, (label > 0).to(torch.uint8))


@pytest.mark.parametrize("both", [0, 1])
def test_all_of_several_classes_carry_one_name(label: Tensor, both: int) -> None:
    third = label.clone()
    third[0, 0, 0] = 3
    alike = one(SwappedClasses(), third, {"first": 3, "second": 2, "both": both, "all": 1})
    assert torch.equal(alike, 2 * (third > 0).to(torch.uint8))
    drawn = [params.get("all", 0) for params in draws(SwappedClasses(), third, 80)]
    assert 8 < sum(drawn) < 32
    assert not any(
        "all" in params for params in draws(SwappedClasses(), label, 40)
    )  # one for the other is that


def test_swapping_needs_two_classes(label: Tensor) -> None:
    assert not SwappedClasses().applies_to(torch.where(label == 2, 0, label))
    params = draws(SwappedClasses(), label, 40)
    assert {(p["first"], p["second"]) for p in params} == {(1, 2), (2, 1)}
    assert {p["both"] for p in params} == {0, 1}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_left_out(label: Tensor, axis: int) -> None:
    result = one(SlicesLeftOut(), label, {"axis": axis, "slices": [5, 7, 8]}).movedim(axis, 0)
    before = label.movedim(axis, 0)
    for index in range(len(before)):
        if index in {5, 7, 8}:
            assert before[index].any()
            assert not result[index].any()
        else:
            assert torch.equal(result[index], before[index])


def test_patterns_of_slices_left_out(label: Tensor) -> None:
    box = torch.zeros_like(label)
    box[3:15, 4:16, 2:14] = 1
    patterns = set()
    for params in draws(SlicesLeftOut(), box, 80):
        gone = np.array(params["slices"])
        first = (3, 4, 2)[params["axis"]]
        assert set(gone) < set(range(first, first + 12))  # slices of the structure, never all of them
        steps = set(np.diff(gone).tolist())
        if steps <= {1}:
            assert 1 <= len(gone) <= 8
            patterns.add("run")
        elif steps == {2}:
            assert len(gone) == 6
            patterns.add("every second")
        else:
            assert (steps, len(gone)) == ({1, 2}, 8)
            patterns.add("two of three")
    assert patterns == {"run", "every second", "two of three"}


def test_left_right_flip(labels: Tensor) -> None:
    result = LeftRightFlip().apply(labels, [{}] * len(labels))
    np.testing.assert_array_equal(result.numpy(), np.flip(labels.numpy(), axis=1))


@pytest.mark.parametrize("voxels", [[2, 0, 0], [-3, 1, 4], [0, -5, -1], [19, 0, 0], [-7, 23, 15]])
def test_a_shift_by_whole_voxels(label: Tensor, voxels: list[int]) -> None:
    expected = ndimage.shift(label.numpy(), voxels, order=0, mode="constant", cval=0)
    np.testing.assert_array_equal(one(Shift(), label, {"voxels": voxels}).numpy(), expected)


@pytest.mark.parametrize("voxels", [[20, 0, 0], [0, 25, 0], [0, 0, -16], [0, 0, -40], [-21, 99, 3]])
def test_a_shift_out_of_the_volume_leaves_nothing(label: Tensor, voxels: list[int]) -> None:
    assert not one(Shift(), label, {"voxels": voxels}).any()


def test_a_shift_moves_by_a_share_of_the_radius_but_at_least_a_voxel(label: Tensor) -> None:
    lengths = [np.linalg.norm(params["voxels"]) for params in draws(Shift(), label, 100)]
    assert min(lengths) >= 1
    assert max(lengths) <= 1.1 * radius(label) + 1
    assert max(lengths) > 0.8 * radius(label)
    dot = torch.zeros(8, 8, 8, dtype=torch.uint8)
    dot[4, 4, 4] = 1
    assert all(any(params["voxels"]) for params in draws(Shift(), dot, 50))


def test_another_patients_label_is_never_the_own_one(labels: Tensor) -> None:
    kind = AnotherPatient([labels[0], labels[1], labels[2]])
    donors = [params["donor"] for params in draws(kind, labels[1], 40)]
    assert set(donors) == {0, 2}
    assert torch.equal(one(kind, labels[1], {"donor": 2}), labels[2])
    assert not AnotherPatient([labels[1], labels[1].clone()]).applies_to(labels[1])
    assert AnotherPatient([labels[1], labels[3]]).applies_to(labels[1])
