"""The quality that a label and an error map imply, and what the network is trained on, by hand."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import NetworkConfig, QCConfig
from fedqc.methods.voxresnet import VoxResNetMethod
from fedqc.metrics.overlap import overlap
from fedqc.networks.voxresnet import VoxResNetOutput
from fedqc.task import Task

FP32 = Compute(torch.device("cpu"), torch.float32)


class Knows(nn.Module):
    """A network that knows the reference: as published, it marks where the label differs from it.

    In the corrective form it says which class a voxel has.
    """

    def __init__(self, architecture: str, reference: Tensor, certainty: float = 20.0) -> None:
        super().__init__()
        self.architecture, self.reference, self.certainty = architecture, reference, certainty

    def forward(self, x: Tensor) -> VoxResNetOutput:
        said = torch.stack([self.reference == index for index in (1, 2)], dim=1)
        if self.architecture == "published":
            said = x[:, 2:].bool() != said
        logits = torch.where(said, self.certainty, -self.certainty)
        return VoxResNetOutput(logits, (logits, logits, logits, logits))


BOTH = pytest.mark.parametrize("architecture", ["corrective", "published"])


def make(
    task: Task,
    architecture: Literal["corrective", "published"] = "corrective",
    patch: tuple[int, int, int] = (96, 96, 80),
) -> VoxResNetMethod:
    network = NetworkConfig(architecture=architecture, width=4, patch=patch, error_maps="classes")
    return VoxResNetMethod(task, QCConfig(method="voxresnet", network=network))


def pair(cases: list[Case]) -> tuple[Tensor, Tensor, Tensor]:
    """Image, reference, and a label that is moved and has the classes swapped in places."""
    image = torch.from_numpy(cases[0].image)[None]
    reference = torch.from_numpy(cases[0].label)[None]
    label = reference.roll(3, dims=1)
    label[:, :, 8:] = torch.where(label[:, :, 8:] == 1, 2, label[:, :, 8:])
    return image, reference, label


@BOTH
def test_a_perfect_error_map_gives_the_true_dsc(
    architecture: Literal["corrective", "published"], task: Task, cases: list[Case]
) -> None:
    image, reference, label = pair(cases)
    method = make(task, architecture)
    found = method.judge(Knows(architecture, reference), image, label)
    truth = overlap(label, reference, task.region_indices())
    torch.testing.assert_close(found.regions, truth.dsc)
    torch.testing.assert_close(found.quality, truth.mean)
    assert found.error is not None
    assert torch.equal(found.error[0] >= 0.5, label[0] != reference[0])
    assert found.class_errors is not None
    for index in (1, 2):
        is_wrong = (label == index)[0] != (reference == index)[0]
        assert torch.equal(found.class_errors[0, index - 1] >= 0.5, is_wrong)


@BOTH
def test_the_quality_indicator_is_the_share_of_unmarked_voxels(
    architecture: Literal["corrective", "published"], task: Task, cases: list[Case]
) -> None:
    _, reference, label = pair(cases)
    case = Case(**(vars(cases[0]) | {"label": label[0].numpy()}))
    (score,) = make(task, architecture).score(Knows(architecture, reference), [case], FP32)
    assert score.quality_indicator == pytest.approx((label == reference).float().mean().item())


@BOTH
def test_an_empty_label_that_should_be_empty_is_right(
    architecture: Literal["corrective", "published"], task: Task, cases: list[Case]
) -> None:
    nothing = torch.zeros(1, 32, 16, 16, dtype=torch.uint8)
    image = torch.from_numpy(cases[0].image)[None]
    method = make(task, architecture)
    assert method.judge(Knows(architecture, nothing), image, nothing).quality.item() == 1
    something = nothing.clone()
    something[:, :4] = 1
    assert method.judge(Knows(architecture, nothing), image, something).quality.item() == 0
    assert method.judge(Knows(architecture, something), image, nothing).quality.item() == 0


@BOTH
def test_losses_of_a_perfect_a_blind_and_a_wrong_answer(
    architecture: Literal["corrective", "published"], task: Task, cases: list[Case]
) -> None:
    image, reference, label = pair(cases)
    method = make(task, architecture)
    batch = method.batch(np.random.default_rng(0), image, reference, label)
    perfect, blind, wrong = (
        method.losses(Knows(architecture, reference, c), batch) for c in (30.0, 0.0, -30.0)
    )
    assert all(part.item() == pytest.approx(0, abs=1e-4) for part in perfect.values())
    assert blind["cross_entropy"].item() == pytest.approx(math.log(2), abs=1e-5)
    for name in perfect:
        assert perfect[name] < blind[name] < wrong[name]


def test_patches_cut_image_reference_and_label_at_one_place(task: Task, cases: list[Case]) -> None:
    method = make(task, patch=(16, 8, 16))
    label = torch.from_numpy(cases[0].label)[None]
    image = torch.stack([label.float(), label.float()], dim=1)
    rng = np.random.default_rng(0)
    places = set()
    for _ in range(20):
        batch = method.batch(rng, image, label, label)
        assert batch.label.shape == (1, 16, 8, 16)
        assert torch.equal(batch.label, batch.reference)
        assert torch.equal(batch.inputs[:, 0], batch.label.float())  # of a patch as of the whole
        places.add(batch.label.sum().item())
    assert len(places) > 3


def test_intensities_are_those_of_the_whole_image_in_training_as_in_use(
    task: Task, cases: list[Case]
) -> None:
    """A patch is a part of what is judged as a whole, not an image of its own."""
    method = make(task, patch=(16, 8, 16))
    bright = cases[0].image.copy()
    bright[:, 0, 0, 0] = 100.0
    case = replace(cases[0], image=bright)
    (batch,) = method.batches([case], method.pool([case]), np.random.default_rng(0), 1, 8)
    brightest = batch.inputs[:, 0].amax(dim=(1, 2, 3))
    assert (brightest < -0.5).any()  # the patches without the bright voxel, which is in a corner
    assert brightest.max() <= 1 + 1e-5
    assert batch.inputs[:, 0].min() >= -1 - 1e-5


def test_windows_cover_a_volume_that_is_larger_than_a_patch(task: Task, cases: list[Case]) -> None:
    method = make(task, patch=(16, 8, 16))
    (score,) = method.score(method.build(0), cases[:1], FP32)
    assert score.error_map is not None
    assert score.error_map.shape == (32, 16, 16)
    assert np.isfinite(score.error_map).all()
