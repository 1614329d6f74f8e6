"""One DSC for background, for each class and for all classes, by hand."""

import torch
from torch import Tensor, nn

from fedqc.cases.volumes import Case
from fedqc.config import NetworkConfig, QCConfig
from fedqc.methods.robinson import RobinsonMethod, short_axes
from fedqc.task import Task


class Says(nn.Module):
    """A network that always says the same."""

    def __init__(self, dsc: Tensor) -> None:
        super().__init__()
        self.dsc = dsc

    def forward(self, _: Tensor) -> Tensor:
        return self.dsc


def make(task: Task) -> RobinsonMethod:
    return RobinsonMethod(task, QCConfig(network=NetworkConfig(width=4, blocks=(1, 1))))


def test_what_is_predicted_and_what_is_lost(task: Task) -> None:
    method = make(task)
    assert list(method.scored_regions()) == ["background", "core", "rim", "all-classes"]
    reference = torch.zeros(1, 32, 16, 16, dtype=torch.uint8)
    reference[:, :8], reference[:, 8:16] = 1, 2
    label = reference.clone()
    label[:, 8:12] = 1  # a quarter of the volume is marked as the other class in half of it
    image = torch.zeros(1, 2, 32, 16, 16)
    batch = method.batch(torch.Generator(), image, reference, label)  # type: ignore[arg-type]  # nothing is drawn
    expected = torch.tensor([[1.0, 2 * 8 / (12 + 8), 2 * 4 / (4 + 8), 1.0]])
    torch.testing.assert_close(batch.dsc, expected)
    loss = method.losses(Says(expected + torch.tensor([[0.1, 0.2, 0.0, 0.0]])), batch)
    torch.testing.assert_close(loss["quality"], torch.tensor((0.01 + 0.04) / 4))


def test_the_quality_is_that_of_all_classes_together(task: Task, cases: list[Case]) -> None:
    compute = make(task)
    found = compute.judge(
        Says(torch.tensor([[0.9, 0.8, 0.7, 0.6]])),
        torch.from_numpy(cases[0].image)[None],
        torch.from_numpy(cases[0].label)[None],
    )
    torch.testing.assert_close(found.quality, torch.tensor([0.6]))
    torch.testing.assert_close(found.regions, torch.tensor([[0.9, 0.8, 0.7, 0.6]]))


def test_intensities_in_the_unit_interval_and_the_label_with_its_background(
    task: Task, cases: list[Case]
) -> None:
    image, label = torch.from_numpy(cases[0].image)[None], torch.from_numpy(cases[0].label)[None]
    inputs = make(task).inputs(image, label)
    assert inputs.shape == (1, 2 + 3, 32, 16, 16)
    for channel in (0, 1):
        assert inputs[0, channel].min() == 0
        assert inputs[0, channel].max() == 1
    assert torch.equal(inputs[:, 2:].argmax(dim=1).to(torch.uint8), label)


def test_a_stack_of_few_slices_keeps_them(task: Task) -> None:
    stack = task.model_copy(update={"size": (224, 224, 8)})
    assert short_axes(stack) == (False, False, True)
    assert make(stack).deepest()[2] == 8
    assert short_axes(task.model_copy(update={"size": (40, 56, 40)})) == (False, False, False)
