"""What all methods of one network on image and label have in common."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import NetworkConfig, QCConfig, SamplesConfig
from fedqc.degradation.samples import StoredLabels
from fedqc.errors import ConfigError
from fedqc.methods.base import Known, RoundPlan, get_method
from fedqc.methods.pairs import PairMethod, scaled
from fedqc.task import Task

FP32 = Compute(torch.device("cpu"), torch.float32)
SMALL = {
    "qcresunet": NetworkConfig(width=4, blocks=(1, 1)),
    "unet": NetworkConfig(width=4),
    "resnet34": NetworkConfig(width=4, blocks=(1, 1)),
    "resnet50": NetworkConfig(width=4, blocks=(1, 1)),
    "robinson": NetworkConfig(width=4, blocks=(1, 1)),
    "voxresnet": NetworkConfig(width=4, patch=(16, 16, 16)),
}


def make(name: str, task: Task, **options: object) -> PairMethod:
    values = {"network": SMALL[name], "learning_rate": 3e-3, **options}
    method = get_method(name)(task, QCConfig.model_validate(values))
    assert isinstance(method, PairMethod)
    return method


@pytest.fixture(params=SMALL)
def method(request: pytest.FixtureRequest, task: Task) -> PairMethod:
    return make(request.param, task)


def plan(number: int = 1, steps: int = 2) -> RoundPlan:
    return RoundPlan(seed=0, site="hospital-1", round=number, rounds=8, steps=steps, batch_size=4)


def numbers(network: nn.Module) -> NDArray[np.float64]:
    return np.concatenate([p.detach().double().numpy().ravel() for p in network.parameters()])


def test_a_seed_decides_everything(method: PairMethod, cases: list[Case]) -> None:
    results = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        network = method.build(5)
        method.train_round(network, cases, plan(), FP32)
        results.append(numbers(network))
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], numbers(method.build(5)))
    assert not np.array_equal(numbers(method.build(5)), numbers(method.build(6)))


def test_training_teaches(method: PairMethod, cases: list[Case]) -> None:
    network = method.build(0)
    losses = [
        method.train_round(network, cases, plan(number, steps=10), FP32).losses["loss"]
        for number in range(1, 6)
    ]
    assert min(losses[-2:]) < 0.9 * losses[0]


def test_scores_are_in_range_and_in_order_and_look_at_the_label(
    method: PairMethod, cases: list[Case]
) -> None:
    network = method.build(0)
    method.train_round(network, cases, plan(steps=10), FP32)
    scores = list(method.score(network, cases, FP32, batch_size=2))
    assert [score.case_id for score in scores] == [case.id for case in cases]
    for score in scores:
        assert 0 <= score.quality <= 1
        assert list(score.regions) == list(method.scored_regions())
        assert all(0 <= value <= 1 for value in score.regions.values())
    spoiled = [Case(**(vars(case) | {"label": np.flip(case.label, 0).copy()})) for case in cases]
    others = [score.quality for score in method.score(network, spoiled, FP32)]
    assert others != [score.quality for score in scores]


def test_an_option_of_another_network_is_refused(task: Task) -> None:
    for name, options in (("unet", {"blocks": (1, 1)}), ("qcresunet", {"patch": (8, 8, 8)})):
        with pytest.raises(ConfigError, match=f"qc.network.{next(iter(options))} is of no use to .*{name}"):
            make(name, task, network=NetworkConfig.model_validate(options))


def test_one_voxel_in_the_last_layer_is_refused(task: Task) -> None:
    tiny = task.model_copy(update={"size": (8, 8, 8)})
    with pytest.raises(ConfigError, match="8x8x8 leaves 1x1x1 voxels"):
        make("resnet34", tiny)


def test_intensities_are_scaled_channel_by_channel() -> None:
    image = torch.tensor([[-2.0, 0.0, 2.0], [1.0, 2.0, 5.0], [3.0, 3.0, 3.0], [0.0, 1.0, 4.0]])
    expected = torch.tensor([[-1.0, 0.0, 1.0], [-1.0, -0.5, 1.0], [-1.0, -1.0, -1.0], [-1.0, -0.5, 1.0]])
    torch.testing.assert_close(scaled(image.reshape(2, 2, 1, 1, 3), -1, 1), expected.reshape(2, 2, 1, 1, 3))


# ------------------------------------------------------------------------------------- labels on disk


class Empty:
    """Labels of a source: of each case one, in which nothing is marked."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases
        self.asked: set[tuple[int, int]] = set()

    def count(self, case: int) -> int:
        return 0 if case == 0 else 2

    def read(self, case: int, index: int) -> NDArray[np.uint8]:
        self.asked.add((case, index))
        label = self.cases[case].label.copy()
        label[: 8 * (index + 1)] = 0
        return label


def test_stored_labels_are_trained_on_in_their_share(task: Task, cases: list[Case]) -> None:
    method = make("resnet34", task, samples=SamplesConfig(seggen=0, annotator=0, untouched=0, forest=1))
    source = Empty(cases)
    stored: Mapping[str, StoredLabels] = {"forest": source}
    method.train_round(method.build(0), cases, plan(steps=8), FP32, known=Known(labels=stored))
    assert source.asked == {(case, index) for case in range(1, 5) for index in (0, 1)}


def test_a_share_without_labels_is_refused(task: Task, cases: list[Case]) -> None:
    method = make("resnet34", task, samples=SamplesConfig(forest=0.5))
    with pytest.raises(ConfigError, match="share of forest, whose labels were not made"):
        method.train_round(method.build(0), cases, plan(), FP32)
