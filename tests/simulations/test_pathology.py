import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from fedqc_simulations.pathology import KINDS, TUMOUR, WHITE_MATTER_LESIONS, Growth, Head, Kind
from fedqc_simulations.phantoms import (
    Anatomy,
    Phantom,
    draw_anatomy,
    draw_scanner,
    make_phantom,
    scan,
    write_phantoms,
)
from scipy import ndimage

from fedqc.cases.layouts import find_cases
from fedqc.cases.preprocessing import preprocess
from fedqc.cases.validation import inspect_case
from fedqc.cases.volumes import read_volume
from fedqc.seeding import generator
from fedqc.task import load_task

KIND = WHITE_MATTER_LESIONS
TASK = load_task("phantom-lesions")
ML = KIND.grid.spacing**3 / 1000
"""Volume of a voxel in ml."""
SEEDS = range(12)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Head, Anatomy]]:
    heads: list[Head] = []

    def grow(rng: np.random.Generator, head: Head) -> Growth:
        heads.append(head)
        return KIND.grow(rng, head)

    watched = dataclasses.replace(KIND, grow=grow)
    anatomies = [draw_anatomy(generator(seed), watched) for seed in SEEDS]
    return list(zip(heads, anatomies, strict=True))


@pytest.fixture(scope="module")
def anatomies(drawn: list[tuple[Head, Anatomy]]) -> list[Anatomy]:
    return [anatomy for _, anatomy in drawn]


@pytest.fixture(scope="module")
def made(anatomies: list[Anatomy]) -> list[Phantom]:
    return [
        Phantom(
            scan(generator(seed), anatomy, draw_scanner(generator(seed, "scanner"), KIND)),
            anatomy.label,
            KIND.grid.affine,
        )
        for seed, anatomy in zip(SEEDS, anatomies, strict=True)
    ]


def loads(anatomies: list[Anatomy]) -> list[float]:
    """Volume in ml of all lesions of each."""
    return [float(np.count_nonzero(anatomy.label) * ML) for anatomy in anatomies]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_kind_is_that_of_its_task(kind: Kind) -> None:
    task = load_task(kind.task)
    assert task.modalities == kind.modalities
    assert {name: value for name, (value,) in task.classes.items()} == kind.label_values
    assert set(kind.label_values) <= set(kind.tissues)
    assert kind.tissues[:3] == ("white matter", "grey matter", "fluid")
    assert all(len(brightness) == len(kind.modalities) for brightness in kind.contrast.values())
    # The whole brain has room in the network's input.
    assert all(voxels * spacing >= 140 for voxels, spacing in zip(task.size, task.spacing, strict=True))
    task.check_strides(8)


def test_kinds_are_known_by_their_task() -> None:
    assert KINDS == {"phantom": TUMOUR, "phantom-lesions": WHITE_MATTER_LESIONS}
    TASK.check_strides(16)


def test_one_seed_gives_the_same_lesions(anatomies: list[Anatomy]) -> None:
    scanner = draw_scanner(generator(0, "scanner"), KIND)
    first, second = (make_phantom(generator(3), scanner, KIND) for _ in range(2))
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.label, anatomies[3].label)
    for one, other in itertools.combinations(anatomies, 2):
        assert not np.array_equal(one.label, other.label)


def test_loads_are_log_uniform_from_half_to_fifty_ml(drawn: list[tuple[Head, Anatomy]]) -> None:
    head, _ = drawn[0]
    found = []
    for seed in range(24):
        voxels = np.count_nonzero(KIND.grow(generator(seed), head).label)
        # The volume is the first thing that is drawn, and met to the voxel.
        load = math.exp(generator(seed).uniform(math.log(0.5), math.log(50)))
        assert voxels == round(load / ML)
        found.append(voxels * ML)
    assert 0.49 < min(found) < 1
    assert 25 < max(found) < 50.1


def test_more_volume_means_more_and_larger_lesions(anatomies: list[Anatomy]) -> None:
    volumes = loads(anatomies)
    parts = [ndimage.label(anatomy.label) for anatomy in anatomies]
    numbers = [number for _, number in parts]
    largest = [np.bincount(labelled.ravel())[1:].max() * ML for labelled, _ in parts]
    assert min(numbers) >= 4
    assert np.corrcoef(np.log(volumes), np.log(numbers))[0, 1] > 0.5
    assert np.corrcoef(np.log(volumes), np.log(largest))[0, 1] > 0.7
    for labelled, _ in parts:  # of varied size
        sizes = np.bincount(labelled.ravel())[1:]
        assert sizes.max() >= 4 * sizes.min()


def test_lesions_lie_in_white_matter_and_mostly_near_the_ventricles(
    drawn: list[tuple[Head, Anatomy]],
) -> None:
    near, everywhere = [], []
    for head, anatomy in drawn:
        lesion, white = anatomy.label > 0, head.white > 0.5
        assert not (lesion & ~white).any()
        assert not (lesion & ~ndimage.binary_erosion(anatomy.brain)).any()
        distance = ndimage.distance_transform_edt(head.ventricles <= 0, sampling=KIND.grid.spacing)
        near.append((distance[lesion] < 10).mean())
        everywhere.append((distance[white & anatomy.brain] < 10).mean())
    assert np.mean(near) > 2 * np.mean(everywhere)
    assert np.mean(near) > 0.4


def test_the_label_is_where_lesions_fill_most_of_a_voxel(anatomies: list[Anatomy]) -> None:
    for anatomy in anatomies:
        share = anatomy.shares[KIND.tissues.index("lesion")]
        assert np.array_equal(share > 0.5, anatomy.label > 0)
        assert anatomy.shares.sum(axis=0)[anatomy.brain] == pytest.approx(1, abs=1e-5)


def test_lesions_are_bright_in_flair_and_dark_in_t1(made: list[Phantom], anatomies: list[Anatomy]) -> None:
    for phantom, anatomy in zip(made, anatomies, strict=True):
        white = anatomy.shares[KIND.tissues.index("white matter")] > 0.95
        t1, flair = (
            float(channel[anatomy.label > 0].mean() / channel[white].mean()) for channel in phantom.image
        )
        assert 0.6 < t1 < 0.9
        assert 1.15 < flair < 1.6


def test_no_threshold_finds_all_lesions_and_nothing_else(made: list[Phantom]) -> None:
    best = []
    for phantom in made:
        flair, lesion = phantom.image[KIND.modalities.index("FLAIR")], phantom.label > 0
        found = [flair > level for level in np.percentile(flair[flair > 0], np.linspace(70, 99.9, 60))]
        best.append(max(2 * (mask & lesion).sum() / (mask.sum() + lesion.sum()) for mask in found))
    assert 0.1 < np.mean(best) < 0.8
    assert max(best) < 0.95


def test_contrasts_are_in_order_at_every_site() -> None:
    for seed in range(20):
        site = draw_scanner(generator(seed), KIND)
        of = dict(zip(KIND.tissues, site.contrast, strict=True))
        t1, flair = ({tissue: values[channel] for tissue, values in of.items()} for channel in (0, 1))
        assert t1["white matter"] > max(t1["lesion"], t1["grey matter"]) > t1["fluid"]
        assert flair["lesion"] > flair["grey matter"] > flair["white matter"] > flair["fluid"]
        assert 0.6 <= site.blur <= 1.6


@pytest.mark.parametrize("name", ["phantom-lesions", "wmh"])
def test_what_is_written_can_be_used(name: str, tmp_path: Path) -> None:
    task = load_task(name)
    write_phantoms(tmp_path, ["north"], 2, 0, lambda *_: None, kind=KIND)
    cases = find_cases(tmp_path, task).cases
    assert [case.id for case in cases] == ["north_000", "north_001"]
    assert all(inspect_case(case, task).is_usable for case in cases)
    if name == "phantom-lesions":
        for files in cases:
            case = preprocess(files, task)
            assert case.image.shape == (2, *task.size)
            assert files.label is not None
            # Nothing is resampled, and no lesion is cut off.
            assert np.count_nonzero(case.label) == np.count_nonzero(read_volume(files.label).data)
