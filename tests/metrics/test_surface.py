"""Surface DSC of masks whose surfaces are known, against distances that are computed here."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from fedqc.errors import DataError
from fedqc.metrics.surface import surface_dsc

REGIONS = [(1, 2), (2,)]


def box(begin: int, end: int, value: int = 1) -> NDArray[np.uint8]:
    label = np.zeros((16, 16, 16), dtype=np.uint8)
    label[begin:end, 4:12, 4:12] = value
    return label


def test_the_same_label_has_1_and_one_far_away_0() -> None:
    assert surface_dsc(box(4, 12), box(4, 12), [(1,)], (1, 1, 1), 0.0) == 1
    assert surface_dsc(box(0, 3), box(13, 16), [(1,)], (1, 1, 1), 2.0) == 0


def test_a_shift_counts_from_the_tolerance_on_and_in_mm() -> None:
    """Along x by two voxels of 3 mm: the four long sides overlap, the two ends are 6 mm away."""
    shifted, right = box(6, 14), box(4, 12)
    assert surface_dsc(shifted, right, [(1,)], (3, 1, 1), 6.5) == 1
    within = surface_dsc(shifted, right, [(1,)], (3, 1, 1), 0.5)
    # Corners of voxels stand for the surface: 7 planes across x have 32 sides of 3 mm2, the 2 at the ends
    # half of that and a face of 64 mm2. 6 planes, half of one and the rim of a face, some 14 mm2, are near.
    assert within == pytest.approx((6.5 * 96 + 14) / (8 * 96 + 2 * 64), abs=0.03)
    assert surface_dsc(right, shifted, [(1,)], (3, 1, 1), 0.5) == pytest.approx(within)


def test_it_is_near_to_what_distances_between_border_voxels_say() -> None:
    rng = np.random.default_rng(0)
    fields = [ndimage.gaussian_filter(rng.normal(size=(20, 20, 20)), 3) for _ in range(2)]
    a, b = (field > np.quantile(field, 0.7) for field in (fields[0], fields[0] + 0.7 * fields[1]))
    inside = np.pad(np.ones((16, 16, 16), dtype=bool), 2)
    a, b = a & inside, b & inside
    borders = [mask & ~ndimage.binary_erosion(mask) for mask in (a, b)]
    near = [
        (ndimage.distance_transform_edt(~other)[border] <= 1.0) for border, other in (borders, borders[::-1])
    ]
    expected = np.concatenate(near).mean()
    assert expected < 0.95
    found = surface_dsc(a.astype(np.uint8), b.astype(np.uint8), [(1,)], (1, 1, 1), 1.0)
    assert found == pytest.approx(expected, abs=0.1)


def test_a_region_that_the_reference_lacks_is_left_out_and_a_missing_one_has_0() -> None:
    assert surface_dsc(box(4, 12), box(4, 12), REGIONS, (1, 1, 1), 1.0) == 1  # no voxel of class 2 anywhere
    both = box(4, 12)
    both[6:9, 6:9, 6:9] = 2
    assert surface_dsc(box(4, 12), both, REGIONS, (1, 1, 1), 1.0) == pytest.approx(0.5)
    nothing = np.zeros_like(both)
    assert surface_dsc(nothing, nothing, REGIONS, (1, 1, 1), 1.0) == 1
    assert surface_dsc(both, nothing, REGIONS, (1, 1, 1), 1.0) == 0
    assert surface_dsc(nothing, both, REGIONS, (1, 1, 1), 1.0) == 0


def test_a_surface_at_the_border_of_the_volume_counts() -> None:
    """The same two boxes, in the middle of the volume and in its corner."""
    middle, corner = ([np.roll(box(4, end), (-by, -by, -by), (0, 1, 2)) for end in (12, 9)] for by in (0, 4))
    expected = surface_dsc(middle[0], middle[1], [(1,)], (1, 1, 1), 1.0)
    assert 0.6 < expected < 0.95
    assert surface_dsc(corner[0], corner[1], [(1,)], (1, 1, 1), 1.0) == pytest.approx(expected)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(DataError, match="shape"):
        surface_dsc(box(4, 12), box(4, 12)[:8], REGIONS, (1, 1, 1), 1.0)
    with pytest.raises(DataError, match="no region"):
        surface_dsc(box(4, 12), box(4, 12), [], (1, 1, 1), 1.0)
