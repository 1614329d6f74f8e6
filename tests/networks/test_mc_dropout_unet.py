import pytest
import torch
from torch import Tensor, nn

from fedqc.compute import Compute
from fedqc.networks.mc_dropout_unet import MCDropoutUNet


def small(dropout: float = 0.2) -> MCDropoutUNet:
    torch.manual_seed(0)
    return MCDropoutUNet(in_channels=2, out_channels=3, channels=(4, 6, 8), dropout=dropout)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 2, 16, 17, 10, generator=torch.Generator().manual_seed(1))


def test_parameters_counted_by_hand() -> None:
    def conv(inside: int, out: int, kernel: int) -> int:
        return kernel**3 * inside * out + out

    def norm_act(channels: int) -> int:
        """Scale, shift and the slope of the PReLU, one for all channels."""
        return 2 * channels + 1

    def down(fine: int, coarse: int) -> int:
        return conv(fine, coarse, 3) + conv(coarse, coarse, 3) + 2 * norm_act(coarse)

    def up(coarse: int, fine: int) -> int:
        return conv(coarse, fine, 1) + conv(fine, fine, 2) + conv(2 * fine, fine, 3) + 3 * norm_act(fine)

    expected = (
        conv(2, 8, 3)
        + norm_act(8)
        + down(8, 16)
        + down(16, 32)
        + down(32, 64)
        + up(64, 32)
        + up(32, 16)
        + up(16, 8)
        + conv(32, 2, 1)
        + conv(16, 2, 1)
        + conv(8, 2, 1)
        + conv(2, 2, 1)
    )
    with torch.device("meta"):
        network = MCDropoutUNet(in_channels=2, out_channels=2)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_dropout_acts_in_evaluation_too(x: Tensor) -> None:
    network = small().eval()
    with torch.inference_mode():
        assert not torch.equal(network(x), network(x))
        torch.manual_seed(7)
        first = network(x)
        torch.manual_seed(7)
        assert torch.equal(network(x), first)
        still = small(dropout=0.0).eval()
        assert torch.equal(still(x), still(x))


def test_a_fifth_of_the_values_is_dropped_after_each_block_and_nowhere_else(x: Tensor) -> None:
    network = small().eval()
    shares: list[float] = []
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(
                lambda _module, _inputs, output: shares.append((output == 0).float().mean().item())
            )
    with torch.inference_mode():
        network(x)
    assert len(shares) == 4  # two levels down and two up
    assert all(abs(share - 0.2) < 0.06 for share in shares)


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 17, 10), (9, 12, 7)])
def test_the_output_has_the_size_of_the_input(size: tuple[int, int, int]) -> None:
    network = small()
    shapes: list[torch.Size] = []
    network.down[-1].register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
    assert network(torch.randn(1, 2, *size)).shape == (1, 3, *size)
    assert shapes == [(1, 8, *network.deepest(size))]


def test_a_gradient_reaches_every_parameter(x: Tensor) -> None:
    network = small()
    network(x).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_mixed_precision_changes_little(x: Tensor) -> None:
    network = Compute(torch.device("cpu"), torch.bfloat16).place(small(dropout=0.0)).eval()
    with torch.inference_mode():
        exact = network(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = network(x.to(memory_format=torch.channels_last_3d))
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.1 * exact.std() + 0.05
