"""QC methods of one network that sees image and label together: how all of them are trained and applied."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from fedqc.augmentation import augment
from fedqc.cases.cached import LabelsOf, PatientsOf
from fedqc.cases.volumes import Case
from fedqc.compute import Compute, cases_at_once, halved_when_full, seeded
from fedqc.config import QCConfig
from fedqc.degradation.samples import LabelFactory, SamplePool
from fedqc.errors import ConfigError
from fedqc.geometry import sides_of
from fedqc.methods.base import Known, Method, RoundPlan, RoundResult, Score
from fedqc.metrics.overlap import error_map, one_hot, overlap
from fedqc.seeding import derive_seed, generator
from fedqc.task import Task
from fedqc.training import Progress, train


@dataclass(frozen=True)
class PairBatch:
    """Image-label pairs whose quality is known."""

    inputs: Tensor
    """`[N, C', X, Y, Z]` image and label as the network sees them."""
    label: Tensor
    """`[N, X, Y, Z]` uint8, the class indices to be judged."""
    reference: Tensor
    """`[N, X, Y, Z]` uint8, the class indices that are right."""
    error: Tensor
    """`[N, X, Y, Z]` bool, where the label is wrong."""
    dsc: Tensor
    """`[N, R]` true DSC of each region."""
    present: Tensor
    """`[N, R]` whether the region is in the reference."""
    mean: Tensor
    """`[N]` true mean DSC."""


@dataclass(frozen=True)
class Judgement:
    """What a network says of N image-label pairs."""

    quality: Tensor
    """`[N]`, of the whole label."""
    regions: Tensor
    """`[N, R]`, of each region."""
    error: Tensor | None = None
    """`[N, X, Y, Z]` probability that the label is wrong at a voxel, where the method has an error map."""
    class_errors: Tensor | None = None
    """`[N, K, X, Y, Z]` the same for the mask of each class, where the method tells them apart."""
    corrected: Tensor | None = None
    """`[N, X, Y, Z]` uint8, the class indices that would be right, where the method tells."""


class PairMethod(Method):
    """Trains one network on freshly degraded labels of reference cases, and judges labels with it.

    A method says which network it is (`build`), what is learned (`losses`) and what that means (`judge`).
    """

    judges = "label"

    def __init__(self, task: Task, config: QCConfig) -> None:
        super().__init__(task, config)
        self.regions = self.scored_regions()
        self.sides = sides_of(task.spacing)
        deepest = self.deepest()
        if max(deepest) <= 1 or min(deepest) < 1:  # there is no instance norm of one voxel
            raise ConfigError(
                f"task {task.name!r}: size {'x'.join(map(str, task.size))} leaves "
                f"{'x'.join(map(str, deepest))} voxels in the network's last layer, too few for its norm; "
                "use a larger size or a shallower network (qc.network)"
            )
        self.shortest_axis = min(deepest)

    @abstractmethod
    def deepest(self) -> tuple[int, int, int]:
        """Voxels of the network's last layer.

        Raises:
            ConfigError: the task's size does not fit the network.
        """

    @abstractmethod
    def losses(self, network: nn.Module, batch: PairBatch) -> dict[str, Tensor]:
        """The parts of the loss by name, each a scalar."""

    @abstractmethod
    def judge(self, network: nn.Module, image: Tensor, label: Tensor) -> Judgement:
        """What the network says of images `[N, C, X, Y, Z]` with labels `[N, X, Y, Z]`; under autocast."""

    def inputs(self, image: Tensor, label: Tensor) -> Tensor:
        """Network input `[N, C + classes, X, Y, Z]` of images `[N, C, X, Y, Z]` and labels `[N, X, Y, Z]`.

        Under autocast it has the precision that the first convolution would bring it to.
        """
        device = image.device.type
        if torch.is_autocast_enabled(device):
            image = image.to(torch.get_autocast_dtype(device))
        return torch.cat([image, one_hot(label, self.task.n_classes, image.dtype)], dim=1)

    def train_round(
        self,
        network: nn.Module,
        cases: Sequence[Case],
        plan: RoundPlan,
        compute: Compute,
        progress: Progress | None = None,
        *,
        known: Known | None = None,
    ) -> RoundResult:
        """One round of local steps on freshly degraded (or drawn, where they are stored) labels."""
        compute = compute.for_training(self.shortest_axis)
        rng = generator(plan.seed, "train", plan.site, plan.round)
        # Dropout draws from PyTorch's own generator.
        with seeded(derive_seed(plan.seed, "dropout", plan.site, plan.round), compute.device):
            pool = self.pool(cases, compute.device, known)
            seen: list[str] = []
            batches = self.batches(cases, pool, rng, plan.steps, plan.batch_size, seen)
            placed, settings = compute.place(network), self.settings(plan)
            losses = train(placed, batches, self.losses, settings, compute, progress)
        return RoundResult(losses, plan.steps * plan.batch_size, pool.drawn, tuple(seen))

    def pool(
        self,
        cases: Sequence[Case],
        device: torch.device | None = None,
        known: Known | None = None,
    ) -> SamplePool:
        """Labels of known quality of the cases, which are made when they are drawn."""
        stored = known.labels if known is not None else None
        factory = LabelFactory(
            LabelsOf(cases),
            tuple(self.regions.values()),
            self.kinds,
            device,
            stored,
            patients=PatientsOf(cases),
            sides=self.sides,
        )
        return SamplePool(factory, self.config.samples, self.config.balance)

    def batches(  # noqa: PLR0917 - what is drawn, and from what
        self,
        cases: Sequence[Case],
        pool: SamplePool,
        rng: np.random.Generator,
        steps: int,
        batch_size: int,
        seen: list[str] | None = None,
    ) -> Iterator[PairBatch]:
        """Augmented QC samples, made chunk by chunk; images are read when their batch is made.

        The patient of each sample is added to `seen`.
        """
        samples = (
            (cases[recipe.case], label)
            for chunk in pool.chunks(rng, steps * batch_size)
            for recipe, label in zip(chunk.recipes, chunk.label, strict=True)
        )
        for _ in range(steps):
            batch = list(islice(samples, batch_size))
            chosen = [case for case, _ in batch]
            if seen is not None:
                seen += [case.patient for case in chosen]
            label = torch.stack([label for _, label in batch])
            image = torch.from_numpy(np.stack([case.image for case in chosen])).to(label.device)
            reference = torch.from_numpy(np.stack([case.label for case in chosen])).to(label.device)
            maps = self.maps_of(chosen)
            image, reference, label, *maps = augment(rng, image, reference, label, *maps, sides=self.sides)
            yield self.batch(rng, self.shown(chosen, image, label, maps), reference, label)

    def maps_of(self, cases: Sequence[Case]) -> list[Tensor]:
        """What `shown` needs of N cases beside their images: each `[N, X, Y, Z]`, moved as a label is."""
        return []

    def shown(self, cases: Sequence[Case], image: Tensor, label: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """What the network sees beside the labels, `[N, C', X, Y, Z]`: the images, unless a method has maps.

        Args:
            cases: whose images and labels they are.
            image: `[N, C, X, Y, Z]`.
            label: `[N, X, Y, Z]`, to be judged.
            maps: what `maps_of` made.
        """
        return image

    def batch(self, rng: np.random.Generator, image: Tensor, reference: Tensor, label: Tensor) -> PairBatch:
        """Pairs and the truth about them; `rng` is for methods that draw a part of each volume."""
        truth = overlap(label, reference, tuple(self.regions.values()))
        return PairBatch(
            inputs=self.inputs(image, label),
            label=label,
            reference=reference,
            error=error_map(label, reference),
            dsc=truth.dsc,
            present=truth.present,
            mean=truth.mean,
        )

    @torch.inference_mode()
    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int | None = None
    ) -> Iterator[Score]:
        """Judge the label of each case, in order; without `batch_size` as many at a time as are small."""
        network = compute.place(network).eval()
        remaining = iter(cases)
        at_once = batch_size or cases_at_once(self.task.size)
        while batch := list(islice(remaining, at_once)):
            yield from halved_when_full(partial(self._score, network, compute), batch)

    def _score(self, network: nn.Module, compute: Compute, batch: Sequence[Case]) -> list[Score]:
        """The scores of cases that fit into memory together."""
        image = torch.from_numpy(np.stack([case.image for case in batch])).to(compute.device)
        label = torch.from_numpy(np.stack([case.label for case in batch])).to(compute.device)
        image = self.shown(batch, image, label, self.maps_of(batch))
        with compute.autocast():
            found = self.judge(network, image, label)
        quality, regions = (values.float().clamp(0, 1).tolist() for values in (found.quality, found.regions))
        return [
            Score(
                case.id,
                quality[index],
                dict(zip(self.regions, regions[index], strict=True)),
                None if found.error is None else found.error[index].float().cpu().numpy(),
                {}
                if found.class_errors is None
                else dict(
                    zip(self.task.classes, found.class_errors[index].float().cpu().numpy(), strict=True)
                ),
                corrected=None if found.corrected is None else found.corrected[index].cpu().numpy(),
            )
            for index, case in enumerate(batch)
        ]


def scaled(image: Tensor, low: float, high: float) -> Tensor:
    """Images `[N, C, X, Y, Z]` with each channel's values brought linearly onto [low, high]."""
    least, most = (end(image, dim=(2, 3, 4), keepdim=True) for end in (torch.amin, torch.amax))
    return low + (high - low) * (image - least) / (most - least).clamp(min=1e-6)


def quality_loss(predicted: Tensor, batch: PairBatch) -> Tensor:
    """Mean absolute error of predicted `[N, 1 + R]` mean and regions' DSC (Qiu et al. 2023, eq. 1).

    Regions that the reference does not hold are left out.
    """
    return mean_where_present((predicted - qualities(batch)).abs(), batch)


def qualities(batch: PairBatch) -> Tensor:
    """`[N, 1 + R]`, true DSC: the mean and each region's."""
    return torch.cat([batch.mean[:, None], batch.dsc], dim=1)


def mean_where_present(loss: Tensor, batch: PairBatch) -> Tensor:
    """The mean of losses `[N, 1 + R]` of `qualities`, without regions that the reference does not hold."""
    weight = torch.cat([torch.ones_like(batch.mean[:, None]), batch.present.float()], dim=1)
    return (loss * weight).sum() / weight.sum()
