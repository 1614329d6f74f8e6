import builtins
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedqc import augmentation_2d
from fedqc.augmentation_2d import augment_slice
from fedqc.errors import ConfigError

SIDE = 48


@pytest.fixture(scope="module")
def views() -> Tensor:
    """Two modalities and one mask."""
    views = torch.zeros(3, SIDE, SIDE)
    views[:2, 6:40, 8:42] = torch.from_numpy(np.random.default_rng(0).uniform(0.2, 1, (2, 34, 34)))
    views[2, 12:24, 14:20] = 1
    return views


def test_many_draws(views: Tensor) -> None:
    pytest.importorskip("torchio")
    rng = np.random.default_rng(1)
    before = views.clone()
    state = torch.random.get_rng_state()
    drawn = [augment_slice(rng, views, 2) for _ in range(40)]
    assert torch.equal(before, views)
    assert torch.equal(state, torch.random.get_rng_state())
    for one in drawn:
        assert type(one) is Tensor
        assert one.shape == views.shape
        assert one.dtype == torch.float32
        assert one.isfinite().all()
        assert one[:2].min() >= 0
        assert one[:2].max() <= 1
        assert set(one[2].flatten().tolist()) <= {0, 1}
        assert 0.3 < one[2].sum() / views[2].sum() < 3
    assert len({one.sum().item() for one in drawn}) > 30
    flipped = [views, views.flip(1), views.flip(2), views.flip(1, 2)]
    moved_masks = [not any(torch.equal(one[2], other[2]) for other in flipped) for one in drawn]
    assert 10 < sum(moved_masks) < 36
    # Noise and artefacts are of the image: where the mask did not move, the image often changed all the same.
    changed = [not any(torch.equal(one[:2], other[:2]) for other in flipped) for one in drawn]
    assert sum(changed) > sum(moved_masks)


def test_the_same_for_the_same_generator(views: Tensor) -> None:
    pytest.importorskip("torchio")
    first, second = (
        [augment_slice(rng, views, 2) for _ in range(12)]
        for rng in (np.random.default_rng(7), np.random.default_rng(7))
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_image_and_mask_move_together(views: Tensor) -> None:
    pytest.importorskip("torchio")
    # With the mask as the image too, what is spatial does the same to both.
    same = views.clone()
    same[:2] = same[2]
    rng = np.random.default_rng(3)
    for _ in range(20):
        one = augment_slice(rng, same, 2)
        inside, outside = one[0][one[2] == 1].mean(), one[0][one[2] == 0].mean()
        assert inside - outside > 0.3


def test_without_torchio(monkeypatch: pytest.MonkeyPatch, views: Tensor) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **named: Any) -> Any:
        if name == "torchio":
            raise ImportError(name)
        return real(name, *args, **named)

    augmentation_2d._transforms.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ConfigError, match=r"needs the package torchio; install it with: pip install 'fedqc\[dqe"
    ):
        augment_slice(np.random.default_rng(0), views, 2)
