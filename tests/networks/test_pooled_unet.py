import pytest
import torch
from torch import Tensor, nn

from fedqc.networks.pooled_unet import PooledUNet


def small(dropout: float = 0.0) -> PooledUNet:
    torch.manual_seed(0)
    return PooledUNet(in_channels=2, n_outputs=3, width=4, dropout=dropout)


@pytest.fixture
def x() -> Tensor:
    """Not noise alone, whose mean after a norm says nothing: a ball and a slab."""
    noise = torch.randn(2, 2, 32, 17, 20, generator=torch.Generator().manual_seed(1))
    noise[0, :, 8:20, 4:12, 5:15] += 3
    noise[1, :, 3:6] -= 4
    return noise


def test_parameters_counted_by_hand() -> None:
    def two(inside: int, out: int) -> int:
        """Two 3x3x3 convolutions without bias, each with an affine norm."""
        return 27 * inside * out + 27 * out * out + 2 * 2 * out

    def up(deep: int, skip: int, out: int, above: int) -> int:
        """A 2x2x2 transposed convolution with bias, then two convolutions on it and the skip."""
        return 8 * deep * above + above + two(above + skip, out)

    encoder = two(5, 32) + two(32, 32) + two(32, 64) + two(64, 128) + two(128, 256)
    decoder = up(256, 128, 128, 128) + up(128, 64, 64, 64) + up(64, 32, 32, 32) + up(32, 32, 32, 32)
    with torch.device("meta"):
        network = PooledUNet(in_channels=5, n_outputs=2)
    assert sum(parameter.numel() for parameter in network.parameters()) == encoder + decoder + 2 * 32 + 2


def test_the_head_sees_the_mean_of_the_last_feature_map(x: Tensor) -> None:
    network = small()
    maps: list[Tensor] = []
    network.unet.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    quality = network(x)
    assert maps[0].shape == (2, 4, 32, 17, 20)
    pooled = maps[0].flatten(2).mean(dim=2)
    torch.testing.assert_close(quality, pooled @ network.quality.weight.T + network.quality.bias)


@pytest.mark.parametrize("size", [(32, 16, 16), (16, 47, 33), (40, 31, 16)])
def test_deepest_is_the_shape_of_the_deepest_feature_map(size: tuple[int, int, int]) -> None:
    network = small()
    shapes: list[torch.Size] = []
    deepest = network.unet.get_submodule("down_4")
    deepest.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))

    assert network(torch.randn(1, 2, *size)).shape == (1, 3)
    assert shapes == [(1, 32, *network.deepest(size))]


def test_what_the_pooled_map_says_depends_on_the_input(x: Tensor) -> None:
    """Instance norm takes the mean away; the activation after it leaves what the head needs."""
    with torch.inference_mode():
        first, second = small().eval()(x)
    assert (first - second).abs().max() > 1e-3


def test_a_gradient_reaches_every_parameter(x: Tensor) -> None:
    network = small()
    network(x).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dropout_acts_in_training_only(x: Tensor) -> None:
    network = small(dropout=0.3)
    with torch.no_grad():
        assert not torch.equal(network(x), network(x))
        network.eval()
        assert torch.equal(network(x), network(x))
    assert not any(isinstance(module, nn.Dropout3d) for module in small().modules())


def test_mixed_precision_with_the_head_in_fp32(x: Tensor) -> None:
    network = small().eval()
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    x = x.to(memory_format=torch.channels_last_3d)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        quality = network(x)
        assert network.unet(x).dtype == torch.bfloat16
    assert quality.dtype == torch.float32
    # Not merely cast back: values of bf16 would be unchanged by rounding them to bf16.
    assert not torch.equal(quality, quality.bfloat16().float())
    with torch.no_grad():
        torch.testing.assert_close(quality, network(x), atol=0.05, rtol=0.05)


def test_the_seed_decides_the_weights() -> None:
    first, again = small().state_dict(), small().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
