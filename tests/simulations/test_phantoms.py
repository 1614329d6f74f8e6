import hashlib
import json
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from fedqc_simulations.pathology import TUMOUR
from fedqc_simulations.phantoms import (
    Phantom,
    Scanner,
    add_rician_noise,
    draw_anatomy,
    draw_scanner,
    make_phantom,
    scan,
    site_of,
    write_phantoms,
)
from scipy import ndimage

from fedqc.cases.layouts import find_cases
from fedqc.cases.preprocessing import preprocess
from fedqc.cases.validation import inspect_case
from fedqc.cases.volumes import read_volume
from fedqc.ratings import read_ratings
from fedqc.seeding import generator
from fedqc.task import load_task

TASK = load_task("phantom")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "phantoms.md"
SEEDS = range(8)
SHAPE, TISSUES, LABEL_VALUES = TUMOUR.grid.shape, TUMOUR.tissues, TUMOUR.label_values


def quiet(what: str, done: int, total: int) -> None:
    pass


def scanner(seed: int = 0) -> Scanner:
    return draw_scanner(generator(seed, "scanner"))


@pytest.fixture(scope="module")
def made() -> list[Phantom]:
    return [make_phantom(generator(seed), scanner()) for seed in SEEDS]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, 2, 3, 0, quiet)
    return folder


def test_one_seed_gives_the_same_voxels(made: list[Phantom]) -> None:
    again = make_phantom(generator(SEEDS[1]), scanner())
    assert np.array_equal(again.image, made[1].image)
    assert np.array_equal(again.label, made[1].label)


def test_phantoms_of_earlier_versions_come_again(made: list[Phantom]) -> None:
    """Figures measured on them stay comparable; what is expected was computed by the first version."""
    phantom = made[1]
    digest = hashlib.sha256(phantom.label.tobytes()).hexdigest()
    assert digest.startswith("99afec1c70e4cd4a")
    means = phantom.image.mean(axis=(1, 2, 3), dtype=np.float64)
    # Not to the last bit: exponentials differ between processors.
    assert means == pytest.approx([171.815816, 136.699674, 103.834195, 132.337513], rel=1e-6)
    assert phantom.image[:, 20, 24, 20] == pytest.approx([633.4156, 522.6556, 183.877, 325.0725], rel=1e-5)


def test_no_two_alike(made: list[Phantom]) -> None:
    masks = [phantom.image[0] > 0 for phantom in made]
    labels = [phantom.label > 0 for phantom in made]
    for first in SEEDS:
        for second in range(first):
            assert 0.7 < overlap(masks[first], masks[second]) < 0.99  # all of them brains
            assert overlap(labels[first], labels[second]) < 0.9


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * np.count_nonzero(first & second) / (first.sum() + second.sum()))


def test_shapes_types_and_place(made: list[Phantom]) -> None:
    for phantom in made:
        assert phantom.image.shape == (4, *SHAPE)
        assert phantom.image.dtype == np.float32
        assert phantom.label.shape == SHAPE
        assert phantom.label.dtype == np.uint8
        middle = phantom.affine @ [*((np.array(SHAPE) - 1) / 2), 1]
        assert middle == pytest.approx([0, 0, 0, 1])
        assert phantom.affine[:3, :3] == pytest.approx(4 * np.eye(3))


def test_each_part_of_a_lesion_lies_inside_the_next(made: list[Phantom]) -> None:
    for phantom in made:
        brain = phantom.image.all(axis=0)
        lesion, core = phantom.label > 0, phantom.label == LABEL_VALUES["core"]
        rim = phantom.label == LABEL_VALUES["rim"]
        assert all((phantom.label == value).sum() >= 24 for value in LABEL_VALUES.values())
        assert not (lesion & ~brain).any()
        assert not (ndimage.binary_dilation(core | rim) & ~lesion).any()
        assert not (ndimage.binary_dilation(core) & ~(core | rim)).any()


def test_lesions_differ_in_number_and_size() -> None:
    labels = [draw_anatomy(generator(seed)).label for seed in range(24)]
    sizes = [np.count_nonzero(label) for label in labels]
    assert max(sizes) > 5 * min(sizes)
    numbers = [ndimage.label(label > 0)[1] for label in labels]
    assert {1, 2} <= set(numbers)


def test_values_are_those_of_the_task(made: list[Phantom]) -> None:
    of_task = {name: value for name, (value,) in TASK.classes.items()}
    assert of_task == LABEL_VALUES
    assert TASK.modalities == TUMOUR.modalities
    assert set(np.unique(np.stack([phantom.label for phantom in made]))) == {0, 1, 2, 3}


def test_nothing_outside_the_brain(made: list[Phantom]) -> None:
    for phantom in made:
        inside = phantom.image > 0
        assert (inside == inside[0]).all()
        assert (phantom.image[:, ~inside[0]] == 0).all()
        assert ndimage.label(inside[0])[1] == 1
        assert 0.2 < inside[0].mean() < 0.6
        assert not any(inside[0].take(side, axis).any() for axis in range(3) for side in (0, -1))


def test_what_is_dark_inside_the_brain_is_not_zero() -> None:
    anatomy = draw_anatomy(generator(0))
    dark = Scanner(contrast=((0.0,) * 4,) * len(TISSUES), bias=0.0, blur=1.0, noise=0.0)
    assert np.array_equal(scan(generator(0), anatomy, dark)[0], anatomy.brain.astype(np.float32))


def test_shares_of_the_tissues_add_up() -> None:
    anatomy = draw_anatomy(generator(0))
    assert anatomy.shares.sum(axis=0)[anatomy.brain] == pytest.approx(1, abs=1e-5)
    assert not anatomy.shares[:, ~anatomy.brain].any()
    assert anatomy.shares.min() >= 0
    share = dict(zip(TISSUES, anatomy.shares.sum(axis=(1, 2, 3)) / anatomy.brain.sum(), strict=True))
    assert share["white matter"] > share["grey matter"] > share["fluid"] > 0.03
    # The label is where the lesion's tissues fill most of a voxel.
    filled = anatomy.shares[[TISSUES.index(name) for name in LABEL_VALUES]].sum(axis=0) > 0.5
    assert overlap(filled, anatomy.label > 0) > 0.97


BRIGHTEST_FIRST = {
    "t1n": ("white matter", "grey matter", "edema", "core", "fluid"),
    "t1c": ("rim", "white matter", "grey matter", "edema", "core", "fluid"),
    "t2w": ("fluid", "core", "edema", "grey matter", "white matter"),
    "t2f": ("edema", "grey matter", "white matter", "fluid"),
}


@pytest.mark.parametrize("seed", range(5))
def test_contrasts_are_in_order_at_every_site(seed: int) -> None:
    site = scanner(seed)
    brightness = dict(zip(TISSUES, site.contrast, strict=True))
    for channel, modality in enumerate(TUMOUR.modalities):
        values = [brightness[tissue][channel] for tissue in BRIGHTEST_FIRST[modality]]
        assert values == sorted(values, reverse=True), modality


def test_contrasts_are_in_order_in_the_image() -> None:
    anatomy = draw_anatomy(generator(2))
    image = scan(generator(2), anatomy, scanner())
    pure = {name: share > 0.95 for name, share in zip(TISSUES, anatomy.shares, strict=True)}
    assert all(voxels.sum() > 5 for voxels in pure.values())
    for channel, modality in zip(image, TUMOUR.modalities, strict=True):
        # What is thin is blurred with what lies around it.
        tissues = [name for name in BRIGHTEST_FIRST[modality] if name not in {"grey matter", "core"}]
        means = [channel[pure[name]].mean() for name in tissues]
        assert means == sorted(means, reverse=True), modality


def test_lesions_can_be_told_from_tissue_but_not_by_a_threshold(made: list[Phantom]) -> None:
    for phantom in made:
        flair, lesion = phantom.image[3], phantom.label > 0
        normal = flair[(flair > 0) & ~lesion]
        edema = flair[phantom.label == LABEL_VALUES["edema"]]
        distance = (edema.mean() - normal.mean()) / math.hypot(edema.std(), normal.std())
        assert 1 < distance < 5
        assert normal.max() > np.percentile(edema, 10)


def test_sites_look_different() -> None:
    anatomy = draw_anatomy(generator(0))
    means = []
    for seed in range(4):
        image = scan(generator(0), anatomy, scanner(seed))
        means.append(image[:, anatomy.brain].mean(axis=1))
    for first in range(4):
        for second in range(first):
            assert np.abs(means[first] / means[second] - 1).max() > 0.1
    assert len({(scanner(seed).bias, scanner(seed).blur, scanner(seed).noise) for seed in range(4)}) == 4


def plain_scanner(**changes: float) -> Scanner:
    """A scanner that shows the tissues as they are."""
    settings = {"bias": 0.0, "blur": 1e-3, "noise": 0.0, **changes}
    return Scanner(contrast=((1000.0,) * 4,) * len(TISSUES), **settings)


@pytest.mark.parametrize(("bias", "low", "high"), [(0.0, 0.95, 1.05), (0.5, 0.55, 1.75)])
def test_bias_field_is_smooth_and_as_strong_as_it_should(bias: float, low: float, high: float) -> None:
    anatomy = draw_anatomy(generator(0))
    inside = ndimage.binary_erosion(anatomy.brain, iterations=2)
    flat, biased = (scan(generator(0), anatomy, plain_scanner(bias=value))[0] for value in (0.0, bias))
    field = np.where(inside, biased / np.where(inside, flat, 1), np.nan)
    assert low < np.nanmin(field)
    assert np.nanmax(field) < high
    assert np.nanmax(np.abs(np.diff(field, axis=0))) < 0.1
    if bias:
        assert np.nanmax(field) / np.nanmin(field) > 1.2


def test_blur_takes_away_detail() -> None:
    anatomy = draw_anatomy(generator(0))
    site = scanner()
    roughness = []
    for blur in (0.1, 2.0, 4.0):
        image = scan(generator(0), anatomy, Scanner(site.contrast, bias=0.0, blur=blur, noise=0.0))
        roughness.append(np.diff(image[0], axis=1)[anatomy.brain[:, 1:] & anatomy.brain[:, :-1]].std())
    assert roughness[0] > 1.2 * roughness[1] > 1.44 * roughness[2]


def test_rician_noise_follows_its_formulas() -> None:
    sigma = 20.0
    empty = add_rician_noise(generator(0), np.zeros((60, 60, 60), dtype=np.float32), sigma)
    assert empty.mean() == pytest.approx(sigma * math.sqrt(math.pi / 2), rel=0.01)
    assert empty.std() == pytest.approx(sigma * math.sqrt(2 - math.pi / 2), rel=0.01)
    signal = np.full((60, 60, 60), 50, dtype=np.float32)
    noisy = add_rician_noise(generator(1), signal, sigma)
    assert (noisy.astype(float) ** 2).mean() == pytest.approx(50**2 + 2 * sigma**2, rel=0.01)


def test_noise_is_as_strong_as_the_scanner_says() -> None:
    anatomy = draw_anatomy(generator(0))
    inside = ndimage.binary_erosion(anatomy.brain, iterations=2)
    clean, noisy = (scan(generator(0), anatomy, plain_scanner(noise=noise)) for noise in (0.0, 0.05))
    assert (noisy - clean)[:, inside].std(axis=1) == pytest.approx([50] * 4, rel=0.03)


def test_a_case_is_the_same_among_few_and_many(written: Path, tmp_path: Path) -> None:
    write_phantoms(tmp_path, ["site-2"], 2, 0, quiet)
    for folder in ("imagesTr", "labelsTr"):
        few = read_volume(tmp_path / folder / "site-2_001.nii.gz")
        many = read_volume(written / folder / "site-2_001.nii.gz")
        assert np.array_equal(few.data, many.data)
        assert np.array_equal(few.affine, many.affine)
    other = tmp_path / "other"
    write_phantoms(other, ["site-2"], 1, 1, quiet)
    name = "labelsTr/site-2_000.nii.gz"
    assert not np.array_equal(read_volume(other / name).data, read_volume(written / name).data)


def test_files_hold_what_was_drawn(written: Path) -> None:
    site = draw_scanner(generator(0, "scanner", "site-1"))
    drawn = make_phantom(generator(0, "phantom", "site-1", 2), site)
    image = read_volume(written / "imagesTr" / "site-1_002.nii.gz")
    assert image.data.shape == (*SHAPE, 4)
    assert image.data.dtype == np.int16
    assert np.abs(np.moveaxis(image.data, 3, 0) - drawn.image).max() <= 0.5
    assert np.array_equal(image.data > 0, np.moveaxis(drawn.image > 0, 0, 3))
    assert np.array_equal(read_volume(written / "labelsTr" / "site-1_002.nii.gz").data, drawn.label)


def test_ids_name_the_site(written: Path) -> None:
    listed = json.loads((written / "dataset.json").read_text(encoding="utf-8"))
    assert listed["numTraining"] == 6
    assert list(listed["modality"].values()) == list(TUMOUR.modalities)
    ids = [case.id for case in find_cases(written, TASK).cases]
    assert ids == [f"site-{site}_{number:03d}" for site in (1, 2) for number in range(3)]
    assert [site_of(case) for case in ids] == ["site-1"] * 3 + ["site-2"] * 3
    assert site_of("north_east_1000") == "north_east"


def test_every_phantom_can_be_used(written: Path) -> None:
    cases = find_cases(written, TASK).cases
    assert len(cases) == 6
    assert all(inspect_case(case, TASK).is_usable for case in cases)
    for files in cases:
        case = preprocess(files, TASK)
        assert case.image.shape == (4, 32, 40, 32)
        assert (case.image != 0).any(axis=(1, 2, 3)).all()
        assert {1, 2} <= set(np.unique(case.label))
        assert files.label is not None
        # Nothing of the lesion is cut off: its volume in mm^3 stays.
        before = np.count_nonzero(read_volume(files.label).data) * TUMOUR.grid.spacing**3
        assert np.count_nonzero(case.label) * math.prod(TASK.spacing) == pytest.approx(before, rel=0.15)


def test_task_fits_the_networks() -> None:
    TASK.check_strides(8)
    assert min(TASK.size) >= 24
    assert list(TASK.classes) == ["edema", "core", "rim"]
    assert TASK.regions == {
        "whole-tumour": ("edema", "core", "rim"),
        "tumour-core": ("core", "rim"),
        "enhancing": ("rim",),
    }


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    write_phantoms(tmp_path, ["a", "b"], 1, 0, lambda *what: told.append(what))
    assert told == [("making phantoms", done, 2) for done in range(3)]


def test_examples_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    codes = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for number, code in enumerate(codes):
        script = tmp_path / f"{number}.py"
        script.write_text(code.replace("cases_per_site=25", "cases_per_site=1"), encoding="utf-8")
        runpy.run_path(str(script))
    for folder, task in (("phantoms", TASK), ("lesions", load_task("phantom-lesions"))):
        assert [case.id for case in find_cases(tmp_path / folder, task).cases] == [
            f"{site}_000" for site in ("east", "north", "south", "west")
        ]
    assert len(read_ratings(tmp_path / "ratings.csv")) > 21 * 3 * 3
