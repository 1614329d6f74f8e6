"""Segmenters and reconstruction networks in two folds: who sees whom, what they say, what they learn from."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.stats import entropy
from torch import Tensor, nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import QCConfig
from fedqc.errors import ConfigError, TrainingError
from fedqc.methods.base import RoundPlan
from fedqc.methods.cross_fitting import fold_of
from fedqc.methods.segmenters import (
    CrossFitted,
    Prediction,
    Reconstructors,
    Segmenters,
    region_probability,
    ssim_loss,
)
from fedqc.task import Task

FP32 = Compute(torch.device("cpu"), torch.float32)
SMALL = {"channels": (4, 8), "passes": 3, "rounds": 4, "local_steps": 7, "batch_size": 2}


def config(**more: object) -> QCConfig:
    return QCConfig.model_validate({"segmenter": SMALL, **more})


class Says(nn.Module):
    """A segmenter that is sure of one class everywhere, and counts how often it is asked."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.asked = index, 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += 1
        logits = torch.zeros(len(x), 3, *x.shape[2:])
        logits[:, self.index] = 9
        return logits


class Adds(nn.Module):
    """A reconstruction network that gives back what it is shown, and something more."""

    def __init__(self, more: float) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return x + self.more


def plan(stage: str, number: int = 1) -> RoundPlan:
    return RoundPlan(seed=0, site="a", round=number, rounds=4, steps=2, batch_size=2, stage=stage)


# ------------------------------------------------------------------------------------------ the folds


def test_the_stages_leave_each_fold_out_once_and_learn_from_all_valid_cases(task: Task) -> None:
    stages = Segmenters(task, config()).stages()
    assert [(stage.name, stage.part, stage.fold) for stage in stages] == [
        ("segmenter-1", "segmenter-1", 0),
        ("segmenter-2", "segmenter-2", 1),
    ]
    for stage in stages:
        assert stage.learns_from == "all"
        assert not stage.starts_from
        assert (stage.rounds, stage.local_steps, stage.batch_size) == (4, 7, 2)


def test_rounds_and_steps_follow_those_of_the_method_where_nobody_sets_them(task: Task) -> None:
    few = {"channels": (4, 8)}
    stages = Segmenters(
        task, QCConfig.model_validate({"segmenter": few, "rounds": 7, "local_steps": 5})
    ).stages()
    assert [(stage.rounds, stage.local_steps) for stage in stages] == [(4, 5), (4, 5)]


def test_further_snapshots_begin_where_the_one_before_ended(task: Task) -> None:
    stages = Segmenters(task, config(), snapshots=3).stages()
    assert [(stage.name, stage.starts_from, stage.rounds) for stage in stages if stage.fold == 1] == [
        ("segmenter-2", "", 4),
        ("segmenter-2-2", "segmenter-2", 2),
        ("segmenter-2-3", "segmenter-2-2", 2),
    ]


def test_a_case_is_only_shown_to_segmenters_that_its_patient_was_left_out_of(
    task: Task, cases_of_both_folds: list[Case]
) -> None:
    segmenters = Segmenters(task, config(), snapshots=2)
    assert {fold_of(case.patient) for case in cases_of_both_folds} == {0, 1}
    for case in cases_of_both_folds:
        network = nn.ModuleDict({part: Says(1) for part in segmenters.all_parts()})
        segmenters.predict(network, case, FP32)
        fold = fold_of(case.patient)
        left_out = {stage.part for stage in segmenters.stages() if stage.fold == fold}
        asked = {part for part, one in network.items() if isinstance(one, Says) and one.asked}
        assert asked == left_out


def test_a_case_of_nobody_is_shown_to_all(task: Task, cases: list[Case]) -> None:
    segmenters = Segmenters(task, config())
    nobody = Case(**(vars(cases[0]) | {"patient": ""}))
    network = nn.ModuleDict({"segmenter-1": Says(1), "segmenter-2": Says(2)})
    found = segmenters.predict(network, nobody, FP32)
    assert [set(sample.flatten().tolist()) for sample in found.samples] == [{1}] * 3 + [{2}] * 3
    torch.testing.assert_close(found.probability[1], found.probability[2])


def test_the_passes_are_divided_among_snapshots(task: Task, cases: list[Case]) -> None:
    segmenters = Segmenters(task, config(segmenter={**SMALL, "passes": 5}), snapshots=3)
    network = nn.ModuleDict({part: Says(0) for part in segmenters.all_parts()})
    assert len(segmenters.predict(network, cases[0], FP32).samples) == 6  # 2 of each: 5 at least


def test_reconstructions_of_the_other_fold_only(task: Task, cases_of_both_folds: list[Case]) -> None:
    reconstructors = Reconstructors(task, config())
    network = nn.ModuleDict({"reconstruction-1": Adds(0.1), "reconstruction-2": Adds(0.2)})
    chosen = cases_of_both_folds[:2]
    image = torch.from_numpy(np.stack([case.image for case in chosen]))
    label = torch.zeros(2, *task.size, dtype=torch.uint8)
    patients = [case.patient for case in chosen]
    errors = reconstructors.errors(network, patients, image, label, FP32)
    for case, error in zip(chosen, errors, strict=True):
        expected = 0.1 if fold_of(case.patient) == 0 else 0.2
        torch.testing.assert_close(error, torch.full_like(error, expected))
    both = reconstructors.errors(network, ["", ""], image, label, FP32)
    torch.testing.assert_close(both, torch.full_like(both, 0.15))


# --------------------------------------------------------------------------------------- predictions


def test_passes_depend_on_the_case_alone(task: Task, cases: list[Case]) -> None:
    segmenters = Segmenters(task, config())
    network = nn.ModuleDict(segmenters.build(0)).eval()
    state = torch.get_rng_state()
    alone = segmenters.predict(network, cases[3], FP32)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    for case in (cases[1], cases[4]):
        segmenters.predict(network, case, FP32)
    again = segmenters.predict(network, cases[3], FP32)
    assert torch.equal(again.samples, alone.samples)
    assert torch.equal(again.probability, alone.probability)
    differ = [not torch.equal(a, b) for a, b in zip(alone.samples, alone.samples[1:], strict=False)]
    assert all(differ)
    renamed = Case(**(vars(cases[3]) | {"id": "other"}))
    assert not torch.equal(segmenters.predict(network, renamed, FP32).samples, alone.samples)


def test_entropy_is_that_of_scipy_and_label_the_most_probable_class() -> None:
    rng = np.random.default_rng(0)
    probability = rng.dirichlet([0.5, 0.5, 0.5], size=(4, 5, 6)).transpose(3, 0, 1, 2)
    probability[:, 0, 0, 0] = (1, 0, 0)
    found = Prediction(torch.from_numpy(probability).float(), torch.zeros(1))
    expected = entropy(probability, axis=0)
    np.testing.assert_allclose(found.entropy.numpy(), expected, atol=1e-5)
    assert found.entropy[0, 0, 0] == 0
    np.testing.assert_array_equal(found.label.numpy(), probability.argmax(axis=0))


def test_a_region_is_as_probable_as_its_classes_together() -> None:
    probability = torch.tensor([0.5, 0.2, 0.3])[:, None, None, None].expand(3, 2, 2, 2)
    found = region_probability(probability, [(2,), (1, 2)])
    torch.testing.assert_close(found[:, 0, 0, 0], torch.tensor([0.3, 0.5]))


# ------------------------------------------------------------------------------------ reconstructions


def ssim(a: NDArray[np.float64], b: NDArray[np.float64], windows: Sequence[int]) -> float:
    """Mean SSIM of slices `[X, Y, Z]` by Wang et al. (2004), eq. 13, with SciPy's Gaussian filter."""

    def blurred(volume: NDArray[np.float64]) -> NDArray[np.float64]:
        for axis, window in enumerate(windows):
            volume = gaussian_filter1d(volume, 1.5, axis=axis, mode="mirror", radius=window // 2)
        return volume

    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    values = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((values / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


@pytest.mark.parametrize(("shape", "windows"), [((20, 16, 5), (11, 11)), ((8, 9, 4), (7, 9))])
def test_ssim_is_that_of_scipy_filters(shape: tuple[int, int, int], windows: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    a = rng.random((2, 2, *shape))
    b = np.clip(a + rng.normal(0, 0.2, a.shape), 0, 1)
    pairs = zip(a.reshape(-1, *shape), b.reshape(-1, *shape), strict=True)
    expected = np.mean([ssim(x, y, windows) for x, y in pairs])
    found = ssim_loss(torch.from_numpy(a).float(), torch.from_numpy(b).float())
    assert found.item() == pytest.approx(1 - expected, abs=1e-5)
    assert ssim_loss(torch.from_numpy(a), torch.from_numpy(a)).item() == pytest.approx(0, abs=1e-6)


def test_ssim_is_computed_in_fp32_under_autocast() -> None:
    image = torch.rand(1, 1, 16, 16, 4, generator=torch.Generator().manual_seed(0))
    other = (image + 0.05).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = ssim_loss(other, image)
    torch.testing.assert_close(rough, ssim_loss(other.float(), image))


def test_what_a_label_marks_is_cut_out_of_intensities_between_0_and_1(task: Task, cases: list[Case]) -> None:
    reconstructors = Reconstructors(task, config(reconstruction={"modalities": ("T2",)}))
    image, label = torch.from_numpy(cases[0].image)[None], torch.from_numpy(cases[0].label)[None]
    whole = reconstructors.whole(image)
    assert whole.shape == (1, 1, *task.size)
    low, high = image[0, 1].min(), image[0, 1].max()
    torch.testing.assert_close(whole[0, 0], (image[0, 1] - low) / (high - low))
    holes = reconstructors.with_holes(whole, label)
    assert not holes[0, 0][label[0] > 0].any()
    assert torch.equal(holes[0, 0][label[0] == 0], whole[0, 0][label[0] == 0])
    network = nn.ModuleDict(reconstructors.build(0))
    errors = reconstructors.errors(network, [cases[0].patient], image, label, FP32)
    assert errors.shape == (1, 1, *task.size)


def test_a_modality_that_the_task_does_not_have_is_refused(task: Task) -> None:
    with pytest.raises(ConfigError, match=r"qc.reconstruction.modalities names FLAIR; .* has T1, T2"):
        Reconstructors(task, config(reconstruction={"modalities": ("T1", "FLAIR")}))


# ------------------------------------------------------------------------------------------- training

KINDS = pytest.mark.parametrize("kind", [Segmenters, Reconstructors])


def weights(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@KINDS
def test_a_seed_decides_everything_and_only_the_stages_part_is_trained(
    kind: type[CrossFitted], task: Task, cases: list[Case]
) -> None:
    networks = kind(task, config())
    first, second = networks.all_parts()
    results = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        network = nn.ModuleDict(networks.build(5))
        before = weights(network[first])
        networks.train_round(network, cases, plan(second), FP32)
        assert torch.equal(weights(network[first]), before)
        results.append(weights(network[second]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], weights(networks.build(5)[second]))
    assert not torch.equal(weights(networks.build(5)[first]), weights(networks.build(5)[second]))
    assert not torch.equal(weights(networks.build(5)[first]), weights(networks.build(6)[first]))


@KINDS
def test_training_teaches(kind: type[CrossFitted], task: Task, cases: list[Case]) -> None:
    networks = kind(task, config(segmenter={**SMALL, "learning_rate": 1e-2}))
    part = networks.all_parts()[0]
    network = nn.ModuleDict(networks.build(0))
    losses = [
        networks.train_round(network, cases, RoundPlan(0, "a", number, 3, 10, 2, stage=part), FP32).losses[
            "loss"
        ]
        for number in (1, 2, 3)
    ]
    assert losses[-1] < 0.9 * losses[0]


def test_a_site_without_a_case_for_the_stage_is_told_so(task: Task) -> None:
    segmenters = Segmenters(task, config())
    with pytest.raises(TrainingError, match=r"'segmenter-2' has no case to learn from"):
        segmenters.train_round(nn.ModuleDict(segmenters.build(0)), [], plan("segmenter-2"), FP32)


@KINDS
def test_one_voxel_on_the_deepest_level_is_refused(kind: type[CrossFitted], task: Task) -> None:
    tiny = task.model_copy(update={"size": (8, 8, 8)})
    with pytest.raises(ConfigError, match=r"4 levels leave one voxel of 8x8x8; use fewer qc.segmenter.ch"):
        kind(tiny, QCConfig())


def test_the_loss_is_the_soft_dice_of_the_classes(task: Task) -> None:
    from fedqc.segmentation import SegmentationBatch

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 6, 6, generator=generator)
    label = torch.randint(0, 3, (2, 6, 6, 6), generator=generator, dtype=torch.uint8)
    found = Segmenters(task, config()).losses(nn.Identity(), SegmentationBatch(logits, label))["dice"]
    probability = logits.softmax(dim=1)
    dice = [
        2 * probability[:, k][label == k].sum() / (probability[:, k].sum() + (label == k).sum())
        for k in (1, 2)
    ]
    torch.testing.assert_close(found, 1 - torch.stack(dice).mean(), atol=1e-5, rtol=0)
