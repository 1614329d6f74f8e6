import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from fedqc.degradation.base import Untouched, component_at, distance_to, draw_seed, radius, smooth_field

CPU = torch.device("cpu")


def test_radius_of_a_ball() -> None:
    axes = [torch.arange(24, dtype=torch.float32) - 11.5] * 3
    distance = torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)
    ball = (distance <= 8).to(torch.uint8) * 3
    assert radius(ball) == pytest.approx(8, rel=0.01)


def test_radius_is_at_least_one_voxel() -> None:
    label = torch.zeros(4, 4, 4, dtype=torch.uint8)
    assert radius(label) == 1
    label[0, 0, 0] = 1
    assert radius(label) == 1


@pytest.mark.parametrize("reach", [1, 3, 7, 30])
def test_distances_are_those_of_scipy_up_to_the_reach(reach: int) -> None:
    draw = torch.Generator().manual_seed(reach)
    share = torch.tensor([0.3, 0.01, 0.001, 0.0])[:, None, None, None]
    mask = torch.rand((4, 17, 12, 20), generator=draw) < share
    found = distance_to(mask, reach)
    assert found.dtype == torch.float32
    for one, distance in zip(mask[:3], found, strict=False):
        exact = ndimage.distance_transform_edt(~one.numpy())
        near = exact <= reach
        np.testing.assert_allclose(distance.numpy()[near], exact[near], rtol=1e-6)
        assert (distance.numpy()[~near] > reach).all()
    assert not mask[3].any()
    assert (found[3] > reach).all()  # nothing to be near to


def test_distances_go_by_the_sides_of_a_voxel() -> None:
    mask = torch.zeros(1, 12, 14, 9, dtype=torch.bool)
    mask[0, 3, 4, 2] = mask[0, 9, 10, 6] = True
    sides = (1.0, 1.5, 4.0)
    expected = ndimage.distance_transform_edt(~mask[0].numpy(), sampling=sides)
    found = distance_to(mask, 9, sides)[0].numpy()
    near = expected <= 9
    assert near.sum() > 100
    np.testing.assert_allclose(found[near], expected[near], rtol=1e-6)
    assert (found[~near] > 9).all()


def test_the_radius_is_that_of_the_volume_in_space() -> None:
    label = torch.zeros(20, 20, 6, dtype=torch.uint8)
    label[4:16, 4:16, 2:4] = 1
    assert radius(label, (1.0, 1.0, 6.0)) == pytest.approx((3 * 12 * 12 * 12 / (4 * math.pi)) ** (1 / 3))


def test_smooth_fields_are_coarse_noise_interpolated_linearly() -> None:
    field = smooth_field([5, 6], 3, 4, (10, 13, 7), CPU)
    part = (slice(2, 9), slice(0, 13), slice(6, 7))
    assert torch.equal(smooth_field([5, 6], 3, 4, (10, 13, 7), CPU, region=part), field[:, :, *part])
    assert field.shape == (2, 3, 10, 13, 7)
    assert field.abs().max() <= 1
    coarse = torch.rand((3, 4, 4, 4), generator=torch.Generator().manual_seed(6)) * 2 - 1
    for channel in range(3):
        zoomed = ndimage.zoom(coarse[channel].numpy(), (10 / 4, 13 / 4, 7 / 4), order=1)
        np.testing.assert_allclose(field[1, channel].numpy(), zoomed, atol=1e-5)


def test_a_field_depends_on_its_own_seed_only() -> None:
    together = smooth_field([1, 2, 3], 1, 5, (8, 8, 8), CPU)
    torch.manual_seed(99)
    assert torch.equal(smooth_field([2], 1, 5, (8, 8, 8), CPU)[0], together[1])
    assert not torch.equal(together[0], together[1])


def test_drawn_seeds_fit_into_json_and_differ() -> None:
    rng = np.random.default_rng(0)
    seeds = [draw_seed(rng) for _ in range(50)]
    assert all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) == 50


def test_components_hang_together_over_corners() -> None:
    mask = np.zeros((6, 6, 6), dtype=bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[2, 1, 1] = True
    mask[4, 4, 4] = mask[4, 4, 5] = True
    assert np.argwhere(component_at(mask, [0, 0, 0])).tolist() == [[0, 0, 0], [1, 1, 1], [2, 1, 1]]
    assert np.argwhere(component_at(mask, [4, 4, 5])).tolist() == [[4, 4, 4], [4, 4, 5]]


def test_untouched_is_a_copy(labels: Tensor) -> None:
    untouched = Untouched()
    assert untouched.make_params(np.random.default_rng(0), labels[0]) == {}
    result = untouched.apply(labels, [{}] * len(labels))
    assert torch.equal(result, labels)
    result.zero_()
    assert labels.any()
    assert untouched.applies_to(torch.zeros(4, 4, 4, dtype=torch.uint8))
