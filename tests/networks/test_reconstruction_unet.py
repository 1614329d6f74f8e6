import torch
from torch import nn

from fedqc.networks.mc_dropout_unet import MCDropoutUNet
from fedqc.networks.reconstruction_unet import ReconstructionUNet


def test_the_unet_without_dropout_and_a_relu_behind_it() -> None:
    torch.manual_seed(0)
    network = ReconstructionUNet(modalities=2, channels=(4, 8))
    x = torch.rand(2, 2, 8, 9, 8)
    found = network(x)
    torch.testing.assert_close(found, network.unet(x).clamp(min=0))
    assert torch.equal(found, network(x))
    assert found.shape == x.shape
    assert found.mean() > 0.1  # or no gradient would come through the ReLU


def test_as_many_parameters_as_the_segmenter() -> None:
    def count(network: nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    with torch.device("meta"):
        segmenter = MCDropoutUNet(in_channels=1, out_channels=1)
        assert count(ReconstructionUNet(modalities=1)) == count(segmenter)
