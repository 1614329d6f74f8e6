"""Deep quality estimation: a 2D DenseNet rates three slices with one to six stars (Kofler et al. 2022).

It sees the axial, the coronal and the sagittal slice through the middle of a label (`fedqc.views`), one by
one, and the mean of the three is the rating. It learns either

    ratings     what people thought of labels, by the squared error of the stars, or
    distilled   from a trained network, the teacher, whose ratings hardly tell good labels from bad ones: of
                an untouched label what the teacher says, of a degraded one less, the further it is from the
                untouched one (see `_Discount`).

Batch norm: means and variances travel and are averaged like weights; distilling leaves them as the teacher
has them. There are no counters of batches, which would mean nothing to an average.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedqc.augmentation_2d import augment_slice
from fedqc.cases.cached import LabelsOf, PatientsOf
from fedqc.cases.sources import Source
from fedqc.cases.volumes import Case
from fedqc.compute import Compute, seeded
from fedqc.config import QCConfig
from fedqc.degradation.samples import Degraded, LabelFactory, SamplePool
from fedqc.errors import TrainingError
from fedqc.geometry import sides_of
from fedqc.lazy import Kept, Lazy
from fedqc.methods.base import Known, Method, RoundPlan, RoundResult, Score, Stage, part_of
from fedqc.ratings import FEWEST_STARS, MOST_STARS, Rating
from fedqc.seeding import derive_seed, generator
from fedqc.task import Task
from fedqc.training import Progress, TrainSettings, train
from fedqc.views import VIEWS, Look, default_side, views_of_case, views_of_sources

RATER, TEACHER = "rater", "teacher"
"""Parts of the network: what is trained and rates, and what it learns from where it is distilled."""
DISCOUNT_LABELS = 16
"""Degraded labels that the teacher rates in each round to see what it makes of errors."""
ROUND_LABELS = 64
"""Labels that are distilled from in a round, at most: making one takes a second at full size, a step too."""
_KEPT_BYTES = 2**29
"""Of views that are kept from one step to the next."""


@dataclass(frozen=True)
class RatedSlices:
    """Slices whose rating is known."""

    inputs: Tensor
    """`[N, C + M, side, side]`."""
    stars: Tensor
    """`[N]`."""


@dataclass(frozen=True, eq=False)
class _RatedSlice:
    """One slice of a case."""

    image: Tensor
    """`[C + M, side, side]`."""
    stars: float
    """What it deserves."""
    patient: str


class DQEMethod(Method):
    """Rates labels like people do; it has no opinion of single regions, and no error map."""

    name = "dqe"
    judges = "label"
    figures = ("stars", *VIEWS)
    own_settings = TrainSettings(
        learning_rate=1e-3, total_steps=1, optimizer="adamw", schedule="constant", weight_decay=0.01
    )

    def __init__(self, task: Task, config: QCConfig) -> None:
        super().__init__(task, config)
        chosen = config.dqe
        self.look = Look(chosen.normalisation, chosen.encoding, chosen.side or default_side(task))
        self.needs_initial = self.is_distilled

    @property
    def is_distilled(self) -> bool:
        """Whether it learns from a teacher."""
        return self.config.dqe.targets == "distilled"

    def scored_regions(self) -> dict[str, tuple[int, ...]]:
        """None: a rating is of the whole label."""
        return {}

    def stages(self) -> tuple[Stage, ...]:
        """One, which learns from ratings or from reference cases."""
        config = self.config
        return (
            Stage(
                "qc",
                config.rounds,
                config.local_steps,
                config.dqe.batch_size,
                part=RATER,
                needs=(TEACHER,) if self.is_distilled else (),
                starts_from=TEACHER if self.is_distilled else "",
                learns_from="references" if self.is_distilled else "rated",
            ),
        )

    def build(self, seed: int) -> nn.ModuleDict:
        """The rater, which begins in the middle of the scale, and the teacher, which has yet to be given."""
        parts = {RATER: self._network(seed)}
        if self.is_distilled:
            parts[TEACHER] = self._network(seed)
        return nn.ModuleDict(parts)

    def initial_state(self, trained: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The trained network's rater, as rater and, where there is one, as teacher."""
        rater = {
            name.removeprefix(f"{RATER}."): values
            for name, values in trained.items()
            if name.startswith(f"{RATER}.")
        }
        parts = (RATER, TEACHER) if self.is_distilled else (RATER,)
        return {f"{part}.{name}": values for part in parts for name, values in rater.items()}

    def _network(self, seed: int) -> nn.Module:
        from monai.networks.nets.densenet import DenseNet121, DenseNet201  # noqa: PLC0415 - takes seconds

        kind = DenseNet121 if self.config.dqe.architecture == "densenet121" else DenseNet201
        masks = self.task.n_classes if self.look.encoding == "tissue" else len(self.task.regions)
        with seeded(derive_seed(seed, "build", self.name)):
            network: nn.Module = kind(
                spatial_dims=2, in_channels=len(self.task.modalities) + masks, out_channels=1
            )
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None  # unused, as running values follow with a fixed momentum
                if self.is_distilled:
                    module.__class__ = _FrozenBatchNorm
        head = cast(nn.Linear, network.get_submodule("class_layers.out"))
        nn.init.constant_(head.bias, (FEWEST_STARS + MOST_STARS) / 2)
        return network

    # ------------------------------------------------------------------------------------------- training

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
        """One round on slices with ratings, or on those whose rating follows from the teacher's."""
        known = known or Known()
        compute = compute.for_training(self.look.side // 32)
        rater = compute.place(part_of(network, RATER))
        _mend(rater)
        rng = generator(plan.seed, "train", plan.site, plan.round)
        with seeded(derive_seed(plan.seed, "dropout", plan.site, plan.round), compute.device):
            seen: list[str] = []
            if self.is_distilled:
                teacher = compute.place(part_of(network, TEACHER)).eval()
                pool = self._pool(cases, compute, known)
                slices = self._distilled(cases, pool, teacher, rng, plan=plan, compute=compute)
            else:
                pool = None
                slices = self._rated(cases, known, rng)
            batches = _batches(slices, plan, compute, seen)
            losses = train(rater, batches, self.losses, self.settings(plan), compute, progress)
        _mend(rater)
        drawn = None if pool is None else pool.drawn
        return RoundResult(losses, plan.steps * plan.batch_size, drawn, tuple(seen))

    @staticmethod
    def losses(network: nn.Module, batch: RatedSlices) -> dict[str, Tensor]:
        """Squared error of the stars (Kofler et al. 2022, 2)."""
        return {"stars": F.mse_loss(network(batch.inputs)[:, 0].float(), batch.stars)}

    def _rated(
        self, cases: Sequence[Case], known: Known, rng: np.random.Generator
    ) -> Iterator["_RatedSlice"]:
        """Slices that people rated, augmented, with their mean rating; without end."""
        rated = []
        for index, case in enumerate(cases):
            stars = stars_by_view(known.ratings.get(case.id, ()))
            rated += [(index, view, value) for view, value in stars.items()]
        if not rated:
            raise TrainingError("none of the cases that are there for training has a rating; rate some")
        views = _kept_views(self, cases)
        owners = {index: cases[index].patient for index, _, _ in rated}
        while True:
            for which in rng.permutation(len(rated)):
                index, view, stars_of_view = rated[which]
                image = augment_slice(rng, views[index][VIEWS.index(view)], len(self.task.modalities))
                yield _RatedSlice(image, stars_of_view, owners[index])

    def _pool(self, cases: Sequence[Case], compute: Compute, known: Known) -> SamplePool:
        """Labels of known quality."""
        factory = LabelFactory(
            LabelsOf(cases),
            self.task.region_indices(),
            self.kinds,
            compute.device,
            known.labels,
            patients=PatientsOf(cases),
            sides=sides_of(self.task.spacing),
        )
        return SamplePool(factory, self.config.samples, self.config.balance)

    def _distilled(
        self,
        cases: Sequence[Case],
        pool: SamplePool,
        teacher: nn.Module,
        rng: np.random.Generator,
        *,
        plan: RoundPlan,
        compute: Compute,
    ) -> Iterator["_RatedSlice"]:
        """Slices of labels of known quality, augmented anew each time, and what they deserve; without end."""
        untouched = _kept_views(self, cases)
        own: dict[int, Tensor] = {}

        def rated_by_teacher(case: int) -> Tensor:
            """`[3]` stars of a case's own label."""
            if case not in own:
                own[case] = self._stars(teacher, untouched[case], compute)
            return own[case]

        own_rng = generator(plan.seed, "discount", plan.site)  # the same labels in every round
        errors, kept = [], []
        first = (sample for chunk in pool.chunks(own_rng, DISCOUNT_LABELS) for sample in _each(chunk))
        for case, label, dsc in first:
            views = self._views(replace(cases[case], label=label))
            if views is not None:
                mean, whole = self._stars(teacher, views, compute).mean(), rated_by_teacher(case).mean()
                errors.append(dsc)
                kept.append(float((mean - FEWEST_STARS) / (whole - FEWEST_STARS).clamp(min=1e-6)))
        discount = _Discount(np.array(errors), np.array(kept))
        enough = min(ROUND_LABELS, plan.steps * -(-plan.batch_size // len(VIEWS)))
        slices: list[_RatedSlice] = []
        while not slices:  # more than once only where all labels were empty
            for case, label, dsc in (sample for chunk in pool.chunks(rng, enough) for sample in _each(chunk)):
                views = self._views(replace(cases[case], label=label))
                if views is not None:
                    target = FEWEST_STARS + discount.of(dsc) * (rated_by_teacher(case) - FEWEST_STARS)
                    rated = zip(views, target.tolist(), strict=True)
                    slices += [_RatedSlice(view, stars, cases[case].patient) for view, stars in rated]
        while True:
            for which in rng.permutation(len(slices)):
                one = slices[which]
                yield replace(one, image=augment_slice(rng, one.image, len(self.task.modalities)))

    def _views(self, case: Case) -> Tensor | None:
        """The views of a case; None of an empty label where that is an error."""
        if self.task.empty_label == "error" and not case.label.any():
            return None
        return views_of_case(case, self.task, self.look)

    # -------------------------------------------------------------------------------------------- scoring

    def score(
        self,
        network: nn.Module,
        cases: Iterable[Case],
        compute: Compute,
        batch_size: int | None = None,
    ) -> Iterator[Score]:
        """Rate the label of each case, in order; an empty one that cannot be right gets one star.

        The views of a case are one batch, whatever `batch_size` says.
        """
        rater = self._ready(network, compute)
        for case in cases:
            views = self._views(case)
            stars = torch.full((3,), FEWEST_STARS) if views is None else self._stars(rater, views, compute)
            yield _score(case.id, stars)

    def score_sources(
        self, network: nn.Module, images: Sequence[Source], label: Source, compute: Compute
    ) -> Score | None:
        """Rate a label from the three slices of its files or arrays alone, which is several times faster."""
        views = views_of_sources(images, label, self.task, self.look)
        if views is None:
            return None
        return _score("", self._stars(self._ready(network, compute), views, compute))

    @staticmethod
    def _ready(network: nn.Module, compute: Compute) -> nn.Module:
        rater = part_of(network, RATER)
        if rater.training or next(rater.parameters()).device != compute.device:
            rater = compute.place(rater).eval()  # looking through its 500 modules takes 20 ms
            _mend(rater)
        return rater

    @staticmethod
    @torch.inference_mode()
    def _stars(network: nn.Module, views: Tensor, compute: Compute) -> Tensor:
        """`[3]`, what a network says of the views of one label; in fp32, as bf16 is off by 0.02 stars."""
        inputs = views.to(compute.device, memory_format=torch.channels_last)
        with torch.backends.cudnn.flags(allow_tf32=False):
            stars: Tensor = network(inputs)[:, 0].cpu()
        return stars


def stars_by_view(ratings: Sequence[Rating]) -> dict[str, float]:
    """The mean of the ratings of each view that has some; a rating of all three counts for each."""
    found = {view: [rating.stars for rating in ratings if rating.view in {view, "all"}] for view in VIEWS}
    return {view: float(np.mean(stars)) for view, stars in found.items() if stars}


class _FrozenBatchNorm(nn.BatchNorm2d):
    """Normalises as the teacher does, whatever a batch holds: few slices of few cases are no statistics."""

    def train(self, mode: bool = True) -> Self:
        """Stay as it is; its scale and shift are trained all the same."""
        return super().train(False)


class _Discount:
    """What is left of a label's rating when it is degraded, by its DSC with what it was.

    The teacher's own opinion, made monotonous (isotonic regression), but never more than in proportion to the
    DSC: of a label that has nothing in common with the right one nothing is left, though teachers, which saw
    good labels, hardly take notice.

    Args:
        dsc: `[N]` of degraded labels.
        kept: `[N]`, which share of a label's stars beyond the first the teacher leaves to the degraded one.
    """

    def __init__(self, dsc: NDArray[np.float64], kept: NDArray[np.float64]) -> None:
        from sklearn.isotonic import IsotonicRegression  # noqa: PLC0415 - takes seconds

        at = np.concatenate([[0.0], dsc, [1.0]])
        left = np.concatenate([[0.0], np.minimum(kept.clip(0, 1), dsc), [1.0]])
        ends = np.concatenate([[len(dsc) + 1.0], np.ones(len(dsc)), [len(dsc) + 1.0]])
        self._fitted = IsotonicRegression(out_of_bounds="clip").fit(at, left, sample_weight=ends)

    def of(self, dsc: float) -> float:
        """From 0 to 1."""
        return float(self._fitted.predict([dsc])[0])


class _Views(Lazy[Tensor]):
    """The views of cases.

    Args:
        method: Says how views are made.
        cases: Each with a label.
    """

    def __init__(self, method: DQEMethod, cases: Sequence[Case]) -> None:
        self._method = method
        self._cases = cases

    def __len__(self) -> int:
        return len(self._cases)

    def make(self, index: int) -> Tensor:
        """The views of a case."""
        return views_of_case(self._cases[index], self._method.task, self._method.look)


def _kept_views(method: DQEMethod, cases: Sequence[Case]) -> Kept[Tensor]:
    """Views that stay: most are needed again, and a whole volume is read for them."""
    return Kept(_Views(method, cases), lambda views: views.nbytes, _KEPT_BYTES)


def _each(chunk: Degraded) -> Iterator[tuple[int, NDArray[np.uint8], float]]:
    """Case, label and mean DSC of each degraded label."""
    labels = chunk.label.cpu().numpy()
    for recipe, label, dsc in zip(chunk.recipes, labels, chunk.mean.tolist(), strict=True):
        yield recipe.case, label, dsc


def _batches(
    slices: Iterator[_RatedSlice], plan: RoundPlan, compute: Compute, seen: list[str]
) -> Iterator[RatedSlices]:
    """Batches of a round; the patient of each slice is added to `seen`."""
    for _ in range(plan.steps):
        batch = list(islice(slices, plan.batch_size))
        seen += [one.patient for one in batch]
        images = torch.stack([one.image for one in batch])
        inputs = images.to(compute.device, memory_format=torch.channels_last)
        yield RatedSlices(inputs, torch.tensor([one.stars for one in batch], device=compute.device))


def _score(case_id: str, stars: Tensor) -> Score:
    """What three ratings `[3]` come to; the network may go beyond the scale, and people do not."""
    mean = float(stars.mean().clamp(FEWEST_STARS, MOST_STARS))
    views = stars.clamp(FEWEST_STARS, MOST_STARS).tolist()
    quality = (mean - FEWEST_STARS) / (MOST_STARS - FEWEST_STARS)
    return Score(case_id, quality, {}, stars=mean, views=dict(zip(VIEWS, views, strict=True)))


def _mend(network: nn.Module) -> None:
    """Take running variances below 0, which noise on updates or FedAdam can bring about, as 0."""
    for name, values in network.named_buffers():
        if name.endswith("running_var"):
            values.clamp_(min=0)
