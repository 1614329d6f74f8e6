"""Pictures of the worst labels: the right cases, cut through the right place."""

from pathlib import Path

import matplotlib.image
import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from fedqc.cases.layouts import CaseFiles
from fedqc.reports import review, slices
from fedqc.reports.review import draw_review, draw_worst
from fedqc.reports.slices import Panel, Window
from fedqc.scoring import Scored
from fedqc.task import Task

SHAPE = (20, 16, 12)
ORANGE = np.array([0xE6, 0x9F, 0]) / 255


@pytest.fixture
def task() -> Task:
    return Task(
        name="blocks",
        modalities=("T1", "FLAIR"),
        classes={"left": (1,), "right": (2,)},
        regions={"both": ("left", "right")},
        spacing=(1.0, 1.0, 1.0),
        size=(16, 16, 16),
    )


def write_case(folder: Path, number: int, affine: NDArray[np.float64], error: NDArray[np.uint8]) -> Scored:
    """A case whose label is seen in FLAIR only, and its error map."""
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[4:9, 5:11, 4:9] = 1
    label[9:14, 5:11, 4:9] = 2
    rng = np.random.default_rng(number)
    flat, clear = (rng.uniform(90, 100, SHAPE) + 80 * contrast * (label > 0) for contrast in (0, 1))
    paths = [folder / f"{number}-{name}.nii.gz" for name in ("t1", "flair", "label")]
    for path, data in zip(paths, (flat, clear, label), strict=True):
        nibabel.save(nibabel.Nifti1Image(data.astype(np.float32), affine), path)
    maps = folder / "out" / "error_maps"
    maps.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(error, affine), maps / f"case-{number}.nii.gz")
    files = CaseFiles(f"case-{number}", f"p{number}", tuple(paths[:2]), paths[2])
    return Scored(files, number / 30, {"both": number / 30})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[NDArray[np.float32], Panel, Panel]]:
    """What is drawn: image, left and right panel of each slice."""
    seen: list[tuple[NDArray[np.float32], Panel, Panel]] = []
    real = slices.draw_panels

    def spy(
        image: NDArray[np.float32],
        panels: tuple[Panel, Panel],
        pixel: tuple[float, float],
        *,
        window: Window,
        mirrored: bool,
    ) -> bytes:
        seen.append((image, *panels))
        return real(image, panels, pixel, window=window, mirrored=mirrored)

    monkeypatch.setattr(review, "draw_panels", spy)
    return seen


def test_the_worst_cases_are_drawn(tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review, "draw_review", lambda *_: b"a picture")
    files = [CaseFiles(f"case-{number}", "p", (), None) for number in range(24, 0, -1)]
    scored = [Scored(one, number / 30, {}) for number, one in zip(range(24, 0, -1), files, strict=True)]
    told: list[tuple[int, int]] = []
    assert draw_worst(scored, task, tmp_path / "out", lambda *step: told.append(step)) == []
    assert {path.name for path in (tmp_path / "out" / "review").iterdir()} == {
        f"case-{number}.png" for number in range(1, 21)
    }
    assert told == [(done, 20) for done in range(1, 21)]


def test_a_picture_holds_three_slices_and_the_error(tmp_path: Path, task: Task) -> None:
    error = np.zeros(SHAPE, dtype=np.uint8)
    error[5:9, 5:9, 5:9] = 100
    one = write_case(tmp_path, 7, np.eye(4), error)
    (tmp_path / "picture.png").write_bytes(
        draw_review(one, task, tmp_path / "out" / "error_maps" / "case-7.nii.gz")
    )
    picture = matplotlib.image.imread(tmp_path / "picture.png")[..., :3]
    assert picture.shape[:2] == (3 * 220 + 2 * 26, 440)
    is_orange = np.abs(picture - ORANGE).max(axis=2) < 0.12
    middle = picture.shape[1] // 2
    for row in range(3):
        part = is_orange[26 + 220 * row : 26 + 220 * (row + 1)]
        assert not part[:, : middle - 5].any()  # left there is the label alone
        assert part[:, middle + 5 :].mean() > 0.02


@pytest.mark.parametrize(
    "affine",
    [
        np.eye(4),
        np.array([[0, 0, -1.0, 30], [-1, 0, 0, 20], [0, 1, 0, -7], [0, 0, 0, 1]]),
    ],
)
def test_slices_go_through_most_of_the_error(
    tmp_path: Path,
    task: Task,
    affine: NDArray[np.float64],
    drawn: list[tuple[NDArray[np.float32], Panel, Panel]],
) -> None:
    """A block of little certainty outweighs a single voxel of much; both are far from the label's middle."""
    error = np.zeros(SHAPE, dtype=np.uint8)
    error[12:17, 10:15, 7:12] = 60
    error[1, 1, 1] = 100
    one = write_case(tmp_path, 7, affine, error)
    draw_review(one, task, tmp_path / "out" / "error_maps" / "case-7.nii.gz")
    assert len(drawn) == 3
    for image, left, right in drawn:
        assert right.marked is not None
        assert right.marked.shape == image.shape
        assert right.marked.max() == pytest.approx(0.6)
        assert (right.marked > 0).sum() == 25
        assert left.marked is None
        assert left.label is not None
        assert right.label is not None
        assert np.array_equal(left.label, right.label)
    axial, coronal, sagittal = (image.shape for image, *_ in drawn)
    sides = SHAPE if affine[0, 0] == 1 else (SHAPE[2], SHAPE[0], SHAPE[1])
    assert (axial, coronal, sagittal) == (sides[:2], (sides[0], sides[2]), sides[1:])


def test_the_modality_that_shows_the_label(
    tmp_path: Path, task: Task, drawn: list[tuple[NDArray[np.float32], Panel, Panel]]
) -> None:
    error = np.zeros(SHAPE, dtype=np.uint8)
    error[5:9, 5:9, 5:9] = 100
    one = write_case(tmp_path, 7, np.eye(4), error)
    draw_review(one, task, tmp_path / "out" / "error_maps" / "case-7.nii.gz")
    assert all(image.max() > 150 for image, *_ in drawn)


def test_a_label_without_error_is_cut_through_its_middle(
    tmp_path: Path, task: Task, drawn: list[tuple[NDArray[np.float32], Panel, Panel]]
) -> None:
    one = write_case(tmp_path, 7, np.eye(4), np.zeros(SHAPE, dtype=np.uint8))
    for path in ("case-7.nii.gz", "nowhere.nii.gz"):
        drawn.clear()
        draw_review(one, task, tmp_path / "out" / "error_maps" / path)
        for _, left, right in drawn:
            assert left.label is not None
            assert left.label.any()
            assert right.marked is not None
            assert not right.marked.any()


def test_weak_suspicions_are_left_out(
    tmp_path: Path, task: Task, drawn: list[tuple[NDArray[np.float32], Panel, Panel]]
) -> None:
    error = np.full(SHAPE, 10, dtype=np.uint8)
    error[5:9, 5:9, 5:9] = 80
    one = write_case(tmp_path, 7, np.eye(4), error)
    draw_review(one, task, tmp_path / "out" / "error_maps" / "case-7.nii.gz")
    for _, _, right in drawn:
        assert right.marked is not None
        assert np.unique(right.marked).tolist() == [0, np.float32(0.8)]


def test_an_empty_label(tmp_path: Path, task: Task) -> None:
    """Where a task allows it, there is nothing to cut through but the image."""
    one = write_case(tmp_path, 7, np.eye(4), np.zeros(SHAPE, dtype=np.uint8))
    assert one.files.label is not None
    nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE, dtype=np.uint8), np.eye(4)), one.files.label)
    allowed = task.model_copy(update={"empty_label": "allowed"})
    png = draw_review(one, allowed, tmp_path / "out" / "error_maps" / "case-7.nii.gz")
    assert png.startswith(b"\x89PNG")


def test_a_case_that_cannot_be_drawn_does_not_stop_the_others(tmp_path: Path, task: Task) -> None:
    error = np.zeros(SHAPE, dtype=np.uint8)
    scored = [write_case(tmp_path, number, np.eye(4), error) for number in (1, 2)]
    assert scored[0].files.label is not None
    scored[0].files.label.unlink()
    (sentence,) = draw_worst(scored, task, tmp_path / "out")
    assert sentence.startswith("case case-1, ")
    assert "no such file" in sentence
    assert {path.name for path in (tmp_path / "out" / "review").iterdir()} == {"case-2.png"}


def test_many_classes_have_a_legend_of_several_lines(tmp_path: Path, task: Task) -> None:
    error = np.zeros(SHAPE, dtype=np.uint8)
    one = write_case(tmp_path, 7, np.eye(4), error)
    names = {f"a-class-with-a-long-name-{number}": (number,) for number in range(1, 8)}
    many = task.model_copy(update={"classes": names})
    (tmp_path / "picture.png").write_bytes(draw_review(one, many, tmp_path / "nowhere.nii.gz"))
    assert len(matplotlib.image.imread(tmp_path / "picture.png")) > 3 * 220 + 4 * 26
