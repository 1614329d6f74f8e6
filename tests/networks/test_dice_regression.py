import pytest
import torch

from fedqc.networks.dice_regression import DiceRegressionNet


def test_parameters_counted_by_hand() -> None:
    with torch.device("meta"):
        network = DiceRegressionNet(in_channels=2, n_outputs=1, size=(128, 128, 128))
    convolutions = sum(27 * a * b + b for a, b in ((2, 16), (16, 32), (32, 64), (64, 128)))
    assert sum(p.numel() for p in network.parameters()) == convolutions + 128 * 8**3 + 1


@pytest.mark.parametrize("size", [(16, 24, 32), (8, 20, 17)])
def test_any_size_that_it_was_made_for(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    network = DiceRegressionNet(in_channels=3, n_outputs=4, size=size, channels=(2, 3, 4, 5))
    found = network(torch.randn(2, 3, *size))
    assert found.shape == (2, 4)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_the_output_is_linear_and_in_fp32() -> None:
    torch.manual_seed(0)
    network = DiceRegressionNet(in_channels=1, n_outputs=1, size=(16, 16, 16), channels=(2, 2, 2, 2))
    x = torch.randn(8, 1, 16, 16, 16)
    with torch.no_grad():
        network.quality.weight *= 100
        network.quality.bias.zero_()
        found = network(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = network(x)
    assert found.min() < 0 or found.max() > 1
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, rough.bfloat16().float())
