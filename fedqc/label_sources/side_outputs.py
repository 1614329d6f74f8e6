"""Labels that all heads of a 3D and of a 2D VoxResNet make, ten an image (Zhang & Chung 2019, 2.2)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedqc.augmentation import augment
from fedqc.cases.volumes import Case
from fedqc.compute import Compute, seeded
from fedqc.geometry import sides_of
from fedqc.label_sources.segmenters import MadeLabels, SegmenterSource
from fedqc.methods.base import RoundPlan, RoundResult
from fedqc.methods.pairs import scaled
from fedqc.networks.voxresnet import VoxResNet, VoxResNetOutput
from fedqc.seeding import derive_seed, generator
from fedqc.training import Progress, TrainSettings, train

SLICES = 16
"""Axial slices of a case that the 2D network sees in a step, and segments at a time."""


@dataclass(frozen=True)
class _Batch:
    image: Tensor
    """`[N, C, *spatial]` float32 in [-1, 1]."""
    label: Tensor
    """`[N, *spatial]` uint8 class indices."""


class SideOutputSource(SegmenterSource):
    """A VoxResNet in 3D, and one in 2D whose slices are axial; each segments by all five of its outputs."""

    name = "side-outputs"
    own_rate = 1e-2
    """On 32 hippocampi, width 8, 120 steps of 2: final outputs of 0.77 (3D) and 0.67 (2D) mean DSC."""

    @property
    def variants(self) -> tuple[str, ...]:
        """Both networks."""
        return ("3d", "2d")

    def build(self, variant: str, seed: int) -> VoxResNet:
        """A VoxResNet from modalities to classes and background."""
        with seeded(derive_seed(seed, "build", self.name, variant)):
            return VoxResNet(
                in_channels=len(self.task.modalities),
                out_channels=self.task.n_classes + 1,
                spatial_dims=3 if variant == "3d" else 2,
                width=self.config.width,
            )

    def train_round(
        self,
        variant: str,
        network: nn.Module,
        cases: Sequence[Case],
        plan: RoundPlan,
        compute: Compute,
        *,
        progress: Progress | None = None,
    ) -> RoundResult:
        """Cross-entropy and Dice of the final output and the four others (2.4)."""
        settings = TrainSettings(
            learning_rate=self.learning_rate,
            total_steps=plan.rounds * plan.steps,
            first_step=(plan.round - 1) * plan.steps,
            proximal=plan.proximal,
        )
        if variant == "3d":
            compute = compute.for_training(-(-min(self.task.size) // 8))
        rng = generator(plan.seed, "train", self.name, variant, plan.site, plan.round)
        seen: list[str] = []
        batches = self._batches(variant, cases, rng, plan, compute, seen)
        losses = train(_placed(network, variant, compute), batches, _losses, settings, compute, progress)
        return RoundResult(losses, plan.steps * plan.batch_size, patients=tuple(seen))

    def is_kept(self, round_number: int, rounds: int) -> bool:
        """Only what is trained to the end."""
        return round_number == rounds

    @torch.inference_mode()
    def segment(self, variant: str, network: nn.Module, case: Case, compute: Compute) -> MadeLabels:
        """Five labels: the final output's, then those of the side outputs from the shallowest on."""
        network = _placed(network, variant, compute).eval()
        image = scaled(torch.from_numpy(np.array(case.image))[None].to(compute.device), -1, 1)
        parts = [image] if variant == "3d" else list(torch.split(_slices(image[0]), SLICES))
        found: list[list[Tensor]] = []
        for part in parts:
            with compute.autocast():
                output: VoxResNetOutput = network(part)
            found.append(
                [logits.argmax(dim=1).to(torch.uint8).cpu() for logits in (output.final, *output.side)]
            )
        names = ["final", *(f"side-{number}" for number in range(2, 6))]
        labels = [torch.cat(pieces) for pieces in zip(*found, strict=True)]
        return [
            ({"output": name}, (label[0] if variant == "3d" else label.permute(1, 2, 0)).numpy().copy())
            for name, label in zip(names, labels, strict=True)
        ]

    @staticmethod
    def _batches(  # noqa: PLR0917 - what is drawn, and from what
        variant: str,
        cases: Sequence[Case],
        rng: np.random.Generator,
        plan: RoundPlan,
        compute: Compute,
        seen: list[str],
    ) -> Iterator[_Batch]:
        """Augmented volumes, or axial slices of theirs, drawn at random; `seen` is told their patients."""
        for _ in range(plan.steps):
            chosen = [cases[int(index)] for index in rng.integers(len(cases), size=plan.batch_size)]
            seen += [case.patient for case in chosen]
            image = torch.from_numpy(np.stack([case.image for case in chosen])).to(compute.device)
            label = torch.from_numpy(np.stack([case.label for case in chosen])).to(compute.device)
            image, label = augment(rng, image, label, sides=sides_of(chosen[0].spacing))
            image = scaled(image, -1, 1)
            if variant == "3d":
                yield _Batch(image.to(memory_format=torch.channels_last_3d), label)
                continue
            images = torch.cat([_slices(one) for one in image])
            labels = torch.cat([one.permute(2, 0, 1) for one in label])
            count = min(SLICES * plan.batch_size, len(images))
            taken = torch.from_numpy(rng.permutation(len(images))[:count]).to(compute.device)
            yield _Batch(images[taken], labels[taken])


def _slices(image: Tensor) -> Tensor:
    """Axial slices `[Z, C, X, Y]` of an image `[C, X, Y, Z]`."""
    return image.permute(3, 0, 1, 2).contiguous()


def _placed(network: nn.Module, variant: str, compute: Compute) -> nn.Module:
    """A network on the device; the layout for 3D convolutions is none for 2D ones."""
    return compute.place(network) if variant == "3d" else network.to(compute.device)


def _losses(network: nn.Module, batch: _Batch) -> dict[str, Tensor]:
    """Cross-entropy and Dice of the classes, summed over the five outputs."""
    output: VoxResNetOutput = network(batch.image)
    label = batch.label.long()
    classes = F.one_hot(label, output.final.shape[1]).movedim(-1, 1).float()
    cross_entropy, dice = [], []
    for logits in (output.final, *output.side):
        log_probability = logits.float().log_softmax(dim=1)
        cross_entropy.append(F.nll_loss(log_probability, label))
        axes = [0, *range(2, classes.dim())]
        probability = log_probability.exp()
        both = (probability * classes).sum(dim=axes)
        sizes = probability.sum(dim=axes) + classes.sum(dim=axes)
        dice.append(1 - ((2 * both + 1) / (sizes + 1))[1:].mean())
    return {"cross_entropy": torch.stack(cross_entropy).sum(), "dice": torch.stack(dice).sum()}
