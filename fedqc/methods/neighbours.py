"""Labels carried from one case onto another by what their voxels look like, without registration.

Each voxel of the other case takes the class that voxels of the first one have which look alike and lie at a
similar place: all of them vote, with the weight of a Gaussian of their distance. That is a classifier trained
on one image and the label that is to be judged, as Valindria et al. (2017) have it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedqc.cases.volumes import Case, bounding_box
from fedqc.geometry import grown
from fedqc.label_sources.forest import body, equal_shares
from fedqc.label_sources.forest import features as forest_features
from fedqc.metrics.overlap import region_masks
from fedqc.seeding import generator

Features = Callable[[Case], NDArray[np.float32]]
"""What each voxel of a case looks like, `[F, X, Y, Z]`."""
BANDWIDTH = 0.2
"""Standard deviation of the Gaussian, in the distance of `_scaled`."""
STEADIEST = 0.02
"""Share of the body's side: places of labels are not taken to vary less, however few there are."""
MARGIN = 5
"""Voxels around a label that it is compared in."""
_AT_ONCE = 1024  # voxels of a reference; each takes 4 bytes for every voxel of the candidate
_ELSEWHERE, _NEAR = 0, 1  # strata of voxels; a voxel of class c is of stratum 1 + c


def appearance(case: Case) -> NDArray[np.float32]:
    """Intensities, smoothed ones and their gradients, as a random forest sees them; 0 outside the body.

    Returns:
        `[5 C, X, Y, Z]`, see `fedqc.label_sources.forest.features`, without the places.
    """
    inside = body(case)
    rows = forest_features(case)[:, :-3]
    volumes = np.zeros((rows.shape[1], *inside.shape), dtype=np.float32)
    for volume, column in zip(volumes, rows.T, strict=True):
        volume[inside] = column
    return volumes


@dataclass(frozen=True, eq=False)
class _Voxels:
    """Voxels drawn from a case."""

    looks: NDArray[np.float16]
    """`[n, F]`, in the units of the features."""
    places: NDArray[np.float32]
    """`[n, 3]`, from 0 to 1 along each side of the body."""
    indices: NDArray[np.intp]
    """`[n]`, into the flattened volume."""
    weights: NDArray[np.float32]
    """`[n]`, how many voxels each stands for."""


@dataclass(frozen=True)
class Neighbours:
    """How voxels of two cases are compared."""

    references: Sequence[Case]
    regions: Sequence[Sequence[int]]
    """Class indices of each region."""
    features: Features = appearance
    voxels: int = 6000
    """Drawn of each case, as many of each class and of what is around them."""
    position: float = 10.0
    """How much the place weighs beside the looks (see `weight_of_place`)."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _kept: dict[int, tuple[_Voxels, NDArray[np.uint8]]] = field(default_factory=dict, repr=False)
    """By index, what was drawn of a reference, and its classes: some 0.4 MB each instead of 450 MB."""

    def begin(
        self, case: Case, labels: Sequence[NDArray[np.uint8]]
    ) -> Callable[[int], tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """Get ready to carry labels of one image onto references.

        Args:
            case: whose image the labels are of; its own label does not matter.
            labels: L labels `[X, Y, Z]`.

        Returns:
            What compares them with the label of the reference at an index: `[L, R]` DSC of each region, and
            `[R]` whether the reference holds it.
        """
        atlas = self._draw(case, np.max(labels, axis=0), everywhere=True)
        classes = np.stack([label.reshape(-1)[atlas.indices] for label in labels])
        looks = atlas.looks.astype(np.float32)
        middle, spread = looks.mean(axis=0), looks.std(axis=0)
        spread[spread == 0] = np.inf  # says nothing
        n_classes = 1 + int(classes.max())
        votes = F.one_hot(torch.from_numpy(classes.astype(np.int64)), n_classes)
        votes = votes.permute(1, 0, 2).flatten(1).float().to(self.device)
        known = self._scaled(atlas, middle, spread)
        # Of |a - b|^2 what differs between a voxel's neighbours, and how many voxels each of them stands for.
        offset = torch.from_numpy(np.log(atlas.weights)).to(self.device) - known.square().sum(dim=1) / 2

        def compare(index: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
            reference, truth = self._reference(index)
            asked = self._scaled(reference, middle, spread)
            found = torch.cat(
                [
                    (torch.softmax(part @ known.T + offset, dim=1) @ votes)
                    .reshape(-1, len(labels), n_classes)
                    .argmax(dim=2)
                    for part in torch.split(asked, _AT_ONCE)
                ]
            ).T.cpu()
            return _weighted_dice(found, truth, reference.weights, self.regions)

        return compare

    def prepare(self, index: int) -> None:
        """Draw the voxels of a reference, once."""
        if index not in self._kept:
            case = self.references[index]
            drawn = self._draw(case, case.label, everywhere=False)
            self._kept[index] = drawn, case.label.reshape(-1)[drawn.indices]

    def _reference(self, index: int) -> tuple[_Voxels, NDArray[np.uint8]]:
        self.prepare(index)
        return self._kept[index]

    def _draw(self, case: Case, label: NDArray[np.uint8], *, everywhere: bool) -> _Voxels:
        """Voxels of each class of a label, of what is near it, and `everywhere` else in the body too."""
        inside = body(case) | (label > 0)
        if not inside.any():
            inside[:] = True
        box = bounding_box(label)
        strata = np.zeros(label.shape, dtype=np.uint8)
        if box is not None:
            strata[grown(box, MARGIN, label.shape)] = _NEAR
        strata[label > 0] = _NEAR + label[label > 0]
        candidates = np.flatnonzero(inside if everywhere or box is None else inside & (strata > _ELSEWHERE))
        of = strata.reshape(-1)[candidates]
        totals = np.bincount(of, minlength=256)
        shares = equal_shares(totals, self.voxels)
        rng = generator(0, "rca", case.id)
        chosen = np.concatenate(
            [
                rng.choice(np.flatnonzero(of == stratum), shares[stratum], replace=False, shuffle=False)
                for stratum in np.flatnonzero(shares)
            ]
        )
        indices = candidates[chosen]
        where = np.stack(np.unravel_index(indices, label.shape), axis=1)
        looks = self.features(case)[(slice(None), *where.T)].T
        return _Voxels(
            looks=looks.astype(np.float16),
            places=_places(where, inside).astype(np.float32),
            indices=indices,
            weights=(totals / np.maximum(shares, 1))[of[chosen]].astype(np.float32),
        )

    def _scaled(self, voxels: _Voxels, middle: NDArray[np.float32], spread: NDArray[np.float32]) -> Tensor:
        """`[n, F + 3]` whose distances are in standard deviations of the Gaussian.

        The squared distance is the mean over the features, each of variance 1 in the candidate, and the
        square of `position` times the distance of the places.
        """
        looks = (voxels.looks.astype(np.float32) - middle) / spread / np.sqrt(len(spread))
        joined = np.concatenate([looks, self.position * voxels.places], axis=1) / BANDWIDTH
        return torch.from_numpy(joined.astype(np.float32)).to(self.device)


def weight_of_place(references: Iterable[Case]) -> float:
    """How much a place should weigh: so that its Gaussian is as wide as the places of labels vary.

    That is much for a structure that has its place in the body, and little for lesions, which lie anywhere.

    Args:
        references: cases whose labels are right; fewer than two with a label say nothing, and give 0.
    """
    middles = []
    for case in references:
        if case.label.any():
            where = np.argwhere(case.label)
            middles.append(_places(where, body(case) | (case.label > 0)).mean(axis=0))
    if len(middles) < 2:
        return 0.0
    spread = float(np.sqrt(np.var(middles, axis=0, ddof=1).mean()))
    return BANDWIDTH / max(spread, STEADIEST)


def _places(where: NDArray[np.intp], inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Indices `[n, 3]` of voxels, as places from 0 to 1 along each side of what is inside."""
    ends = bounding_box(inside) or ()
    begin = np.array([side.start for side in ends])
    length = np.array([max(1, side.stop - 1 - side.start) for side in ends])
    places: NDArray[np.float64] = (where - begin) / length
    return places


def _weighted_dice(
    found: Tensor, truth: NDArray[np.uint8], weights: NDArray[np.float32], regions: Sequence[Sequence[int]]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """DSC `[L, R]` of labels `[L, n]` of voxels that stand for several each, and what the truth holds."""
    shape = (-1, 1, 1, len(truth))
    in_label = region_masks(found.reshape(shape), regions).flatten(2).float()
    in_truth = region_masks(torch.from_numpy(truth).reshape(shape), regions).flatten(2).float()
    weight = torch.from_numpy(weights)
    sizes = (in_label + in_truth) @ weight
    dsc = torch.where(sizes > 0, 2 * (in_label * in_truth) @ weight / sizes.clamp(min=1e-6), 1.0)
    return dsc.clamp(0, 1).numpy(), (in_truth[0].sum(dim=1) > 0).numpy()
