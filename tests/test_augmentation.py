from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedqc.augmentation import _intensities, augment
from fedqc.geometry import Sides
from fedqc.metrics.overlap import binary_dice

SHAPE = (42, 36, 30)
CENTRE = (torch.tensor(SHAPE) - 1) / 2


class Never(np.random.Generator):
    """Every chance that could be taken is not."""

    def random(self, *args: Any, **options: Any) -> Any:
        return super().random(*args, **options) * 0 + 0.999


def ball(n: int, offset: tuple[float, float, float], radius: float) -> Tensor:
    """`[n, X, Y, Z]` uint8: class 2 in a ball about a point `offset` voxels from the centre."""
    axes = [torch.arange(side, dtype=torch.float32) for side in SHAPE]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    inside = (grid - CENTRE - torch.tensor(offset)).norm(dim=-1) <= radius
    return torch.where(inside, 2, 0).to(torch.uint8).expand(n, *SHAPE)


def noisy(n: int) -> Tensor:
    return torch.randn(n, 2, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_nothing_drawn_changes_nothing() -> None:
    image, label = noisy(3), ball(3, (3, -2, 1), 5)
    image[:, :, :4] = 0
    new_image, new_label = augment(Never(np.random.PCG64(0)), image, label)
    torch.testing.assert_close(new_image, image, atol=1e-4, rtol=0)
    assert not new_image[:, :, :3].any()
    assert new_image[:, :, 4:].all()
    assert torch.equal(new_label, label)


def test_image_and_labels_of_a_sample_move_together() -> None:
    label = ball(24, (3, -2, 1), 5)
    image = (label > 0).float()[:, None]
    rng = np.random.default_rng(1)
    new_image, first, second = augment(rng, image, label, label.clone())
    assert (first != label).flatten(1).any(dim=1).sum() >= 12  # they did move
    assert torch.equal(first, second)
    assert binary_dice(new_image[:, 0] > 0.5, first).min() > 0.9
    assert set(torch.unique(first).tolist()) == {0, 2}  # no classes in between


def test_maps_move_with_a_label_and_keep_their_values_and_their_type() -> None:
    label = ball(8, (3, -2, 1), 5)
    error = torch.where(label > 0, -0.3, 0.1).half()
    _, moved, new_error = augment(np.random.default_rng(1), noisy(8), label, error)
    assert new_error.dtype == torch.float16
    inside = moved > 0
    assert (new_error[inside] == error.min()).all()
    assert set(torch.unique(new_error[~inside]).tolist()) <= {0.0, error.max().item()}


def test_labels_move_as_rigid_bodies_of_another_size_whatever_the_shape_of_the_volume() -> None:
    before = ball(64, (5.5, -4.5, 2.5), 6.5)
    _, after = augment(np.random.default_rng(2), before[:, None].float(), before)
    volume = float((before[0] > 0).sum())
    start = (before[0] > 0).nonzero().float().mean(dim=0) - CENTRE
    for label in after:
        points = (label > 0).nonzero().float()
        scale = (len(points) / volume) ** (1 / 3)
        assert 0.8 < scale < 1.25
        # A rotated or mirrored ball is a ball, and its distance from the centre grows as its radius does.
        spread = torch.linalg.eigvalsh(torch.cov(points.T))
        assert spread[2] / spread[0] < 1.25
        distance = (points.mean(dim=0) - CENTRE).norm()
        assert float(distance) == pytest.approx(float(scale * start.norm()), abs=0.35)
    centres = torch.stack([(label > 0).nonzero().float().mean(dim=0) - CENTRE for label in after])
    assert (centres[:, 0] < 0).any()  # mirrored left to right
    assert (centres[:, 0] > 0).any()


def test_in_thick_slices_a_rotation_hardly_leaves_the_slice() -> None:
    label = torch.zeros(8, 32, 32, 9, dtype=torch.uint8)
    label[..., 4] = 1
    image = label.float()[:, None]

    def slices(sides: Sides) -> int:
        _, moved = augment(np.random.default_rng(0), image, label, sides=sides)
        return int((moved > 0).any(dim=1).any(dim=1).sum())

    assert slices((1.0, 1.0, 10.0)) <= 8 * 3  # 16 mm times the sine of 20 degrees are half a slice of 10 mm
    assert slices((1.0, 1.0, 1.0)) > 8 * 5


def test_outside_the_body_stays_zero() -> None:
    body, wide = ball(16, (0, 0, 0), 5), ball(16, (0, 0, 0), 7.5)
    image = noisy(16) * (body > 0)[:, None]
    new_image, new_wide = augment(np.random.default_rng(3), image, wide)
    outside = (new_wide == 0)[:, None].expand_as(new_image)
    assert outside.any()
    assert not new_image[outside].any()
    assert new_image[~outside].any()


def test_noise_and_gamma_each_change_half_of_the_samples_within_their_bounds() -> None:
    image = torch.linspace(-2, 2, 512).reshape(1, 1, 8, 8, 8).expand(400, 1, 8, 8, 8)
    change = (_intensities(np.random.default_rng(4), image) - image).flatten(1)
    largest = change.abs().amax(dim=1)
    assert (largest < 1e-5).float().mean().item() == pytest.approx(0.25, abs=0.08)  # neither was drawn
    # t - t**1.5 is at most 0.148 of the range of 4; noise has an SD of at most 0.1.
    assert 0.3 < largest.max() < 0.148 * 4 + 0.55
    steps = change.diff(dim=1).std(dim=1) / 2**0.5  # gamma is smooth, so what jumps is noise
    assert 0.09 < steps.max() < 0.11
    assert (steps < 0.005).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_the_generator_decides_everything_and_the_input_is_left_alone() -> None:
    image, label = noisy(4), ball(4, (3, -2, 1), 5).clone()
    kept_image, kept_label = image.clone(), label.clone()
    torch.manual_seed(0)
    first = augment(np.random.default_rng(5), image, label)
    torch.manual_seed(1)
    again = augment(np.random.default_rng(5), image, label)
    other = augment(np.random.default_rng(6), image, label)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(image, kept_image)
    assert torch.equal(label, kept_label)
    assert (first[0].dtype, first[1].dtype) == (torch.float32, torch.uint8)
    assert (first[0].shape, first[1].shape) == (image.shape, label.shape)
