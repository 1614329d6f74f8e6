"""Dice regression: the DSC of a label, by a CNN that sees it beside a map (Williams et al.).

The map is one of three (`[qc.regression] input`): the image; the entropy of MC-dropout segmenters; or the
error of reconstruction networks, which are shown the image without what the label marks. In the paper the
label is the segmenter's own prediction; here it is whatever is to be judged, annotations too. The networks
that make the maps are trained first, in two folds (`fedqc.methods.segmenters`).
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from fedqc.cases.memo import digest
from fedqc.cases.volumes import Case
from fedqc.compute import Compute, seeded
from fedqc.config import QCConfig
from fedqc.errors import TrainingError
from fedqc.methods.base import Known, RoundPlan, RoundResult, Score, Stage, part_of
from fedqc.methods.pair_maps import KeptMaps, TrainedParts, folder_of_maps, pair_maps, weights_digest
from fedqc.methods.pairs import Judgement, PairBatch, PairMethod, mean_where_present, qualities
from fedqc.networks.dice_regression import CHANNELS, DiceRegressionNet
from fedqc.seeding import derive_seed
from fedqc.task import Task
from fedqc.training import Progress, TrainSettings

QC = "qc"
"""Name of the regression's stage and part."""


class DiceRegressionMethod(PairMethod):
    """A regression CNN on a map and a label."""

    name = "dice-regression"
    figures = ()
    network_options = frozenset({"width"})
    own_settings = TrainSettings(
        learning_rate=1e-3, total_steps=1, optimizer="adam", schedule="constant", weight_decay=0.0
    )
    """Adam as its library has it, as in the published code."""

    def __init__(self, task: Task, config: QCConfig) -> None:
        self.maps = pair_maps(task, config)
        self._kept = KeptMaps()
        self._parts: TrainedParts | None = None
        super().__init__(task, config)

    def stages(self) -> tuple[Stage, ...]:
        """The networks that make the maps, then the regression."""
        before = tuple(stage for kind in self.maps.networks for stage in kind.stages())
        needs = tuple(stage.part for stage in before)
        own = (self.config.rounds, self.config.local_steps, self.config.batch_size)
        return *before, Stage(QC, *own, part=QC, needs=needs)

    def build(self, seed: int) -> nn.Module:
        """All networks; the regression is 16 channels wide where `qc.network.width` is left out."""
        parts: dict[str, nn.Module] = {}
        for kind in self.maps.networks:
            parts |= kind.build(seed)
        width = self.config.network.width or CHANNELS[0]
        with seeded(derive_seed(seed, "build", self.name)):
            parts[QC] = DiceRegressionNet(
                in_channels=self.maps.channels + self.task.n_classes,
                n_outputs=1 + len(self.regions),
                size=self.task.size,
                channels=[width * 2**level for level in range(len(CHANNELS))],
            )
        return nn.ModuleDict(parts)

    def deepest(self) -> tuple[int, int, int]:
        """Voxels that the last convolution sees."""
        x, y, z = (-(-axis // 2 ** (len(CHANNELS) - 1)) for axis in self.task.size)
        return x, y, z

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
        """One round of a network that makes maps, or of the regression on labels of known quality."""
        for kind in self.maps.networks:
            if plan.stage in kind.all_parts():
                return kind.train_round(network, cases, plan, compute, progress)
        made_by = digest([weights_digest(network, self.stage(QC).needs), self.config.segmenter.passes])
        kept = None if known is None else known.kept
        folder = None if kept is None else folder_of_maps(kept / "uncertainty", plan.site, made_by)
        shown = self._with(
            TrainedParts(compute.place(network), compute, self._kept, (plan.site, made_by), folder)
        )
        return super(DiceRegressionMethod, shown).train_round(
            part_of(network, QC), cases, plan, compute, progress, known=known
        )

    def maps_of(self, cases: Sequence[Case]) -> list[Tensor]:
        """What the maps are made of that depends on the cases alone."""
        return self.maps.of_cases(self.parts, cases)

    def shown(self, cases: Sequence[Case], image: Tensor, label: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """The maps, in the place of the images."""
        return self.maps.of_pairs(self.parts, [case.patient for case in cases], image, label, maps)

    def losses(self, network: nn.Module, batch: PairBatch) -> dict[str, Tensor]:
        """Huber loss of the mean and the regions' DSC, regions left out that the reference does not hold.

        Its corner is at 1, as in the published code: between values in [0, 1] it is half the squared error.
        """
        loss = F.huber_loss(network(batch.inputs), qualities(batch), reduction="none")
        return {"quality": mean_where_present(loss, batch)}

    def judge(self, network: nn.Module, image: Tensor, label: Tensor) -> Judgement:
        """Predicted mean DSC, and each region's, of maps `[N, M, X, Y, Z]` with labels `[N, X, Y, Z]`."""
        quality: Tensor = network(self.inputs(image, label))
        return Judgement(quality[:, 0], quality[:, 1:])

    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int | None = None
    ) -> Iterator[Score]:
        """Judge the label of each case, in order."""
        shown = self._with(TrainedParts(compute.place(network).eval(), compute))
        return super(DiceRegressionMethod, shown).score(part_of(network, QC), cases, compute, batch_size)

    @property
    def parts(self) -> TrainedParts:
        """The networks that make maps.

        Raises:
            TrainingError: they are not at hand outside of `train_round` and `score`.
        """
        if self._parts is None:
            raise TrainingError("maps are made in `train_round` and `score`, where the networks are given")
        return self._parts

    def _with(self, parts: TrainedParts) -> Self:
        """The method with the networks at hand that make maps."""
        shown = copy.copy(self)
        shown._parts = parts
        return shown
