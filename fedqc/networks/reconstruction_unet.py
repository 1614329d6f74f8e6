"""Reconstruction U-Net: gives back an image from which the lesions were cut out.

Williams et al. (Fig. 4b), after Zhou et al. (arXiv 1903.08773): the U-Net of `fedqc.networks.mc_dropout_unet`
without its dropout, with a ReLU at the end. What it is shown has zeros where a label marks something; what it
learns is to fill them in. Where its image differs from the true one, the label may be wrong.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from fedqc.networks.mc_dropout_unet import CHANNELS, MCDropoutUNet


class ReconstructionUNet(nn.Module):
    """The U-Net, for images in [0, 1] of any size that leaves more than one voxel on the deepest level.

    Args:
        modalities: Channels of the image.
        channels: Of each level.
    """

    def __init__(self, *, modalities: int, channels: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        self.unet = MCDropoutUNet(
            in_channels=modalities, out_channels=modalities, channels=channels, dropout=0.0
        )
        # An output that is negative everywhere would stay at 0 behind the ReLU: it starts above.
        nn.init.constant_(self.unet.output.bias, 0.5)  # type: ignore[arg-type]  # it has a bias

    def deepest(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Voxels of the deepest level of an input of `size`; instance norm refuses a single one."""
        return self.unet.deepest(size)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, modalities, X, Y, Z]` in [0, 1], holes at 0, to the same shape, 0 or more."""
        return F.relu(self.unet(x))
