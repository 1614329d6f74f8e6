"""Real-time prediction of segmentation quality (Robinson et al., MICCAI 2018): one DSC for each class."""

import torch
from torch import Tensor, nn

from fedqc.compute import seeded
from fedqc.errors import ConfigError
from fedqc.methods.pairs import Judgement, PairBatch, PairMethod, scaled
from fedqc.metrics.overlap import region_masks
from fedqc.networks.resnet import ResNet
from fedqc.seeding import derive_seed
from fedqc.task import Task
from fedqc.training import TrainSettings

BACKGROUND, WHOLE = "background", "all-classes"
"""What is scored beside the classes; a class or region of that name is refused."""
MISSING_FROM = 0.5
"""Predicted DSC from which a region that a label lacks is taken to be right to be missing."""


class RobinsonMethod(PairMethod):
    """A 3D ResNet-50 on image and one-hot label with background, learned with the squared error.

    It predicts the DSC of background, of each class, of all classes together (the paper's figure), and of the
    task's other regions. The quality is the mean over the task's regions, as everywhere. Stacks of few thick
    slices are never halved along their short axis.
    """

    name = "robinson"
    network_options = frozenset({"width", "blocks", "dropout"})
    own_settings = TrainSettings(
        learning_rate=1e-5, total_steps=1, optimizer="adam", schedule="constant", weight_decay=0.0
    )
    """Adam at 1e-5 (section 2). The paper has a "decay of 0.005" as well and leaves open of what. As an L2
    penalty it draws predictions to the middle once the loss is small (slope 0.87 after 3,000 steps)."""

    def scored_regions(self) -> dict[str, tuple[int, ...]]:
        """Background, the classes, all of them together, and the task's other regions, as class indices.

        Raises:
            ConfigError: a name would stand for two of them.
        """
        for kind, names in (("class", self.task.classes), ("region", self.task.regions)):
            if taken := {BACKGROUND, WHOLE} & set(names):
                raise ConfigError(
                    f"task {self.task.name!r} has a {kind} {min(taken)!r}, which method {self.name!r} uses "
                    f"as a name of its own; rename the {kind}"
                )
        classes = {name: (index,) for index, name in enumerate(self.task.classes, start=1)}
        regions = super().scored_regions()
        for name, members in regions.items():
            if classes.get(name, members) != members:
                raise ConfigError(
                    f"task {self.task.name!r} has a region {name!r} that is another than the class {name!r}, "
                    f"and method {self.name!r} scores both; rename the region"
                )
        whole = tuple(range(1, self.task.n_classes + 1))
        return {BACKGROUND: (0,), **classes, WHOLE: whole} | regions

    def build(self, seed: int) -> ResNet:
        """The network, 64 channels wide where `qc.network.width` is left out."""
        chosen = self.config.network
        with seeded(derive_seed(seed, "build", self.name)):
            return ResNet(
                in_channels=len(self.task.modalities) + self.task.n_classes + 1,
                n_outputs=len(self.regions),
                width=chosen.width or 64,
                blocks=chosen.blocks or (3, 4, 6, 3),
                dropout=0.0 if chosen.dropout is None else chosen.dropout,
                bottleneck=True,
                short_axes=short_axes(self.task),
            )

    def deepest(self) -> tuple[int, int, int]:
        """The feature map that is pooled."""
        with torch.device("meta"):
            return self.build(0).deepest(self.task.size)

    def inputs(self, image: Tensor, label: Tensor) -> Tensor:
        """`[N, C + 1 + classes, X, Y, Z]`: intensities in [0, 1], and one mask a class, background too."""
        masks = region_masks(label, [(index,) for index in range(self.task.n_classes + 1)])
        joined = torch.cat([scaled(image, 0, 1), masks.float()], dim=1)
        return joined.to(memory_format=torch.channels_last_3d)

    def losses(self, network: nn.Module, batch: PairBatch) -> dict[str, Tensor]:
        """Mean squared error of all DSC; of a class that neither holds it is 1, as anywhere here."""
        return {"quality": (network(batch.inputs) - batch.dsc).square().mean()}

    def judge(self, network: nn.Module, image: Tensor, label: Tensor) -> Judgement:
        """Predicted DSC of all that is scored, and their mean over the task's regions.

        As in the truth, where a region that the reference lacks has no share in the mean, neither has one
        that the label lacks and is right to lack. A label that is right to hold none of them is perfect.
        """
        dsc: Tensor = network(self.inputs(image, label))
        names = list(self.regions)
        regions = dsc[:, [names.index(name) for name in self.task.regions]].clamp(0, 1)
        held = region_masks(label, self.task.region_indices()).flatten(2).any(dim=2)
        counts = held | (regions < MISSING_FROM)
        mean = (regions * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)
        return Judgement(torch.where(counts.any(dim=1), mean, 1.0), dsc)


def short_axes(task: Task) -> tuple[bool, bool, bool]:
    """Axes with less than a third of the voxels of the longest, as in 224x224x8."""
    x, y, z = (3 * voxels < max(task.size) for voxels in task.size)
    return x, y, z
