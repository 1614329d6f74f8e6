import pytest
import torch
from torch import Tensor

SHAPE = (20, 24, 16)


@pytest.fixture
def label() -> Tensor:
    """`[20, 24, 16]` uint8: two classes side by side, and an island of the first; no symmetry."""
    label = torch.zeros(SHAPE, dtype=torch.uint8)
    label[4:12, 5:16, 4:12] = 1
    label[12:15, 6:14, 5:11] = 2
    label[10:12, 5:9, 4:7] = 2
    label[16:19, 18:21, 3:6] = 1
    return label


@pytest.fixture
def labels(label: Tensor) -> Tensor:
    """`[4, 20, 24, 16]`: that label, moved, halved, and mirrored back to front."""
    halved = label.clone()
    halved[:, 10:] = 0
    return torch.stack([label, label.roll((1, 2, -1), (0, 1, 2)), halved, label.flip(1)])
