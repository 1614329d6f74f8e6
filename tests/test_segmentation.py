from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses.dice import DiceCELoss
from numpy.typing import NDArray
from torch import Tensor, nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import SegmentationConfig
from fedqc.errors import ConfigError
from fedqc.methods.base import RoundPlan
from fedqc.segmentation import Segmentation, SegmentationBatch
from fedqc.task import Task

FP32 = Compute(torch.device("cpu"), torch.float32)
BF16 = Compute(torch.device("cpu"), torch.bfloat16)
PLAN = RoundPlan(seed=0, site="hospital-1", round=1, rounds=2, steps=2, batch_size=3)
SMALL = SegmentationConfig(channels=(4, 8))


@pytest.fixture
def task() -> Task:
    return Task(
        name="blobs",
        modalities=("T1", "T2"),
        classes={"core": (1,), "rim": (2,)},
        regions={"rim": ("rim",), "whole": ("core", "rim")},
        spacing=(1.0, 1.0, 1.0),
        size=(24, 16, 16),
    )


@pytest.fixture
def segmentation(task: Task) -> Segmentation:
    return Segmentation(task, SMALL)


def make_case(number: int) -> Case:
    rng = np.random.default_rng(number)
    label: NDArray[np.uint8] = np.zeros((24, 16, 16), dtype=np.uint8)
    x, y, z = rng.integers(2, 6, 3)
    label[x : x + 14, y : y + 8, z : z + 8] = 2
    label[x + 3 : x + 10, y + 2 : y + 6, z + 2 : z + 6] = 1
    image = np.stack([label, 2.0 - label]) + rng.normal(0, 0.2, (2, *label.shape))
    return Case(
        id=f"case-{number}",
        patient=f"patient-{number}",
        image=image.astype(np.float32),
        label=label,
        affine=np.eye(4),
        native_shape=(24, 16, 16),
        native_affine=np.eye(4),
    )


@pytest.fixture
def cases() -> list[Case]:
    return [make_case(number) for number in range(5)]


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def trained(segmentation: Segmentation, cases: Sequence[Case], **changes: Any) -> nn.Module:
    network = segmentation.build(0)
    segmentation.train_round(network, cases, RoundPlan(**(vars(PLAN) | changes)), FP32)
    return network


class Reads(nn.Module):
    """Reads the class off the first channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.shapes.append(tuple(image.shape[2:]))
        wanted = image[:, :1] * self.scale
        return torch.cat([-((wanted - index) ** 2) for index in range(3)], dim=1)


# --------------------------------------------------------------------------------------------------- build


def test_the_network_depends_on_nothing_but_the_seed(segmentation: Segmentation) -> None:
    state = torch.get_rng_state()
    first = segmentation.build(7)
    assert torch.equal(torch.get_rng_state(), state)  # other draws are not disturbed
    torch.rand(3)
    assert same(segmentation.build(7), first)
    assert not same(segmentation.build(8), first)


def test_the_network_answers_voxel_by_voxel_and_keeps_no_statistics(segmentation: Segmentation) -> None:
    network = segmentation.build(0)
    assert network(torch.zeros(1, 2, 24, 16, 16)).shape == (1, 3, 24, 16, 16)
    assert list(network.buffers()) == []
    assert segmentation.stride == 2


def test_a_size_that_does_not_fit(task: Task) -> None:
    with pytest.raises(ConfigError, match="size along y is 18, which the network's stride of 4"):
        Segmentation(task.model_copy(update={"size": (24, 18, 16)}), SegmentationConfig())
    four = SegmentationConfig(channels=(4, 4, 4, 4))
    with pytest.raises(ConfigError, match=r"4 levels leave one voxel of 8x8x8; use fewer"):
        Segmentation(task.model_copy(update={"size": (8, 8, 8)}), four)
    Segmentation(task.model_copy(update={"size": (16, 8, 8)}), four)


# ---------------------------------------------------------------------------------------------- train_round


def test_batches_draw_every_case_before_one_again(cases: list[Case]) -> None:
    light = [np.full_like(case.image, number + 1.0) for number, case in enumerate(cases)]
    marked = [Case(**(vars(case) | {"image": image})) for case, image in zip(cases, light, strict=True)]
    made = list(Segmentation.batches(marked, np.random.default_rng(0), 5, 2, FP32.device))
    assert [batch.image.shape for batch in made] == [(2, 2, 24, 16, 16)] * 5
    seen = [round(one.median().item()) for batch in made for one in batch.image]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [1, 2, 3, 4, 5]
    assert seen[:5] != seen[5:]


def test_image_and_label_stay_together(cases: list[Case]) -> None:
    for batch in Segmentation.batches(cases, np.random.default_rng(0), 4, 3, FP32.device):
        inside = batch.label > 0
        assert batch.label.dtype == torch.uint8
        assert batch.image[:, 0][inside].mean() > 1
        assert batch.image[:, 0][~inside].mean() < 0.2


def test_the_loss_is_dice_plus_cross_entropy() -> None:
    logits = torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(2, 8, 8, 8, dtype=torch.uint8)
    label[0, 2:6], label[0, 3:5, 4:] = 1, 2  # the second case has neither class

    class Says(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return logits

    losses = Segmentation.losses(Says(), SegmentationBatch(torch.zeros(2, 1, 8, 8, 8), label))
    monai = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    assert set(losses) == {"dice", "cross_entropy"}
    torch.testing.assert_close(sum(losses.values()), monai(logits, label[:, None].long()))


def test_one_seed_one_result(segmentation: Segmentation, cases: list[Case]) -> None:
    torch.manual_seed(3)
    first = trained(segmentation, cases)
    torch.manual_seed(4)
    assert same(trained(segmentation, cases), first)
    for change in ({"seed": 1}, {"site": "hospital-2"}, {"round": 2}):
        assert not same(trained(segmentation, cases, **change), first)


def test_what_a_round_reports(segmentation: Segmentation, cases: list[Case]) -> None:
    told: list[tuple[int, int]] = []
    plan = RoundPlan(seed=0, site="a", round=2, rounds=3, steps=2, batch_size=3)
    result = segmentation.train_round(
        segmentation.build(0), cases, plan, FP32, lambda done, of: told.append((done, of))
    )
    assert result.samples == 6
    assert set(result.losses) == {"dice", "cross_entropy", "loss"}
    assert told == [(3, 6), (4, 6)]


def test_it_learns_what_the_image_shows(task: Task, cases: list[Case]) -> None:
    segmentation = Segmentation(task, SegmentationConfig(channels=(8, 16), learning_rate=1e-2))
    network = segmentation.build(0)
    plan = RoundPlan(seed=0, site="a", round=1, rounds=1, steps=40, batch_size=2)
    unseen = [make_case(99)]
    before = next(segmentation.evaluate(network, unseen, FP32)).dice
    segmentation.train_round(network, cases, plan, FP32)
    after = next(segmentation.evaluate(network, unseen, FP32)).dice
    assert before < 0.5
    assert after > 0.8


def test_bf16_is_not_used_where_its_gradients_are_wrong(task: Task, cases: list[Case]) -> None:
    small = task.model_copy(update={"size": (24, 16, 16)})
    deep = Segmentation(small, SegmentationConfig(channels=(4, 4, 4, 4)))  # two voxels along y
    networks = [deep.build(0), deep.build(0)]
    for network, compute in zip(networks, (FP32, BF16), strict=True):
        deep.train_round(network, cases, PLAN, compute)
    assert same(*networks)
    shallow = Segmentation(small, SMALL)
    networks = [shallow.build(0), shallow.build(0)]
    for network, compute in zip(networks, (FP32, BF16), strict=True):
        shallow.train_round(network, cases, PLAN, compute)
    assert not same(*networks)


# ------------------------------------------------------------------------------------------------- evaluate


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_by_hand(segmentation: Segmentation, batch_size: int) -> None:
    case = make_case(0)
    image = np.stack([case.label, case.label]).astype(np.float32)
    right = Case(**(vars(case) | {"id": "right", "image": image}))
    shown = image.copy()
    shown[0][case.label == 1] = 2  # the core is taken for rim: 14*8*8 voxels of rim, of which 7*4*4 are core
    wrong = Case(**(vars(case) | {"id": "wrong", "image": shown}))
    only_core = Case(
        **(vars(case) | {"id": "core", "label": np.where(case.label == 1, 1, 0).astype(np.uint8)})
    )
    shown_core = Case(**(vars(only_core) | {"image": np.stack([only_core.label] * 2).astype(np.float32)}))
    first, second, third = segmentation.evaluate(Reads(), [right, wrong, shown_core], FP32, batch_size)
    assert (first.case_id, first.patient, first.dice) == ("right", "patient-0", 1.0)
    assert first.regions == {"rim": 1.0, "whole": 1.0}
    rim = 2 * (896 - 112) / (896 - 112 + 896)
    assert second.regions == pytest.approx({"rim": rim, "whole": 1.0})
    assert second.dice == pytest.approx((rim + 1) / 2)
    assert third.regions == {"rim": 1.0, "whole": 1.0}  # no rim in either
    assert third.dice == 1.0


# -------------------------------------------------------------------------------------------------- predict


@pytest.mark.parametrize("shape", [(24, 16, 16), (30, 41, 17), (9, 16, 40), (5, 7, 9)])
def test_an_image_of_any_size(segmentation: Segmentation, shape: tuple[int, int, int]) -> None:
    expected = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    network = Reads()
    image = np.stack([expected, expected]).astype(np.float32)
    found = segmentation.predict(network, image, FP32)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)
    assert set(network.shapes) == {(24, 16, 16)}  # always windows of the task's size


def test_windows_and_whole_agree_where_both_fit(segmentation: Segmentation, cases: list[Case]) -> None:
    network = trained(segmentation, cases)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = segmentation.predict(network, cases[0].image, FP32)
    with torch.inference_mode():
        expected = network.eval()(torch.from_numpy(cases[0].image)[None])[0].argmax(dim=0)
    assert np.array_equal(found, expected.numpy())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
