import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier

from fedqc.cases.volumes import Case
from fedqc.errors import TrainingError
from fedqc.label_sources import forest as forest_module
from fedqc.label_sources.folds import folds_of
from fedqc.label_sources.forest import (
    Forest,
    ForestSettings,
    body,
    draw_voxels,
    features,
    make_forest_labels,
    train_forest,
)
from fedqc.label_sources.store import LabelStore

MakeCase = Callable[..., Case]
SHAPE = (16, 18, 14)
REGIONS = ((1,), (2,))
SETTINGS = ForestSettings(trees=8, depths=(1, 2, 4, 8, 40), voxels=3000)


@pytest.fixture
def easy(make_case: MakeCase) -> list[Case]:
    """Six cases with two balls, one brighter than the other, in noise, and a margin outside of the body."""
    grid = np.indices(SHAPE, dtype=np.float32)
    cases = []
    for number in range(6):
        rng = np.random.default_rng(number)
        label = np.zeros(SHAPE, dtype=np.uint8)
        for index, centre in ((1, (5, 9, 7)), (2, (10, 9, 7))):
            middle = np.reshape(centre + rng.uniform(-1, 1, 3), (3, 1, 1, 1))
            label[((grid - middle) ** 2).sum(axis=0) < 3**2] = index
        image = (1.5 * label + rng.standard_normal(SHAPE))[None].astype(np.float32)
        image[:, :2] = 0
        image[:, :, -1] = 0
        cases.append(make_case(f"case-{number}", label, image))
    return cases


@pytest.fixture
def forest(easy: list[Case]) -> Forest:
    return train_forest(easy[:4], SETTINGS, 0)


def dice(label: NDArray[np.uint8], reference: NDArray[np.uint8], index: int) -> float:
    a, b = label == index, reference == index
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def labels_of(forest: Forest, case: Case) -> list[NDArray[np.uint8]]:
    return [label for _, label in forest.segment(case)]


# ------------------------------------------------------------------------------------------------ features


def test_features_of_two_modalities(make_case: MakeCase) -> None:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, 9, 8, 7)).astype(np.float32)
    image[:, :, 5:] = 0
    image[0, 3] = image[1, 6] = 0  # still in the body: the other modality is there
    case = make_case(image=image, label=np.zeros((9, 8, 7), dtype=np.uint8))
    rows = features(case)
    assert rows.dtype == np.float32
    assert rows.shape == (9 * 5 * 7, 2 * 5 + 3)
    x, y, z = np.nonzero(body(case))
    assert np.array_equal(rows[:, 0], image[0, x, y, z])
    assert np.array_equal(rows[:, 5], image[1, x, y, z])
    # The place in the body's box, which is 9 x 5 x 7.
    np.testing.assert_allclose(rows[:, 10:], np.stack([x / 8, y / 4, z / 6], axis=1), rtol=1e-6)
    # More smoothing leaves less spread.
    assert rows[:, 0].std() > rows[:, 1].std() > rows[:, 3].std()


@pytest.mark.parametrize(("scale", "column"), [(1, 1), (3, 3)])
def test_smoothing_is_gaussian(make_case: MakeCase, scale: int, column: int) -> None:
    image = np.full((1, 41, 41, 41), 1e-20, dtype=np.float32)  # a body without intensity but in its middle
    image[0, 20, 20, 20] = 1
    volume = features(make_case(image=image, label=np.zeros((41, 41, 41), dtype=np.uint8)))
    smooth = volume[:, column].reshape(41, 41, 41)
    kernel = np.exp(-(np.arange(-20, 21) ** 2) / (2 * scale**2))
    kernel /= kernel.sum()
    expected = kernel[:, None, None] * kernel[None, :, None] * kernel[None, None, :]
    np.testing.assert_allclose(smooth, expected, atol=2e-4 * expected.max())


def test_gradient_of_a_ramp(make_case: MakeCase) -> None:
    x, y, z = np.indices((20, 20, 20), dtype=np.float32)
    image = (3 * x - 4 * y + 12 * z + 100)[None]  # nowhere 0, and |(3, -4, 12)| = 13
    rows = features(make_case(image=image, label=np.zeros((20, 20, 20), dtype=np.uint8)))
    inner = rows[:, 2].reshape(20, 20, 20)[6:-6, 6:-6, 6:-6]  # where no edge is smoothed in
    np.testing.assert_allclose(inner, 13, rtol=1e-4)


def test_a_body_one_voxel_thick_and_none(make_case: MakeCase) -> None:
    image = np.zeros((1, 8, 10, 6), dtype=np.float32)
    case = make_case(image=image)
    assert features(case).shape == (0, 8)
    image[0, 4, 2:5, 3] = 1
    assert np.array_equal(features(case)[:, 5:], [[0.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 1.0, 0.0]])


# ----------------------------------------------------------------------------------------- training voxels


def voxel_case(make_case: MakeCase, name: str, counts: Sequence[int], outside: int = 0) -> Case:
    """A case with so many voxels of each class in its body, each with an intensity of its own."""
    label = np.zeros((10, 10, 10), dtype=np.uint8).reshape(-1)
    label[: sum(counts)] = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)
    image = np.zeros(1000, dtype=np.float32)
    image[: sum(counts)] = np.arange(1, sum(counts) + 1)
    label[1000 - outside :] = 1
    return make_case(name, label.reshape(10, 10, 10), image.reshape(1, 10, 10, 10))


def test_as_many_voxels_of_each_class_as_there_are(make_case: MakeCase) -> None:
    cases = [
        voxel_case(make_case, "first", (500, 30, 60), outside=50),  # which are not drawn from
        voxel_case(make_case, "second", (300, 0, 120)),
        voxel_case(make_case, "third", (200, 10, 0)),
    ]
    drawn = draw_voxels(cases, 300, np.random.default_rng(0))
    # 40 voxels of class 1 are all there are; the 260 others are shared by the other two.
    assert Counter(drawn.classes.tolist()) == {0: 130, 1: 40, 2: 130}
    assert drawn.counts[:4].tolist() == [1000, 40, 180, 0]
    for index, count in ((0, 1000), (1, 40), (2, 180)):  # what was drawn stands for all
        assert drawn.weights[drawn.classes == index].sum() == pytest.approx(count)
        assert len(set(drawn.weights[drawn.classes == index])) == 1
    # Each case gives its part: of class 0 it has 500, 300 and 200, of class 2 60, 120 and 0.
    first, second, third = 0, 65 + 30 + 43, 65 + 30 + 43 + 39 + 87
    parts = [Counter(drawn.classes[part].tolist()) for part in (slice(first, second), slice(second, third))]
    assert parts == [{0: 65, 1: 30, 2: 43}, {0: 39, 2: 87}]
    # Every voxel stands beside its own class, and none comes twice.
    for case, part in zip(
        cases, (slice(first, second), slice(second, third), slice(third, 300)), strict=True
    ):
        intensities = drawn.features[part, 0]
        assert len(set(intensities.tolist())) == len(intensities)
        assert np.array_equal(case.label.reshape(-1)[intensities.astype(int) - 1], drawn.classes[part])


@pytest.mark.parametrize("voxels", [1, 7, 100, 1219, 1220, 10**9])
def test_never_more_voxels_than_asked_for(make_case: MakeCase, voxels: int) -> None:
    cases = [
        voxel_case(make_case, "first", (500, 30, 60)),
        voxel_case(make_case, "second", (500, 10, 120)),
        make_case("nothing", image=np.zeros((1, 8, 10, 6), dtype=np.float32)),
    ]
    drawn = draw_voxels(cases, voxels, np.random.default_rng(0))
    assert len(drawn.features) == len(drawn.classes) == len(drawn.weights) == min(voxels, 1220)
    assert np.isfinite(drawn.weights).all()


def test_counts_that_no_32_bits_hold(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forest_module, "_classes", lambda label: np.bincount(label, minlength=256) * 10**7)
    case = voxel_case(make_case, "large", (500, 300))
    drawn = draw_voxels([case, case], 200, np.random.default_rng(0))
    assert Counter(drawn.classes.tolist()) == {0: 100, 1: 100}


def test_which_voxels_are_drawn_depends_on_the_generator_alone(easy: list[Case]) -> None:
    first, again, other = (draw_voxels(easy, 500, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first.features, again.features)
    assert not np.array_equal(first.features, other.features)


def test_no_body_to_learn_from(make_case: MakeCase) -> None:
    case = make_case(image=np.zeros((1, 8, 10, 6), dtype=np.float32))
    with pytest.raises(TrainingError, match="all 2 cases to train a forest on are 0 everywhere"):
        draw_voxels([case, case], 100, np.random.default_rng(0))


# ---------------------------------------------------------------------------------------------- truncation


def test_each_depth_is_where_the_paths_are_after_that_many_splits(forest: Forest, easy: list[Case]) -> None:
    case = easy[5]
    rows = features(case)
    inside = body(case)
    in_training = np.concatenate([one.label[body(one)] for one in easy[:4]])
    frequency = np.bincount(in_training) / len(in_training)
    votes = np.zeros((len(SETTINGS.depths), len(rows), 3))
    for one in forest.classifier.estimators_:
        paths = one.decision_path(rows)
        for row in range(len(rows)):
            path = sorted(paths.indices[paths.indptr[row] : paths.indptr[row + 1]])  # a child comes later
            for position, depth in enumerate(SETTINGS.depths):
                shares = one.tree_.value[path[min(depth, len(path) - 1)], 0] / frequency
                votes[position, row] += shares / shares.sum()
    for label, expected in zip(labels_of(forest, case), votes, strict=True):
        ordered = np.sort(expected, axis=1)
        clear = ordered[:, -1] - ordered[:, -2] > 1e-4  # rounding may decide a tie
        assert clear.mean() > 0.99
        assert np.array_equal(label[inside][clear], expected.argmax(axis=1)[clear])


def test_beyond_its_own_depth_a_forest_answers_as_a_whole(forest: Forest, easy: list[Case]) -> None:
    depth = max(one.get_depth() for one in forest.classifier.estimators_)
    assert 8 < depth < 40
    for case in easy:
        predicted = forest.classifier.predict(features(case))
        labels = labels_of(forest, case)
        assert np.array_equal(labels[-1][body(case)], predicted)
        assert not np.array_equal(labels[-2][body(case)], predicted)


def test_votes_count_relative_to_how_frequent_a_class_is() -> None:
    # 90 of 96 voxels of the first class on one side, 6 and all 4 of the second on the other.
    classes = np.repeat([0, 0, 1], [90, 6, 4])
    side = np.repeat([0.0, 1.0, 1.0], [90, 6, 4])[:, None]
    classifier = RandomForestClassifier(n_estimators=1, bootstrap=False).fit(side, classes)
    tree = forest_module._tree(classifier.estimators_[0].tree_, (0, 1, 2), np.array([96, 4]))
    share = (6 / 96) / (6 / 96 + 4 / 4)
    np.testing.assert_allclose(tree.votes, np.array([[0.5, 0.5], [1, 0], [share, 1 - share]]), rtol=1e-6)
    assert tree.ancestors.tolist() == [[0, 0, 0], [0, 1, 1], [0, 2, 2]]


def test_a_forest_learns_how_frequent_the_classes_are(easy: list[Case]) -> None:
    forest = train_forest(easy[:4], replace(SETTINGS, trees=30, voxels=900), 0)
    in_training = np.concatenate([case.label[body(case)] for case in easy[:4]])
    roots = [one.tree_.value[0, 0] for one in forest.classifier.estimators_]  # 300 voxels of each class
    np.testing.assert_allclose(np.mean(roots, axis=0), np.bincount(in_training) / len(in_training), atol=0.01)


def test_dsc_rises_with_the_depth(easy: list[Case]) -> None:
    forest = train_forest(easy[:4], replace(SETTINGS, depths=(1, 3, 6, 20)), 0)
    dsc = np.mean(
        [
            [dice(label, case.label, 1) + dice(label, case.label, 2) for label in labels_of(forest, case)]
            for case in easy[4:]
        ],
        axis=0,
    )
    dsc /= 2
    assert np.array_equal(dsc, np.sort(dsc))
    assert dsc[0] < 0.65
    assert dsc[-1] > 0.8


def test_what_is_outside_of_the_body_is_background(forest: Forest, easy: list[Case]) -> None:
    for case in easy:
        for label in labels_of(forest, case):
            assert label.shape == SHAPE
            assert label.dtype == np.uint8
            assert label.any()
            assert not label[~body(case)].any()
    empty = replace(easy[0], image=np.zeros_like(easy[0].image))
    assert len(labels_of(forest, empty)) == len(SETTINGS.depths)
    assert not np.any(labels_of(forest, empty))


def test_classes_keep_their_indices(easy: list[Case]) -> None:
    renamed = {0: 0, 1: 7, 2: 200}
    cases = [replace(case, label=np.vectorize(renamed.get, otypes="B")(case.label)) for case in easy]
    before, after = (train_forest(some[:4], SETTINGS, 0) for some in (easy, cases))
    for label, other in zip(labels_of(before, easy[5]), labels_of(after, cases[5]), strict=True):
        assert np.array_equal(np.vectorize(renamed.get, otypes="B")(label), other)


def test_a_site_with_background_alone(easy: list[Case]) -> None:
    cases = [replace(case, label=np.zeros_like(case.label)) for case in easy]
    assert not np.any(labels_of(train_forest(cases, SETTINGS, 0), cases[0]))


# ----------------------------------------------------------------------------------------- the same twice


def test_one_seed_one_forest(forest: Forest, easy: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    np.random.seed(7)  # noqa: NPY002 - the global generator, which must not matter
    again = train_forest(easy[:4], SETTINGS, 0)
    other = train_forest(easy[:4], SETTINGS, 1)
    threaded = functools.partial(RandomForestClassifier, n_jobs=2)
    monkeypatch.setattr("sklearn.ensemble.RandomForestClassifier", threaded)
    in_threads = train_forest(easy[:4], SETTINGS, 0)
    assert in_threads.classifier.n_jobs == 2
    expected = labels_of(forest, easy[5])
    assert np.array_equal(labels_of(again, easy[5]), expected)
    assert np.array_equal(labels_of(in_threads, easy[5]), expected)
    assert not np.array_equal(labels_of(other, easy[5]), expected)


def test_a_few_voxels_at_a_time(forest: Forest, easy: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = labels_of(forest, easy[5])
    sizes: list[int] = []
    votes = Forest._votes

    def counted(self: Forest, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        sizes.append(len(rows))
        return votes(self, rows)

    monkeypatch.setattr(Forest, "_votes", counted)
    monkeypatch.setattr(forest_module, "_VOXELS_AT_ONCE", 500)
    assert np.array_equal(labels_of(forest, easy[5]), expected)
    n_voxels = int(body(easy[5]).sum())
    assert sizes == [500] * (n_voxels // 500) + [n_voxels % 500]


# -------------------------------------------------------------------------------------- make_forest_labels


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    return LabelStore(tmp_path, "forest", asdict(SETTINGS))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Patients that each forest was trained on, in order."""
    patients: list[set[str]] = []

    def spied(cases: Sequence[Case], settings: ForestSettings, seed: int) -> Forest:
        patients.append({case.patient for case in cases})
        return train_forest(cases, settings, seed)

    monkeypatch.setattr(forest_module, "train_forest", spied)
    return patients


def stored(store: LabelStore, cases: Sequence[Case]) -> list[list[tuple[Any, NDArray[np.uint8]]]]:
    return [[(one.recipe, store.read(case, i)) for i, one in enumerate(store.of(case))] for case in cases]


def same(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return all(
        a[0] == b[0] and np.array_equal(a[1], b[1])
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_every_case_gets_a_label_at_each_depth_from_the_other_folds(
    easy: list[Case], store: LabelStore, trained: list[set[str]]
) -> None:
    settings = replace(SETTINGS, folds=3)
    calls: list[tuple[int, int]] = []
    make_forest_labels(easy, store, REGIONS, settings, 5, progress=lambda *call: calls.append(call))
    assert calls == [(done, 6) for done in range(1, 7)]
    fold_of = folds_of([case.patient for case in easy], 5, 3)
    seeds = set()
    for case in easy:
        found = store.of(case)
        assert [one.recipe["depth"] for one in found] == list(settings.depths)
        assert {one.recipe["segmenter"] for one in found} == {"random-forest"}
        assert {one.recipe["fold"] for one in found} == {fold_of[case.patient]}
        assert case.patient not in trained[fold_of[case.patient]]
        assert len(trained[fold_of[case.patient]]) == 4
        for index, one in enumerate(found):
            expected = [dice(store.read(case, index), case.label, region) for region in (1, 2)]
            assert one.dsc == pytest.approx(expected)
        seeds.add(found[0].recipe["seed"])
    assert len(seeds) == len(trained) == 3


def test_no_forest_saw_the_patient_whose_case_it_segments(make_case: MakeCase, store: LabelStore) -> None:
    """Labels that images do not explain: only what was learned by heart is found again."""
    cases = []
    for number in range(4):
        rng = np.random.default_rng(number)
        label = rng.integers(0, 3, SHAPE).astype(np.uint8)
        image = rng.standard_normal((1, *SHAPE)).astype(np.float32)
        cases += [make_case(f"case-{number}{visit}", label, image, f"patient-{number}") for visit in "ab"]
    settings = replace(SETTINGS, voxels=50_000)
    by_heart = labels_of(train_forest(cases, settings, 0), cases[0])[-1]
    assert dice(by_heart, cases[0].label, 1) > 0.9
    make_forest_labels(cases, store, REGIONS, settings, 0)
    assert max(store.of(case)[-1].mean for case in cases) < 0.45


def test_what_was_cut_off_goes_on(
    easy: list[Case], store: LabelStore, tmp_path: Path, trained: list[set[str]]
) -> None:
    whole = LabelStore(tmp_path, "forest", {"run": "not cut off"})
    make_forest_labels(easy, whole, REGIONS, SETTINGS, 0)
    assert len(trained) == 2

    class CutOffError(Exception):
        pass

    def cut_off(done: int, total: int) -> None:
        if done == 4:  # three cases of the first fold, one of the second
            raise CutOffError

    with pytest.raises(CutOffError):
        make_forest_labels(easy, store, REGIONS, SETTINGS, 0, progress=cut_off)
    before = {case.id for case in easy if store.of(case)}
    assert len(before) == 4
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.labels")}
    trained.clear()
    calls: list[tuple[int, int]] = []
    make_forest_labels(easy, store, REGIONS, SETTINGS, 0, progress=lambda *call: calls.append(call))
    assert len(trained) == 1  # the second fold's forest again, not the first's
    assert calls == [(5, 6), (6, 6)]
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.labels")}.items()
    assert same(stored(store, easy), stored(whole, easy))
    trained.clear()
    make_forest_labels(easy, store, REGIONS, SETTINGS, 0)
    assert trained == []


@pytest.mark.parametrize("change", ["corrected", "gone", "of another patient"])
def test_labels_are_those_of_forests_that_learned_from_the_present_cases(
    easy: list[Case], store: LabelStore, tmp_path: Path, trained: list[set[str]], change: str
) -> None:
    make_forest_labels(easy, store, REGIONS, SETTINGS, 0)
    changed = {
        "corrected": [replace(easy[0], label=np.roll(easy[0].label, 1, axis=0)), *easy[1:]],
        "gone": easy[1:],
        "of another patient": [replace(easy[0], patient="somebody"), *easy[1:]],
    }[change]
    before = stored(store, easy[1:])
    trained.clear()
    make_forest_labels(changed, store, REGIONS, SETTINGS, 0)
    assert trained
    anew = LabelStore(tmp_path, "forest", {"run": "the first"})
    make_forest_labels(changed, anew, REGIONS, SETTINGS, 0)
    assert same(stored(store, changed), stored(anew, changed))
    assert not same(stored(store, easy[1:]), before)
    trained.clear()
    make_forest_labels(list(reversed(changed)), store, REGIONS, SETTINGS, 0)
    assert not trained


def test_where_a_forest_learned_from_whom_nothing_changed_its_labels_stay(
    easy: list[Case], store: LabelStore, trained: list[set[str]]
) -> None:
    make_forest_labels(easy, store, REGIONS, SETTINGS, 0)
    corrected = [replace(easy[0], label=np.roll(easy[0].label, 1, axis=0)), *easy[1:]]
    fold_of = folds_of([case.patient for case in easy], 0, SETTINGS.folds)
    of_its_fold = [case for case in easy[1:] if fold_of[case.patient] == fold_of[easy[0].patient]]
    assert of_its_fold
    before = stored(store, of_its_fold)
    make_forest_labels(corrected, store, REGIONS, SETTINGS, 0)
    assert same(stored(store, of_its_fold), before)
    assert len(store.of(corrected[0])) == len(SETTINGS.depths)


def test_one_patient_alone(easy: list[Case], store: LabelStore) -> None:
    cases = [replace(case, patient="the same") for case in easy[:3]]
    with pytest.raises(TrainingError, match="no case is left to train a segmenter on"):
        make_forest_labels(cases, store, REGIONS, SETTINGS, 0)
    make_forest_labels([], store, REGIONS, SETTINGS, 0)


def test_who_is_left_alone_has_no_labels_to_learn_from(easy: list[Case], store: LabelStore) -> None:
    make_forest_labels(easy[:2], store, REGIONS, SETTINGS, 0)
    with pytest.raises(TrainingError, match="no case is left to train a segmenter on"):
        make_forest_labels(easy[:1], store, REGIONS, SETTINGS, 0)


def test_a_depth_that_is_missing_is_made(
    easy: list[Case], store: LabelStore, trained: list[set[str]]
) -> None:
    make_forest_labels(easy, store, REGIONS, replace(SETTINGS, depths=(2,)), 0)
    trained.clear()
    make_forest_labels(easy, store, REGIONS, SETTINGS, 0)
    assert len(trained) == 2
    assert [[one.recipe["depth"] for one in store.of(case)] for case in easy] == [[2, 1, 4, 8, 40]] * 6


def test_a_foreign_recipe_is_no_depth(easy: list[Case], store: LabelStore) -> None:
    store.add(easy[0], [({"depths": 1}, easy[0].label), ({"depth": [1]}, easy[0].label)], REGIONS)
    make_forest_labels(easy, store, REGIONS, SETTINGS, 0)
    assert len(store.of(easy[0])) == 2 + len(SETTINGS.depths)
