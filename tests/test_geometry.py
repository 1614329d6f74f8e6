import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch.nn import functional as F

from fedqc.geometry import rotation, sampling_grid, source_positions


def test_rotation_agrees_with_scipy() -> None:
    angles = [11.0, -7.0, 4.0]
    expected = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    np.testing.assert_allclose(rotation(angles).numpy(), expected, atol=1e-6)


def test_positions_by_hand() -> None:
    matrix = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 2.0]]])
    source = source_positions(matrix, torch.tensor([[1.0, 0.0, 0.0]]), (4, 6, 8))
    assert source.shape == (1, 3, 4, 6, 8)
    # Voxel (3, 0, 5) is (1.5, -2.5, 1.5) from the centre, (0.5, -2.5, 1.5) after the shift.
    assert source[0, :, 3, 0, 5].tolist() == [2.5, 0.5, 3.0]


def test_sampling_agrees_with_scipy() -> None:
    volume = torch.rand(1, 1, 9, 12, 7, generator=torch.Generator().manual_seed(0))
    matrix = rotation([5.0, -12.0, 8.0]) * 1.1
    source = source_positions(matrix[None], torch.tensor([[0.4, -1.0, 0.2]]), (9, 12, 7))

    ours = F.grid_sample(volume, sampling_grid(source, (9, 12, 7)), align_corners=False)[0, 0]

    centre = (np.array([9, 12, 7]) - 1) / 2
    expected = ndimage.map_coordinates(
        volume[0, 0].numpy(), source[0].numpy() + centre[:, None, None, None], order=1, mode="grid-constant"
    )
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    matrices = torch.stack([rotation([angle, -angle, 2 * angle]) for angle in (3.0, 9.0, 14.0)])
    shifts = torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = source_positions(matrices, shifts, (40, 56, 40))
        torch.set_num_threads(threads)
        assert torch.equal(source_positions(matrices, shifts, (40, 56, 40)), expected)
    finally:
        torch.set_num_threads(before)
