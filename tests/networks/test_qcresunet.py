import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedqc.networks.qcresunet import ChannelAttention, QCOutput, QCResUNet, SideMaps


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def published(width: int) -> QCResUNet:
    with torch.device("meta"):  # sizes are all that is asked for
        return QCResUNet(in_channels=5, n_outputs=1, width=width, blocks=(3, 4, 6, 3), stem_stride=2)


def small(stem_stride: int = 2) -> QCResUNet:
    torch.manual_seed(0)
    return QCResUNet(
        in_channels=3, n_outputs=4, width=4, blocks=(1, 1, 1, 1), stem_stride=stem_stride, dropout=0.3
    )


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 32, 32, generator=torch.Generator().manual_seed(1))


def test_the_published_network_has_the_published_parameters() -> None:
    network = published(64)
    assert count(network) == 66_151_042
    assert count(network.stem, network.layers, network.quality) == 63_557_953


def test_the_journal_version_without_its_channel_attention() -> None:
    assert count(published(32)) == 16_569_666


def test_the_encoder_is_a_resnet_34_with_instance_norm() -> None:
    network = published(64)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    strided = [m for m in network.layers.modules() if isinstance(m, nn.Conv3d) and m.kernel_size == (3, 3, 3)]
    assert len(strided) == 32  # 2 convolutions in each of 3 + 4 + 6 + 3 blocks; with stem and head 34 layers
    assert sum(isinstance(module, nn.Dropout3d) for module in network.modules()) == 16
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout3d)} == {0.3}
    assert network.deepest((96, 64, 33)) == (3, 2, 2)


@pytest.mark.parametrize(("stem_stride", "stride"), [(2, 32), (1, 16)])
def test_shapes(stem_stride: int, stride: int, x: Tensor) -> None:
    network = small(stem_stride=stem_stride)
    assert network.deepest((64, 32, 32)) == (64 // stride, 32 // stride, 32 // stride)
    output = network(x)
    assert output.quality.shape == (2, 4)
    assert output.error_logits.shape == (2, 64, 32, 32)
    assert output.corrected is None
    assert output.quality.isfinite().all()
    assert output.error_logits.isfinite().all()


@pytest.mark.parametrize("attention", [False, True])
def test_a_size_that_halving_does_not_divide(attention: bool) -> None:
    network = QCResUNet(
        in_channels=3, n_outputs=4, n_error_maps=2, width=4, blocks=(1, 1, 1, 1), attention=attention
    )
    output = network(torch.randn(1, 3, 40, 56, 33, generator=torch.Generator().manual_seed(1)))
    assert network.deepest((40, 56, 33)) == (2, 2, 2)
    assert output.quality.isfinite().all()
    assert output.class_error_logits is not None
    assert output.class_error_logits.shape == (1, 2, 40, 56, 33)


def gradients(network: QCResUNet, value: Tensor) -> dict[str, bool]:
    """Whether a gradient of `value` reaches the parameters of each part."""
    network.zero_grad()
    value.backward()  # type: ignore[no-untyped-call]
    parts = dict(network.named_children())
    parts |= {f"layer {number}": layer for number, layer in enumerate(network.layers, start=1)}
    return {
        name: any(p.grad is not None and bool(p.grad.any()) for p in part.parameters())
        for name, part in parts.items()
        if any(True for _ in part.parameters())
    }


def test_the_last_layer_feeds_the_quality_only_and_the_decoder_the_error_map_only(x: Tensor) -> None:
    network = small()
    output = network(x)
    of_quality = gradients(network, output.quality.sum())
    of_errors = gradients(network, network(x).error_logits.square().sum())
    for shared in ("stem", "layer 1", "layer 2", "layer 3"):
        assert of_quality[shared]
        assert of_errors[shared]
    assert of_quality["layer 4"]
    assert of_quality["quality"]
    assert not of_errors["layer 4"]
    assert not of_errors["quality"]
    assert of_errors["ups"]
    assert of_errors["error"]
    assert not of_quality["ups"]
    assert not of_quality["error"]


def test_samples_of_a_batch_do_not_see_each_other(x: Tensor) -> None:
    network = small().eval()
    with torch.inference_mode():
        together = network(x)
        alone = [network(one[None]) for one in x]
    torch.testing.assert_close(together.quality, torch.cat([o.quality for o in alone]), atol=1e-4, rtol=1e-4)
    maps = torch.cat([o.error_logits for o in alone])
    torch.testing.assert_close(together.error_logits, maps, atol=1e-4, rtol=1e-4)


def test_dropout_acts_in_training_only(x: Tensor) -> None:
    network = small()
    with torch.no_grad():
        assert not torch.equal(network(x).quality, network(x).quality)
        network.eval()
        assert torch.equal(network(x).quality, network(x).quality)


def test_the_error_map_is_local(x: Tensor) -> None:
    """The skip of the stem carries fine detail: a change in a corner changes the map there most."""
    network = small(stem_stride=1).eval()
    other = x.clone()
    other[:, :, :8, :8, :8] += 3
    with torch.inference_mode():
        change = (network(other).error_logits - network(x).error_logits).abs()
    assert change[:, :8, :8, :8].mean() > 3 * change[:, 32:, 16:, 16:].mean()


def test_the_quality_head_computes_in_fp32_under_mixed_precision(x: Tensor) -> None:
    network = small().eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output: QCOutput = network(x)
        assert network.stem(x).dtype == torch.bfloat16
    assert output.quality.dtype == torch.float32
    # Not merely cast back: values of bf16 would be unchanged by rounding them to bf16.
    assert not torch.equal(output.quality, output.quality.bfloat16().float())


def test_the_seed_decides_the_weights() -> None:
    first, again = small().state_dict(), small().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def with_attention(stem_stride: int = 2, n_error_maps: int = 1, label_channels: int = 1) -> QCResUNet:
    torch.manual_seed(0)
    return QCResUNet(
        in_channels=3,
        n_outputs=4,
        n_error_maps=n_error_maps,
        width=4,
        blocks=(1, 1, 1, 1),
        stem_stride=stem_stride,
        attention=True,
        label_channels=label_channels,
    )


def test_the_journal_version_has_the_published_parameters() -> None:
    with torch.device("meta"):
        network = QCResUNet(in_channels=5, n_outputs=1, width=32, attention=True)
    assert count(network) == 16_569_842


def test_without_attention_there_is_nothing_of_it() -> None:
    parts = {name.split(".")[0] for name in small().state_dict()}
    assert parts == {"stem", "layers", "quality", "ups", "error"}
    assert "error.bias" in small().state_dict()


def test_channel_attention_by_hand() -> None:
    attention = ChannelAttention()
    with torch.no_grad():
        attention.mix.weight.copy_(torch.tensor([[[1.0, 2.0, -1.0]]]))
    means = [0.5, -1.0, 2.0]
    x = torch.tensor(means)[None, :, None, None, None].expand(1, 3, 2, 2, 2).clone()
    x[:, :, 0] += 1
    x[:, :, 1] -= 1  # the mean is what counts
    mixed = [2 * 0.5 - -1.0, 0.5 + 2 * -1.0 - 2.0, -1.0 + 2 * 2.0]  # one before, itself twice, less one after
    weights = 1 / (1 + torch.exp(-torch.tensor(mixed)))
    torch.testing.assert_close(attention(x), x * weights[None, :, None, None, None])


@pytest.mark.parametrize("stem_stride", [2, 1])
def test_the_label_joins_the_error_maps_at_every_depth(stem_stride: int, x: Tensor) -> None:
    """With maps of zeros and even weights the label is left, at 1/4, at 1/2 and twice at full resolution."""
    network = with_attention(stem_stride=stem_stride, label_channels=2).eval()
    state = network.state_dict()
    for name in state:
        if name.endswith("mix.weight") or name.startswith(("side_maps.maps.", "error.")):
            state[name].zero_()
    state["side_maps.join.weight"].copy_(torch.tensor([5.0, 1.0, -2.0])[None, :, None, None, None])
    first, second = x[:, 1:2], x[:, 2:3]
    expected = torch.zeros_like(first)
    for scale in (4, 2, 1, 1):
        coarse = F.avg_pool3d(first - 2 * second, scale)
        expected += 0.5 * coarse.repeat_interleave(scale, 2).repeat_interleave(scale, 3).repeat_interleave(
            scale, 4
        )

    with torch.inference_mode():
        torch.testing.assert_close(network(x).error_logits, expected[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [2, 1])
def test_side_maps_are_joined_as_if_all_were_enlarged_first(scale: int) -> None:
    torch.manual_seed(0)
    side_maps = SideMaps([6, 4], n_error_maps=2, label_channels=3, scale=scale)
    label = (torch.rand(2, 3, 16, 8, 24) > 0.5).float()
    coarse, fine = (torch.randn(2, 6, 4 * n, 2 * n, 6 * n) for n in ((1, 2) if scale == 2 else (2, 4)))
    decoded, error = [coarse, fine[:, :4]], torch.randn(2, 2, *fine.shape[2:])
    enlarged = F.interpolate(error, size=label.shape[2:], mode="nearest")
    expected = side_maps.join(side_maps.attentions[2](torch.cat([enlarged, label], dim=1)))
    for features, to_maps, attention in zip(decoded, side_maps.maps, side_maps.attentions, strict=False):
        maps = F.interpolate(to_maps(features), scale_factor=float(scale), mode="nearest")
        beside = F.interpolate(label, size=maps.shape[2:], mode="area")
        joined = side_maps.join(attention(torch.cat([maps, beside], dim=1)))
        expected = expected + F.interpolate(joined, size=label.shape[2:], mode="nearest")
    torch.testing.assert_close(side_maps(decoded, error, label), expected)


def test_attention_weighs_the_channels_of_the_input(x: Tensor) -> None:
    network = with_attention().eval()
    seen: list[Tensor] = []
    network.stem.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        network(x)
    torch.testing.assert_close(seen[0], network.attention(x))
    assert not torch.equal(seen[0], x)


def test_attention_with_an_error_map_for_each_class(x: Tensor) -> None:
    output = with_attention(n_error_maps=2, label_channels=2)(x)
    assert output.quality.shape == (2, 4)
    assert output.error_logits.shape == (2, 64, 32, 32)
    assert output.class_error_logits is not None
    assert output.class_error_logits.shape == (2, 2, 64, 32, 32)


def test_with_attention_a_gradient_reaches_every_parameter(x: Tensor) -> None:
    network = with_attention()
    output = network(x)
    (output.quality.sum() + output.error_logits.square().sum()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_attention_under_mixed_precision(x: Tensor) -> None:
    network = with_attention().eval()
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    x = x.to(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        exact = network(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output: QCOutput = network(x)
    assert output.quality.dtype == torch.float32
    assert output.quality.isfinite().all()
    assert (output.error_logits - exact.error_logits).abs().mean() < 0.05 * exact.error_logits.std()
