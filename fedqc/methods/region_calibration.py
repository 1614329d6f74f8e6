"""One monotone map for the quality of a whole label, and one for each region's."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedqc.methods.calibration import MonotoneMap

CALIBRATION = "calibration"
"""Name of the part of a method's network."""


class RegionCalibration(nn.Module):
    """Maps from what a method measures to DSC, fitted on labels whose DSC is known.

    Until they are fitted they leave values in [0, 1] as they are.

    Args:
        n_regions: How many regions there are.
        learned_sign: Whether quality may fall as what is measured rises, where the labels say so.
    """

    def __init__(self, n_regions: int, *, learned_sign: bool = False) -> None:
        super().__init__()
        self.maps = nn.ModuleList(
            [MonotoneMap(sign="learned" if learned_sign else "increasing") for _ in range(1 + n_regions)]
        )

    def fit(
        self, measured: NDArray[np.floating], dsc: NDArray[np.floating], present: NDArray[np.bool_]
    ) -> None:
        """Fit in place.

        Args:
            measured: `[n, 1 + R]`, of whole labels and of their regions.
            dsc: `[n, 1 + R]` in [0, 1], the truth.
            present: `[n, R]` whether the region is in the reference; a map without any such label stays.
        """
        counts = np.concatenate([np.ones_like(present[:, :1]), present], axis=1)
        for index, one in enumerate(self.maps):
            chosen = counts[:, index]
            if isinstance(one, MonotoneMap) and chosen.any():
                one.fit(measured[chosen, index], dsc[chosen, index])

    def forward(self, measured: Tensor) -> Tensor:
        """Measured values `[..., 1 + R]` to quality in [0, 1], of the same shape."""
        return torch.stack([one(measured[..., index]) for index, one in enumerate(self.maps)], dim=-1)


def calibration_of(network: nn.Module) -> RegionCalibration:
    """The part of a method's network that its `fit` fits."""
    calibration = network.get_submodule(CALIBRATION)
    assert isinstance(calibration, RegionCalibration)  # noqa: S101 - for the type checker
    return calibration
