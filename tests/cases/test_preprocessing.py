import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from fedqc.cases import preprocessing
from fedqc.cases.layouts import CaseFiles, find_cases
from fedqc.cases.preprocessing import FullImage, label_to_native, preprocess, preprocess_full, to_native
from fedqc.cases.validation import inspect_image
from fedqc.cases.volumes import Case
from fedqc.errors import DataError
from fedqc.task import Task, load_task

MakeCase = Callable[..., CaseFiles]


def world_of(affine: NDArray[np.float64], voxel: Any) -> NDArray[np.float64]:
    position: NDArray[np.float64] = nibabel.affines.apply_affine(affine, voxel)
    return position


def blob(shape: tuple[int, int, int], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """A smooth function of the place in mm, so that resampled values are known."""
    x, y, z = np.moveaxis(world_of(affine, np.moveaxis(np.indices(shape), 0, -1)), -1, 0)
    return np.asarray(200 + 3 * x - 2 * y + 5 * z, dtype=np.float64)


def test_already_on_the_grid(make_case: MakeCase, task: Task, image: Any, label: Any) -> None:
    case = preprocess(make_case(), task)
    assert case.image.dtype == np.float32
    assert case.label.dtype == np.uint8
    assert case.image.shape == (1, 16, 16, 24)
    scored = (image - image.mean(dtype=np.float64)) / image.std(dtype=np.float64)
    # 16x18x20 to 16x16x24: one voxel less on each side of y, two more on each side of z
    assert np.allclose(case.image[0, :, :, 2:22], scored[:, 1:17], atol=1e-5)
    assert not case.image[..., :2].any()
    assert not case.image[..., 22:].any()
    assert np.array_equal(case.label[:, :, 2:22], np.where(label == 5, 2, label)[:, 1:17])
    assert case.affine[:3, 3].tolist() == [0, 1, -2]
    assert case.spacing == (1, 1, 1)
    assert case.native_shape == (16, 18, 20)
    assert np.array_equal(case.native_affine, np.eye(4))


def test_crop_to_the_part_that_is_not_zero(make_case: MakeCase, task: Task, image: Any) -> None:
    image[:6] = 0
    image[:, 16:] = 0
    case = preprocess(make_case(image=image), task)
    inside = image[6:, :16]
    scored = (inside - inside.mean(dtype=np.float64)) / inside.std(dtype=np.float64)
    assert np.allclose(case.image[0, 3:13, :, 2:22], scored, atol=1e-5)
    assert not case.image[0, :3].any()
    assert world_of(case.affine, (3, 0, 2)).tolist() == [6, 0, 0]


def test_zeros_inside_stay_zero_and_do_not_count(make_case: MakeCase, task: Task, image: Any) -> None:
    image[4:8, 4:8, 4:8] = 0
    case = preprocess(make_case(image=image), task)
    assert not case.image[0, 4:8, 3:7, 6:10].any()
    # Every other voxel counts; the rows of y that the window cuts off (0 and 17) are part of the statistics.
    values = image[image != 0].astype(np.float64)
    expected = (image[0, 1, 0] - values.mean()) / values.std()
    assert case.image[0, 0, 0, 2] == pytest.approx(expected, abs=1e-5)


def test_what_z_scoring_took_out_is_kept(make_case: MakeCase, task: Task, image: Any) -> None:
    image[:3] = 0
    case = preprocess(make_case(image=image), task)
    values = image[image != 0].astype(np.float64)
    (taken,) = case.intensities
    assert (taken.mean, taken.sd) == pytest.approx((values.mean(), values.std()))
    inside = case.image != 0
    assert np.allclose((case.image * taken.sd + taken.mean)[inside].sum(), image[:, 1:17].sum(), rtol=1e-6)
    coarse = preprocess(make_case(image=image), task.model_copy(update={"spacing": (2.0, 1.0, 1.0)}))
    (of_new_voxels,) = coarse.intensities
    assert of_new_voxels.sd < 0.9 * taken.sd  # noise is averaged out


def test_constant_image_is_refused(make_case: MakeCase, task: Task, image: Any) -> None:
    with pytest.raises(DataError, match="found nothing but the value 7, expected an image"):
        preprocess(make_case(image=0 * image + 7), task)


def test_modalities_are_scored_one_by_one(make_case: MakeCase, task: Task, image: Any) -> None:
    two = task.model_copy(update={"modalities": ("T1", "FLAIR"), "size": (16, 18, 20)})
    other = np.where(image > 50, 1000 + image, 0)
    case = preprocess(make_case(image=np.stack([image, other], axis=-1)), two)
    assert case.image.shape == (2, 16, 18, 20)
    for channel, source in zip(case.image, (image, other), strict=True):
        assert channel[source != 0].mean(dtype=np.float64) == pytest.approx(0, abs=1e-6)
        assert channel[source != 0].std(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    assert not case.image[1][other == 0].any()


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SAL"])
def test_orientation_changes_nothing_but_the_files(
    make_case: MakeCase, task: Task, image: Any, label: Any, axes: str
) -> None:
    expected = preprocess(make_case(), task)
    turn = nibabel.orientations.axcodes2ornt(axes)
    turned = [nibabel.Nifti1Image(volume, np.eye(4)).as_reoriented(turn) for volume in (image, label)]
    files = make_case(image=turned[0].get_fdata(), label=turned[1].get_fdata(), affine=turned[0].affine)
    case = preprocess(files, task)
    assert np.allclose(case.image, expected.image, atol=1e-5)
    assert np.array_equal(case.label, expected.label)
    assert np.allclose(case.affine, expected.affine)
    assert case.native_shape == turned[0].shape


def test_resampled_values_lie_where_the_affine_says(make_case: MakeCase, task: Task) -> None:
    affine = np.array([[0, 0, -2.0, 30], [0.75, 0, 0, -4], [0, 1.6, 0, 9], [0, 0, 0, 1]])
    shape = (20, 12, 10)
    label = np.zeros(shape, dtype=np.uint8)
    label[4:15, 3:9, 2:7] = 1
    image = blob(shape, affine)
    case = preprocess(make_case(image=image, label=label, affine=affine), task)
    assert case.spacing == pytest.approx((1, 1, 1))
    assert nibabel.aff2axcodes(case.affine) == ("R", "A", "S")

    # A linear function stays what it is under linear interpolation, up to the z-score.
    place = blob(case.label.shape, case.affine)
    middle = case.image[0, 4:12, 4:12, 8:16]
    slope, offset = np.polyfit(place[4:12, 4:12, 8:16].ravel(), middle.ravel(), 1)
    assert np.allclose(slope * place[4:12, 4:12, 8:16] + offset, middle, atol=1e-4)

    # The label keeps its place (centre of mass) and, up to half a voxel on each side, its 8.25x9.6x10 mm.
    native_centre = world_of(affine, np.argwhere(label).mean(axis=0))
    centre = world_of(case.affine, np.argwhere(case.label).mean(axis=0))
    assert np.allclose(centre, native_centre, atol=0.3)
    assert sorted(np.ptp(np.argwhere(case.label), axis=0) + 1) in ([8, 9, 10], [8, 10, 10])


def test_outer_slices_keep_their_thickness(make_case: MakeCase, task: Task) -> None:
    label = np.zeros((16, 16, 4), dtype=np.uint8)
    label[4:12, 4:12, 3] = 1
    image = 9.0 + np.arange(label.size).reshape(label.shape)
    case = preprocess(make_case(image=image, label=label, affine=np.diag([1.0, 1, 5, 1])), task)
    assert case.label.sum() == 8 * 8 * 5
    assert world_of(case.affine, (0, 0, 2)).tolist() == [0, 0, -2]  # 20 slices of 1 mm, from -2.5 to 17.5 mm


def test_small_difference_of_spacing_is_no_reason_to_resample(make_case: MakeCase, task: Task) -> None:
    case = preprocess(make_case(affine=np.diag([1.0005, 1, 1, 1])), task)
    assert case.spacing == pytest.approx((1.0005, 1, 1))


@pytest.mark.parametrize("axes", ["RAS", "PIR", "LSA"])
def test_label_comes_back_to_its_own_grid(make_case: MakeCase, task: Task, label: Any, axes: str) -> None:
    turned = nibabel.Nifti1Image(label, np.eye(4)).as_reoriented(nibabel.orientations.axcodes2ornt(axes))
    values = np.asanyarray(turned.dataobj)
    case = preprocess(make_case(image=values + 1.0, label=values, affine=turned.affine), task)
    native = to_native(case.label, case, 0)
    assert native.dtype == np.uint8
    assert np.array_equal(native, np.where(values == 5, 2, values))


def test_what_the_network_never_saw_comes_back_as_zero(make_case: MakeCase, task: Task) -> None:
    case = preprocess(make_case(), task)
    native = to_native(np.ones(task.size, dtype=np.float32), case, 1)
    assert native.shape == (16, 18, 20)
    assert native.dtype == np.float32
    assert np.array_equal(native[:, 1:17], np.ones((16, 16, 20)))
    assert not native[:, [0, 17]].any()


@pytest.mark.parametrize("order", [0, 1])
def test_map_comes_back_through_another_spacing(make_case: MakeCase, task: Task, order: Any) -> None:
    affine = np.array([[-2.0, 0, 0, 30], [0, 0, 0.75, -4], [0, 1.6, 0, 9], [0, 0, 0, 1]])
    shape = (8, 12, 20)
    label = np.zeros(shape, dtype=np.uint8)
    label[2:6, 3:9, 4:15] = 1
    case = preprocess(make_case(image=blob(shape, affine), label=label, affine=affine), task)
    native = to_native(blob(task.size, case.affine), case, order)
    assert native.shape == shape
    difference = np.abs(native - blob(shape, affine))[1:-1, 1:-1, 1:-1]
    assert difference.max() < (1e-3 if order == 1 else 0.5 * (3 + 2 + 5) + 1e-3)
    returned = to_native(case.label, case, 0)
    assert 2 * (returned & label).sum() / (returned.sum() + label.sum()) > 0.95


def test_volume_of_another_grid_cannot_be_brought_back(make_case: MakeCase, task: Task) -> None:
    case = preprocess(make_case(), task)
    with pytest.raises(DataError, match=r"found a volume of shape \(4, 4, 4\), expected \(16, 16, 24\)"):
        to_native(np.ones((4, 4, 4)), case, 0)


def whole(files: CaseFiles, task: Task) -> FullImage:
    raw, _ = inspect_image(files, task)
    assert raw is not None
    return preprocess_full(files, raw, task)


def test_full_image_is_what_the_window_shows_and_more(make_case: MakeCase, task: Task, image: Any) -> None:
    image[:3] = 0
    affine = np.array([[0, 0, -2.0, 30], [0.75, 0, 0, -4], [0, 1.6, 0, 9], [0, 0, 0, 1]])
    files = make_case(image=image, affine=affine)
    case, full = preprocess(files, task), whole(files, task)
    # 20 voxels of 2 mm along right, 16 - 3 of 0.75 mm along anterior, 18 of 1.6 mm along superior
    assert full.image.shape == (1, 40, 10, 29)
    assert full.image.dtype == np.float32
    assert (full.native_shape, full.id) == ((16, 18, 20), "case-1")
    assert np.allclose(full.native_affine, affine)
    # The window of 16x16x24 voxels cuts x and z, and pads y.
    start = np.rint(np.linalg.inv(full.affine) @ case.affine)[:3, 3].astype(int)
    assert start.tolist() == [12, -3, 2]
    assert np.array_equal(case.image[:, :, 3:13], full.image[:, 12:28, :, 2:26])


def test_full_label_comes_back_with_smooth_contours(make_case: MakeCase, task: Task) -> None:
    coarse = task.model_copy(update={"spacing": (3.0, 3.0, 3.0)})
    grid = np.indices((30, 30, 30)) - 14.5
    label = np.where((grid**2).sum(axis=0) < 11**2, np.where(grid[0] > 0, 1, 2), 0).astype(np.uint8)
    full = whole(make_case(image=label + 1.0, label=label), coarse)
    assert full.image.shape == (1, 10, 10, 10)
    centres = (np.indices((10, 10, 10)) - 4.5) * 3
    inside = (centres**2).sum(axis=0) < 11**2
    seen = np.where(inside, np.where(centres[0] > 0, 1, 2), 0).astype(np.uint8)
    smooth, steps = label_to_native(seen, full), to_native(seen, full, 0)
    assert smooth.dtype == np.uint8
    assert smooth.shape == (30, 30, 30)
    assert set(np.unique(smooth)) == {0, 1, 2}
    assert (smooth != label).sum() < 0.8 * (steps != label).sum()
    with pytest.raises(DataError, match=r"found a volume of shape \(4, 4, 4\)"):
        label_to_native(np.zeros((4, 4, 4), dtype=np.uint8), full)


def test_full_label_on_the_files_own_grid_is_the_same(make_case: MakeCase, task: Task, label: Any) -> None:
    classes = np.where(label == 5, 2, label)
    full = whole(make_case(affine=np.diag([-1.0, 1, 1, 1])), task)
    assert np.array_equal(label_to_native(classes[::-1], full), classes)


def test_case_with_a_problem_is_refused(make_case: MakeCase, task: Task, image: Any) -> None:
    image[0, 0, 0] = np.nan
    files = make_case(image=image)
    with pytest.raises(DataError, match=r"case case-1, .*found 1 voxel of NaN"):
        preprocess(files, task)


@pytest.mark.filterwarnings("ignore")  # MONAI's own deprecations are not ours to mend
def test_same_as_monai(make_case: MakeCase, task: Task) -> None:
    transforms: Any = importlib.import_module("monai.transforms")  # untyped, and slow to import
    rng = np.random.default_rng(1)
    shape = (20, 16, 10)  # in mm 18x20x25: where a side is no whole number, MONAI moves the origin a little
    affine = np.array([[0, -1.25, 0, 20], [0.9, 0, 0, -11], [0, 0, -2.5, 15], [0, 0, 0, 1]])
    image = np.zeros(shape, dtype=np.float32)
    image[3:16, 2:12, 1:9] = rng.uniform(100, 1000, (13, 10, 8))
    label = np.zeros(shape, dtype=np.uint8)
    label[5:14, 4:10, 2:7] = 2
    label[7:11, 5:9, 3:6] = 1
    files = make_case(image=image, label=label, affine=affine)
    small = task.model_copy(update={"size": (16, 16, 8)})
    case = preprocess(files, small)

    keys = ["image", "one_hot"]
    chain = transforms.Compose(
        [
            transforms.LoadImaged(keys=["image", "label"], ensure_channel_first=True),
            transforms.Lambdad(
                keys="label",
                func=lambda value: (value == value.new_tensor([0, 1, 2]).view(3, 1, 1, 1)).float(),
            ),
            transforms.CopyItemsd(keys="label", names="one_hot"),
            transforms.Orientationd(keys=keys, axcodes="RAS", labels=None),
            transforms.Spacingd(
                keys=keys,
                pixdim=small.spacing,
                mode="bilinear",
                padding_mode="border",
                scale_extent=True,
                align_corners=False,
            ),
            # Interpolation leaves rounding errors where the image is zero.
            transforms.Lambdad(keys="image", func=lambda value: value * (abs(value) > 0.01)),
            transforms.CropForegroundd(keys=keys, source_key="image", select_fn=lambda value: value != 0),
            transforms.NormalizeIntensityd(keys="image", nonzero=True, channel_wise=True),
            transforms.ResizeWithPadOrCropd(keys=keys, spatial_size=small.size),
        ]
    )
    expected = chain({"image": files.images[0], "label": files.label})
    assert np.allclose(case.affine, expected["image"].affine, atol=1e-4)
    assert np.allclose(case.image, expected["image"].numpy(), atol=1e-3)
    shares = expected["one_hot"].numpy()
    is_clear = np.sort(shares, axis=0)[-1] - np.sort(shares, axis=0)[-2] > 1e-3  # no tie of two classes
    assert np.array_equal(case.label[is_clear], shares.argmax(axis=0)[is_clear])
    assert set(np.unique(case.label)) == {0, 1, 2}


@pytest.mark.real_data
def test_real_case_there_and_back(real_data: Path) -> None:
    task = load_task("msd-hippocampus")
    files = find_cases(real_data / "Task04_Hippocampus", task).cases[0]
    case = preprocess(files, task)
    assert case.image.shape == (1, 40, 56, 40)
    assert files.label is not None
    stored: Any = nibabel.load(files.label)
    assert np.array_equal(to_native(case.label, case, 0), np.asanyarray(stored.dataobj))


@pytest.mark.parametrize("order", [0, 1])
def test_where_voxels_lie_on_voxels_copying_is_resampling(
    order: Literal[0, 1], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Axes in any order and direction, grids that reach beyond one another, or do not meet at all."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        axes, signs = rng.permutation(3), rng.choice([-1, 1], 3)
        matrix = np.eye(4)
        matrix[:3, :3] = np.eye(3)[axes] * signs[:, None]
        matrix[:3, 3] = rng.integers(-9, 12, 3)
        native_shape = tuple(rng.integers(1, 9, 3).tolist())
        volume = rng.integers(1, 200, rng.integers(1, 8, 3)).astype(np.uint8)
        affine = np.diag([2.0, 1.5, 3.0, 1.0])
        case = Case(
            "a", "p", np.zeros((1, *volume.shape), np.float32), volume, affine, native_shape, affine @ matrix
        )
        copied = to_native(volume, case, order)
        with monkeypatch.context() as patch:
            patch.setattr(preprocessing, "_keeps_grid", lambda _: False)
            np.testing.assert_array_equal(copied, to_native(volume, case, order))
        seen.add(bool(copied.any()))
    assert seen == {True, False}
