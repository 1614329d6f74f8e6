import numpy as np
import pytest
import torch
from monai.metrics.meandice import compute_dice

from fedqc.errors import DataError
from fedqc.metrics.overlap import Overlap, binary_dice, error_map, one_hot, overlap, region_masks

REGIONS = ((1,), (2,), (1, 2))


def volume(**boxes: slice) -> torch.Tensor:
    """A label [1, 16, 16, 16] whose class k fills the slices of the first axis given as `class_k`."""
    label = torch.zeros(1, 16, 16, 16, dtype=torch.uint8)
    for name, planes in boxes.items():
        label[0, planes] = int(name.removeprefix("class_"))
    return label


def random_labels(seed: int, n: int = 4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (n, 9, 8, 7), generator=draw, dtype=torch.uint8)


def compare(label: torch.Tensor, reference: torch.Tensor) -> Overlap:
    return overlap(label, reference, REGIONS)


def test_a_region_of_background_counts_all_of_the_volume() -> None:
    label, reference = volume(class_1=slice(4, 6)), volume(class_1=slice(5, 7))
    found = overlap(label, reference, ((0,), (1,)))
    assert found.dsc[0].tolist() == pytest.approx([2 * 13 / (14 + 14), 0.5])


def test_no_labels_have_no_overlap() -> None:
    nothing = torch.zeros(0, 4, 4, 4, dtype=torch.uint8)
    assert overlap(nothing, nothing, REGIONS).dsc.shape == (0, 3)


def test_dsc_by_hand() -> None:
    # class 1: planes 0-3 against 2-5, two of four in common: 2*2/(4+4). class 2: planes 8-9 against 8-13:
    # 2*2/(2+6). Together: 2*(2+2)/(6+10).
    label = volume(class_1=slice(0, 4), class_2=slice(8, 10))
    reference = volume(class_1=slice(2, 6), class_2=slice(8, 14))
    result = compare(label, reference)
    assert result.dsc.tolist() == [[0.5, 0.5, 0.5]]
    other = compare(volume(class_1=slice(0, 4)), volume(class_1=slice(0, 12)))
    assert other.dsc[0, 0].item() == 0.5  # 2*4/(4+12)
    assert other.mean.item() == 0.5


def test_a_swapped_class_is_wrong_in_the_classes_and_right_in_their_union() -> None:
    result = compare(volume(class_1=slice(0, 4)), volume(class_2=slice(0, 4)))
    assert result.dsc.tolist() == [[0.0, 0.0, 1.0]]
    assert result.present.tolist() == [[False, True, True]]
    assert result.mean.item() == 0.5


def test_a_region_absent_from_the_reference_is_left_out_of_the_mean() -> None:
    reference = volume(class_1=slice(0, 4))
    silent = compare(volume(class_1=slice(0, 4)), reference)
    assert silent.dsc.tolist() == [[1.0, 1.0, 1.0]]  # both empty: 1
    assert silent.mean.item() == 1.0
    invented = compare(volume(class_1=slice(0, 4), class_2=slice(4, 8)), reference)
    assert invented.dsc[0, 1].item() == 0.0  # one empty: 0
    assert invented.mean.item() == pytest.approx((1 + 2 / 3) / 2)


def test_a_region_absent_from_the_label_counts_as_zero() -> None:
    missed = compare(volume(class_1=slice(0, 4)), volume(class_1=slice(0, 4), class_2=slice(4, 8)))
    assert missed.dsc[0, 1].item() == 0.0
    assert missed.mean.item() == pytest.approx((1 + 0 + 2 / 3) / 3)


def test_without_any_region_in_the_reference_the_mean_asks_whether_the_label_is_silent() -> None:
    label = torch.cat([volume(), volume(class_1=slice(0, 1)), volume(class_3=slice(0, 1))])
    result = compare(label, torch.cat([volume(), volume(), volume(class_3=slice(3, 4))]))
    assert not result.present.any()
    assert result.mean.tolist() == [1.0, 0.0, 1.0]  # class 3 is in no region


def test_dtypes_and_shapes() -> None:
    result = compare(random_labels(0), random_labels(1))
    assert (result.dsc.dtype, result.dsc.shape) == (torch.float32, (4, 3))
    assert (result.present.dtype, result.present.shape) == (torch.bool, (4, 3))
    assert (result.mean.dtype, result.mean.shape) == (torch.float32, (4,))


def test_agrees_with_monai() -> None:
    label, reference = random_labels(2, n=6), random_labels(3, n=6)
    label[0] = 0
    label[1][label[1] == 2] = 0
    reference[1][reference[1] == 2] = 0
    reference[2][reference[2] == 1] = 0
    result = compare(label, reference)
    masks, truth = region_masks(label, REGIONS).float(), region_masks(reference, REGIONS).float()
    everywhere = compute_dice(masks, truth, include_background=True, ignore_empty=False)
    torch.testing.assert_close(result.dsc, everywhere)
    where_present = compute_dice(masks, truth, include_background=True, ignore_empty=True)  # NaN: absent
    assert torch.equal(result.present, ~where_present.isnan())
    torch.testing.assert_close(result.mean, where_present.nanmean(dim=1))


def test_each_case_is_on_its_own() -> None:
    label, reference = random_labels(4), random_labels(5)
    together = compare(label, reference)
    alone = [compare(label[i : i + 1], reference[i : i + 1]) for i in range(4)]
    assert torch.equal(together.dsc, torch.cat([one.dsc for one in alone]))
    assert torch.equal(together.mean, torch.cat([one.mean for one in alone]))


def test_large_counts_are_exact_also_in_mixed_precision() -> None:
    a = torch.ones(1, 100_000, dtype=torch.bool)
    b = a.clone()
    b[0, :3] = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dsc = binary_dice(a, b)
    assert dsc.dtype == torch.float32
    assert dsc.item() == np.float32(2 * 99_997 / 199_997)


def test_binary_dice() -> None:
    a = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    b = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    expected = torch.tensor([2 * 1 / 5, 1, 0, 1])
    torch.testing.assert_close(binary_dice(a, b), expected)
    torch.testing.assert_close(binary_dice(b.reshape(4, 2, 2), a.reshape(4, 2, 2)), expected)
    torch.testing.assert_close(binary_dice(a.float() * 0.5, b.to(torch.uint8) * 7), expected)


def test_error_map_marks_a_differing_class_even_inside_one_region() -> None:
    wrong = error_map(volume(class_1=slice(0, 4)), volume(class_2=slice(0, 2), class_1=slice(2, 5)))
    assert wrong.dtype == torch.bool
    assert wrong[0, :, 0, 0].nonzero().flatten().tolist() == [0, 1, 4]


def test_one_hot() -> None:
    label = random_labels(6)
    channels = one_hot(label, 3)
    assert (channels.dtype, channels.shape) == (torch.float32, (4, 3, 9, 8, 7))
    expected = torch.nn.functional.one_hot(label.long(), 4)[..., 1:].movedim(-1, 1).float()
    assert torch.equal(channels, expected)


def test_region_masks_of_the_last_possible_class() -> None:
    label = torch.tensor([254, 0, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    assert region_masks(label, ((254,), (1, 254))).flatten().tolist() == [True, False, False] * 2


def test_wrong_input() -> None:
    a, b = random_labels(0), random_labels(0)[..., :6]
    for call in (compare, binary_dice, error_map):
        with pytest.raises(DataError, match=r"\(4, 9, 8, 7\), reference has \(4, 9, 8, 6\)"):
            call(a, b)
    with pytest.raises(DataError, match="no region"):
        overlap(a, a, ())
