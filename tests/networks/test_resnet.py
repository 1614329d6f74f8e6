"""MONAI's ResNet, with instance norm, is the independent implementation to compare with."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedqc.networks.qcresunet import QCResUNet
from fedqc.networks.resnet import ResNet


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def full_size(*, bottleneck: bool) -> ResNet:
    with torch.device("meta"):  # sizes are all that is asked for
        return ResNet(in_channels=5, n_outputs=1, bottleneck=bottleneck)


def small(*, bottleneck: bool = False, short_axes: tuple[bool, bool, bool] = (False, False, False)) -> ResNet:
    torch.manual_seed(0)
    return ResNet(
        in_channels=2, n_outputs=3, width=4, blocks=(1, 2, 1), bottleneck=bottleneck, short_axes=short_axes
    )


def monai(
    bottleneck: bool, blocks: tuple[int, ...], widths: tuple[int, ...], in_channels: int, n_outputs: int
) -> nn.Module:
    """MONAI's ResNet, whose `norm` option does not reach its blocks: every batch norm is replaced here."""
    from monai.networks.nets import resnet

    network: nn.Module = resnet.ResNet(
        resnet.ResNetBottleneck if bottleneck else resnet.ResNetBlock,
        list(blocks),
        list(widths),
        n_input_channels=in_channels,
        num_classes=n_outputs,
        conv1_t_stride=2,
        bias_downsample=False,
    )
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm3d):
                setattr(parent, name, nn.InstanceNorm3d(child.num_features, affine=True))
    return network


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 2, 40, 33, 24, generator=torch.Generator().manual_seed(1))


def test_resnet_34_has_the_parameters_of_the_published_encoder() -> None:
    assert count(full_size(bottleneck=False)) == 63_557_953


def test_resnet_34_is_the_encoder_of_qcresunet(x: Tensor) -> None:
    torch.manual_seed(0)
    qc = QCResUNet(in_channels=2, n_outputs=3, width=4, blocks=(1, 2, 1)).eval()
    network = small().eval()
    network.load_state_dict({name: qc.state_dict()[name] for name in network.state_dict()})

    even = x[:, :, :32, :32, :16]
    torch.testing.assert_close(network(even), qc(even).quality)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_as_many_parameters_as_monai_at_full_size(bottleneck: bool) -> None:
    with torch.device("meta"):
        other = monai(bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), 5, 1)
    assert count(full_size(bottleneck=bottleneck)) == count(other)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_says_what_monai_says_with_the_same_weights(bottleneck: bool, x: Tensor) -> None:
    blocks, widths = (1, 2, 1, 1), (4, 8, 16, 32)
    network = ResNet(in_channels=2, n_outputs=3, width=4, blocks=blocks, bottleneck=bottleneck).eval()
    other = monai(bottleneck, blocks, widths, 2, 3).eval()
    mine, theirs = network.state_dict(), other.state_dict()
    for name in mine:  # not only the initial ones of every norm
        mine[name].copy_(torch.randn_like(mine[name]) * 0.2)
    assert [value.shape for value in mine.values()] == [value.shape for value in theirs.values()]
    other.load_state_dict(dict(zip(theirs, mine.values(), strict=True)))

    torch.testing.assert_close(network(x), other(x))


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("size", [(32, 32, 32), (33, 40, 17), (16, 24, 47)])
@pytest.mark.parametrize("short", [(False, False, False), (False, False, True), (True, False, True)])
def test_deepest_is_the_shape_of_the_last_feature_map(
    bottleneck: bool, size: tuple[int, int, int], short: tuple[bool, bool, bool]
) -> None:
    network = small(bottleneck=bottleneck, short_axes=short)
    shapes: list[torch.Size] = []
    network.layers.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))

    assert network(torch.randn(1, 2, *size)).shape == (1, 3)
    assert shapes == [(1, 64 if bottleneck else 16, *network.deepest(size))]


def test_deepest_by_hand() -> None:
    stack = ResNet(in_channels=1, n_outputs=1, width=1, bottleneck=True, short_axes=(False, False, True))
    assert stack.deepest((224, 224, 8)) == (7, 7, 8)
    assert full_size(bottleneck=False).deepest((160, 192, 170)) == (5, 6, 6)


def test_short_axes_change_no_weight() -> None:
    stack, volume = small(short_axes=(False, False, True)).state_dict(), small().state_dict()
    assert all(torch.equal(stack[name], volume[name]) for name in volume)


def test_nothing_is_pooled_over_a_short_axis(x: Tensor) -> None:
    pooled = small(short_axes=(False, False, True)).pool(x)
    slices = [F.max_pool2d(one, 3, stride=2, padding=1) for one in x.unbind(dim=4)]
    assert torch.equal(pooled, torch.stack(slices, dim=4))


def test_a_short_axis_is_seen_whole(x: Tensor) -> None:
    """A change in any of the slices changes the quality."""
    network = small(short_axes=(False, False, True)).eval()
    image = x[:1, :, :, :, :4].clone().requires_grad_()
    network(image).sum().backward()
    assert image.grad is not None
    assert image.grad.abs().amax(dim=(0, 1, 2, 3)).min() > 0


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_gradient_reaches_every_parameter(bottleneck: bool, x: Tensor) -> None:
    network = small(bottleneck=bottleneck)
    network(x).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("bottleneck", [False, True])
def test_dropout_in_every_block_and_in_training_only(bottleneck: bool, x: Tensor) -> None:
    network = small(bottleneck=bottleneck)
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout3d)] == [0.3] * 4
    with torch.no_grad():
        assert not torch.equal(network(x), network(x))
        network.eval()
        assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("bottleneck", [False, True])
def test_mixed_precision_with_the_head_in_fp32(bottleneck: bool, x: Tensor) -> None:
    network = small(bottleneck=bottleneck).eval()
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    x = x.to(memory_format=torch.channels_last_3d)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        quality = network(x)
        assert network.stem(x).dtype == torch.bfloat16
    assert quality.dtype == torch.float32
    # Not merely cast back: values of bf16 would be unchanged by rounding them to bf16.
    assert not torch.equal(quality, quality.bfloat16().float())
    with torch.no_grad():
        torch.testing.assert_close(quality, network(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_the_seed_decides_the_weights(bottleneck: bool) -> None:
    first, again = small(bottleneck=bottleneck).state_dict(), small(bottleneck=bottleneck).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
