from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from fedqc.networks.voxresnet import VoxResNet, VoxResNetOutput


def small(spatial_dims: Literal[2, 3] = 3) -> VoxResNet:
    torch.manual_seed(0)
    return VoxResNet(in_channels=2, out_channels=3, spatial_dims=spatial_dims, width=8)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 2, 24, 17, 20, generator=torch.Generator().manual_seed(1))


def test_the_network_has_the_parameters_of_the_published_code() -> None:
    network = VoxResNet(in_channels=1, out_channels=3)
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_327_276
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    assert not list(network.buffers())


@pytest.mark.parametrize("size", [(16, 16, 16), (24, 17, 20), (9, 31, 8)])
def test_every_output_has_the_resolution_of_the_input(size: tuple[int, int, int]) -> None:
    network = small()
    assert network.stride == 8
    output = network(torch.randn(2, 2, *size))
    assert output.final.shape == (2, 3, *size)
    assert [side.shape for side in output.side] == [(2, 3, *size)] * 4


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (9, 8)])
def test_in_two_dimensions(size: tuple[int, int]) -> None:
    network = small(spatial_dims=2)
    assert network.stride == 8
    output = network(torch.randn(2, 2, *size))
    assert output.final.shape == (2, 3, *size)
    assert [side.shape for side in output.side] == [(2, 3, *size)] * 4
    kernels = [module.kernel_size for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert kernels.count((3, 3)) == 2 + 3 * 5
    assert kernels.count((1, 1)) == 4


def test_the_final_output_is_the_sum_of_the_side_outputs(x: Tensor) -> None:
    output = small()(x)
    torch.testing.assert_close(output.final, torch.stack(output.side).sum(dim=0))


def test_the_side_outputs_come_from_ever_deeper_depths(x: Tensor) -> None:
    """Without its second depth a network has its first side output still, but no other."""
    network = small()
    before = network(x)
    with torch.no_grad():
        for parameter in network.depths[1].parameters():
            parameter.mul_(2)
        after = network(x)
    changed = [not torch.equal(a, b) for a, b in zip(before.side, after.side, strict=True)]
    assert changed == [False, True, True, True]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_voxel_of_a_depth_becomes_a_cube_where_it_was(depth: int) -> None:
    """Depths of odd sizes are cropped at the far end, so the side output stays where the input is."""
    network = small()
    side = 2**depth
    head = network.heads[depth]
    features = torch.zeros(1, 8, 5, 3, 3)
    features[0, :, 1, 2, 0] = 1
    change = (head(features) - head(torch.zeros_like(features)))[0].abs().sum(dim=0)
    expected = torch.zeros(5 * side, 3 * side, 3 * side, dtype=torch.bool)
    expected[side : 2 * side, 2 * side : 3 * side, :side] = True
    assert torch.equal(change > 1e-6, expected)

    size = (5 * side - 1, 3 * side, 3 * side - 1)
    features = torch.randn(1, 8, 5, 3, 3)
    network.depths[depth] = Constant(features)
    output = network(torch.randn(1, 2, *size))
    x, y, z = size
    torch.testing.assert_close(output.side[depth], head(features)[:, :, :x, :y, :z])


class Constant(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _x: Tensor) -> Tensor:
        return self.value


def test_the_first_convolution_of_a_module_stays_within_its_slice() -> None:
    network = small()
    kernels = [module.kernel_size for module in network.modules() if isinstance(module, nn.Conv3d)]
    assert kernels.count((3, 3, 1)) == 1 + 6
    assert kernels.count((3, 3, 3)) == 1 + 3 + 6


def test_a_module_starts_from_its_input() -> None:
    """Pre-activation: what the convolutions find is added to the input, and nothing comes after that."""
    module = small().depths[1][3]  # type: ignore[index]  # a Sequential
    with torch.no_grad():
        module.conv2.weight.zero_()
        module.conv2.bias.zero_()
    x = torch.randn(1, 8, 4, 4, 4)
    torch.testing.assert_close(module(x), x)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_gradient_reaches_every_parameter(spatial_dims: Literal[2, 3]) -> None:
    network = small(spatial_dims)
    output = network(torch.randn(2, 2, *(17, 24, 20)[:spatial_dims]))
    output.final.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_deepest_loss_trains_the_first_convolution(x: Tensor) -> None:
    network = small()
    network(x).side[3].square().sum().backward()
    first = next(network.parameters())
    assert first.grad is not None
    assert first.grad.abs().max() > 1e-3


def test_samples_of_a_batch_do_not_see_each_other(x: Tensor) -> None:
    network = small()
    with torch.inference_mode():
        together = network(x).final
        alone = torch.cat([network(one[None]).final for one in x])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_mixed_precision(x: Tensor) -> None:
    network = small()
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    x = x.to(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        exact = network(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output: VoxResNetOutput = network(x)
    assert output.final.dtype == torch.bfloat16
    for found, expected in zip((output.final, *output.side), (exact.final, *exact.side), strict=True):
        assert found.isfinite().all()
        assert (found.float() - expected).abs().mean() < 0.05 * expected.std()


def test_the_seed_decides_the_weights() -> None:
    first, again = small().state_dict(), small().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
