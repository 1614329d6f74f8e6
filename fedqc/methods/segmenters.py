"""Segmenters and reconstruction networks that learn from every valid case, references and candidates alike.

Both are trained across the sites in two folds, as stages of a method, and a case is shown only to those that
its patient was left out of (`fedqc.methods.cross_fitting`). Further snapshots of a fold begin with the
weights of the one before and a learning rate that starts again (Huang et al., ICLR 2017).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedqc.cases.volumes import Case
from fedqc.compute import Compute, seeded
from fedqc.config import QCConfig
from fedqc.errors import ConfigError, TrainingError
from fedqc.methods.base import RoundPlan, RoundResult, Stage, part_of
from fedqc.methods.cross_fitting import FOLDS, folds_that_may_judge
from fedqc.methods.pairs import scaled
from fedqc.networks.mc_dropout_unet import MCDropoutUNet
from fedqc.networks.reconstruction_unet import ReconstructionUNet
from fedqc.seeding import derive_seed, generator
from fedqc.segmentation import Segmentation, SegmentationBatch
from fedqc.task import Task
from fedqc.training import Progress, TrainSettings, train

SSIM_WINDOW = 11
"""Voxels along a side of the Gaussian window (SD 1.5) in which images are compared (Wang et al. 2004)."""


@dataclass(frozen=True)
class Prediction:
    """What segmenters that never saw a case say of it, over many passes."""

    probability: Tensor
    """`[K + 1, X, Y, Z]` float32, of background and the classes: the mean over the passes."""
    samples: Tensor
    """`[N, X, Y, Z]` uint8, the most probable class index at each pass."""

    @property
    def label(self) -> Tensor:
        """`[X, Y, Z]` uint8, the most probable class index of the mean."""
        return self.probability.argmax(dim=0).to(torch.uint8)

    @property
    def entropy(self) -> Tensor:
        """`[X, Y, Z]` float32, of the mean, in nats; with one class the binary entropy of Williams et al."""
        entropy: Tensor = torch.special.entr(self.probability).sum(dim=0)
        return entropy


class CrossFitted(ABC):
    """Networks of one kind, one or more for each fold, as stages and parts of a method.

    Args:
        task: What is segmented.
        config: Of the method; `[qc.segmenter]` says how they are trained.
        snapshots: Networks of each fold.

    Raises:
        ConfigError: the task's size does not fit the network.
    """

    kind: ClassVar[str]
    """What the parts' names begin with."""

    def __init__(self, task: Task, config: QCConfig, snapshots: int = 1) -> None:
        self.task = task
        self.config = config.segmenter
        self.rounds = self.config.rounds or -(-config.rounds // 2)
        self.local_steps = self.config.local_steps or config.local_steps
        self.snapshots = snapshots
        with torch.device("meta"):
            deepest = self.network().deepest(task.size)
        if max(deepest) <= 1:  # there is no instance norm of one voxel
            raise ConfigError(
                f"task {task.name!r}: {len(self.config.channels)} levels leave one voxel of "
                f"{'x'.join(map(str, task.size))}; use fewer qc.segmenter.channels"
            )
        self.shortest_axis = min(deepest)

    @abstractmethod
    def network(self) -> MCDropoutUNet | ReconstructionUNet:
        """A network with weights that PyTorch's generator draws."""

    @abstractmethod
    def losses(self, network: nn.Module, batch: SegmentationBatch) -> dict[str, Tensor]:
        """The parts of the loss by name, each a scalar."""

    def parts(self, fold: int) -> tuple[str, ...]:
        """Names of a fold's networks, in the order in which they are trained."""
        first = f"{self.kind}-{fold + 1}"
        return first, *(f"{first}-{number}" for number in range(2, self.snapshots + 1))

    def parts_for(self, patient: str) -> tuple[str, ...]:
        """Names of the networks that never saw a patient: all where nobody says whose case it is."""
        return tuple(part for fold in folds_that_may_judge(patient) for part in self.parts(fold))

    def all_parts(self) -> tuple[str, ...]:
        """Names of all networks."""
        return tuple(part for fold in FOLDS for part in self.parts(fold))

    def stages(self) -> tuple[Stage, ...]:
        """One for each network; those of further snapshots are half as long as the first."""
        found = []
        for fold in FOLDS:
            before = ""
            for part in self.parts(fold):
                found.append(
                    Stage(
                        name=part,
                        rounds=-(-self.rounds // 2) if before else self.rounds,
                        local_steps=self.local_steps,
                        batch_size=self.config.batch_size,
                        part=part,
                        starts_from=before,
                        learns_from="all",
                        fold=fold,
                    )
                )
                before = part
        return tuple(found)

    def build(self, seed: int) -> dict[str, nn.Module]:
        """The untrained networks by their parts' names, on the CPU, the same for the same seed."""
        built: dict[str, nn.Module] = {}
        for part in self.all_parts():
            with seeded(derive_seed(seed, "build", part)):
                built[part] = self.network()
        return built

    def train_round(
        self,
        network: nn.Module,
        cases: Sequence[Case],
        plan: RoundPlan,
        compute: Compute,
        progress: Progress | None = None,
    ) -> RoundResult:
        """One round of local steps of the stage's part, in place, on the labels as they are.

        Args:
            network: the method's, with all its parts.
            cases: valid cases without the patients of the stage's fold.
            plan: the round, and its stage.
            compute: device and precision.
            progress: told after every step.

        Raises:
            TrainingError: there is no case.
        """
        if not cases:
            raise TrainingError(
                f"stage {plan.stage!r} has no case to learn from: every patient of this site is in the fold "
                "that it leaves out; two patients or more are needed"
            )
        compute = compute.for_training(self.shortest_axis)
        settings = TrainSettings(
            learning_rate=self.config.learning_rate,
            total_steps=plan.rounds * plan.steps,
            first_step=(plan.round - 1) * plan.steps,
            proximal=plan.proximal,
        )
        rng = generator(plan.seed, "train", plan.stage, plan.site, plan.round)
        with seeded(derive_seed(plan.seed, "dropout", plan.stage, plan.site, plan.round), compute.device):
            seen: list[str] = []
            batches = Segmentation.batches(cases, rng, plan.steps, plan.batch_size, compute.device, seen=seen)
            placed = compute.place(part_of(network, plan.stage))
            losses = train(placed, batches, self.losses, settings, compute, progress)
        return RoundResult(losses, plan.steps * plan.batch_size, patients=tuple(seen))


class Segmenters(CrossFitted):
    """MC-dropout U-Nets, trained with the Dice loss (Williams et al., "Uncertainty and error estimation")."""

    kind = "segmenter"

    def network(self) -> MCDropoutUNet:
        """A network from the modalities to background and the classes."""
        return MCDropoutUNet(
            in_channels=len(self.task.modalities),
            out_channels=self.task.n_classes + 1,
            channels=self.config.channels,
            dropout=self.config.dropout,
        )

    def losses(self, network: nn.Module, batch: SegmentationBatch) -> dict[str, Tensor]:
        """Soft Dice of the classes over the batch, without background."""
        from monai.losses.dice import DiceLoss  # noqa: PLC0415 - MONAI takes seconds to load

        dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
        return {"dice": dice(network(batch.image).float(), batch.label[:, None].long())}

    @torch.no_grad()
    def predict(self, network: nn.Module, case: Case, compute: Compute) -> Prediction:
        """What the segmenters that never saw a case's patient say of it.

        The passes of a case are drawn by its id, one after the other: whatever else is segmented, and in
        which order, they are the same.

        Args:
            network: the method's, with all its parts, already on the device.
            case: its image counts alone.
            compute: device and precision.
        """
        image = torch.from_numpy(np.array(case.image))[None].to(compute.device)
        image = image.to(memory_format=torch.channels_last_3d)
        parts = self.parts_for(case.patient)
        passes = -(-self.config.passes // self.snapshots)
        shape = (self.task.n_classes + 1, *case.image.shape[1:])
        total = torch.zeros(shape, device=compute.device)
        samples = []
        for part in parts:
            segmenter = part_of(network, part)
            for number in range(passes):
                with (
                    seeded(derive_seed(0, "pass", case.id, part, number), compute.device),
                    compute.autocast(),
                ):
                    logits = segmenter(image)[0]
                probability = logits.float().softmax(dim=0)
                total += probability
                samples.append(probability.argmax(dim=0).to(torch.uint8))
        return Prediction(total / len(samples), torch.stack(samples))


class Reconstructors(CrossFitted):
    """Reconstruction U-Nets, which fill in what a label marks, trained with 1 - SSIM (Williams et al.)."""

    kind = "reconstruction"

    def __init__(self, task: Task, config: QCConfig) -> None:
        chosen = config.reconstruction.modalities or task.modalities
        if unknown := [name for name in chosen if name not in task.modalities]:
            raise ConfigError(
                f"qc.reconstruction.modalities names {', '.join(unknown)}; task {task.name!r} has "
                f"{', '.join(task.modalities)}"
            )
        self.channels = [task.modalities.index(name) for name in chosen]
        super().__init__(task, config)

    def network(self) -> ReconstructionUNet:
        """A network from the chosen modalities to the same."""
        return ReconstructionUNet(modalities=len(self.channels), channels=self.config.channels)

    def losses(self, network: nn.Module, batch: SegmentationBatch) -> dict[str, Tensor]:
        """1 - SSIM of what is given back and the whole image."""
        image = self.whole(batch.image)
        return {"ssim": ssim_loss(network(self.with_holes(image, batch.label)), image)}

    def whole(self, image: Tensor) -> Tensor:
        """The chosen modalities of images `[N, C, X, Y, Z]`, each in [0, 1]: `[N, M, X, Y, Z]`."""
        return scaled(image[:, self.channels], 0, 1)

    @staticmethod
    def with_holes(image: Tensor, label: Tensor) -> Tensor:
        """Images `[N, M, X, Y, Z]` with zeros where labels `[N, X, Y, Z]` mark anything."""
        return (image * (label == 0)[:, None]).to(memory_format=torch.channels_last_3d)

    @torch.no_grad()
    def errors(
        self, network: nn.Module, patients: Sequence[str], image: Tensor, label: Tensor, compute: Compute
    ) -> Tensor:
        """What is given back minus what is there, by networks that never saw the patient.

        Args:
            network: the method's, with all its parts, already on the device.
            patients: of each of N samples.
            image: `[N, C, X, Y, Z]` float32, z-scored.
            label: `[N, X, Y, Z]` class indices; what it marks is cut out.
            compute: device and precision.

        Returns:
            `[N, M, X, Y, Z]` float32 in [-1, 1] where networks stay in [0, 1].
        """
        whole = self.whole(image)
        holes = self.with_holes(whole, label)
        errors = []
        for index, patient in enumerate(patients):
            with compute.autocast():
                found = [part_of(network, part)(holes[index : index + 1]) for part in self.parts_for(patient)]
            errors.append(torch.cat(found).float().mean(dim=0) - whole[index])
        return torch.stack(errors)


def ssim_loss(found: Tensor, image: Tensor) -> Tensor:
    """1 - SSIM of images in [0, 1], slice by slice in the axial plane, as in the published code.

    Slices are continued by reflection, so that their borders count too; where one has fewer voxels than the
    window, the window is smaller.

    Args:
        found: `[N, M, X, Y, Z]`.
        image: the same shape.
    """
    from monai.losses.ssim_loss import SSIMLoss  # noqa: PLC0415 - MONAI takes seconds to load

    x, y = (min(SSIM_WINDOW, axis - 1 + axis % 2) for axis in image.shape[2:4])
    loss = SSIMLoss(spatial_dims=2, win_size=(x, y))
    slices = (volume.float().movedim(4, 2).flatten(1, 2) for volume in (found, image))  # `[N, M * Z, X, Y]`
    padded = [F.pad(volume, (y // 2, y // 2, x // 2, x // 2), mode="reflect") for volume in slices]
    with torch.autocast(found.device.type, enabled=False):  # variances are small differences of squares
        value: Tensor = loss(*padded)
    return value


def region_probability(probability: Tensor, regions: Sequence[Sequence[int]]) -> Tensor:
    """Probability `[R, X, Y, Z]` of each region, of the probability `[K + 1, X, Y, Z]` of the classes."""
    return torch.stack([probability[list(members)].sum(dim=0) for members in regions]).clamp(max=1)
