"""Layers that are PyTorch's own in another way: the same values, gradients and names."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fedqc.networks.layers import HalvingConv3d, InstanceNorm3d

LAYOUT = torch.channels_last_3d


def volume(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=LAYOUT)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instance_norm_is_that_of_pytorch_in_the_layout_that_came(affine: bool, dtype: torch.dtype) -> None:
    ours, theirs = InstanceNorm3d(6, affine=affine), nn.InstanceNorm3d(6, affine=affine)
    if affine:
        with torch.no_grad():
            ours.weight.copy_(torch.linspace(0.5, 2, 6))
            ours.bias.copy_(torch.linspace(-1, 1, 6))
    theirs.load_state_dict(ours.state_dict())
    x = volume(2, 6, 5, 4, 3).mul(3).add(2).to(dtype)
    expected = theirs(x)
    found = ours(x)  # with gradients
    assert torch.equal(found, expected)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        found = ours(x)
    assert found.is_contiguous(memory_format=LAYOUT)
    assert not expected.is_contiguous(memory_format=LAYOUT)  # else this layer is of no use any more
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)


def test_instance_norm_of_one_voxel_is_refused_as_in_pytorch() -> None:
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        InstanceNorm3d(2)(volume(1, 2, 1, 1, 1))


@pytest.mark.parametrize("kernel", [3, 5, 7, 9])
@pytest.mark.parametrize("size", [(8, 10, 12), (9, 10, 7), (4, 4, 4)])
def test_halving_is_the_convolution_with_stride_2(kernel: int, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    layer = HalvingConv3d(3, 4, kernel)
    plain = nn.Conv3d(3, 4, kernel, stride=2, padding=kernel // 2, bias=False)
    plain.load_state_dict(layer.state_dict())
    # Small integers have exact sums in bf16.
    with torch.no_grad():
        plain.weight.copy_((plain.weight * 20).round().sign())
        layer.weight.copy_(plain.weight)
    x = volume(2, 3, *size).sign() * (volume(2, 3, *size, seed=1) > 1.2)
    expected = plain(x)
    assert torch.equal(layer(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape
    assert torch.equal(found.float(), expected)
    assert found.is_contiguous(memory_format=LAYOUT)


def test_the_gradient_of_halving() -> None:
    torch.manual_seed(0)
    layer = HalvingConv3d(3, 4, 7)
    plain = copy.deepcopy(layer)
    x, again = (volume(2, 3, 12, 8, 9).requires_grad_() for _ in range(2))
    plain(x).square().sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(again).float().square().sum().backward()
    assert x.grad is not None
    assert again.grad is not None
    assert layer.weight.grad is not None
    assert plain.weight.grad is not None
    assert (again.grad - x.grad).norm() < 0.02 * x.grad.norm()
    assert (layer.weight.grad - plain.weight.grad).norm() < 0.02 * plain.weight.grad.norm()
