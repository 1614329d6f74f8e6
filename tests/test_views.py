"""Slices of cases and of files, compared with slices that are cut by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from numpy.typing import NDArray
from scipy import ndimage

from fedqc.cases.cache import CaseCache
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.preprocessing import preprocess
from fedqc.cases.sources import Source
from fedqc.cases.volumes import Volume
from fedqc.errors import DataError
from fedqc.task import Task
from fedqc.views import Look, default_side, middle_of, views_of_case, views_of_sources

SHAPE = (20, 26, 18)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
LOOK = Look("percentile", "regions", 32)


@pytest.fixture
def task() -> Task:
    return Task(
        name="blobs",
        modalities=("T1", "T2"),
        classes={"core": (1, 4), "edema": (2,)},
        regions={"whole": ("core", "edema"), "inner": ("core",)},
        core="inner",
        spacing=(1.0, 1.0, 1.0),
        size=(24, 24, 24),
    )


@pytest.fixture
def image() -> NDArray[np.float32]:
    """`[2, X, Y, Z]` in LPS, not 0 in a head that is smaller than the volume."""
    rng = np.random.default_rng(4)
    image = rng.uniform(50, 900, (2, *SHAPE)).astype(np.float32)
    head = np.zeros(SHAPE, dtype=bool)
    head[3:19, 2:24, 1:17] = True
    return np.where(head, image, 0)


@pytest.fixture
def label() -> NDArray[np.uint8]:
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[6:16, 5:14, 4:12] = 2
    label[7:10, 6:11, 5:10] = 1
    label[10, 8, 7:11] = 4
    return label


def by_hand(image: NDArray[Any], label: NDArray[Any]) -> NDArray[np.float32]:
    """The published recipe for volumes in LPS, with SciPy's centre of mass."""
    core = np.isin(label, (1, 4))
    middle = [int(at) for at in ndimage.center_of_mass(core if core.any() else label > 0)]
    views = []
    for axis in (2, 1, 0):
        slices = np.stack([np.take(one, middle[axis], axis) for one in image]).astype(np.float64)
        seen = np.take(label, middle[axis], axis)
        low, high = np.percentile(slices, (0.5, 99.5))
        channels = [*((slices - low) / (high - low)).clip(0, 1), seen > 0, np.isin(seen, (1, 4))]
        room = [((32 - side) // 2, 32 - side - (32 - side) // 2) for side in seen.shape]
        views.append(np.pad(np.stack(channels).astype(np.float64), [(0, 0), *room], mode="minimum"))
    return np.stack(views).astype(np.float32)


def written(folder: Path, image: NDArray[Any], label: NDArray[Any], axes: str = "LPS") -> CaseFiles:
    """A case whose files have other axes, in the same place."""
    turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(axes))
    affine = LPS @ inv_ornt_aff(turn, SHAPE)
    paths = []
    for name, volume in (("t1", image[0]), ("t2", image[1]), ("label", label)):
        paths.append(folder / f"{axes}-{name}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(apply_orientation(volume, turn), affine), paths[-1])
    return CaseFiles("case", "patient", (paths[0], paths[1]), paths[2])


def of_files(files: CaseFiles, task: Task, look: Look = LOOK) -> Any:
    assert files.label is not None
    return views_of_sources(
        [Source(path) for path in files.images if path is not None], Source(files.label), task, look
    )


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PSR", "AIL"])
def test_the_published_slices_from_case_and_files_of_any_orientation(
    tmp_path: Path, task: Task, image: Any, label: Any, axes: str
) -> None:
    expected = by_hand(image, label)
    assert expected.shape == (3, 4, 32, 32)
    files = written(tmp_path, image, label, axes)
    assert np.array_equal(of_files(files, task).numpy(), expected)
    case = CaseCache(tmp_path / "cache", task).get(files)
    assert np.allclose(views_of_case(case, task, LOOK).numpy(), expected, atol=1e-6)


def test_arrays_are_sliced_as_they_are(tmp_path: Path, task: Task, image: Any, label: Any) -> None:
    expected = by_hand(image, label)
    for kind in (np.float64, np.int64, np.uint8):
        volumes = [Source(Path("x"), Volume(one, LPS)) for one in image]
        found = views_of_sources(volumes, Source(Path("label"), Volume(label.astype(kind), LPS)), task, LOOK)
        assert found is not None
        assert np.array_equal(found.numpy(), expected)
    both = Source(Path("image"), Volume(np.moveaxis(image, 0, -1), LPS))
    found = views_of_sources([both], Source(Path("label"), Volume(label, LPS)), task, LOOK)
    assert found is not None
    assert np.array_equal(found.numpy(), expected)


def test_without_a_core_all_that_is_labelled_counts(
    tmp_path: Path, task: Task, image: Any, label: Any
) -> None:
    edema = np.where(label > 0, 2, 0).astype(np.uint8)
    files = written(tmp_path, image, edema)
    assert np.array_equal(of_files(files, task).numpy(), by_hand(image, edema))
    assert middle_of(label, task) != middle_of(edema, task)
    no_core = task.model_copy(update={"core": None})
    assert middle_of(label, no_core) == middle_of(edema, no_core) == middle_of(edema, task)


def test_a_middle_between_voxels_is_rounded_down_on_both_sides(task: Task) -> None:
    label = np.zeros((6, 5, 4), dtype=np.uint8)
    label[2:4, 1:3, 1] = 1
    assert middle_of(label, task) == (2, 1, 1)
    assert middle_of(label[::-1, ::-1], task) == (2, 2, 1)
    assert middle_of(np.asfortranarray(label)[::-1, ::-1], task) == (2, 2, 1)
    assert middle_of(0 * label, task) is None


def test_encodings_and_normalisations(tmp_path: Path, task: Task, image: Any, label: Any) -> None:
    files = written(tmp_path, image, label)
    found = of_files(files, task, Look("min-max", "tissue", 32)).numpy()
    assert found.shape == (3, 4, 32, 32)
    regions = by_hand(image, label)
    assert np.array_equal(found[:, 2], regions[:, 3])  # the class core, which is the region inner
    assert np.array_equal(found[:, 3], regions[:, 2] - regions[:, 3])
    assert (found[:, :2].max(axis=(2, 3)) == 1).all()
    axial = image[0][:, :, middle_of(label, task)[2]]  # type: ignore[index]
    assert np.allclose(found[0, 0, 6:26, 3:29], axial / axial.max(), atol=1e-6)


def test_larger_slices_are_cropped_about_their_middle(
    tmp_path: Path, task: Task, image: Any, label: Any
) -> None:
    small = of_files(written(tmp_path, image, label), task, replace(LOOK, side=16)).numpy()
    axial = by_hand(image, label)[0]
    assert np.array_equal(small[0], axial[:, 8:24, 8:24])


@pytest.mark.parametrize(
    ("size", "side"), [((160, 192, 160), 240), ((160, 160, 24), 160), ((40, 56, 40), 64), ((260, 8, 8), 288)]
)
def test_default_side(task: Task, size: tuple[int, int, int], side: int) -> None:
    assert default_side(task.model_copy(update={"size": size})) == side


def test_resampled_cases_show_their_own_grid(tmp_path: Path, task: Task, image: Any, label: Any) -> None:
    coarse = task.model_copy(update={"spacing": (2.0, 2.0, 2.0), "size": (16, 16, 16)})
    files = written(tmp_path, image, label)
    assert of_files(files, coarse) is None  # it has to be read as a whole
    case = preprocess(files, coarse)
    views = views_of_case(case, coarse, LOOK).numpy()
    middle = middle_of(case.label[::-1, ::-1], coarse)
    assert middle is not None
    assert np.array_equal(views[0, 2, 8:24, 8:24], case.label[::-1, ::-1, middle[2]] > 0)
    assert np.array_equal(views[2, 3, 8:24, 8:24], case.label[15 - middle[0], ::-1] == 1)


def test_an_empty_label(tmp_path: Path, task: Task, image: Any, label: Any) -> None:
    case = replace(preprocess(written(tmp_path, image, label), task), label=np.zeros((24, 24, 24), np.uint8))
    with pytest.raises(DataError, match="case case: found a label without any marked voxel, expected at lea"):
        views_of_case(case, task, LOOK)
    allowed = task.model_copy(update={"empty_label": "allowed"})
    views = views_of_case(case, allowed, LOOK)
    assert not views[:, 2:].any()
    assert views[:, :2].any()


@pytest.fixture
def spoilt(
    tmp_path: Path, image: NDArray[Any], label: NDArray[Any]
) -> Callable[[str], tuple[list[Source], Source]]:
    def make(what: str) -> tuple[list[Source], Source]:
        images, marked, grid = image.copy(), label.astype(np.float64), LPS.copy()
        match what:
            case "unknown value":
                marked[0, 0, 0] = 3
            case "fraction":
                marked[7, 7, 7] = 1.5
            case "no number in a label":
                marked[7, 7, 7] = np.nan
            case "empty":
                marked[:] = 0
            case "no number in a slice":
                images[1, :, :, 7] = np.nan
            case "constant image":
                images[0] = 7 * (images[0] > 0)
            case "label as image":
                images[0] = marked
            case "other place":
                grid[0, 3] = 0.5
            case "other shape":
                marked = marked[1:]
        sources = [Source(Path(f"image {n}"), Volume(one, LPS)) for n, one in zip("12", images, strict=True)]
        return sources[what == "missing modality" :], Source(Path("label"), Volume(marked, grid))

    return make


@pytest.mark.parametrize(
    "what",
    [
        "unknown value",
        "fraction",
        "no number in a label",
        "empty",
        "no number in a slice",
        "constant image",
        "label as image",
        "other place",
        "other shape",
        "missing modality",
    ],
)
def test_what_is_odd_is_left_to_a_full_reading(task: Task, spoilt: Any, what: str) -> None:
    images, marked = spoilt("nothing")
    assert views_of_sources(images, marked, task, LOOK) is not None
    images, marked = spoilt(what)
    assert views_of_sources(images, marked, task, LOOK) is None


def test_files_that_cannot_be_read(tmp_path: Path, task: Task, image: Any, label: Any) -> None:
    files = written(tmp_path, image, label)
    path = files.images[0]
    assert path is not None
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert of_files(files, task) is None
    path.unlink()
    assert of_files(files, task) is None
