import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from monai.metrics.meandice import compute_dice
from numpy.typing import NDArray
from torch import Tensor

from fedqc.cases.volumes import Case
from fedqc.config import SamplesConfig
from fedqc.degradation.annotator import ANNOTATOR_KINDS
from fedqc.degradation.samples import (
    ALL_KINDS,
    CHUNK,
    Degraded,
    LabelFactory,
    Recipe,
    SamplePool,
    degrade_cases,
)
from fedqc.errors import ConfigError, TrainingError
from fedqc.task import Task

REGIONS = ((1,), (2,), (1, 2))
References = list[NDArray[np.uint8]]


@pytest.fixture
def references(labels: Tensor) -> References:
    """Four labels of 16x16x16."""
    return [np.ascontiguousarray(label[2:18, 4:20].numpy()) for label in labels]


def one_of_each_kind(factory: LabelFactory, seed: int = 0) -> list[Recipe]:
    rng = np.random.default_rng(seed)
    drawn = [factory.draw(rng, case, kind) for kind in ALL_KINDS for case in range(len(factory.references))]
    recipes = [recipe for recipe in drawn if recipe is not None]
    return [recipes[index] for index in rng.permutation(len(recipes))]


def drawn(pool: SamplePool, count: int, seed: int = 0) -> Degraded:
    first, *others = pool.chunks(np.random.default_rng(seed), count)
    for other in others:
        first = first.joined(other)
    return first


# --------------------------------------------------------------------------------------------- LabelFactory


def test_the_promised_dsc_is_the_one_that_monai_finds(references: References) -> None:
    factory = LabelFactory(references, REGIONS)
    recipes = one_of_each_kind(factory)
    assert {recipe.kind for recipe in recipes} == set(ALL_KINDS)
    made = factory.make(recipes)
    before = torch.from_numpy(np.stack([references[recipe.case] for recipe in recipes]))

    def masks(label: Tensor) -> Tensor:
        return torch.stack([label == 1, label == 2, label > 0], dim=1).float()

    promised = torch.where(made.present, made.dsc, torch.nan)
    found = compute_dice(masks(made.label), masks(before), ignore_empty=True)
    torch.testing.assert_close(promised, found, equal_nan=True)
    torch.testing.assert_close(made.mean, found.nanmean(dim=1))
    untouched = [recipe.kind == "untouched" for recipe in recipes]
    assert (made.mean[untouched] == 1).all()
    assert made.mean.min() < 0.2


def test_labels_made_together_are_those_made_alone_in_the_order_of_the_recipes(
    references: References,
) -> None:
    factory = LabelFactory(references, REGIONS)
    recipes = one_of_each_kind(factory) * 2  # more of the whole than fits into a chunk
    assert len(recipes) > 2 * CHUNK
    together = factory.make(recipes)
    assert together.recipes == tuple(recipes)
    for position, recipe in enumerate(recipes):
        alone = factory.make([recipe])
        assert torch.equal(alone.label[0], together.label[position])
        assert torch.equal(alone.dsc[0], together.dsc[position])


def test_a_recipe_replays_exactly_from_json(references: References) -> None:
    factory = LabelFactory(references, REGIONS)
    recipes = one_of_each_kind(factory)
    written = json.dumps([asdict(recipe) for recipe in recipes])
    read = [Recipe(**recipe) for recipe in json.loads(written)]
    assert read == recipes
    assert torch.equal(LabelFactory(references, REGIONS).make(read).label, factory.make(recipes).label)


def test_nothing_to_make(references: References) -> None:
    made = LabelFactory(references, REGIONS).make([])
    assert (made.label.shape, made.dsc.shape, made.mean.shape) == ((0, 16, 16, 16), (0, 3), (0,))


def test_what_is_not_possible_is_not_drawn(references: References) -> None:
    single = np.where(references[0] == 2, 0, references[0])
    rng = np.random.default_rng(0)
    assert LabelFactory([single], REGIONS).draw(rng, 0, "swapped-classes") is None
    assert LabelFactory([single], REGIONS).draw(rng, 0, "another-patient") is None
    assert LabelFactory(references, REGIONS).draw(rng, 0, "swapped-classes") is not None
    empty = LabelFactory([np.zeros_like(single), single], REGIONS)
    possible = [kind for kind in ALL_KINDS if empty.draw(rng, 0, kind) is not None]
    assert possible == ["untouched", "another-patient"]


def test_labels_may_be_read_only_memory_maps(references: References, tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.stack(references))
    mapped = list(np.load(tmp_path / "labels.npy", mmap_mode="r"))
    assert not mapped[0].flags.writeable
    factory = LabelFactory(mapped, REGIONS)
    recipes = one_of_each_kind(factory)
    assert torch.equal(factory.make(recipes).label, LabelFactory(references, REGIONS).make(recipes).label)


def test_an_unknown_kind(references: References) -> None:
    with pytest.raises(ConfigError, match="unknown kind of label error: scribble; known: untouched, seggen"):
        LabelFactory(references, REGIONS, ["shift", "scribble"])


# ----------------------------------------------------------------------------------------------- SamplePool


def test_kinds_are_drawn_in_their_shares(references: References) -> None:
    factory = LabelFactory(references, REGIONS)
    samples = SamplesConfig(seggen=2, annotator=5, untouched=3)  # normalised to one
    counts = Counter(recipe.kind for recipe in drawn(SamplePool(factory, samples, "none"), 1600).recipes)
    assert counts["seggen"] / 1600 == pytest.approx(0.2, abs=0.03)
    assert counts["untouched"] / 1600 == pytest.approx(0.3, abs=0.035)
    for kind in ANNOTATOR_KINDS:
        assert counts[kind] / 1600 == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("balance", ["quantile", "histogram", "none"])
def test_untouched_labels_keep_their_share_whatever_the_balance(
    references: References, balance: Literal["quantile", "histogram", "none"]
) -> None:
    pool = SamplePool(LabelFactory(references, REGIONS), SamplesConfig(untouched=0.1), balance)
    sample = drawn(pool, 640)
    untouched = np.array([recipe.kind == "untouched" for recipe in sample.recipes])
    assert untouched.mean() == pytest.approx(0.1, abs=0.04)
    halves = untouched.reshape(-1, CHUNK)
    assert halves[:, : CHUNK // 2].any()  # mixed among the others
    assert halves[:, CHUNK // 2 :].any()


def test_quantile_balance_flattens_the_dsc(references: References) -> None:
    factory = LabelFactory(references, REGIONS)
    samples = SamplesConfig(untouched=0)
    plain = drawn(SamplePool(factory, samples, "none"), 640).mean.numpy()
    flat = drawn(SamplePool(factory, samples, "quantile"), 640).mean.numpy()
    histograms = [np.histogram(dsc, np.linspace(0, 1, 6))[0] / 640 for dsc in (plain, flat)]
    unevenness = [np.abs(histogram - 0.2).sum() for histogram in histograms]
    assert unevenness[1] < 0.6 * unevenness[0]


@pytest.mark.parametrize("count", [1, CHUNK, 2 * CHUNK + 5])
@pytest.mark.parametrize("balance", ["quantile", "histogram", "none"])
def test_as_many_samples_as_asked_for(
    references: References, balance: Literal["quantile", "histogram", "none"], count: int
) -> None:
    pool = SamplePool(LabelFactory(references, REGIONS), SamplesConfig(), balance)
    chunks = list(pool.chunks(np.random.default_rng(0), count))
    assert [len(chunk.recipes) for chunk in chunks[:-1]] == [CHUNK] * (len(chunks) - 1)
    assert sum(len(chunk.recipes) for chunk in chunks) == count
    for chunk in chunks:
        assert len(chunk.label) == len(chunk.dsc) == len(chunk.present) == len(chunk.mean)
        again = pool.factory.make(chunk.recipes)  # every label stands beside its own recipe and truth
        assert torch.equal(again.label, chunk.label)
        assert torch.equal(again.mean, chunk.mean)
        assert torch.equal(again.dsc, chunk.dsc)


def test_one_seed_one_set_of_samples(references: References) -> None:
    def sample(seed: int) -> Degraded:
        torch.manual_seed(seed + 7)
        return drawn(SamplePool(LabelFactory(references, REGIONS), SamplesConfig(), "quantile"), 48, seed)

    first, again, other = sample(0), sample(0), sample(1)
    assert first.recipes == again.recipes
    assert torch.equal(first.label, again.label)
    assert first.recipes != other.recipes


def test_kinds_left_out_never_come(references: References) -> None:
    kinds = [kind for kind in ALL_KINDS if kind not in {"shift", "untouched", "seggen"}]
    sample = drawn(SamplePool(LabelFactory(references, REGIONS, kinds), SamplesConfig(), "none"), 400)
    assert {recipe.kind for recipe in sample.recipes} == set(kinds)
    without_annotator = LabelFactory(references, REGIONS, ["untouched", "seggen"])
    sample = drawn(SamplePool(without_annotator, SamplesConfig(), "quantile"), 400)
    shares = Counter(recipe.kind for recipe in sample.recipes)
    assert shares["untouched"] / 400 == pytest.approx(0.25, abs=0.07)  # 0.1 of 0.1 + 0.3
    assert shares.total() == shares["untouched"] + shares["seggen"]


def test_untouched_labels_alone(references: References) -> None:
    factory = LabelFactory(references, REGIONS)
    sample = drawn(SamplePool(factory, SamplesConfig(seggen=0, annotator=0, untouched=1), "quantile"), 40)
    assert {recipe.kind for recipe in sample.recipes} == {"untouched"}
    assert {recipe.case for recipe in sample.recipes} == {0, 1, 2, 3}


def test_nothing_left_to_train_on(references: References) -> None:
    factory = LabelFactory(references, REGIONS, ["seggen"])
    with pytest.raises(ConfigError, match=r"qc\.samples and qc\.leave_out"):
        SamplePool(factory, SamplesConfig(seggen=0), "none")


def test_errors_that_are_not_possible_in_any_case(references: References) -> None:
    single = [np.minimum(references[0], 1)]
    pool = SamplePool(LabelFactory(single, REGIONS, ["swapped-classes"]), SamplesConfig(), "none")
    with pytest.raises(TrainingError, match="none of the label errors swapped-classes is possible"):
        drawn(pool, 4)


# -------------------------------------------------------------------------------------------- degrade_cases


@pytest.fixture
def task() -> Task:
    return Task(
        name="blobs",
        modalities=("T1",),
        classes={"core": (1,), "rim": (2,)},
        regions={"core": ("core",), "rim": ("rim",), "whole": ("core", "rim")},
        spacing=(1.0, 1.0, 1.0),
        size=(16, 16, 16),
    )


def make_case(name: str, label: NDArray[np.uint8]) -> Case:
    return Case(
        id=name,
        patient=f"patient of {name}",
        image=np.zeros((1, *label.shape), dtype=np.float32),
        label=label,
        affine=np.eye(4),
        native_shape=(16, 16, 16),
        native_affine=np.eye(4),
    )


def test_every_case_gets_every_kind_once(references: References, task: Task) -> None:
    cases = [make_case(f"case-{number}", label) for number, label in enumerate(references)]
    made = list(degrade_cases(cases, task, ALL_KINDS, np.random.default_rng(0)))
    assert [(one.case.id, one.kind) for one in made] == [(c.id, kind) for c in cases for kind in ALL_KINDS]
    for one in made:
        original = cases[one.recipe.case]
        assert one.case.patient == original.patient
        assert one.case.image is original.image
        assert np.array_equal(one.error, one.case.label != original.label)
        both = (one.case.label > 0) & (original.label > 0)
        whole = 2 * both.sum() / ((one.case.label > 0).sum() + (original.label > 0).sum())
        assert one.dsc["whole"] == pytest.approx(whole)
        assert one.mean_dsc == pytest.approx(np.mean(list(one.dsc.values())))
    assert all(np.array_equal(case.label, label) for case, label in zip(cases, references, strict=True))


def test_a_region_that_is_not_there_and_a_kind_that_is_not_possible_are_left_out(
    references: References, task: Task
) -> None:
    case = make_case("single", np.minimum(references[0], 1))
    (made,) = degrade_cases([case], task, ["swapped-classes", "over-contouring"], np.random.default_rng(0))
    assert made.kind == "over-contouring"
    assert set(made.dsc) == {"core", "whole"}
    assert list(degrade_cases([], task, ALL_KINDS, np.random.default_rng(0))) == []


@pytest.mark.parametrize("balance", ["none", "quantile", "histogram"])
def test_what_was_drawn_is_noted(
    references: References, balance: Literal["none", "quantile", "histogram"]
) -> None:
    pool = SamplePool(LabelFactory(references, REGIONS), SamplesConfig(untouched=0.2), balance)
    sample = drawn(pool, 48)
    noted = [
        (recipe.case, recipe.kind, mean)
        for recipe, mean in zip(sample.recipes, sample.mean.tolist(), strict=True)
    ]
    assert sorted(pool.drawn.chosen) == sorted(noted)
    assert set(pool.drawn.chosen) <= set(pool.drawn.made)
    untouched = sum(kind == "untouched" for _, kind, _ in noted)
    assert 0 < untouched < 48
    assert len(pool.drawn.made) == untouched + (48 - untouched) * (1 if balance == "none" else 2)
