"""Labels carried from one case onto another by registration of their images, with SimpleITK."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedqc.cases.volumes import Case
from fedqc.metrics.overlap import overlap

if TYPE_CHECKING:
    import SimpleITK as sitk  # noqa: N813 - as its own documentation has it

LEVELS = ((4, 2.0), (2, 1.0))
"""Of the affine registration: by what the image is divided, and its smoothing in voxels. A third level, at
full size, did not bring hippocampi closer together (r 0.933 instead of 0.936) and took 1.6 times as long."""
AFFINE_STEPS = 60
"""Most steps of the optimiser on each level."""
DEMONS_SHRINK = 2
"""Deformations are sought at half the size: at full size as well, hippocampi gained 0.006 in r and took twice
as long."""
DEMONS_STEPS = 20
DEMONS_SMOOTHING = 1.5
"""Standard deviation of the Gaussian that smooths a deformation after every step, in voxels of half size."""
SHORTEST = 16
"""A side of so many voxels or fewer is not halved, for in a stack of few slices each one counts; on its first
level the affine registration halves every side all the same."""


@dataclass(frozen=True)
class Registration:
    """How two cases are registered: an affine transform, then a deformation.

    Both maximise the agreement of the first modality: the affine transform its correlation (regular step
    gradient descent, every voxel counts, nothing is drawn), the deformation its squared difference (symmetric
    forces demons, Vercauteren et al. 2009).
    """

    references: Sequence[Case]
    regions: Sequence[Sequence[int]]
    """Class indices of each region."""
    threads: int = 1
    """Sums of floats depend on it in their last digits; for one number of them the result is the same."""
    _kept: dict[int, Case] = field(default_factory=dict, repr=False)
    """By index, the reference that was prepared last."""

    def __post_init__(self) -> None:
        importlib.import_module("SimpleITK")  # takes long, and belongs to no case

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
        moving = _image(case.image[0], case)
        carried = [_image(label, case) for label in labels]

        def compare(index: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
            import SimpleITK as sitk  # noqa: PLC0415, N813 - takes long, only where it is used

            reference = self._reference(index)
            fixed = _image(reference.image[0], reference)
            transform = register(moving, fixed, self.threads)
            resample = sitk.ResampleImageFilter()
            resample.SetNumberOfThreads(self.threads)
            resample.SetReferenceImage(fixed)
            resample.SetTransform(transform)
            resample.SetInterpolator(sitk.sitkNearestNeighbor)
            warped = np.stack([sitk.GetArrayFromImage(resample.Execute(label)).T for label in carried])
            truth = torch.from_numpy(np.array(reference.label))
            found = overlap(torch.from_numpy(warped), truth.expand(len(labels), -1, -1, -1), self.regions)
            return found.dsc.numpy(), found.present[0].numpy()

        return compare

    def prepare(self, index: int) -> None:
        """Read a reference."""
        if index not in self._kept:
            self._kept.clear()
            self._kept[index] = self.references[index]

    def _reference(self, index: int) -> Case:
        self.prepare(index)
        return self._kept[index]


def register(moving: "sitk.Image", fixed: "sitk.Image", threads: int) -> "sitk.Transform":
    """From points of `fixed` to points of `moving` that show the same, both in mm."""
    import SimpleITK as sitk  # noqa: PLC0415, N813 - takes long, only where it is used

    coarse_fixed, coarse_moving = (_shrunk(image, DEMONS_SHRINK, threads) for image in (fixed, moving))
    affine = _affine(coarse_moving, coarse_fixed, threads)
    warp = sitk.ResampleImageFilter()
    warp.SetNumberOfThreads(threads)
    warp.SetReferenceImage(coarse_fixed)
    warp.SetTransform(affine)
    demons = sitk.FastSymmetricForcesDemonsRegistrationFilter()
    demons.SetNumberOfThreads(threads)
    demons.SetNumberOfIterations(DEMONS_STEPS)
    demons.SetSmoothDisplacementField(True)
    demons.SetStandardDeviations(DEMONS_SMOOTHING)
    deformation = demons.Execute(coarse_fixed, warp.Execute(coarse_moving))
    # The last one added is applied first: a point of the reference is displaced, then it goes to the case.
    both = sitk.CompositeTransform(3)
    both.AddTransform(affine)
    both.AddTransform(sitk.DisplacementFieldTransform(sitk.Cast(deformation, sitk.sitkVectorFloat64)))
    return both


def _affine(moving: "sitk.Image", fixed: "sitk.Image", threads: int) -> "sitk.Transform":
    """The affine transform between images that are shrunk to the finest of `LEVELS` already."""
    import SimpleITK as sitk  # noqa: PLC0415, N813 - takes long, only where it is used

    start = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.AffineTransform(3), sitk.CenteredTransformInitializerFilter.GEOMETRY
    )
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(threads)
    method.SetMetricAsCorrelation()
    method.SetMetricSamplingStrategy(method.NONE)  # every voxel
    method.SetInterpolator(sitk.sitkLinear)
    method.SetInitialTransform(start, inPlace=True)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0, minStep=0.01, numberOfIterations=AFFINE_STEPS
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([shrink // DEMONS_SHRINK for shrink, _ in LEVELS])
    method.SetSmoothingSigmasPerLevel([sigma / DEMONS_SHRINK for _, sigma in LEVELS])
    method.SetSmoothingSigmasAreSpecifiedInPhysicalUnits(False)
    found: sitk.Transform = method.Execute(fixed, moving)
    return found


def _shrunk(image: "sitk.Image", factor: int, threads: int) -> "sitk.Image":
    """An image smoothed and divided along every side that is long enough."""
    import SimpleITK as sitk  # noqa: PLC0415, N813 - takes long, only where it is used

    factors = [factor if side > SHORTEST else 1 for side in image.GetSize()]
    spacing = image.GetSpacing()
    smooth = sitk.DiscreteGaussianImageFilter()
    smooth.SetNumberOfThreads(threads)
    smooth.SetUseImageSpacing(True)
    smooth.SetVariance([(side * (by - 1)) ** 2 for side, by in zip(spacing, factors, strict=True)])
    shrunk: sitk.Image = sitk.Shrink(smooth.Execute(image), factors)
    return shrunk


def _image(volume: NDArray[Any], case: Case) -> "sitk.Image":
    """`[X, Y, Z]` as an image whose axes are the grid's, in mm from its first voxel.

    Where the scanner's origin was does not matter: cases are compared from the middle of their grids.
    """
    import SimpleITK as sitk  # noqa: PLC0415, N813 - takes long, only where it is used

    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.T))
    image.SetSpacing(case.spacing)
    return image
