from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fedqc.cases.volumes import Case

MakeCase = Callable[..., Case]


@pytest.fixture
def make_case() -> MakeCase:
    """A case of one patient; without label and image, two classes side by side in a small noisy body."""

    def make(
        name: str = "case-1",
        label: NDArray[np.uint8] | None = None,
        image: NDArray[np.float32] | None = None,
        patient: str | None = None,
    ) -> Case:
        if label is None:
            label = np.zeros((8, 10, 6), dtype=np.uint8)
            label[2:4, 3:7, 1:5] = 1
            label[4:6, 3:7, 1:5] = 2
        if image is None:
            image = np.random.default_rng(0).standard_normal((1, *label.shape)).astype(np.float32)
        x, y, z = label.shape
        return Case(
            id=name,
            patient=patient or name,
            image=image,
            label=label,
            affine=np.eye(4),
            native_shape=(x, y, z),
            native_affine=np.eye(4),
        )

    return make
