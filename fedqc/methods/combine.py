"""Several methods' scores joined, so that a consortium need not choose one.

Every method is trained as it would be alone, but without a quarter of the reference patients. On these, with
labels degraded in every known way, each method's scores are compared with the truth: a least-squares fit with
weights that are not negative, then a monotone map onto the DSC. A method that is worth nothing at a site gets
the weight 0 there. Where a site has too few patients to fit to, the quality is the mean of the methods'.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import NetworkConfig, QCConfig
from fedqc.degradation.samples import degrade_cases
from fedqc.errors import ConfigError
from fedqc.lazy import Chosen
from fedqc.methods.base import (
    Known,
    Method,
    RoundPlan,
    RoundResult,
    Score,
    Stage,
    chosen_options,
    get_method,
    part_of,
    with_own_settings,
)
from fedqc.methods.calibration import MonotoneMap
from fedqc.methods.cross_fitting import is_for_fitting
from fedqc.task import Task
from fedqc.training import Progress

FEWEST_LABELS = 20
"""Labels of known quality below which nothing is fitted."""
CASES_AT_ONCE = 16
FITTED = "fitted"
"""Name of the part that joins the scores."""


class Blend(nn.Module):
    """Joins scores: a weighted sum, then a monotone map; the mean of all until it is fitted."""

    weight: Tensor
    """`[M]`, not negative."""
    bias: Tensor
    """`[1]`."""

    def __init__(self, n_scores: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.full((n_scores,), 1 / n_scores))
        self.register_buffer("bias", torch.zeros(1))
        self.calibration = MonotoneMap()

    def fit(self, scores: NDArray[np.float64], true: NDArray[np.float64]) -> None:
        """Fit in place to scores `[n, M]` of labels whose quality `[n]` is known."""
        from sklearn.linear_model import LinearRegression  # noqa: PLC0415 - only where something is fitted

        found = LinearRegression(positive=True).fit(scores, true)
        self.weight.copy_(torch.from_numpy(found.coef_))
        self.bias.fill_(float(found.intercept_))
        self.calibration.fit(found.predict(scores), true)

    def forward(self, scores: NDArray[np.float64]) -> NDArray[np.float32]:
        """The quality `[n]` that scores `[n, M]` come to."""
        joined = torch.from_numpy(scores).float() @ self.weight.cpu() + self.bias.cpu()
        quality: NDArray[np.float32] = self.calibration(joined.numpy())
        return quality


class CombineMethod(Method):
    """Trains the methods that `qc.combine.methods` names, and joins their scores."""

    name = "combine"
    judges = "label"

    def __init__(self, task: Task, config: QCConfig) -> None:
        kinds = {name: get_method(name) for name in config.combine.methods}
        options = (kind.network_options for kind in kinds.values())
        self.network_options = frozenset().union(*options)  # type: ignore[misc]  # it depends on the methods
        super().__init__(task, config)
        self.methods: dict[str, Method] = {}
        for name, kind in kinds.items():
            if kind.judges != "label":
                raise ConfigError(
                    f"qc.combine.methods names {name!r}, which judges its own prediction and never looks at "
                    "the annotation; name methods that judge the label"
                )
            foreign = chosen_options(config.network) - kind.network_options
            default = NetworkConfig().model_dump(include=set(foreign))
            own = config if hasattr(kind, "own_settings") else with_own_settings(config)
            update = {"method": name, "network": config.network.model_copy(update=default)}
            self.methods[name] = kind(task, own.model_copy(update=update))
            if self.methods[name].needs_initial:
                raise ConfigError(
                    f"qc.combine.methods names {name!r}, which as it is set up learns from a trained model; "
                    "method 'combine' cannot be given one, so leave it out or let it learn otherwise"
                )
        self.needs_references = any(  # type: ignore[misc]  # it depends on the methods
            method.needs_references for method in self.methods.values()
        )

    @property
    def uses_settings(self) -> bool:
        """Whether one of the methods does."""
        return any(hasattr(get_method(name), "own_settings") for name in self.config.combine.methods)

    def stages(self) -> tuple[Stage, ...]:
        """Those of the methods, one method after another."""

        def inside(name: str, part: str) -> str:
            return f"{name}.{part}" if part else name

        return tuple(
            replace(
                stage,
                name=f"{name}-{stage.name}",
                part=inside(name, stage.part),
                needs=tuple(inside(name, part) for part in stage.needs),
                starts_from=inside(name, stage.starts_from) if stage.starts_from else "",
                spares_fitting=stage.fold is None,
            )
            for name, method in self.methods.items()
            for stage in method.stages()
        )

    def build(self, seed: int) -> nn.ModuleDict:
        """The networks of the methods, by their names, and what joins them."""
        networks: dict[str, nn.Module] = {name: method.build(seed) for name, method in self.methods.items()}
        return nn.ModuleDict(networks | {FITTED: Blend(len(networks))})

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
        """One round of a stage of one of the methods."""
        name = next(name for name in self.methods if self.stage(plan.stage).part.partition(".")[0] == name)
        plan = replace(plan, stage=plan.stage.removeprefix(f"{name}-"))
        method = self._with_references()[name]
        return method.train_round(part_of(network, name), cases, plan, compute, progress, known=known)

    def fit(
        self,
        network: nn.Module,
        cases: Sequence[Case],
        compute: Compute,
        rng: np.random.Generator,
        progress: Progress | None = None,
    ) -> None:
        """Let each method fit what it fits on the patients it learned from, then join them on the others."""
        kept = [index for index, case in enumerate(cases) if is_for_fitting(case.patient)]
        others = Chosen(cases, [index for index in range(len(cases)) if index not in set(kept)])
        for name, method in self._with_references().items():
            method.fit(part_of(network, name), others, compute, rng, progress)
        true: list[float] = []

        def labels() -> Iterator[Case]:
            for sample in degrade_cases(Chosen(cases, kept), self.task, self.kinds, rng):
                true.append(sample.mean_dsc)
                yield sample.case

        rows = [[score.quality for score in scores] for scores in self._scores(network, labels(), compute)]
        if len(rows) >= FEWEST_LABELS:
            blend = part_of(network, FITTED)
            assert isinstance(blend, Blend)  # noqa: S101 - for the type checker
            blend.fit(np.array(rows), np.array(true))

    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int | None = None
    ) -> Iterator[Score]:
        """Judge the label of each case, in order; error maps are those of the first method that has some."""
        blend = part_of(network, FITTED)
        for scores in self._scores(network, cases, compute):
            first = next((score for score in scores if score.error_map is not None), scores[0])
            rows = np.array(
                [[score.quality for score in scores]]
                + [
                    [score.regions.get(region, score.quality) for score in scores]
                    for region in self.task.regions
                ]
            )
            quality, *regions = blend(rows).tolist()
            yield Score(
                first.case_id,
                quality,
                dict(zip(self.task.regions, regions, strict=True)),
                first.error_map,
                first.class_error_maps,
                next((score.corrected for score in scores if score.corrected is not None), None),
            )

    def cannot_judge(self, files: CaseFiles) -> str | None:
        """All methods have to judge a case."""
        reasons = (method.cannot_judge(files) for method in self._with_references().values())
        return next((reason for reason in reasons if reason is not None), None)

    def _scores(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute
    ) -> Iterator[tuple[Score, ...]]:
        """What each method says, case by case."""
        remaining = iter(cases)
        methods = self._with_references()
        while batch := list(islice(remaining, CASES_AT_ONCE)):
            yield from zip(
                *(method.score(part_of(network, name), batch, compute) for name, method in methods.items()),
                strict=True,
            )

    def _with_references(self) -> dict[str, Method]:
        for method in self.methods.values():
            method.references = self.references
        return self.methods
