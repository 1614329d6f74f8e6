"""What a site knows about its own data: summaries whose every number says how many patients stand behind it.

Nothing here has been filtered: a summary stays at the site, and `fedqc.statistics.privacy.release` makes what
may leave of it.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, FiniteFloat, NonNegativeInt, StrictFloat, StrictInt, model_validator

from fedqc.config import FrozenModel
from fedqc.curation.calibration import BINS, bins_of, counted
from fedqc.curation.diagnosis import Kind
from fedqc.curation.guards import EMPTY, SIZE, SIZES, Gathering
from fedqc.curation.rules import Outcome
from fedqc.errors import DataError
from fedqc.metrics.agreement import limits_of_agreement, mae, pearson, rmse
from fedqc.metrics.filtering import auroc

N_BINS = 10
"""Bins of a histogram of qualities, of equal width in [0, 1]."""
PROFILE_BINS = 5
"""Bins of a profile, of equal width in [0, 1]."""


class Figure(FrozenModel):
    """A number and the fewest distinct patients it tells something about.

    That is everyone it was computed from, unless a smaller group shows when it is held against another figure
    of the same site; then it is that group.
    """

    value: StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)]
    patients: Annotated[StrictInt, Field(ge=0)]


class Groups(FrozenModel):
    """Disjoint groups of cases whose total is known, so that one hidden count follows from the others."""

    counts: tuple[NonNegativeInt, ...]
    """Cases of each group."""
    patients: tuple[NonNegativeInt, ...]
    """Distinct patients of each group."""
    total_patients: NonNegativeInt
    """Distinct patients of all groups together (a patient may have cases in several)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.counts) != len(self.patients) or not self.counts:
            msg = f"{len(self.counts)} counts and {len(self.patients)} patient counts; each group needs both"
            raise ValueError(msg)
        if any(patients > count for count, patients in zip(self.counts, self.patients, strict=True)):
            msg = "a group has more patients than cases"
            raise ValueError(msg)
        if not max(self.patients) <= self.total_patients <= sum(self.patients):
            msg = f"{self.total_patients} patients in all do not fit groups of {self.patients}"
            raise ValueError(msg)
        return self


class Histogram(Groups):
    """Cases in each bin; a bin holds its lower edge, the last one its upper edge too."""

    edges: tuple[FiniteFloat, ...]
    parts: tuple[Groups, ...] = ()
    """The same bins for each group, and each two, whose totals another table of the same cases tells."""

    @model_validator(mode="after")
    def _has_edges(self) -> Self:
        if len(self.edges) != len(self.counts) + 1:
            msg = f"{len(self.counts)} bins have {len(self.edges)} edges; they need {len(self.counts) + 1}"
            raise ValueError(msg)
        return self


class Profile(Histogram):
    """Labels of known quality by predicted quality, with how predicted and true DSC agree in each bin.

    A mean over true DSCs of which most are exactly 1, or 0, gives the others away, so its `parts` hold the
    labels that are not perfect, and those that are not all wrong: of few patients with one, a bin is not
    told.
    """

    predicted: tuple[FiniteFloat | None, ...]
    """Mean predicted DSC of each bin; None where it is empty."""
    true: tuple[FiniteFloat | None, ...]
    """Mean true DSC; None where it is empty."""
    sd: tuple[FiniteFloat | None, ...]
    """Standard deviation (n - 1) of predicted minus true; None below two labels."""

    @model_validator(mode="after")
    def _has_means(self) -> Self:
        if {len(self.predicted), len(self.true), len(self.sd)} != {len(self.counts)}:
            msg = f"{len(self.counts)} bins need as many means and standard deviations"
            raise ValueError(msg)
        return self


class Tally(Groups):
    """Cases of each named group."""

    names: tuple[str, ...]

    @model_validator(mode="after")
    def _has_names(self) -> Self:
        if len(self.names) != len(self.counts) or len(set(self.names)) != len(self.names):
            msg = f"{len(self.counts)} groups have the names {self.names}; each needs one of its own"
            raise ValueError(msg)
        return self


class Part(Tally):
    """Cases that are not kept, by named group; another table tells their sum, as far as it may."""

    decisions: Tally


class Spread(FrozenModel):
    """Labels by predicted quality, as in `fedqc.curation.calibration`, and whose they are in each bin."""

    masses: tuple[NonNegativeInt, ...]
    """Labels of each bin in thousandths of a patient, who comes to one in all."""
    owners: tuple[frozenset[str], ...]
    """The patients of each bin."""
    total_patients: NonNegativeInt
    """Distinct patients of all labels of known quality, in this table or not."""
    shared: NonNegativeInt = 0
    """Those among them who are in another table that is told, too: its sum tells how many they are."""
    cautious: Literal["up", "down"]
    """Where labels may be counted in another bin: that which makes a decision rest on less."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.masses) != len(self.owners):
            msg = f"{len(self.masses)} bins have {len(self.owners)} sets of patients; each needs its own"
            raise ValueError(msg)
        return self


class Split(FrozenModel):
    """Cases of each named group that are not kept, where it is told of all groups together how many are."""

    names: tuple[str, ...]
    not_kept: Groups
    kept: Groups
    """Of the same groups: whoever knows how large a group is knows these, too."""
    decisions: Tally
    """The table that tells their sum."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not len(self.names) == len(self.not_kept.counts) == len(self.kept.counts):
            msg = f"the groups {self.names} need a count each of what is kept and of what is not"
            raise ValueError(msg)
        return self


class Found(FrozenModel):
    """Findings, of which those are counted that enough patients stand behind."""

    patients: tuple[NonNegativeInt, ...]
    """Of each, the fewest distinct patients it tells something about."""
    total_patients: NonNegativeInt
    """Distinct patients that were looked at."""


class Volume(FrozenModel):
    """Volume of one class in ml over the cases that have it."""

    mean: Figure | None
    sd: Figure | None


class DataSummary(FrozenModel):
    """A site's data set (phase summarise)."""

    cases: Figure
    patients: Figure
    references: Figure
    left_out: dict[str, Figure]
    """Cases left out, by the code of the problem."""
    volume_ml: dict[str, Volume]
    """By class."""
    spacing_mm: dict[str, Figure]
    """Mean voxel side by axis."""
    shape: dict[str, Figure]
    """Mean number of voxels by axis."""
    intensity: dict[str, Figure]
    """By modality, mean over the cases of the median of the voxels that are not zero."""


class CrossCheckSummary(FrozenModel):
    """What a model that never saw a site's references says of their labels (phase cross-check)."""

    references: Figure
    quality_mean: Figure | None
    quality_sd: Figure | None


class CalibrationSummary(FrozenModel):
    """How well the QC model does on a site's calibration cases, degraded in known ways (phase calibrate)."""

    samples: Figure
    r: Figure | None
    mae: Figure | None
    rmse: Figure | None
    auroc: Figure | None
    """Of finding failures."""
    bias: Figure | None
    """Mean of predicted minus true DSC."""
    difference_sd: Figure | None
    """Its standard deviation (n - 1): 95 % of normal differences lie within 1.96 of them around the bias."""
    profile: Profile | None
    """Agreement by predicted quality."""
    failures: Spread
    """Labels whose true DSC is below the bound, by predicted quality."""
    others: Spread
    """All others."""
    regions_mae: dict[str, Figure]
    """By region, over the labels whose true label holds it."""
    regions_r: dict[str, Figure]


class CurationSummary(FrozenModel):
    """What curation did to a site's candidates (phase score)."""

    candidates: Figure
    curated: Figure
    """1 where the rule was applied; 0 where the model failed its self-test, so that all are kept."""
    decisions: Tally | None
    """Keep, review, drop, as far as there are any."""
    diagnosis: Part | None
    """What is probably wrong with those that are not kept, where the method tells."""
    not_kept: Split | None
    """By the size of the label; None where it is not known, or the same of all."""
    gatherings: Found
    """Groups of cases, such as a scanner's, in which far more are not kept than elsewhere."""
    quality: Histogram | None
    quality_mean: Figure | None
    quality_sd: Figure | None
    regions_mean: dict[str, Figure]


class LabelsSummary(FrozenModel):
    """Labels of known quality that the QC model was trained on in a round (phase train.qc)."""

    made: Histogram
    """By their DSC, before balancing."""
    chosen: Histogram
    """By their DSC, after balancing."""
    sources: Tally
    """The chosen by where they come from."""


class SegmentationSummary(FrozenModel):
    """How well the segmentation model does on a site's references (phase evaluate.segmentation)."""

    cases: Figure
    dice_mean: Figure | None
    dice_sd: Figure | None
    dice: dict[str, Figure]
    """By region, over the cases."""


def summarise_data(
    patients: Sequence[str],
    reference: Sequence[bool],
    volumes_ml: Mapping[str, ArrayLike],
    left_out: Mapping[str, Sequence[str]],
    *,
    spacing_mm: Mapping[str, ArrayLike] | None = None,
    shape: Mapping[str, ArrayLike] | None = None,
    intensity: Mapping[str, ArrayLike] | None = None,
) -> DataSummary:
    """Summarise a site's data set.

    Args:
        patients: the patient of each of the n usable cases.
        reference: for each, whether it is a reference case.
        volumes_ml: by class, `[n]` volumes in ml.
        left_out: by the code of the problem, the patient of each case that was left out for it.
        spacing_mm: by axis, `[n]` voxel sides in mm.
        shape: by axis, `[n]` numbers of voxels.
        intensity: by modality, `[n]` medians of the voxels that are not zero.

    Raises:
        DataError: the lengths differ.
    """
    owner = _strings(patients)
    is_reference = np.asarray(reference, dtype=np.bool_)
    _check_lengths(len(owner), reference=len(is_reference))
    n_patients, in_reference, in_candidates = (
        _distinct(group) for group in (owner, owner[is_reference], owner[~is_reference])
    )
    # Another phase tells the number of candidates, and a total less one part is the other part.
    behind_total = min((count for count in (in_reference, in_candidates) if count), default=0)
    return DataSummary(
        cases=Figure(value=len(owner), patients=behind_total),
        patients=Figure(value=n_patients, patients=behind_total),
        references=Figure(value=int(is_reference.sum()), patients=in_reference),
        left_out={
            code: Figure(value=len(names), patients=len(set(names)))
            for code, names in sorted(left_out.items())
        },
        volume_ml={name: _volume(name, values, owner) for name, values in volumes_ml.items()},
        spacing_mm=_means(spacing_mm or {}, len(owner), behind_total),
        shape=_means(shape or {}, len(owner), behind_total),
        intensity=_means(intensity or {}, len(owner), behind_total),
    )


def summarise_cross_check(quality: ArrayLike, patients: Sequence[str]) -> CrossCheckSummary:
    """Summarise the predicted quality `[n]` of a site's references.

    Raises:
        DataError: the lengths differ.
    """
    scores, owner = np.asarray(quality, dtype=np.float64), _strings(patients)
    _check_lengths(len(owner), quality=len(scores))
    return CrossCheckSummary(
        references=Figure(value=len(owner), patients=_distinct(owner)),
        **_mean_and_sd("quality", scores, owner),
    )


def summarise_labels(
    made: Sequence[tuple[str, float]], chosen: Sequence[tuple[str, str, float]]
) -> LabelsSummary:
    """Summarise labels of known quality that were trained on.

    Args:
        made: patient and DSC of each label before balancing, one or more.
        chosen: patient, source and DSC of each label after it, one or more.

    Raises:
        DataError: a DSC is outside [0, 1].
    """
    patients, sources, dsc = zip(*chosen, strict=True)
    return LabelsSummary(
        made=quality_histogram([value for _, value in made], [patient for patient, _ in made]),
        chosen=quality_histogram(dsc, patients),
        sources=_tally(_strings(sources), _strings(patients), sorted(set(sources))),
    )


def summarise_segmentation(
    dice: ArrayLike, regions: Mapping[str, ArrayLike], patients: Sequence[str]
) -> SegmentationSummary:
    """Summarise the DSC of the segmentation model on a site's references.

    Args:
        dice: `[n]` mean DSC of each case.
        regions: by region, `[n]` DSC; NaN where the reference does not hold it, for a mean with the others'
            ones and zeros would give a lone patient away.
        patients: the patient of each case.

    Raises:
        DataError: the lengths differ.
    """
    scores, owner = np.asarray(dice, dtype=np.float64), _strings(patients)
    per_region = {name: np.asarray(values, dtype=np.float64) for name, values in regions.items()}
    lengths = {f"region {name}": len(values) for name, values in per_region.items()}
    _check_lengths(len(owner), dice=len(scores), **lengths)
    held = {name: ~np.isnan(values) for name, values in per_region.items()}
    return SegmentationSummary(
        cases=Figure(value=len(owner), patients=_distinct(owner)),
        dice={
            name: Figure(
                value=float(values[held[name]].mean()),
                # A DSC of what is not there is 1 or 0: the mean of all tells how many of each there are.
                patients=min(
                    _fewest(owner, held[name], ~held[name] & worst) for worst in (scores == 0, scores > 0)
                ),
            )
            for name, values in per_region.items()
            if held[name].any()
        },
        **_mean_and_sd("dice", scores, owner),
    )


def summarise_calibration(
    predicted: ArrayLike,
    true: ArrayLike,
    patients: Sequence[str],
    tau: float,
    regions: Mapping[str, ArrayLike] | None = None,
    *,
    is_dsc: bool = True,
) -> CalibrationSummary:
    """Summarise the QC model's predictions on degraded calibration cases.

    Args:
        predicted: `[n]` predicted DSC.
        true: `[n]` true DSC.
        patients: the patient of each sample.
        tau: a true DSC below this is a failure.
        regions: by region, `[n, 2]` its true and its predicted DSC; NaN where one of them is not known.
        is_dsc: whether the prediction is one of the DSC, and not of stars, say; else there is no difference.

    Raises:
        DataError: the lengths differ or a value is not finite.
    """
    quality, truth, owner = (
        np.asarray(predicted, np.float64),
        np.asarray(true, np.float64),
        _strings(patients),
    )
    _check_lengths(len(owner), predicted=len(quality), true=len(truth))
    failure = truth < tau
    everyone = _distinct(owner)
    # With one patient among the failures, the curve is that patient's rank.
    smaller_class = min(_distinct(owner[failure]), _distinct(owner[~failure]))
    both = len(set(owner[failure].tolist()) & set(owner[~failure].tolist()))
    pairs = {name: np.asarray(pair, np.float64).reshape(-1, 2) for name, pair in (regions or {}).items()}
    _check_lengths(len(owner), **{f"region {name}": len(pair) for name, pair in pairs.items()})
    limits = limits_of_agreement(quality, truth)
    # Beside the mean absolute error the bias tells the sum of all differences of one sign.
    signs = [quality < truth, quality > truth]
    one_sign = _fewest(owner, *signs) if all(sign.any() for sign in signs) else everyone
    return CalibrationSummary(
        samples=Figure(value=len(owner), patients=everyone),
        r=_figure(pearson(quality, truth), everyone),
        mae=_figure(mae(quality, truth), everyone),
        rmse=_figure(rmse(quality, truth), everyone),
        auroc=_figure(auroc(-quality, failure), smaller_class),
        bias=_figure(float((quality - truth).mean()) if is_dsc and len(owner) else None, one_sign),
        difference_sd=_figure(limits.sd if is_dsc and limits else None, everyone),
        profile=_profile(quality, truth, owner) if is_dsc and len(owner) else None,
        # A failure that is counted as better, and a good label that is counted as worse, can only make
        # decisions more careful.
        failures=_spread(quality[failure], owner[failure], everyone, both, "up"),
        others=_spread(quality[~failure], owner[~failure], everyone, both, "down"),
        regions_mae=_of_regions(mae, pairs, owner),
        regions_r=_of_regions(pearson, pairs, owner),
    )


def summarise_curation(
    quality: ArrayLike,
    regions: Mapping[str, ArrayLike],
    outcomes: Sequence[Outcome],
    patients: Sequence[str],
    *,
    curated: bool = True,
    tested: int | None = None,
    diagnoses: Sequence[Kind | None] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    gathered: Sequence[Gathering] = (),
) -> CurationSummary:
    """Summarise the scores of a site's candidates and what became of them.

    Args:
        quality: `[n]` predicted quality in [0, 1].
        regions: by region, `[n]` predicted DSC.
        outcomes: the decision about each candidate.
        patients: the patient of each candidate.
        curated: whether the rule was applied.
        tested: the patients of the self-test that decided it; None: there was none.
        diagnoses: what is wrong with each candidate's label; None for one that is kept. None: nobody told.
        groups: the group of each candidate, by what they are grouped by. Sizes of labels are told of; other
            names of groups and what they are grouped by are not.
        gathered: groups among them in which far more is not kept than elsewhere.

    Raises:
        DataError: the lengths differ or a quality is outside [0, 1].
    """
    scores, owner = np.asarray(quality, dtype=np.float64), _strings(patients)
    per_region = {name: np.asarray(values, dtype=np.float64) for name, values in regions.items()}
    lengths = {f"region {name}": len(values) for name, values in per_region.items()}
    _check_lengths(len(owner), quality=len(scores), outcomes=len(outcomes), **lengths)
    everyone = _distinct(owner)
    if diagnoses is not None:
        _check_lengths(len(owner), diagnoses=len(diagnoses))
    known = {column: _strings(names) for column, names in (groups or {}).items()}
    _check_lengths(len(owner), **{f"groups by {column}": len(names) for column, names in known.items()})
    not_kept = np.array([outcome is not Outcome.KEEP for outcome in outcomes], dtype=np.bool_)
    decisions = _decisions(outcomes, owner)
    return CurationSummary(
        candidates=Figure(value=len(owner), patients=everyone),
        curated=Figure(value=int(curated), patients=everyone if tested is None else min(everyone, tested)),
        decisions=decisions,
        diagnosis=_diagnosis(diagnoses, owner, decisions) if diagnoses and decisions else None,
        not_kept=_split(known[SIZE], not_kept, owner, decisions) if SIZE in known and decisions else None,
        gatherings=Found(
            patients=tuple(_behind(one, known[one.column] == one.group, not_kept, owner) for one in gathered),
            total_patients=everyone,
        ),
        quality=_by_outcome(scores, owner, outcomes) if len(owner) else None,
        **_mean_and_sd("quality", scores, owner),
        regions_mean={
            name: Figure(value=float(values.mean()), patients=everyone)
            for name, values in per_region.items()
            if len(values)
        },
    )


def _profile(quality: NDArray[np.float64], truth: NDArray[np.float64], owner: NDArray[np.str_]) -> Profile:
    """Agreement by predicted quality, of one label or more."""
    edges = _edges(PROFILE_BINS)
    place = _places(quality, edges)
    bins = [place == index for index in range(PROFILE_BINS)]
    difference = quality - truth
    return Profile(
        **_groups(bins, owner).model_dump(),
        edges=edges,
        parts=tuple(_groups([inside & some for inside in bins], owner) for some in (truth < 1, truth > 0)),
        predicted=tuple(float(quality[inside].mean()) if inside.any() else None for inside in bins),
        true=tuple(float(truth[inside].mean()) if inside.any() else None for inside in bins),
        sd=tuple(float(difference[inside].std(ddof=1)) if inside.sum() > 1 else None for inside in bins),
    )


def _groups(members: Sequence[NDArray[np.bool_]], owner: NDArray[np.str_]) -> Groups:
    """Disjoint groups of cases, each with the mask `[n]` of those in it."""
    return Groups(
        counts=tuple(int(inside.sum()) for inside in members),
        patients=tuple(_distinct(owner[inside]) for inside in members),
        total_patients=_distinct(owner[np.logical_or.reduce(members)]),
    )


def _spread(
    quality: NDArray[np.float64],
    owner: NDArray[np.str_],
    total: int,
    shared: int,
    cautious: Literal["up", "down"],
) -> Spread:
    place = bins_of(quality)
    return Spread(
        masses=tuple(counted(quality, owner).tolist()),
        owners=tuple(frozenset(owner[place == index].tolist()) for index in range(BINS)),
        total_patients=total,
        shared=shared,
        cautious=cautious,
    )


def effective_number(weights: Sequence[float], patients: Sequence[str]) -> int:
    """How many patients a weighted mean tells something about: as many equal ones would be (Kish 1965).

    Args:
        weights: of each case, above 0.
        patients: of each case.
    """
    _, owner = np.unique(_strings(patients), return_inverse=True)
    of_patient = np.bincount(owner, np.asarray(weights, dtype=np.float64))
    return int(of_patient.sum() ** 2 / (of_patient**2).sum() + 1e-9) if len(of_patient) else 0


def quality_histogram(quality: ArrayLike, patients: Sequence[str]) -> Histogram:
    """Cases in ten bins of equal width in [0, 1].

    Args:
        quality: `[n]` in [0, 1].
        patients: the patient of each case.

    Raises:
        DataError: the lengths differ or a quality is outside [0, 1].
    """
    scores, owner = np.asarray(quality, dtype=np.float64), _strings(patients)
    _check_lengths(len(owner), quality=len(scores))
    edges = _edges(N_BINS)
    place = _places(scores, edges)
    groups = _groups([place == index for index in range(N_BINS)], owner)
    return Histogram(**groups.model_dump(), edges=edges)


def _edges(n_bins: int) -> tuple[float, ...]:
    """As people write them: np.histogram has 0.30000000000000004 and puts 0.3 into the bin below."""
    return tuple(index / n_bins for index in range(n_bins + 1))


def _places(quality: NDArray[np.float64], edges: Sequence[float]) -> NDArray[np.intp]:
    """`[n]`, the bin of each quality.

    Raises:
        DataError: a quality is outside [0, 1].
    """
    outside = quality[~((quality >= 0) & (quality <= 1))]
    if outside.size:
        raise DataError(f"quality {outside[0]} is outside [0, 1]; a QC method must give a number in [0, 1]")
    return np.searchsorted(edges[1:-1], quality, side="right")


def _by_outcome(
    scores: NDArray[np.float64], owner: NDArray[np.str_], outcomes: Sequence[Outcome]
) -> Histogram:
    """The histogram of all, with those of one outcome and of two, whose totals are told or follow.

    Where one outcome has too few patients to be told, another is hidden with it: then bins must not tell the
    one that has enough.
    """
    decided = np.array([outcome.value for outcome in outcomes])
    there = np.unique(decided).tolist()
    parts = []
    for some in (*combinations(there, 1), *combinations(there, 2)):
        mine = np.isin(decided, some)
        part = quality_histogram(scores[mine], owner[mine].tolist())
        parts.append(Groups(counts=part.counts, patients=part.patients, total_patients=part.total_patients))
    return quality_histogram(scores, owner.tolist()).model_copy(update={"parts": tuple(parts)})


def _decisions(outcomes: Sequence[Outcome], owner: NDArray[np.str_]) -> Tally | None:
    """Candidates by outcome; an outcome that nobody has is no group."""
    decided = [outcome.value for outcome in outcomes]
    there = [name.value for name in Outcome if name.value in decided]
    return _tally(_strings(decided), owner, there) if there else None


def _diagnosis(diagnoses: Sequence[Kind | None], owner: NDArray[np.str_], decisions: Tally) -> Part | None:
    """Candidates that are not kept, by what is wrong with them."""
    diagnosed = [index for index, kind in enumerate(diagnoses) if kind is not None]
    kinds = _strings([kind.value for kind in diagnoses if kind is not None])
    there = [kind.value for kind in Kind if kind.value in kinds]
    if not there:
        return None
    tally = _tally(kinds, owner[diagnosed], there)
    return Part(**tally.model_dump(), decisions=decisions)


def _split(
    size: NDArray[np.str_], not_kept: NDArray[np.bool_], owner: NDArray[np.str_], decisions: Tally
) -> Split:
    """What is not kept by the size of the label; sizes that no label has are no groups."""
    names = [name for name in (EMPTY, *SIZES) if (size == name).any()]
    tables = (_tally(size[part], owner[part], names) for part in (not_kept, ~not_kept))
    out, kept = (Groups.model_validate(table.model_dump(exclude={"names"})) for table in tables)
    return Split(names=tuple(names), not_kept=out, kept=kept, decisions=decisions)


def _behind(
    one: Gathering, inside: NDArray[np.bool_], not_kept: NDArray[np.bool_], owner: NDArray[np.str_]
) -> int:
    """The fewest patients that a gathering tells of: those not kept in the group, or those outside of it."""
    return min(one.n_not_kept, _distinct(owner[inside & not_kept]), _distinct(owner[~inside]))


def _of_regions(
    measure: Callable[[ArrayLike, ArrayLike], float | None],
    pairs: Mapping[str, NDArray[np.float64]],
    owner: NDArray[np.str_],
) -> dict[str, Figure]:
    """A measure of true and predicted DSC of each region, where it is defined."""
    found = {}
    for name, pair in pairs.items():
        there = ~(np.isnan(pair[:, 0]) | np.isnan(pair[:, 1]))
        value = measure(pair[there, 1], pair[there, 0])
        if value is not None:
            # One over all labels is told, too: those without the region are what is left.
            found[name] = Figure(value=value, patients=_fewest(owner, there, ~there))
    return found


def _fewest(owner: NDArray[np.str_], *groups: NDArray[np.bool_]) -> int:
    """Patients of the smallest group of cases that has any: what is told of one tells of the others."""
    return min(_distinct(owner[group]) for group in groups if group.any())


def _tally(group_of: NDArray[np.str_], owner: NDArray[np.str_], names: Sequence[str]) -> Tally:
    """How many there are of each group."""
    groups = {name: owner[group_of == name] for name in names}
    return Tally(
        names=tuple(groups),
        counts=tuple(len(members) for members in groups.values()),
        patients=tuple(_distinct(members) for members in groups.values()),
        total_patients=_distinct(owner),
    )


def _means(numbers: Mapping[str, ArrayLike], n: int, patients: int) -> dict[str, Figure]:
    """The mean over all cases of each kind of number."""
    means = {}
    for name, values in numbers.items():
        known = np.asarray(values, dtype=np.float64)
        _check_lengths(n, **{name: len(known)})
        if n:
            means[name] = Figure(value=float(known.mean()), patients=patients)
    return means


def _volume(name: str, values: ArrayLike, owner: NDArray[np.str_]) -> Volume:
    """Over the cases that have the class: a mean with the others' zeros would give a lone patient away."""
    volumes = np.asarray(values, dtype=np.float64)
    _check_lengths(len(owner), **{f"volumes of {name}": len(volumes)})
    has = volumes > 0
    behind = _distinct(owner[has])
    return Volume(
        mean=_figure(float(volumes[has].mean()) if has.any() else None, behind),
        sd=_figure(float(volumes[has].std(ddof=1)) if has.sum() > 1 else None, behind),
    )


def _mean_and_sd(name: str, values: NDArray[np.float64], owner: NDArray[np.str_]) -> dict[str, Figure | None]:
    """`<name>_mean` and `<name>_sd` of values that tell something about their owners."""
    everyone = _distinct(owner)
    return {
        f"{name}_mean": _figure(float(values.mean()) if len(values) else None, everyone),
        f"{name}_sd": _figure(float(values.std(ddof=1)) if len(values) > 1 else None, everyone),
    }


def _figure(value: float | None, patients: int) -> Figure | None:
    return None if value is None else Figure(value=value, patients=patients)


def _strings(names: Sequence[str]) -> NDArray[np.str_]:
    return np.asarray(names, dtype=np.str_)


def _distinct(names: NDArray[np.str_]) -> int:
    return len(set(names.tolist()))


def _check_lengths(n: int, **lengths: int) -> None:
    for name, length in lengths.items():
        if length != n:
            raise DataError(f"{name} has {length} values for {n} patients; there must be one for each case")
