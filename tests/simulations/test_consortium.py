import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from fedqc_simulations.consortium import (
    as_file,
    build_consortium,
    fitted_to,
    read_candidates,
    read_label,
    read_references,
)
from fedqc_simulations.noise import LARGEST_DSC, Noise
from numpy.typing import NDArray

from fedqc.cases.layouts import CaseFiles, find_cases, read_ids
from fedqc.cases.validation import inspect_case
from fedqc.cases.volumes import read_volume
from fedqc.config import ComputeConfig, load_site
from fedqc.degradation.samples import LabelFactory, Recipe
from fedqc.errors import ConfigError
from fedqc.metrics.overlap import overlap
from fedqc.task import Task, load_task

NAMES = ("hospital-1", "hospital-2")
MakeCases = Callable[..., list[CaseFiles]]
Build = Callable[..., dict[str, Path]]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def build(out: Path, task: Task) -> Build:
    def build(
        cases: list[CaseFiles],
        *,
        seed: int = 0,
        noise: Noise = "mixed",
        names: tuple[str, ...] = NAMES,
        to: Path = out,
    ) -> dict[str, Path]:
        return build_consortium(
            cases,
            task,
            to,
            names=names,
            seed=seed,
            noise=noise,
            min_count=3,
            compute=ComputeConfig(device="cpu", precision="fp32"),
            progress=lambda *_: None,
        )

    return build


def site_cases(out: Path, name: str, task: Task) -> tuple[list[CaseFiles], frozenset[str]]:
    data = out / "sites" / name / "data"
    return list(find_cases(data, task, "csv").cases), read_ids(data / "reference.csv")


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load(path: Path | None) -> nibabel.Nifti1Image:
    assert path is not None
    image = nibabel.load(path)
    assert isinstance(image, nibabel.Nifti1Image)
    return image


def stored_classes(case: CaseFiles) -> NDArray[np.uint8]:
    """A label's class indices, right, anterior, superior, read with nibabel alone."""
    image = nibabel.as_closest_canonical(load(case.label))
    table = np.zeros(6, dtype=np.uint8)
    table[3], table[1], table[5] = 1, 2, 2
    classes: NDArray[np.uint8] = table[np.asanyarray(image.dataobj).astype(int)]
    return classes


# ---------------------------------------------------------------------------------------------- who is where


def test_patients_are_split_over_sites_and_roles_and_nobody_is_in_two(
    make_cases: MakeCases, build: Build, out: Path, task: Task
) -> None:
    cases = make_cases(40)
    patient_of = {case.id: case.patient for case in cases}
    build(cases)
    places: dict[str, set[str]] = {}
    test = [case.id for case in find_cases(out / "truth" / "test", task, "csv").cases]
    places["test"] = set(test)
    counts = []
    for name in NAMES:
        there, references = site_cases(out, name, task)
        assert references <= {case.id for case in there}
        assert all(case.patient == patient_of[case.id] for case in there)
        places[f"{name} references"] = set(references)
        places[f"{name} candidates"] = {case.id for case in there} - references
        counts.append(
            [len({patient_of[i] for i in places[f"{name} {role}"]}) for role in ("references", "candidates")]
        )
    assert counts == [[7, 10], [7, 10]]  # of 20 patients each: 0.35, and what 0.35 and 0.15 leave
    assert len({patient_of[case] for case in test}) == 6
    assert sorted(case for place in places.values() for case in place) == sorted(patient_of)
    owners = [patient for place in places.values() for patient in {patient_of[case] for case in place}]
    assert len(owners) == len(set(owners)) == 40  # both cases of the first patient are in one place
    candidates = {(one.site, one.id) for one in read_candidates(out)}
    assert candidates == {(name, case) for name in NAMES for case in places[f"{name} candidates"]}


def test_the_fewest_patients_still_fill_every_role(
    make_cases: MakeCases, build: Build, out: Path, task: Task
) -> None:
    build(make_cases(8))
    for name in NAMES:
        there, references = site_cases(out, name, task)
        assert len(references) >= 2
        assert len(there) > len(references)
    assert len(find_cases(out / "truth" / "test", task, "csv").cases) >= 2


def test_too_few_patients(make_cases: MakeCases, build: Build, out: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"2 sites need 8 patients .* the data have 7; use --sites 1 or fewer"
    ):
        build(make_cases(7))
    assert not out.exists()


def test_one_seed_one_consortium(make_cases: MakeCases, build: Build, tmp_path: Path) -> None:
    cases = make_cases(16)
    folders = [tmp_path / name for name in ("first", "again", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        build(cases, seed=seed, to=folder)
    truths = [(folder / "truth" / "candidates.csv").read_text() for folder in folders]
    recipes = [(folder / "truth" / "recipes.json").read_text() for folder in folders]
    assert truths[0] != truths[2]
    assert recipes[0] != recipes[2]
    first, again, other = (contents(folder) for folder in folders)
    assert set(first) == set(again)
    # gzip notes the time, so spoiled labels are compared by what they hold.
    files = [name for name in first if first[name] != again[name]]
    assert all(name.endswith(".nii.gz") for name in files)
    for name in files:
        one, two = (read_volume(folder / name).data for folder in folders[:2])
        np.testing.assert_array_equal(one, two)
    assert first != other


# ------------------------------------------------------------------------------------- what a site is given


def test_a_site_has_copies_and_all_that_it_needs_to_run(
    make_cases: MakeCases, build: Build, out: Path, task: Task, tmp_path: Path
) -> None:
    cases = {case.id: case for case in make_cases(12)}
    before = contents(tmp_path / "data")
    sites = build(list(cases.values()))
    assert list(sites) == list(NAMES)
    assert contents(tmp_path / "data") == before
    spoiled = {one.id for one in read_candidates(out) if one.kind != "untouched"}
    for name, path in sites.items():
        site = load_site(path)
        assert (site.name, site.policy.min_count, site.compute.precision) == (name, 3, "fp32")
        assert load_task(site.task) == task
        assert site.results == out / "sites" / name
        assert site.data.path == out / "sites" / name / "data"
        there = find_cases(site.data.path, task, site.data.layout).cases
        assert all(inspect_case(case, task).is_usable for case in there)
        assert not any(file.is_symlink() or file.stat().st_nlink > 1 for file in path.parent.rglob("*.nii*"))
        for case in there:
            original = cases[case.id]
            (image, label), (original_image, original_label) = case.files, original.files
            assert image.read_bytes() == original_image.read_bytes()
            is_same = label.read_bytes() == original_label.read_bytes()
            assert is_same == (case.id not in spoiled)
        text = " ".join(
            file.read_text() for file in path.parent.rglob("*") if file.suffix in {".csv", ".toml"}
        )
        assert "untouched" not in text  # nothing says which label is spoiled
        assert "dsc" not in text


def test_a_4d_image_becomes_a_file_a_modality(
    make_cases: MakeCases, out: Path, task: Task, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = task.model_copy(update={"modalities": ("T1", "T2")})
    cases = []
    for case in make_cases(4):
        single = case.files[0]
        image = load(single)
        data = np.asanyarray(image.dataobj)
        path = single.with_name(f"4d-{single.name}")
        nibabel.save(nibabel.Nifti1Image(np.stack([data, -data], axis=-1), image.affine), path)
        cases.append(CaseFiles(case.id, case.patient, (path,), case.label))
    build_consortium(
        cases,
        both,
        out,
        names=("one",),
        seed=0,
        noise="none",
        min_count=1,
        compute=ComputeConfig(),
        progress=lambda *_: None,
    )
    there, _ = site_cases(out, "one", both)
    originals = {case.id: case for case in cases}
    for case in there:
        stored = read_volume(originals[case.id].files[0])
        assert len(case.images) == 2
        for channel, path in enumerate(case.files[:2]):
            volume = read_volume(path)
            np.testing.assert_array_equal(volume.data, stored.data[..., channel])
            np.testing.assert_allclose(volume.affine, stored.affine)


# ------------------------------------------------------------------------------------------------- the noise


def test_spoiled_labels_are_what_the_truth_says(
    make_cases: MakeCases, build: Build, out: Path, task: Task
) -> None:
    originals = {case.id: case for case in make_cases(40)}
    build(list(originals.values()))
    candidates = read_candidates(out)
    recipes = json.loads((out / "truth" / "recipes.json").read_text())
    spoiled = [one for one in candidates if one.kind != "untouched"]
    assert {f"{one.site}/{one.id}" for one in spoiled} == set(recipes)
    by_site = [[one for one in candidates if one.site == name] for name in NAMES]
    for ones in by_site:
        bad = sum(one.kind != "untouched" for one in ones)
        assert bad == round(0.35 * len(ones))
    assert len({one.kind for one in spoiled}) >= 4
    orientations = set()
    for one in candidates:
        there, _ = site_cases(out, one.site, task)
        case = next(case for case in there if case.id == one.id)
        before, after = stored_classes(originals[one.id]), stored_classes(case)
        truth = overlap(torch.from_numpy(after)[None], torch.from_numpy(before)[None], task.region_indices())
        assert one.dsc == pytest.approx(truth.mean.item())
        assert case.label is not None
        if one.kind == "untouched":
            assert one.dsc == 1
            continue
        assert one.dsc <= LARGEST_DSC
        assert after.any()
        stored, original = load(case.label), load(originals[one.id].label)
        assert stored.shape == original.shape
        np.testing.assert_allclose(stored.affine, original.affine)
        orientations.add(nibabel.aff2axcodes(stored.affine))
        recipe = recipes[f"{one.site}/{one.id}"]
        assert recipe["kind"] == one.kind
        donor = originals[recipe["donor"]] if "donor" in recipe else originals[one.id]
        assert ("donor" in recipe) == (one.kind == "another-patient")
        labels = [before, fitted_to(stored_classes(donor), before.shape)]
        again = LabelFactory(labels, task.region_indices()).make([Recipe(0, one.kind, recipe["params"])])
        np.testing.assert_array_equal(again.label[0].numpy(), after)
    assert len(orientations) == 3


def test_another_patients_label_replays_with_its_donor(
    make_cases: MakeCases, build: Build, out: Path, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedqc_simulations.consortium.deal_kinds", lambda ids, _: dict.fromkeys(ids, ("another-patient",))
    )
    originals = {case.id: case for case in make_cases(16)}
    build(list(originals.values()))
    recipes = json.loads((out / "truth" / "recipes.json").read_text())
    assert recipes
    for key, recipe in recipes.items():
        name, _, case_id = key.partition("/")
        there, references = site_cases(out, name, task)
        after = stored_classes(next(case for case in there if case.id == case_id))
        np.testing.assert_array_equal(after, stored_classes(originals[recipe["donor"]]))
        assert originals[recipe["donor"]].patient != originals[case_id].patient
        assert recipe["donor"] in {case.id for case in there} | references  # no site sees another's labels


def test_systematic_noise_is_one_habit_at_half_of_the_sites(
    make_cases: MakeCases, build: Build, out: Path
) -> None:
    names = ("a", "b", "c", "d")
    build(make_cases(48), noise="systematic", names=names)
    candidates = read_candidates(out)
    recipes = json.loads((out / "truth" / "recipes.json").read_text())
    kinds = {name: {one.kind for one in candidates if one.site == name} for name in names}
    assert kinds["a"] == {"untouched", "swapped-classes"}
    assert kinds["b"] == {"untouched", "over-contouring"}
    assert kinds["c"] == kinds["d"] == {"untouched"}
    for name in ("a", "b"):
        ones = [one for one in candidates if one.site == name]
        bad = [one for one in ones if one.kind != "untouched"]
        assert len(bad) == round(0.8 * len(ones))
        params = [recipes[f"{name}/{one.id}"]["params"] for one in bad]
        assert all(p == params[0] for p in params)  # the same every time
        assert all(one.dsc <= LARGEST_DSC for one in bad)


@pytest.mark.parametrize("seed", range(3))
def test_spoiled_references_are_one_habit_at_one_site(
    seed: int, make_cases: MakeCases, build: Build, out: Path
) -> None:
    names = ("a", "b", "c", "d")
    build(make_cases(48), noise="systematic-reference", names=names, seed=seed)
    everything = [*read_candidates(out), *read_references(out)]
    assert len({one.site for one in everything if one.kind != "untouched"}) == 1
    recipes = json.loads((out / "truth" / "recipes.json").read_text())
    params = [recipe["params"] for recipe in recipes.values()]
    assert all(one == params[0] for one in params)
    site = next(one.site for one in everything if one.kind != "untouched")
    for known in (read_candidates(out), read_references(out)):
        of_site = [one for one in known if one.site == site]
        assert sum(one.kind != "untouched" for one in of_site) == round(0.8 * len(of_site))
    spoiled = next(one for one in read_references(out) if one.kind != "untouched")
    assert f"{site}/{spoiled.id}" in recipes


def test_which_site_has_the_habit_is_drawn(make_cases: MakeCases, build: Build, tmp_path: Path) -> None:
    cases, names = make_cases(16), ("a", "b", "c", "d")
    found = set()
    for seed in range(6):
        build(cases, noise="systematic-reference", names=names, seed=seed, to=tmp_path / str(seed))
        spoiled = [one for one in read_references(tmp_path / str(seed)) if one.kind != "untouched"]
        found.add((spoiled[0].site, spoiled[0].kind))
    assert len({site for site, _ in found}) > 1
    assert len({kind for _, kind in found}) > 1


def test_cases_stay_at_home(make_cases: MakeCases, out: Path, task: Task) -> None:
    cases = make_cases(12)
    build_consortium(
        cases,
        task,
        out,
        names=("even", "odd"),
        seed=0,
        noise="none",
        min_count=1,
        compute=ComputeConfig(),
        progress=lambda *_: None,
        home=lambda case: "even" if int(case.removeprefix("case-")) % 2 == 0 or case == "case-1" else "odd",
    )
    there, _ = site_cases(out, "odd", task)
    assert there
    assert all(int(case.id.removeprefix("case-")) % 2 for case in there)


def test_no_noise(make_cases: MakeCases, build: Build, out: Path) -> None:
    build(make_cases(8), noise="none")
    assert {(one.kind, one.dsc) for one in read_candidates(out)} == {("untouched", 1.0)}
    assert json.loads((out / "truth" / "recipes.json").read_text()) == {}


# ---------------------------------------------------------------------------------------------------- labels


def test_labels_of_any_orientation_come_back_into_their_files(make_cases: MakeCases, task: Task) -> None:
    cases = make_cases(3)
    codes = {nibabel.aff2axcodes(load(case.label).affine) for case in cases}
    assert codes == {("R", "A", "S"), ("L", "P", "S"), ("P", "S", "R")}
    for case in cases:
        classes = read_label(case, task)
        np.testing.assert_array_equal(classes, stored_classes(case))
        values, affine = as_file(case, classes, task)
        assert case.label is not None
        original = load(case.label)
        np.testing.assert_allclose(affine, original.affine)
        # Value 5 means the second class too, which is written with its first value.
        expected = np.where(np.asanyarray(original.dataobj) == 5, 1, np.asanyarray(original.dataobj))
        np.testing.assert_array_equal(values, expected)
        marked = classes.copy()
        marked[0, 1, 2] = 1  # a corner: right, anterior, superior of nothing else
        values, _ = as_file(case, marked, task)
        index = np.argwhere(values != expected)
        millimetres = nibabel.affines.apply_affine(affine, index[0])
        canonical = nibabel.as_closest_canonical(original)
        np.testing.assert_allclose(millimetres, nibabel.affines.apply_affine(canonical.affine, [0, 1, 2]))


def test_fitting_crops_and_pads_about_the_centre() -> None:
    label = np.arange(1, 6, dtype=np.uint8)[:, None, None]
    assert fitted_to(label, (3, 1, 1)).ravel().tolist() == [2, 3, 4]
    assert fitted_to(label, (9, 1, 1)).ravel().tolist() == [0, 0, 1, 2, 3, 4, 5, 0, 0]
    assert fitted_to(label, (5, 3, 1))[:, 1, 0].tolist() == [1, 2, 3, 4, 5]
    assert fitted_to(label, (5, 3, 1)).sum() == 15
