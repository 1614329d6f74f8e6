from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from fedqc.cases import validation
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.problems import Problem
from fedqc.cases.validation import inspect_case, inspect_image, read_case
from fedqc.errors import DataError
from fedqc.task import Task

MakeCase = Callable[..., CaseFiles]


def problems_of(files: CaseFiles, task: Task) -> tuple[Problem, ...]:
    return inspect_case(files, task).problems


def codes(files: CaseFiles, task: Task) -> list[str]:
    problems = inspect_case(files, task).problems
    assert all(problem.case == files.id for problem in problems)
    assert all("\n" not in str(problem) for problem in problems)
    return [problem.code for problem in problems]


def changed(volume: NDArray[Any], value: float, n_voxels: int = 1) -> NDArray[Any]:
    """A float copy in which the first voxels have another value."""
    volume = volume.astype(np.float32)
    volume.ravel()[:n_voxels] = value
    return volume


def shifted(millimetres: float) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[1, 3] = millimetres
    return affine


def image_of(files: CaseFiles) -> Path:
    (path,) = files.images
    assert path is not None
    return path


def label_of(files: CaseFiles) -> Path:
    assert files.label is not None
    return files.label


def test_good_case_has_no_problem(make_case: MakeCase, task: Task) -> None:
    assert codes(make_case(), task) == []


def test_float_label_of_whole_numbers_is_fine(make_case: MakeCase, task: Task, label: Any) -> None:
    assert codes(make_case(label=label.astype(np.float32)), task) == []


def test_label_with_a_trailing_dimension_is_fine(make_case: MakeCase, task: Task, label: Any) -> None:
    assert codes(make_case(label=label[..., None]), task) == []


def test_missing_files(make_case: MakeCase, task: Task, tmp_path: Path) -> None:
    files = replace(make_case(), images=(tmp_path / "no.nii.gz",), label=tmp_path / "no-label.nii.gz")
    assert codes(files, task) == ["missing-modality", "missing-label"]
    assert str(problems_of(files, task)[0]) == (
        f"case case-1, {tmp_path / 'no.nii.gz'}: found no such file of T1, expected a .nii or .nii.gz file; "
        "restore the file or correct its path in the list, or leave the case out"
    )


def test_missing_modality(make_case: MakeCase, task: Task) -> None:
    first, second = make_case("first"), make_case("second")
    three = task.model_copy(update={"modalities": ("T1", "T2", "FLAIR")})
    (problem,) = problems_of(replace(first, images=(*first.images, None, *second.images)), three)
    assert problem.code == "missing-modality"
    assert "found no file of T2, expected one for each modality" in str(problem)
    assert codes(replace(first, images=()), task) == ["missing-modality"]


def test_missing_label(make_case: MakeCase, task: Task) -> None:
    assert codes(replace(make_case(), label=None), task) == ["missing-label"]


def test_unreadable_files(make_case: MakeCase, task: Task, capfd: pytest.CaptureFixture[str]) -> None:
    files = make_case()
    image_of(files).write_text("this is no image")
    content = label_of(files).read_bytes()
    label_of(files).write_bytes(content[: len(content) // 2])
    assert codes(files, task) == ["not-nifti", "truncated"]
    first, second = problems_of(files, task)
    assert "it is no NIfTI file" in first.found
    assert "its compressed data end too early" in second.found
    assert second.file == files.label
    assert capfd.readouterr() == ("", "")


def test_folder_instead_of_a_file(make_case: MakeCase, task: Task, tmp_path: Path) -> None:
    assert codes(replace(make_case(), images=(tmp_path,)), task) == ["not-nifti"]


def test_wrong_dimensions(make_case: MakeCase, task: Task, image: Any, label: Any) -> None:
    assert codes(make_case(image=image[0]), task) == ["wrong-dimensions"]  # two dimensions are no volume
    assert codes(make_case(image=np.stack([image, image], axis=-1)), task) == ["wrong-dimensions"]
    assert codes(make_case(label=np.stack([label, label], axis=-1)), task) == ["wrong-dimensions"]


def test_all_modalities_in_one_file(make_case: MakeCase, task: Task, image: Any) -> None:
    two = task.model_copy(update={"modalities": ("T1", "FLAIR")})
    assert codes(make_case(image=np.stack([image, image], axis=-1)), two) == []
    assert codes(make_case(image=np.stack([image] * 3, axis=-1)), two) == ["wrong-dimensions"]
    assert codes(make_case(), two) == ["wrong-dimensions"]
    raw, _ = read_case(make_case(image=np.stack([image, 2 * image], axis=-1)), two)
    assert np.array_equal(raw.channels[0], image)
    assert np.array_equal(raw.channels[1], 2 * image)


def test_shape_mismatch(make_case: MakeCase, task: Task, label: Any) -> None:
    files = make_case(label=label[:, :-1])
    (problem,) = problems_of(files, task)
    assert problem.code == "shape-mismatch"
    assert problem.file == files.label
    assert "found shape 16x17x20, expected 16x18x20 as in case-1.nii.gz" in str(problem)


def test_second_modality_is_compared_with_the_first(make_case: MakeCase, task: Task, image: Any) -> None:
    two = task.model_copy(update={"modalities": ("T1", "FLAIR")})
    first, second = make_case("first"), make_case("second", image=image[1:], affine=shifted(3))
    assert codes(replace(first, images=(*first.images, *second.images)), two) == [
        "shape-mismatch",
        "affine-mismatch",
    ]


@pytest.mark.parametrize(
    ("millimetres", "expected"),
    [(0.0009, []), (-0.0009, []), (0.0011, ["affine-mismatch"]), (-0.0011, ["affine-mismatch"])],
)
def test_affines_agree_within_a_thousandth_of_a_millimetre(
    make_case: MakeCase, task: Task, millimetres: float, expected: list[str]
) -> None:
    assert codes(make_case(label_affine=shifted(millimetres)), task) == expected


def test_differences_that_cancel_out_are_found(make_case: MakeCase, task: Task) -> None:
    affine = np.eye(4)
    affine[:2, 3] = (5, -5)
    (problem,) = problems_of(make_case(label_affine=affine), task)
    assert "differs by up to 5 mm" in problem.found


def test_orientation_mismatch(make_case: MakeCase, task: Task) -> None:
    (problem,) = problems_of(make_case(label_affine=np.diag([-1.0, 1, 1, 1])), task)
    assert problem.code == "orientation-mismatch"
    assert "found axes LAS, expected RAS" in str(problem)


def test_a_header_without_a_place_is_named(make_case: MakeCase, task: Task, label: Any) -> None:
    """nibabel then makes up an affine; often it is the image that lost its place."""
    files = make_case(label_affine=np.diag([-1.0, 1, 1, 1]))
    image = nibabel.load(image_of(files))
    image.set_sform(None, 0)  # type: ignore[attr-defined]
    image.set_qform(None, 0)  # type: ignore[attr-defined]
    nibabel.save(image, image_of(files))
    (problem,) = [one for one in problems_of(files, task) if one.file == files.label]
    assert problem.found.endswith("; neither sform nor qform is set in case-1.nii.gz")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_voxels(make_case: MakeCase, task: Task, image: Any, label: Any, value: float) -> None:
    (problem,) = problems_of(make_case(image=changed(image, value, 7)), task)
    assert problem.code == "non-finite"
    assert "found 7 voxels" in str(problem)
    assert codes(make_case(label=changed(label, value)), task) == ["non-finite"]


def test_voxels_beyond_32_bits(make_case: MakeCase, task: Task, image: Any) -> None:
    image = image.astype(np.float64)
    image[0, 0, 0] = 1e39
    assert codes(make_case(image=image), task) == ["non-finite"]


def test_empty_image_and_label(make_case: MakeCase, task: Task, image: Any, label: Any) -> None:
    assert codes(make_case(image=0 * image, label=0 * label), task) == ["constant-image", "empty-label"]


def test_unknown_label_value(make_case: MakeCase, task: Task, label: Any) -> None:
    (problem,) = problems_of(make_case(label=changed(label, 7, 3)), task)
    assert problem.code == "unknown-label-value"
    assert "found label value 7 in 3 voxels, expected one of 0, 1, 2, 5 as in task 'blobs'" in str(problem)
    assert codes(make_case(label=changed(label, -1)), task) == ["unknown-label-value"]


def test_non_integral_label(make_case: MakeCase, task: Task, label: Any) -> None:
    (problem,) = problems_of(make_case(label=changed(label, 0.5, 4)), task)
    assert problem.code == "non-integral-label"
    assert "found label value 0.5 in 4 voxels" in str(problem)


def test_all_problems_of_a_case_are_found(make_case: MakeCase, task: Task, image: Any, label: Any) -> None:
    broken = changed(changed(changed(label[:-1], np.nan, 3), 0.25, 2), 9)
    files = make_case(image=changed(image, np.nan), label=broken, label_affine=np.diag([1.0, -1, 1, 1]))
    assert codes(files, task) == [
        "non-finite",
        "shape-mismatch",
        "orientation-mismatch",
        "non-finite",
        "non-integral-label",
        "unknown-label-value",
    ]


def test_random_damage_never_raises(make_case: MakeCase, task: Task, image: Any) -> None:
    files = make_case()
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), image_of(files).with_suffix(""))  # not compressed
    files = replace(files, images=(image_of(files).with_suffix(""),))
    content = image_of(files).read_bytes()
    rng = np.random.default_rng(0)
    n_found = 0
    for _ in range(300):
        damaged = bytearray(content)
        for position in rng.integers(0, 352, size=rng.integers(1, 6)):
            damaged[position] = rng.integers(256)
        image_of(files).write_bytes(damaged)
        n_found += bool(inspect_case(files, task).problems)
    assert n_found > 50


def test_read_case_gives_class_indices(make_case: MakeCase, task: Task, image: Any, label: Any) -> None:
    raw, classes = read_case(make_case(), task)
    assert np.array_equal(raw.channels, [image])
    assert np.array_equal(classes, np.where(label == 5, 2, label))
    assert classes.dtype == np.uint8


def test_read_case_refuses_a_case_with_a_problem(make_case: MakeCase, task: Task, label: Any) -> None:
    with pytest.raises(DataError, match=r"case case-1, .*found a label without any marked voxel"):
        read_case(make_case(label=0 * label), task)


def test_an_image_needs_no_label(
    make_case: MakeCase, task: Task, image: Any, label: Any, tmp_path: Path
) -> None:
    files = make_case()
    raw, problems = inspect_image(files, task)
    assert raw is not None
    assert np.array_equal(raw.channels, [image])
    assert raw.label is not None
    assert np.array_equal(raw.label, np.where(label == 5, 2, label))
    assert problems == []
    raw, problems = inspect_image(replace(files, label=None), task)
    assert raw is not None
    assert np.array_equal(raw.channels, [image])
    assert (raw.label, problems) == (None, [])
    raw, problems = inspect_image(replace(files, label=tmp_path / "where-it-should-be.nii.gz"), task)
    assert raw is not None
    assert (raw.label, problems) == (None, [])


def test_a_bad_label_does_not_cost_the_image(make_case: MakeCase, task: Task, image: Any, label: Any) -> None:
    files = make_case(label=changed(label, 7, 3), label_affine=shifted(1))
    raw, problems = inspect_image(files, task)
    assert raw is not None
    assert np.array_equal(raw.channels, [image])
    assert raw.label is None
    assert [problem.code for problem in problems] == ["affine-mismatch", "unknown-label-value"]
    raw, problems = inspect_image(make_case(image=0 * image, label=0 * label), task)
    assert raw is None
    assert [problem.code for problem in problems] == ["constant-image", "empty-label"]


def test_images_of_a_case_may_not_be_too_large_together(
    make_case: MakeCase, task: Task, image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_case()
    other = make_case("case-2", image=image[::-1])
    two = task.model_copy(update={"modalities": ("T1", "T2")})
    both = replace(files, images=(*files.images, *other.images))
    assert codes(both, two) == []
    monkeypatch.setattr(validation, "MAX_VOXELS", 2 * image.size - 1)
    assert codes(both, two) == ["too-large"]
    assert "16x18x20 voxels in one of 2 images" in inspect_case(both, two).problems[0].found
