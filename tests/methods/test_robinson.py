"""One DSC for background, for each class and for all classes, by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedqc.cases.volumes import Case
from fedqc.config import NetworkConfig, QCConfig
from fedqc.errors import ConfigError
from fedqc.methods.rca_labels import RCALabelsMethod
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
    assert method.scored_regions() == {
        "background": (0,),
        "core": (1,),
        "rim": (2,),
        "all-classes": (1, 2),
        "whole": (1, 2),
    }
    assert list(method.scored_regions())[-2:] == ["all-classes", "whole"]
    reference = torch.zeros(1, 32, 16, 16, dtype=torch.uint8)
    reference[:, :8], reference[:, 8:16] = 1, 2
    label = reference.clone()
    label[:, 8:12] = 1  # a quarter of the volume is marked as the other class in half of it
    image = torch.zeros(1, 2, 32, 16, 16)
    batch = method.batch(torch.Generator(), image, reference, label)  # type: ignore[arg-type]  # nothing is drawn
    expected = torch.tensor([[1.0, 2 * 8 / (12 + 8), 2 * 4 / (4 + 8), 1.0, 1.0]])
    torch.testing.assert_close(batch.dsc, expected)
    loss = method.losses(Says(expected + torch.tensor([[0.1, 0.2, 0.0, 0.0, 0.0]])), batch)
    torch.testing.assert_close(loss["quality"], torch.tensor((0.01 + 0.04) / 5))


def qualities(task: Task, dsc: list[float], label: NDArray[np.uint8]) -> list[float]:
    """The quality of a label, and what is said of each region."""
    image = torch.zeros(1, 2, *label.shape)
    found = make(task).judge(Says(torch.tensor([dsc])), image, torch.from_numpy(label)[None])
    torch.testing.assert_close(found.regions, torch.tensor([dsc]))
    return found.quality.tolist()


def test_the_quality_is_the_mean_over_the_tasks_regions(task: Task, cases: list[Case]) -> None:
    """As the DSC that it is compared with is, by which exchanged classes are all wrong."""
    label = cases[0].label
    assert qualities(task, [0.9, 0.8, 0.7, 0.1, 0.6], label) == pytest.approx([(0.8 + 0.7 + 0.6) / 3])
    assert qualities(task, [1, 1.2, -0.1, 0, 0.5], label) == pytest.approx([0.5])  # as DSC are bounded
    classes = task.model_copy(update={"regions": {"core": ("core",), "rim": ("rim",)}})
    assert list(make(classes).scored_regions()) == ["background", "core", "rim", "all-classes"]
    assert qualities(classes, [1, 0, 0, 1], label) == [0]


def test_a_region_that_is_right_to_be_missing_has_no_share_in_the_quality(
    task: Task, cases: list[Case]
) -> None:
    """Neither has it in the truth, where the reference lacks it."""
    label = np.where(cases[0].label == 2, 0, cases[0].label).astype(np.uint8)
    assert qualities(task, [0.9, 0.8, 0.9, 0, 0.6], label) == pytest.approx([(0.8 + 0.6) / 2])
    assert qualities(task, [0.9, 0.8, 0.1, 0, 0.6], label) == pytest.approx([(0.8 + 0.1 + 0.6) / 3])
    empty = np.zeros_like(label)
    assert qualities(task, [0.9, 0.9, 0.7, 0, 0.8], empty) == [1]
    assert qualities(task, [0.9, 0.9, 0.1, 0, 0.2], empty) == pytest.approx([0.15])


@pytest.mark.parametrize(
    ("classes", "regions", "message"),
    [
        (("core", "background"), {"core": ("core",)}, "a class 'background', which .* rename the class"),
        (("core", "rim"), {"all-classes": ("core", "rim")}, "a region 'all-classes', .* rename the region"),
        (("core", "rim"), {"background": ("rim",)}, "a region 'background', .* rename the region"),
        (
            ("core", "rim"),
            {"core": ("core", "rim")},
            "a region 'core' that is another than .* rename the reg",
        ),
    ],
)
@pytest.mark.parametrize("kind", [RobinsonMethod, RCALabelsMethod])
def test_a_name_that_would_stand_for_two_things_is_refused(
    *, task: Task, classes: tuple[str, ...], regions: dict[str, Any], message: str, kind: type[RobinsonMethod]
) -> None:
    values = {name: (index,) for index, name in enumerate(classes, start=1)}
    named = task.model_copy(update={"classes": values, "regions": regions})
    with pytest.raises(ConfigError, match=message):
        kind(named, QCConfig(network=NetworkConfig(width=4, blocks=(1, 1))))


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
