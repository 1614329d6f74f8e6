import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.image as mpl_image
import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.problems import CODES, Code, Problem
from fedqc.config import DataConfig, PolicyConfig, SiteConfig
from fedqc.errors import DataError
from fedqc.reports import check_slices
from fedqc.reports.check import MOST_ROWS, build_check_report
from fedqc.reports.check_slices import ShapesDifferError, draw_affected, draw_problem
from fedqc.reports.slices import Slice
from fedqc.site_check import SiteCheck, check_site
from fedqc.task import Task

SHAPE = (16, 18, 20)
TASK = Task(
    name="blobs",
    modalities=("T1",),
    classes={"core": (1,), "rim": (2, 5)},
    regions={"whole": ("core", "rim")},
    spacing=(1.0, 1.0, 1.0),
    size=(16, 24, 24),
)
TEXT_ONLY = pytest.mark.usefixtures("no_drawing", "no_slices")
ReadPage = Callable[[Path], Any]


@dataclass
class Patient:
    """A case while it is made."""

    id: str
    image: NDArray[Any]
    label: NDArray[Any]
    affine: NDArray[np.float64] = field(default_factory=lambda: np.eye(4))
    label_affine: NDArray[np.float64] = field(default_factory=lambda: np.eye(4))
    cut: bool = False
    """Whether the image ends too early."""
    file: str = ""
    """Name of its files, if not its id."""


def healthy(case_id: str, number: int = 0) -> Patient:
    rng = np.random.default_rng(number)
    image = rng.uniform(100, 200, SHAPE).astype(np.float32)
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[3:12, 4:13, 5:15] = 2
    label[5:9, 6:10, 7:12] = 1
    label[3:12, 4, 5][[bool(number >> bit & 1) for bit in range(9)]] = 1  # no two alike
    return Patient(case_id, image + 80 * (label == 1), label)


def strange(patient: Patient) -> Patient:
    return replace(patient, label=np.where(patient.label == 1, 7, patient.label))


def with_island(patient: Patient) -> Patient:
    label = patient.label.copy()
    label[14, 16, 18] = 1
    return replace(patient, label=label)


def cut(patient: Patient) -> Patient:
    return replace(patient, cut=True)


def smaller(patient: Patient) -> Patient:
    return replace(patient, label=patient.label[:-1])


def write(folder: Path, patients: Sequence[Patient]) -> None:
    rows = []
    for patient in patients:
        names = [f"{patient.file or patient.id}-{part}.nii.gz" for part in ("image", "label")]
        for name, data, affine in zip(
            names, (patient.image, patient.label), (patient.affine, patient.label_affine), strict=True
        ):
            nibabel.save(nibabel.Nifti1Image(data, affine), folder / name)
        if patient.cut:
            path = folder / names[0]
            path.write_bytes(path.read_bytes()[:-300])
        rows.append((patient.id, *names))
    with (folder / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "T1", "label"), *rows])


@dataclass
class Site:
    """A site, what was found in its data, and its report."""

    config: SiteConfig
    check: SiteCheck
    report: Path

    def build(self) -> Path:
        build_check_report(self.check, self.config, TASK, self.report)
        return self.report


@pytest.fixture
def make_site(tmp_path: Path) -> Callable[..., Site]:
    """Check a folder with these cases."""

    def make(patients: Sequence[Patient], references: Sequence[str] = (), min_count: int = 3) -> Site:
        folder = tmp_path / "data"
        folder.mkdir()
        write(folder, patients)
        vouched = tmp_path / "verified.csv"
        vouched.write_text("\n".join(["id", *references]))
        config = SiteConfig(
            name="hospital-a",
            task="blobs",
            data=DataConfig(path=folder, reference=vouched),
            policy=PolicyConfig(min_count=min_count),
        )
        return Site(config, check_site(config, TASK, memory=None), tmp_path / "out" / "check.html")

    return make


@pytest.fixture
def no_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture is empty."""
    monkeypatch.setattr(check_slices, "draw_problem", lambda *_: Slice(b"", "axial", "T1"))


@pytest.fixture
def mixed(make_site: Callable[..., Site]) -> Site:
    """Eight cases, four of them left out, one with a warning; three references, one of them a stranger."""
    cases = [healthy(f"c{number}", number) for number in range(8)]
    cases[1], cases[2] = strange(cases[1]), strange(cases[2])
    cases[3] = cut(cases[3])
    cases[4] = smaller(cases[4])
    cases[5] = with_island(cases[5])
    return make_site(cases, ["c6", "c7", "nobody"])


def section(path: Path, slug: str) -> str:
    found = re.search(rf'<section id="{slug}".*?</section>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"there is no section {slug}"
    return found[0]


def text(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def pictures(path: Path) -> list[str]:
    """The titles of the pictures."""
    html = path.read_text(encoding="utf-8")
    assert html.count("<img") == html.count('src="data:image/png;base64,')
    return re.findall(r'<img [^>]*alt="([^"]*)"', html)


# ---------------------------------------------------------------------------------------------- the page


def test_page_has_its_sections_and_needs_nothing_else(mixed: Site, read_page: ReadPage) -> None:
    path = mixed.build()
    page = read_page(path)
    slugs = re.findall(r'<section id="(\w+)"', path.read_text(encoding="utf-8"))
    assert slugs == ["found", "pictures", "cases", "datasheet", "leaves"]
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "iframe", "image"} & set(page.tags)
    outside = [link for link in page.links if not link.startswith(("#", "data:image/png;base64,", "data:,"))]
    assert outside == []
    assert "http" not in re.sub(r'xmlns="[^"]+"|base64,[^"]+', "", path.read_text(encoding="utf-8"))
    assert not re.search(r"\b(nan|None|undefined)\b", page.text)
    assert page.tags.count("svg") == 3


def test_equal_input_gives_equal_bytes(mixed: Site) -> None:
    assert mixed.build().read_bytes() == mixed.build().read_bytes()


@TEXT_ONLY
def test_page_says_that_it_stays_inside(mixed: Site) -> None:
    html = mixed.build().read_text(encoding="utf-8")
    header = html[: html.index("</header>")]
    assert "For use inside the hospital only: this page shows scans and names cases." in header


@TEXT_ONLY
def test_headline_counts_the_cases(mixed: Site) -> None:
    html = mixed.build().read_text(encoding="utf-8")
    assert 'id="top" class="caution"' in html
    header = text(html[: html.index("</header>")])
    assert (
        "4 of 8 cases can be used; 4 are left out until their errors are mended. Somebody should look at 1 "
        "that can be used but has a warning." in header
    )
    assert "references 2" in header


@TEXT_ONLY
def test_every_code_stands_with_the_number_of_its_cases(mixed: Site) -> None:
    path = mixed.build()
    shown = dict(
        re.findall(r'<th scope="row"><code>([a-z-]+)</code></th><td>([^<]*)</td>', section(path, "found"))
    )
    assert set(shown) == {problem.code for problem in mixed.check.problems}
    assert shown == {
        "unknown-label-value": "2",
        "truncated": "1",
        "shape-mismatch": "1",
        "tiny-islands": "1",
        "unknown-reference": "-",
    }
    words = text(section(path, "found"))
    assert words.index("Errors: these cases are left out") < words.index("truncated")
    assert words.index("Warnings: these cases stay") < words.index("tiny-islands")
    assert "a label holds values that the task does not know" in words
    assert "correct the label or add the value to a class of the task" in words
    assert "c1-label.nii.gz and c2-label.nii.gz" in words


@TEXT_ONLY
def test_every_problem_is_listed_with_what_was_found(mixed: Site) -> None:
    words = text(section(mixed.build(), "cases")).replace("&#39;", "'")
    for problem in mixed.check.problems:
        assert problem.found in words
        assert problem.expected in words
    assert words.index("nobody") < words.index("c1") < words.index("c5")  # the site, left out, usable


def test_pictures_are_of_cases_that_can_be_read(mixed: Site) -> None:
    path = mixed.build()
    assert pictures(path) == ["unknown-label-value: c1.", "unknown-label-value: c2.", "tiny-islands: c5."]
    words = text(section(path, "pictures"))
    assert "No picture of c4: image 16x18x20, label 15x18x20: image and label have different shapes" in words
    assert "c3" not in words


@TEXT_ONLY
def test_data_sheet_and_what_leaves_have_the_numbers_of_the_site(mixed: Site) -> None:
    path = mixed.build()
    assert "What the 4 usable cases of 4 patients are like" in text(section(path, "datasheet"))
    assert "voxels along z 4 20 - 20 20 -" in text(section(path, "datasheet"))
    words = text(section(path, "leaves"))
    assert "tells something about 3 patients or more" in words
    assert "cases left out: unknown-label-value 2 2 held back left_out.unknown-label-value" in words
    assert "usable cases 4 2 held back cases" in words  # two are references, two are not
    assert re.search(r"mean volume of core, ml ([\d.]+) 4 \1 volume_ml\.core\.mean", words)
    known = mixed.check.leaves(1)
    assert (
        f"{len(mixed.check.leaves(3))} numbers would leave, {len(known) - len(mixed.check.leaves(3))}"
        in words
    )
    assert set(re.findall(r"<code>([a-z_]+(?:\.[\w-]+)*)</code></td></tr>", section(path, "leaves"))) == set(
        known
    )


@TEXT_ONLY
def test_nothing_wrong_is_said(make_site: Callable[..., Site]) -> None:
    path = make_site([healthy(f"c{number}", number) for number in range(3)]).build()
    html = path.read_text(encoding="utf-8")
    assert 'id="top" class="good"' in html
    assert "All 3 cases can be used, and nothing looks wrong." in text(html)
    assert "Nothing: every file could be read" in text(section(path, "found"))
    assert "<img" not in html
    assert 'id="cases"' not in html


def test_nothing_usable_is_said(make_site: Callable[..., Site]) -> None:
    path = make_site([cut(healthy("a")), strange(healthy("b"))]).build()
    assert 'id="top" class="bad"' in path.read_text(encoding="utf-8")
    assert "None of 2 cases can be used: every one has an error." in text(path.read_text(encoding="utf-8"))
    assert "Nothing to describe" in text(section(path, "datasheet"))
    assert pictures(path) == ["unknown-label-value: b."]


def test_texts_of_the_site_are_no_markup(make_site: Callable[..., Site], read_page: ReadPage) -> None:
    evil = "<b>x</b> <script>"
    path = make_site([healthy("a"), replace(strange(healthy(evil)), file="<i>& file")]).build()
    page = read_page(path)
    assert not {"script", "i"} & set(page.tags)
    assert f"unknown-label-value: {evil}." in page.text
    assert "<i>& file-label.nii.gz" in page.text


@TEXT_ONLY
def test_names_that_are_no_text_are_no_obstacle(mixed: Site) -> None:
    problem = replace(mixed.check.problems[-1], file=mixed.config.data.path / "sc\udce4n.nii.gz")
    mixed.check = replace(mixed.check, problems=(problem,))
    assert "sc\\udce4n.nii.gz" in mixed.build().read_text(encoding="utf-8")


def test_three_hundred_cases(make_site: Callable[..., Site]) -> None:
    cases = [with_island(healthy(f"c{number:03d}", number)) for number in range(300)]
    for number in range(50):
        cases[number] = replace(cases[number], label_affine=np.diag([1.0, 1.0, 1.1, 1.0]))
    site = make_site(cases, [f"c{number:03d}" for number in range(100, 200)])
    done: list[tuple[int, int]] = []
    build_check_report(
        site.check, site.config, TASK, site.report, lambda now, total: done.append((now, total))
    )
    found = len(site.check.problems)
    assert found > MOST_ROWS
    words = text(section(site.report, "cases"))
    assert f"The first {MOST_ROWS} of {found} problems; fedqc check --csv writes all" in words
    assert section(site.report, "cases").count("<tr>") == MOST_ROWS + 1
    shown = pictures(site.report)
    assert [title.partition(":")[0] for title in shown].count("tiny-islands") == 3
    assert "3 of 250 cases with tiny-islands" in text(section(site.report, "pictures"))
    assert done == [(number, len(shown)) for number in range(1, len(shown) + 1)]
    assert site.report.stat().st_size < 2e6


# ------------------------------------------------------------------------------------------ which pictures


@pytest.mark.usefixtures("no_slices")
def test_every_code_has_a_picture_before_another_has_its_third() -> None:
    cases = [CaseFiles(f"c{number}", f"c{number}", (Path("i"),), Path("l")) for number in range(4)]
    problems = [Problem(code, case.id, None, "x", "y", "z") for code in CODES for case in cases]
    affected = draw_affected(problems, cases, TASK)
    shown = {code: len(one.drawn) for code, one in affected.items()}
    assert sum(shown.values()) == check_slices.MOST_IN_ALL
    assert min(shown.values()) >= 1
    assert max(shown.values()) <= check_slices.MOST_OF_A_CODE
    assert not {"name-clash", "link-outside", "duplicate-id", "truncated"} & set(shown)


def test_of_two_cases_with_one_id_the_one_with_the_file_is_drawn(tmp_path: Path) -> None:
    write(tmp_path, [healthy("a"), strange(healthy("b"))])
    first, second = (
        CaseFiles("same", "p", (tmp_path / f"{name}-image.nii.gz",), tmp_path / f"{name}-label.nii.gz")
        for name in "ab"
    )
    problem = found_in("unknown-label-value", "same", second.label)
    ((drawn,),) = (one.drawn for one in draw_affected([problem], [first, second], TASK).values())
    assert drawn.slice == draw_problem(second, problem, TASK)
    assert drawn.slice != draw_problem(first, problem, TASK)


# --------------------------------------------------------------------------------------------- the slices


def found_in(code: Code, case: str, file: Path | None) -> Problem:
    return Problem(code, case, file, "x", "y", "z")


def drawn(tmp_path: Path, patient: Patient, code: Code, part: str = "label") -> Slice:
    write(tmp_path, [patient])
    image, label = (tmp_path / f"{patient.id}-{name}.nii.gz" for name in ("image", "label"))
    files = CaseFiles(patient.id, patient.id, (image,), label)
    return draw_problem(files, found_in(code, patient.id, image if part == "image" else label), TASK)


def halves(found: Slice) -> tuple[NDArray[Any], NDArray[Any]]:
    pixels = mpl_image.imread(BytesIO(found.png))[..., :3]
    middle = pixels.shape[1] // 2
    return pixels[:, : middle - 3], pixels[:, middle + 3 :]


def is_orange(pixels: NDArray[Any]) -> NDArray[np.bool_]:
    result: NDArray[np.bool_] = (pixels[..., 0] - pixels[..., 2]) > 0.5
    return result


def has_colour(pixels: NDArray[Any]) -> bool:
    return bool((np.ptp(pixels, axis=-1) > 0.3).any())


def test_left_is_the_scan_and_right_the_label_over_it(tmp_path: Path) -> None:
    left, right = halves(drawn(tmp_path, healthy("a"), "duplicate-label"))
    assert not has_colour(left)
    assert has_colour(right)
    assert left.std() > 0.05


def test_unknown_values_are_coloured_and_known_ones_have_contours(tmp_path: Path) -> None:
    patient = healthy("a")
    patient.label = np.array([0, 9, 1])[patient.label].astype(np.uint8)
    left, right = halves(drawn(tmp_path, patient, "unknown-label-value"))
    assert not has_colour(left)
    assert is_orange(right).mean() > 0.02
    assert ((right[..., 2] - right[..., 0]) > 0.2).any()  # the contour of class 1 is blue


def test_slice_goes_through_what_is_wrong(tmp_path: Path) -> None:
    """Few voxels of the label, in one corner: the slice with most of the label does not show them."""
    assert is_orange(halves(drawn(tmp_path, with_island(healthy("a")), "tiny-islands"))[1]).any()
    patient = healthy("b")
    patient.image[0, 0, :2] = np.nan
    assert is_orange(halves(drawn(tmp_path, patient, "non-finite", "image"))[1]).any()


def test_label_far_from_the_head_is_shown_together_with_it(tmp_path: Path) -> None:
    patient = healthy("a")
    patient.image[8:] = 0
    patient.label[:] = 0
    patient.label[12:15, 2:16, 2:18] = 2  # most of it in sagittal planes, where there is no head
    found = drawn(tmp_path, patient, "label-outside-image")
    left, right = halves(found)
    assert found.plane != "sagittal"
    assert left.max() > 0.5
    assert is_orange(right).any()


def test_case_without_a_label_says_so(tmp_path: Path) -> None:
    write(tmp_path, [healthy("a")])
    files = CaseFiles("a", "a", (tmp_path / "a-image.nii.gz",), None)
    left, right = halves(draw_problem(files, found_in("missing-label", "a", None), TASK))
    assert left.std() > 0.05
    assert not has_colour(right)
    assert (right < 0.1).mean() > 0.9
    assert right.max() > 0.5  # letters


def test_first_of_several_volumes_is_shown(tmp_path: Path) -> None:
    several = replace(healthy("a"), image=np.stack([healthy("a").image] * 3, axis=-1))
    assert drawn(tmp_path, several, "wrong-dimensions", "image") == drawn(
        tmp_path, healthy("a"), "wrong-dimensions", "image"
    )


def test_modality_of_a_file_is_the_one_that_is_drawn(tmp_path: Path) -> None:
    task = TASK.model_copy(update={"modalities": ("T1", "T2", "FLAIR")})
    write(tmp_path, [healthy("a"), healthy("b", 1)])
    images = (tmp_path / "a-image.nii.gz", None, tmp_path / "b-image.nii.gz")
    files = CaseFiles("a", "a", images, tmp_path / "a-label.nii.gz")
    assert draw_problem(files, found_in("clipped-image", "a", images[2]), task).modality == "FLAIR"
    assert draw_problem(files, found_in("clipped-image", "a", images[0]), task).modality == "T1"


def test_shapes_that_differ_and_files_that_cannot_be_read_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ShapesDifferError, match="image 16x18x20, label 15x18x20"):
        drawn(tmp_path, smaller(healthy("a")), "shape-mismatch")
    with pytest.raises(DataError, match="no image can be read"):
        drawn(tmp_path, cut(healthy("a")), "unknown-label-value")


@pytest.mark.parametrize(
    "changes",
    [
        {"image": np.full(SHAPE, np.nan, np.float32)},
        {"image": np.full(SHAPE, 1e300)},
        {"image": np.zeros(SHAPE, np.float32)},
        {"image": np.where(np.indices(SHAPE)[0] % 2, 3e38, -3e38).astype(np.float32)},
        {"label": np.full(SHAPE, np.nan, np.float32)},
        {"label": np.full(SHAPE, np.inf, np.float64)},
        {"label": np.ones(SHAPE, np.uint8)},
        {"label": np.random.default_rng(0).normal(0, 1e6, SHAPE)},
        {"image": np.ones((1, 1, 1)), "label": np.ones((1, 1, 1))},
        {"image": np.zeros((1, 30, 1)), "label": np.zeros((1, 30, 1))},
        {"affine": np.diag([1e-5, 1e5, 1.0, 1.0])},
        {"affine": np.array([[1, 1, 0, 0], [1, 1.001, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])},
    ],
)
@pytest.mark.parametrize("code", ["non-finite", "exchanged-files", "clipped-image", "label-outside-image"])
def test_strange_numbers_can_be_drawn(tmp_path: Path, changes: dict[str, Any], code: Code) -> None:
    assert drawn(tmp_path, replace(healthy("a"), **changes), code).png.startswith(b"\x89PNG")
