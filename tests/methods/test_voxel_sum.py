"""Sums of uncertainty and of reconstruction error: of the network's own prediction, with the sign learned."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor, nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import QCConfig
from fedqc.methods.base import RoundPlan
from fedqc.methods.cross_fitting import fold_of
from fedqc.methods.segmenters import Prediction
from fedqc.methods.voxel_sum import ErrorSumMethod, UncertaintySumMethod, VoxelSumMethod
from fedqc.metrics.overlap import overlap
from fedqc.task import Task

FP32 = Compute(torch.device("cpu"), torch.float32)
SEGMENTER = {"channels": (4, 8), "passes": 2, "rounds": 1, "local_steps": 2, "batch_size": 2}
CONFIG = QCConfig.model_validate({"segmenter": SEGMENTER})
BOTH = pytest.mark.parametrize("kind", [UncertaintySumMethod, ErrorSumMethod])


class Unsure(nn.Module):
    """A segmenter that reads the classes from the first modality, as sure as the second one says.

    It calls everything a rim that the second modality says it is unsure of.
    """

    def forward(self, x: Tensor) -> Tensor:
        label = x[:, 0].round().clamp(0, 2).long()
        doubt = x[:, 1:2]
        logits = nn.functional.one_hot(label, 3).movedim(-1, 1).float() * 4
        logits[:, 2:] += 5 * doubt
        return logits


class Brighter(nn.Module):
    """A reconstruction network that fills holes with 1/4 and leaves the rest, but for an offset."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x == 0, 0.25, x) + self.offset


def replaced(network: nn.Module, kind: str, part: nn.Module) -> nn.Module:
    return nn.ModuleDict(
        {name: part if name.startswith(kind) else child for name, child in network.named_children()}
    )


def doubtful(case: Case, share: float) -> Case:
    """The label to be seen in the first modality, and doubt in a part of the volume in the second."""
    doubt = np.zeros(case.label.shape, dtype=np.float32)
    doubt[: round(share * len(doubt))] = 1
    return replace(case, image=np.stack([case.label.astype(np.float32), doubt]))


def test_the_sum_of_the_entropy_is_that_of_scipy(task: Task) -> None:
    method = UncertaintySumMethod(task, CONFIG)
    rng = np.random.default_rng(0)
    probability = rng.dirichlet([0.5, 0.5, 0.5], size=task.size).transpose(3, 0, 1, 2)
    found = Prediction(torch.from_numpy(probability).float(), torch.zeros(1))
    summed = method.measure(nn.Identity(), None, found, FP32)  # type: ignore[arg-type]  # no case is needed
    assert summed.value == pytest.approx(entropy(probability, axis=0).sum(), rel=1e-5)
    n_voxels = np.prod(task.size)
    assert summed.means[0].item() == pytest.approx(summed.value / n_voxels / np.log(3), rel=1e-5)
    for index, members in enumerate(task.region_indices(), start=1):
        p = probability[list(members)].sum(axis=0)
        binary = entropy(np.stack([p, 1 - p]), base=2, axis=0).mean()
        assert summed.means[index].item() == pytest.approx(binary, rel=1e-4)


def test_with_one_class_the_whole_is_its_region(task: Task) -> None:
    one = task.model_copy(update={"classes": {"core": (1,)}, "regions": {"core": ("core",)}})
    probability = torch.rand(1, *task.size, generator=torch.Generator().manual_seed(0))
    found = Prediction(torch.cat([1 - probability, probability]), torch.zeros(1))
    means = UncertaintySumMethod(one, CONFIG).measure(nn.Identity(), None, found, FP32).means  # type: ignore[arg-type]
    torch.testing.assert_close(means[0], means[1])


def test_the_error_is_what_is_given_back_minus_what_is_there(task: Task, cases: list[Case]) -> None:
    method = ErrorSumMethod(task, CONFIG)
    case = doubtful(cases[0], 0.0)  # classes 0, 1, 2 come to 0, 1/2, 1; the second modality is 0
    network = replaced(method.build(0), "segmenter", Unsure())
    found = method.predict(replaced(network, "reconstruction", Brighter(0.0)), case, FP32)
    assert torch.equal(found.label, torch.from_numpy(case.label))
    expected = ((0.25 - case.label / 2) + 0.25) / 2  # all is a hole, or as dark as one
    np.testing.assert_allclose(found.map.numpy(), expected, atol=1e-6)
    assert found.value == pytest.approx(expected.sum(), rel=1e-5)
    torch.testing.assert_close(found.means, torch.full((4,), float(expected.mean())))
    darker = method.predict(replaced(network, "reconstruction", Brighter(-0.5)), case, FP32)
    assert darker.value == pytest.approx((expected - 0.5).sum(), rel=1e-5)  # the sign stays


@BOTH
def test_only_the_networks_own_prediction_counts(
    kind: type[VoxelSumMethod], task: Task, cases: list[Case]
) -> None:
    method = kind(task, CONFIG)
    assert method.judges == "prediction"
    network = method.build(0)
    spoiled = [replace(case, label=np.zeros_like(case.label)) for case in cases]
    first, second = (list(method.score(network, some, FP32)) for some in (cases, spoiled))
    assert [score.quality for score in first] == [score.quality for score in second]
    assert [score.case_id for score in first] == [case.id for case in cases]
    assert all(0 <= value <= 1 for score in first for value in (score.quality, *score.regions.values()))
    backwards = list(method.score(network, cases[::-1], FP32, batch_size=2))
    assert [score.quality for score in reversed(backwards)] == [score.quality for score in first]


def test_references_teach_that_doubt_is_bad(task: Task, cases: list[Case]) -> None:
    method = UncertaintySumMethod(task, CONFIG)
    network = replaced(method.build(0), "segmenter", Unsure())
    references = [doubtful(case, share) for case, share in zip(cases, (0, 0.2, 0.4, 0.6, 0.8), strict=True)]
    before = [score.quality for score in method.score(network, references, FP32)]
    assert before == sorted(before)  # a mean of doubt, nothing else
    method.fit(network, references, FP32, np.random.default_rng(0))
    after = list(method.score(network, references, FP32))
    for score, case in zip(after, references, strict=True):
        label = method.predict(network, case, FP32).label
        truth = overlap(label[None], torch.from_numpy(case.label)[None], task.region_indices())
        assert score.quality == pytest.approx(truth.mean.item(), abs=0.1)
    assert [score.quality for score in after] == sorted((score.quality for score in after), reverse=True)


@BOTH
def test_every_stage_trains_its_own_part(
    kind: type[VoxelSumMethod], task: Task, cases_of_both_folds: list[Case]
) -> None:
    method = kind(task, CONFIG)
    network = method.build(0)
    start = {key: value.clone() for key, value in network.state_dict().items()}
    names = ["segmenter", "reconstruction"][: len(method.networks)]
    assert [stage.name for stage in method.stages()] == [f"{name}-{n}" for name in names for n in (1, 2)]
    assert len(names) == (2 if kind is ErrorSumMethod else 1)
    for stage in method.stages():
        learned = [case for case in cases_of_both_folds if fold_of(case.patient) != stage.fold]
        before = {key: value.clone() for key, value in network.state_dict().items()}
        method.train_round(network, learned, RoundPlan(0, "a", 1, 1, 2, 2, stage=stage.name), FP32)
        changed = {
            key.split(".")[0]
            for key, value in network.state_dict().items()
            if not torch.equal(value, before[key])
        }
        assert changed == {stage.part}
    assert all(torch.equal(network.state_dict()[key], start[key]) for key in start if "calibration" in key)
