"""Augmentation of slices: what Kofler et al. (2022, 2) put their 2D network through, by MONAI and TorchIO.

    both                flips, affine and elastic deformation; masks by nearest neighbour
    image (MONAI)       Gaussian and Rician noise, contrast, brightness, gamma, low resolution
    image (TorchIO)     motion, ghosting, spikes, bias field

The paper says which, not how much nor how often: strengths are those that nnU-Net and TorchIO take for brain
images, and each artefact hits few slices, so that most stay what a reader would see.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedqc.compute import seeded
from fedqc.errors import ConfigError

IMAGE, MASKS = "image", "masks"


def augment_slice(rng: np.random.Generator, views: Tensor, n_modalities: int) -> Tensor:
    """Augment image and label of one slice.

    Args:
        rng: Draws everything.
        views: `[C + M, H, W]` float32, modalities in [0, 1], then masks of 0 and 1.
        n_modalities: C.

    Returns:
        The same, of the same shape and range.

    Raises:
        ConfigError: TorchIO is not installed.
    """
    spatial, intensities, artefacts = _transforms()
    for axis in (1, 2):
        if rng.random() < 0.5:
            views = views.flip(axis)
    spatial.set_random_state(seed=int(rng.integers(2**31)))
    moved = spatial({IMAGE: views[:n_modalities], MASKS: views[n_modalities:]})
    intensities.set_random_state(seed=int(rng.integers(2**31)))
    image = intensities(moved[IMAGE])
    with seeded(int(rng.integers(2**31))):
        image = artefacts(image[..., None])[..., 0]
    return torch.cat([image.clamp(0, 1), moved[MASKS]]).float()


@cache
def _transforms() -> tuple[Any, Any, Any]:
    """MONAI's for image and masks, MONAI's for the image, TorchIO's for the image.

    Raises:
        ConfigError: TorchIO is not installed.
    """
    # Both take seconds, and only training of a 2D network needs them.
    from monai.transforms.compose import Compose  # noqa: PLC0415
    from monai.transforms.intensity import array as intensity  # noqa: PLC0415
    from monai.transforms.spatial import dictionary as space  # noqa: PLC0415
    from monai.transforms.spatial.array import RandSimulateLowResolution  # noqa: PLC0415
    from monai.transforms.utility.array import ToTensor  # noqa: PLC0415
    from monai.transforms.utility.dictionary import ToTensord  # noqa: PLC0415

    try:
        import torchio as tio  # noqa: PLC0415
    except ImportError:
        raise ConfigError(
            "training of qc.method 'dqe' needs the package torchio; install it with: pip install 'fedqc[dqe]'"
        ) from None
    both: dict[str, Any] = {
        "keys": (IMAGE, MASKS),
        "mode": ("bilinear", "nearest"),
        "padding_mode": "zeros",
    }
    spatial = Compose(
        [
            space.RandAffined(
                prob=0.5,
                rotate_range=np.deg2rad(15),
                scale_range=(0.15, 0.15),
                translate_range=(10, 10),
                **both,
            ),
            space.Rand2DElasticd(prob=0.3, spacing=(24, 24), magnitude_range=(1, 3), **both),
            ToTensord(keys=(IMAGE, MASKS), track_meta=False),
        ]
    )
    intensities = Compose(
        [
            intensity.RandScaleIntensityFixedMean(prob=0.2, factors=0.25, preserve_range=True),  # contrast
            intensity.RandScaleIntensity(prob=0.2, factors=0.25),  # brightness
            intensity.RandAdjustContrast(prob=0.3, gamma=(0.7, 1.5)),
            RandSimulateLowResolution(prob=0.15, upsample_mode="bilinear", zoom_range=(0.5, 1.0)),
            intensity.RandGaussianNoise(prob=0.2, std=0.1),
            intensity.RandRicianNoise(prob=0.1, std=0.1),
            ToTensor(track_meta=False),
        ]
    )
    artefacts = tio.Compose(
        [
            tio.RandomMotion(p=0.1, degrees=5, translation=5, num_transforms=2),
            tio.RandomGhosting(p=0.1, axes=(0, 1), intensity=(0.2, 0.6)),
            tio.RandomSpike(p=0.1, intensity=(0.2, 0.6)),
            tio.RandomBiasField(p=0.2, coefficients=0.3),
        ]
    )
    return spatial, intensities, artefacts
