import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms.spatial.array import Affine
from scipy import ndimage
from torch import Tensor

from fedqc.degradation.annotator import Shift
from fedqc.degradation.base import radius, smooth_field
from fedqc.degradation.seggen import CONTROL_POINTS, PUBLISHED_SIZE, SegGen, sample_nearest
from fedqc.geometry import rotation, source_positions
from fedqc.metrics.overlap import binary_dice

NEUTRAL = {
    "rotation": [0.0, 0.0, 0.0],
    "scale": 1.0,
    "translation": [0.0, 0.0, 0.0],
    "displacement": [0.0, 0.0, 0.0],
    "seed": 1,
}


def transformed(label: Tensor, **changes: Any) -> Tensor:
    return SegGen().apply(label[None], [NEUTRAL | changes])[0]


def ball(shape: tuple[int, int, int], size: float) -> Tensor:
    axes = [torch.arange(side, dtype=torch.float32) - (side - 1) / 2 for side in shape]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return torch.where(grid.norm(dim=0) <= size, 1, 0).to(torch.uint8)


def test_neutral_parameters_give_the_label_back(label: Tensor) -> None:
    assert torch.equal(transformed(label), label)


@pytest.mark.parametrize("voxels", [[3, 0, 0], [0, -4, 0], [0, 0, 2], [-2, 5, -3], [0, 30, 0]])
def test_a_translation_by_whole_voxels_is_a_shift(label: Tensor, voxels: list[int]) -> None:
    expected = Shift().apply(label[None], [{"voxels": voxels}])[0]
    assert torch.equal(transformed(label, translation=[float(v) for v in voxels]), expected)


@pytest.mark.parametrize(
    ("plane", "angles"), [((0, 1), [0, 0, 90]), ((1, 2), [90, 0, 0]), ((2, 0), [0, 90, 0])]
)
def test_a_quarter_turn(plane: tuple[int, int], angles: list[float]) -> None:
    cube = torch.zeros(16, 16, 16, dtype=torch.uint8)
    cube[2:9, 3:7, 5:12] = 1
    cube[2:4, 3:5, 5:8] = 2
    expected = np.rot90(cube.numpy(), 1, plane)
    np.testing.assert_array_equal(transformed(cube, rotation=angles).numpy(), expected)


@pytest.mark.parametrize("scale", [0.85, 1.0, 1.25])
def test_a_scaled_ball_has_a_scaled_radius_and_a_rotated_ball_does_not_change(scale: float) -> None:
    before = ball((24, 28, 26), 8)
    after = transformed(before, scale=scale)
    assert radius(after) == pytest.approx(scale * 8, rel=0.02)
    turned = transformed(before, scale=scale, rotation=[15.0, -10.0, 5.0])
    assert radius(turned) == pytest.approx(radius(after), rel=0.01)
    assert binary_dice(turned[None], after[None]).item() > 0.9


def test_all_together_agree_with_monai_and_scipy(label: Tensor) -> None:
    angles, scale, shift = [12.0, -7.0, 9.0], 1.1, [1.3, -2.2, 0.6]
    result = transformed(label, rotation=angles, scale=scale, translation=shift).numpy()
    a, b, c = (math.radians(angle) for angle in angles)
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    backward = np.linalg.inv(scale * z @ y @ x)
    centre = (np.array(label.shape) - 1) / 2
    offset = centre - backward @ (centre + shift)
    expected = ndimage.affine_transform(label.numpy(), backward, offset, order=0, mode="grid-constant")
    assert (result != expected).mean() < 1e-3
    matrix = np.eye(4)
    matrix[:3, :3] = backward
    matrix[:3, 3] = -backward @ shift
    monai, _ = Affine(affine=matrix, mode="nearest", padding_mode="zeros")(label[None].float())
    assert (result != np.asarray(monai)[0]).mean() < 1e-3
    assert (result != label.numpy()).mean() > 0.02


def test_the_elastic_field_moves_nothing_further_than_its_displacement() -> None:
    half = torch.zeros(24, 16, 16, dtype=torch.uint8)
    half[:12] = 1
    bent = transformed(half, displacement=[3.0, 0.0, 0.0])
    assert (bent[3:9] == 1).all()
    assert (bent[15:21] == 0).all()
    assert (bent[9:12] == 0).any()
    assert (bent[12:15] == 1).any()
    # A field along the other axes cannot change what is constant along them.
    along = transformed(half, displacement=[0.0, 3.0, 3.0])
    assert torch.equal(along[:, 4:12, 4:12], half[:, 4:12, 4:12])
    other = transformed(half, displacement=[3.0, 0.0, 0.0], seed=2)
    assert not torch.equal(bent, other)


def test_sampled_positions_are_counted_from_the_centre() -> None:
    label = torch.arange(4 * 3 * 5, dtype=torch.uint8).reshape(4, 3, 5) + 1
    source = torch.tensor([[0.5, 1.0, -2.0], [-1.5, 0.0, 1.0], [-2.6, 0, 0], [0, 0, 2.4], [0, 0, 2.6]]).T
    assert sample_nearest(label, source).tolist() == [label[2, 2, 0], label[0, 1, 3], 0, label[2, 1, 4], 0]


def test_only_where_the_label_may_come_to_lie_is_sampled_and_nothing_is_missed(label: Tensor) -> None:
    rng = np.random.default_rng(0)
    for number in range(60):
        params = {
            **SegGen().make_params(rng, label),
            "displacement": [2.5, 0.0, 4.0] if number % 2 else [0.0] * 3,
        }
        scale = float(params["scale"])
        matrix, shift = (
            (rotation(params["rotation"]).T / scale)[None],
            torch.tensor(params["translation"])[None],
        )
        field = smooth_field([int(params["seed"])], 3, CONTROL_POINTS, label.shape, label.device)
        size = torch.tensor(params["displacement"])[None, :, None, None, None]
        source = source_positions(matrix, shift.float(), label.shape) + field * size
        assert torch.equal(transformed(label, **params), sample_nearest(label, source[0]))
    assert not transformed(label, translation=[0.0, 60.0, 0.0]).any()
    empty = torch.zeros_like(label)
    assert torch.equal(transformed(empty, scale=1.2), empty)


def test_a_turn_in_a_stack_of_thick_slices_is_one_in_space() -> None:
    """A rod of 40 mm that is turned by 15 degrees rises and falls by 5 mm: one slice, not five of them."""
    rod = torch.zeros(41, 9, 9, dtype=torch.uint8)
    rod[:, 3:6, 4] = 1
    params = {
        "rotation": [0.0, 15.0, 0.0],
        "scale": 1.0,
        "translation": [0.0] * 3,
        "displacement": [0.0] * 3,
        "seed": 0,
    }
    (turned,) = SegGen((1.0, 1.0, 5.0)).apply(rod[None], [params])
    filled = (turned > 0).any(dim=0).any(dim=0).nonzero()[:, 0].tolist()
    assert filled == [3, 4, 5]
    ends = [int((turned[x] > 0).any(dim=0).nonzero()[0, 0]) for x in (1, 39)]
    assert sorted(ends) == [3, 5]


def test_drawn_parameters_are_the_published_ones_scaled_to_the_volume() -> None:
    shape = (40, 48, 80)
    label = torch.zeros(shape, dtype=torch.uint8)
    rng = np.random.default_rng(0)
    params = [SegGen().make_params(rng, label) for _ in range(600)]
    ratio = np.array(shape) / PUBLISHED_SIZE
    assert ratio.tolist() == [0.25, 0.25, 0.5]
    rotation = np.array([p["rotation"] for p in params])
    scale = np.array([p["scale"] for p in params])
    translation = np.array([p["translation"] for p in params]) / ratio
    displacement = np.array([p["displacement"] for p in params]) / ratio
    for values, low, high, neutral in (
        (rotation, -15, 15, 0),
        (scale[:, None], 0.85, 1.25, 1),
        (translation, -20, 20, 0),
        (displacement, 0, 20, 0),
    ):
        used = (values != neutral).any(axis=1)
        assert used.mean() == pytest.approx(0.5, abs=0.07)
        reach = (high - low) * 0.03
        assert low <= values.min() < (neutral if neutral == low else low + reach) + 1e-9
        assert high - reach < values.max() <= high
        drawn = values[used]
        assert drawn.mean() == pytest.approx((low + high) / 2, abs=0.1 * (high - low))
    np.testing.assert_allclose(displacement[:, 0], displacement[:, 2])  # one size, along all axes
    together = np.stack([np.ptp(rotation, axis=1) > 0, scale != 1], axis=1)
    assert (together[:, 0] & together[:, 1]).mean() == pytest.approx(0.25, abs=0.06)


def test_replay_batch_and_seed(labels: Tensor) -> None:
    kept = labels.clone()
    rng = np.random.default_rng(3)
    params = [SegGen().make_params(rng, label) for label in labels]
    result = SegGen().apply(labels, params)
    assert torch.equal(labels, kept)
    assert (result.dtype, result.shape) == (torch.uint8, labels.shape)
    assert not torch.equal(result, labels)
    read = json.loads(json.dumps(params))
    for position, p in enumerate(read):
        assert torch.equal(SegGen().apply(labels[position : position + 1], [p])[0], result[position])
    rng = np.random.default_rng(3)
    assert [SegGen().make_params(rng, label) for label in labels] == params
    assert not SegGen().applies_to(torch.zeros(4, 4, 4, dtype=torch.uint8))
