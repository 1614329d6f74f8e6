"""The segmentation model: a U-Net that is trained on what every site kept, and applied at full size."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedqc.augmentation import augment
from fedqc.cases.volumes import Case
from fedqc.compute import Compute, cases_at_once, halved_when_full, seeded
from fedqc.config import SegmentationConfig
from fedqc.errors import ConfigError
from fedqc.geometry import sides_of
from fedqc.methods.base import RoundPlan, RoundResult
from fedqc.metrics.overlap import overlap
from fedqc.seeding import derive_seed, generator
from fedqc.task import Task
from fedqc.training import Progress, TrainSettings, train

WARMUP_STEPS = 50
WINDOWS_AT_ONCE = 4


@dataclass(frozen=True)
class SegmentationScore:
    """How well the prediction for one case agrees with its label."""

    case_id: str
    patient: str
    regions: dict[str, float]
    """DSC of each region."""
    dice: float
    """Mean DSC over the regions present in the label (conventions of `fedqc.metrics.overlap`)."""
    present: frozenset[str]
    """The regions that the label holds."""


@dataclass(frozen=True)
class SegmentationBatch:
    """Images and what is to be found in them."""

    image: Tensor
    """`[N, C, X, Y, Z]` float32."""
    label: Tensor
    """`[N, X, Y, Z]` uint8 class indices."""


class Segmentation:
    """Trains and applies a U-Net with residual units and instance norm.

    Args:
        task: What is segmented.
        config: How the model is trained.

    Raises:
        ConfigError: the task's size does not fit the network.
    """

    def __init__(self, task: Task, config: SegmentationConfig) -> None:
        self.task = task
        self.config = config
        self.regions = task.region_indices()
        self.stride = 2 ** (len(config.channels) - 1)
        task.check_strides(self.stride)
        if max(task.size) == self.stride:  # instance norm of one voxel is 0, whatever the voxel
            raise ConfigError(
                f"task {task.name!r}: {len(config.channels)} levels leave one voxel of "
                f"{'x'.join(map(str, task.size))}; use fewer segmentation.channels"
            )
        self.shortest_axis = min(task.size) // self.stride

    def build(self, seed: int) -> nn.Module:
        """The untrained network, on the CPU, the same for the same seed."""
        # MONAI takes seconds to load, in every process that Flower starts for a message: only where used.
        from monai.networks.nets.unet import UNet  # noqa: PLC0415

        with seeded(derive_seed(seed, "build", "segmentation")):
            network: nn.Module = UNet(
                spatial_dims=3,
                in_channels=len(self.task.modalities),
                out_channels=self.task.n_classes + 1,
                channels=self.config.channels,
                strides=(2,) * (len(self.config.channels) - 1),
                num_res_units=1,
                norm="instance",
            )
        return network

    def train_round(
        self,
        network: nn.Module,
        cases: Sequence[Case],
        plan: RoundPlan,
        compute: Compute,
        progress: Progress | None = None,
        *,
        weights: Sequence[float] | None = None,
    ) -> RoundResult:
        """One round of local steps on the labels as they are, in place.

        With `weights`, of which the cases have one each, a case is drawn as often as it weighs.
        """
        settings = TrainSettings(
            learning_rate=self.config.learning_rate,
            total_steps=plan.rounds * plan.steps,
            first_step=(plan.round - 1) * plan.steps,
            warmup_steps=WARMUP_STEPS,
            proximal=plan.proximal,
        )
        compute = compute.for_training(self.shortest_axis)
        rng = generator(plan.seed, "train", "segmentation", plan.site, plan.round)
        seen: list[str] = []
        batches = self.batches(
            cases, rng, plan.steps, plan.batch_size, compute.device, weights=weights, seen=seen
        )
        losses = train(compute.place(network), batches, self.losses, settings, compute, progress)
        return RoundResult(losses, plan.steps * plan.batch_size, patients=tuple(seen))

    @staticmethod
    def batches(
        cases: Sequence[Case],
        rng: np.random.Generator,
        steps: int,
        batch_size: int,
        device: torch.device,
        *,
        weights: Sequence[float] | None = None,
        seen: list[str] | None = None,
    ) -> Iterator[SegmentationBatch]:
        """Augmented cases, each read when it is needed.

        None is drawn again before all others were, unless they weigh differently. The patient of each is
        added to `seen`.
        """
        order = _drawn(rng, [1.0] * len(cases) if weights is None else weights)
        for _ in range(steps):
            batch = [cases[index] for index in islice(order, batch_size)]
            if seen is not None:
                seen += [case.patient for case in batch]
            image = torch.from_numpy(np.stack([case.image for case in batch])).to(device)
            label = torch.from_numpy(np.stack([case.label for case in batch])).to(device)
            image, label = augment(rng, image, label, sides=sides_of(batch[0].spacing))
            yield SegmentationBatch(image.to(memory_format=torch.channels_last_3d), label)

    @staticmethod
    def losses(network: nn.Module, batch: SegmentationBatch) -> dict[str, Tensor]:
        """Dice of the classes, without background, plus cross-entropy."""
        from monai.losses.dice import DiceLoss  # noqa: PLC0415 - see `build`

        # Over the batch, not case by case: a class that a case does not have has no Dice of its own there.
        dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
        logits = network(batch.image).float()
        label = batch.label.long()
        return {"dice": dice(logits, label[:, None]), "cross_entropy": F.cross_entropy(logits, label)}

    def evaluate(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int | None = None
    ) -> Iterator[SegmentationScore]:
        """Segment cases on the network's grid and compare with their labels, in order.

        Without `batch_size` as many at a time as are small.
        """
        network = compute.place(network).eval()
        remaining = iter(cases)
        at_once = batch_size or cases_at_once(self.task.size)
        while batch := list(islice(remaining, at_once)):
            yield from halved_when_full(partial(self._evaluate, network, compute), batch)

    def _evaluate(
        self, network: nn.Module, compute: Compute, batch: Sequence[Case]
    ) -> list[SegmentationScore]:
        """The scores of cases that fit into memory together."""
        image = torch.from_numpy(np.stack([case.image for case in batch])).to(compute.device)
        label = torch.from_numpy(np.stack([case.label for case in batch])).to(compute.device)
        with torch.inference_mode(), compute.autocast():
            logits = network(image.to(memory_format=torch.channels_last_3d))
        found = overlap(logits.argmax(dim=1), label, self.regions)
        values = zip(batch, found.dsc.tolist(), found.mean.tolist(), found.present.tolist(), strict=True)
        return [
            SegmentationScore(
                case.id,
                case.patient,
                dict(zip(self.task.regions, dsc, strict=True)),
                mean,
                frozenset(name for name, there in zip(self.task.regions, present, strict=True) if there),
            )
            for case, dsc, mean, present in values
        ]

    def predict(self, network: nn.Module, image: NDArray[np.float32], compute: Compute) -> NDArray[np.uint8]:
        """Segment an image of any size.

        Windows of the task's size overlap by half and count more in their middle; an image that is smaller
        is padded.

        Args:
            network: The trained network.
            image: `[C, X, Y, Z]` float32 at the task's spacing, z-scored, 0 outside the body.
            compute: Device and precision.

        Returns:
            `[X, Y, Z]` class indices.
        """
        from monai.inferers.utils import sliding_window_inference  # noqa: PLC0415 - see `build`

        network = compute.place(network).eval()  # outside of inference mode, or it could not be trained again

        def logits(windows: Tensor) -> Tensor:
            with compute.autocast():
                found: Tensor = network(windows.to(memory_format=torch.channels_last_3d))
            return found.float()

        with torch.inference_mode():
            whole = sliding_window_inference(
                torch.tensor(image, device=compute.device)[None],
                roi_size=self.task.size,
                sw_batch_size=WINDOWS_AT_ONCE,
                predictor=logits,
                overlap=0.5,
                mode="gaussian",
            )
        classes: NDArray[np.uint8] = whole[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
        return classes


def _drawn(rng: np.random.Generator, weights: Sequence[float]) -> Iterator[int]:
    """Positions of weights, without end: all in random order over and over, or each as often as it weighs."""
    count, share = len(weights), np.asarray(weights) / np.sum(weights)
    while True:
        order = rng.permutation(count) if len(set(weights)) == 1 else rng.choice(count, count, p=share)
        yield from order.tolist()
