"""Quality and error map follow from the corrected label: both are recomputed by hand here."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedqc.networks.corrective_qcresunet import CorrectiveQCResUNet

REGIONS = ((1,), (2,), (1, 2))


@pytest.fixture
def network() -> CorrectiveQCResUNet:
    torch.manual_seed(0)
    network = CorrectiveQCResUNet(in_channels=3, regions=REGIONS, n_classes=2, width=8, blocks=(1, 1, 1))
    return network.eval()


@pytest.fixture
def label() -> Tensor:
    return torch.randint(0, 3, (2, 16, 24, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def inputs(label: Tensor) -> Tensor:
    image = torch.randn(2, 1, 16, 24, 16, generator=torch.Generator().manual_seed(2))
    one_hot = F.one_hot(label, 3)[..., 1:].permute(0, 4, 1, 2, 3).float()
    return torch.cat([image, one_hot], dim=1)


def test_error_map_is_the_probability_of_another_class(
    network: CorrectiveQCResUNet, inputs: Tensor, label: Tensor
) -> None:
    output = network(inputs)

    assert output.corrected is not None
    probability = output.corrected.exp()
    torch.testing.assert_close(probability.sum(dim=1), torch.ones(2, 16, 24, 16))
    expected = 1 - probability.gather(1, label[:, None])[:, 0]
    torch.testing.assert_close(output.error_logits.sigmoid(), expected)


def test_error_map_stays_exact_where_a_probability_rounds_to_one(
    network: CorrectiveQCResUNet, inputs: Tensor
) -> None:
    with torch.no_grad():
        network.corrected.weight.zero_()
        network.state_dict()["corrected.bias"].copy_(torch.tensor([60.0, 0.0, 0.0]))
    logits = network(inputs).error_logits
    background = inputs[:, 1:].sum(dim=1) == 0
    expected = torch.log(torch.tensor(2.0)) - 60
    torch.testing.assert_close(logits[background], expected.expand(int(background.sum())))


def test_quality_starts_as_soft_overlap(network: CorrectiveQCResUNet, inputs: Tensor, label: Tensor) -> None:
    output = network(inputs)

    assert output.corrected is not None
    probability = output.corrected.exp()
    expected = []
    for region in REGIONS:
        ours = sum((label == index).float() for index in region)
        theirs = sum(probability[:, index] for index in region)
        both = (ours * theirs).sum(dim=(1, 2, 3))
        expected.append((2 * both + 1) / (ours + theirs).sum(dim=(1, 2, 3)).add(1))
    regions = torch.stack(expected, dim=1)
    torch.testing.assert_close(output.quality[:, 1:], regions)
    torch.testing.assert_close(output.quality[:, 0], regions.mean(dim=1))


def test_the_correction_is_learned(network: CorrectiveQCResUNet, inputs: Tensor) -> None:
    before = network(inputs).quality
    with torch.no_grad():
        network.state_dict()["quality.2.bias"].fill_(0.25)
    torch.testing.assert_close(network(inputs).quality, before + 0.25)


@pytest.mark.parametrize("blocks", [(1, 1, 1), (1, 2, 3, 1)])
def test_any_depth(blocks: tuple[int, ...]) -> None:
    network = CorrectiveQCResUNet(in_channels=4, regions=((1,),), n_classes=1, width=4, blocks=blocks)
    assert network.stride == 2 ** len(blocks)
    size = (network.stride, 2 * network.stride, network.stride)

    output = network(torch.randn(2, 4, *size))

    assert output.quality.shape == (2, 2)
    assert output.error_logits.shape == (2, *size)
    assert output.corrected is not None
    assert output.corrected.shape == (2, 2, *size)
    losses = output.quality.sum() + output.error_logits.sum()
    losses.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
