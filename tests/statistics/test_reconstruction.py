"""A coordinator who holds all that a site told, and solves for its patients, does not find any.

The attack is that of Dinur & Nissim (2003) as the US Census Bureau made it on its own tables (Garfinkel,
Abowd & Martindale 2019): every number that was told is a linear constraint on how many patients there are of
each kind, and an integer program says between which bounds the patients of a kind lie. True values are on the
attacker's grid, which only helps. The attacker knows the rule, how many cases there are and how large the
thirds, that what is told twice is of whom it was told first, and who came, left and was labelled anew between
two runs. A case is a patient. Correlations and AUROC are left out, which are not linear.

What holds: of something that fewer than `min_count` patients have, the attacker can rule out neither that
nobody has it nor that many do, or the bounds are `WIDTH` or more patients apart; and of one who came, left or
was labelled anew between runs, nothing. What all of a group of `min_count` have in common (all are kept) is
told, and is not what the filters are against. Nor is an attacker who knows all patients but one.

The same attack succeeds where a filter is switched off, so that it could have.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from fedqc.curation.diagnosis import Kind as Wrong
from fedqc.curation.guards import SIZE, SIZES
from fedqc.curation.rules import Outcome
from fedqc.statistics import privacy
from fedqc.statistics.privacy import HIDDEN, release
from fedqc.statistics.releases import release_of, settle
from fedqc.statistics.site import (
    N_BINS,
    Part,
    Split,
    summarise_calibration,
    summarise_cross_check,
    summarise_curation,
    summarise_data,
    summarise_segmentation,
)

MIN_COUNT = 10
WIDTH = 3
THRESHOLD, REVIEW = 0.5, 0.6
GRID = tuple((place + 0.5) / 30 for place in range(30))
"""Of every number of a patient that lies in [0, 1]."""
WRONG = (Wrong.FLIP, Wrong.SHIFT, Wrong.UNCLEAR)
Told = Mapping[str, Any]


@dataclass(frozen=True)
class Patient:
    """One with a case, and what only the site knows of it."""

    name: str
    reference: bool
    quality: float
    """Predicted, of the label as it is: in the cross-check, or as a candidate."""
    size: str = "small"
    wrong: Wrong | None = None
    """With its label, if that is not kept."""
    lesion: float = 1.0
    """Volume; 0 where there is none."""
    dice: float = 0.9
    """Of the segmentation model."""
    labels: tuple[tuple[float, float], ...] = ()
    """True and predicted DSC of the labels that were spoiled to calibrate."""
    version: int = 0
    """Of the label."""


@dataclass
class Site:
    """Tells what it is asked, as a site does; without filters it remembers nothing and hides nobody."""

    folder: Path
    filters: bool = True

    def tell(self, phase: str, summary: Any, patients: Sequence[Patient], settings: str = "") -> Told:
        min_count = MIN_COUNT if self.filters else 1
        values = release(summary, min_count)
        if not self.filters:
            return values
        about = {one.name: f"{one.version} {one.reference}" for one in patients}
        new = release_of(dict(values), about, "the model", settings, min_count)
        return settle(self.folder / "releases.json", phase, new)

    def score(self, patients: Sequence[Patient], threshold: float = THRESHOLD) -> Told:
        """The phase score, by the rule that drops below the threshold."""
        mine = [one for one in patients if not one.reference]
        quality = [one.quality for one in mine]
        outcomes = [decision(value, threshold) for value in quality]
        diagnoses = [None if decision(one.quality, threshold) is Outcome.KEEP else one.wrong for one in mine]
        summary = summarise_curation(
            quality,
            {"lesion": quality},
            outcomes,
            [one.name for one in mine],
            groups={SIZE: [one.size for one in mine]},
            diagnoses=diagnoses if any(diagnoses) else None,
        )
        others = [f"{one.name} {one.version}" for one in patients if one.reference]
        return self.tell("score", summary, mine, f"{threshold} {others}")

    def run(self, patients: Sequence[Patient]) -> dict[str, Told]:
        """All phases that tell statistics."""
        references = [one for one in patients if one.reference]
        names = [one.name for one in references]
        data = summarise_data(
            [one.name for one in patients],
            [one.reference for one in patients],
            {"lesion": [one.lesion for one in patients]},
            {},
        )
        pairs = [(one.name, true, said) for one in references for true, said in one.labels]
        held = [one.dice if one.lesion else np.nan for one in references]
        tested = summarise_calibration(
            [said for _, _, said in pairs],
            [true for _, true, _ in pairs],
            [name for name, _, _ in pairs],
            THRESHOLD,
        )
        checked = summarise_cross_check([one.quality for one in references], names)
        tried = summarise_segmentation([one.dice for one in references], {"lesion": held}, names)
        return {
            "summarise": self.tell("summarise", data, patients),
            "cross-check": self.tell("cross-check", checked, references),
            "calibrate": self.tell("calibrate", tested, references),
            "score": self.score(patients),
            "evaluate": self.tell("evaluate", tried, references),
        }


def decision(quality: float, threshold: float = THRESHOLD) -> Outcome:
    """What the rule says."""
    if quality < threshold:
        return Outcome.DROP
    return Outcome.REVIEW if quality < threshold + REVIEW - THRESHOLD else Outcome.KEEP


# ------------------------------------------------------------------------------------------- the attacker

Kind = tuple[Any, ...]
Belongs = Callable[..., bool]
"""Whether those of a kind are among some patients."""
Weigh = Callable[..., float]


@dataclass
class Attacker:
    """Whole numbers of patients of each kind, and what is known of them."""

    kinds: list[Kind] = field(default_factory=list)
    rows: list[tuple[NDArray[np.float64], float, float]] = field(default_factory=list)

    def knows(self, weigh: Weigh, lowest: float, highest: float) -> None:
        """The sum over all patients of a weight of their kind lies between two bounds."""
        slack = 1e-9 * (1 + sum(abs(bound) for bound in (lowest, highest) if np.isfinite(bound)))
        row = np.array([weigh(kind) for kind in self.kinds], dtype=np.float64)
        self.rows.append((row, lowest - slack, highest + slack))

    def counts(self, belongs: Belongs, count: int) -> None:
        self.knows(belongs, count, count)

    def knows_mean(self, of: Weigh, group: Belongs, mean: float, sd: float | None) -> None:
        """Mean and sample standard deviation over a group of unknown size, each as rounded."""
        low, high = unrounded(mean)
        self.knows(lambda kind: (of(kind) - low) * group(kind), 0, np.inf)
        self.knows(lambda kind: (of(kind) - high) * group(kind), -np.inf, 0)
        if sd is None:
            return
        least, most = unrounded(sd)

        def squares(kind: Kind) -> float:
            return (of(kind) - mean) ** 2

        self.knows(lambda kind: (squares(kind) - least**2) * group(kind), -(least**2), np.inf)
        beyond = most**2 + (high - mean) ** 2
        self.knows(lambda kind: (squares(kind) - beyond) * group(kind), -np.inf, -(most**2))

    def proves(self, belongs: Belongs) -> tuple[int, int]:
        """Bounds on the patients of some kinds that hold whatever else is true; there may be closer ones."""
        low, high = (self._solve(belongs, sign, integer=False) for sign in (1, -1))
        return int(np.ceil(low - 1e-6)), int(np.floor(high + 1e-6))

    def cannot_rule_out(self, belongs: Belongs) -> tuple[int, int]:
        """Few and many patients of some kinds, each as a population that fits all that was told."""
        few, many = (self._solve(belongs, sign, integer=True) for sign in (1, -1))
        return round(few), round(many)

    def finds(self, belongs: Belongs) -> bool:
        """Whether it is proved that there are some, and how many but for less than `WIDTH`."""
        low, high = self.proves(belongs)
        return low > 0 and high - low < WIDTH

    def _solve(self, belongs: Belongs, sign: int, *, integer: bool) -> float:
        """The fewest (`sign` 1) or the most (-1) patients of some kinds."""
        wanted = np.array([float(belongs(kind)) for kind in self.kinds])
        rows, low, high = (np.array(part) for part in zip(*self.rows, strict=True))
        # Only what hangs together with the question matters.
        used = wanted != 0
        while (more := used | (rows[(rows[:, used] != 0).any(axis=1)] != 0).any(axis=0)).sum() > used.sum():
            used = more
        asked = (rows[:, used] != 0).any(axis=1)
        answer = milp(
            sign * wanted[used],
            integrality=np.full(used.sum(), int(integer)),
            bounds=Bounds(0, np.inf),
            constraints=LinearConstraint(rows[np.ix_(asked, used)], low[asked], high[asked]),
            options={"mip_rel_gap": 0.3, "time_limit": 120},
        )
        assert answer.x is not None, answer.message
        return float(sign * answer.fun)


def unrounded(value: float) -> tuple[float, float]:
    """What has these three significant digits."""
    unit = 10.0 ** (np.floor(np.log10(abs(value))) - 2) if value else 1e-12
    return value - unit / 2, value + unit / 2


BELOW = {True: 0.2, False: 0.8}
"""True DSC of a label that is a failure, and of one that is not."""
PAIRS = tuple(
    (one, other)
    for one in [(failed, place) for failed in (True, False) for place in range(10)]
    for other in [(failed, place) for failed in (True, False) for place in range(10)]
    if one <= other
)
"""Two labels of known quality: whether each is a failure, and the tenth it is predicted to lie in."""
VOLUMES = tuple(range(21))


def learn_score(
    attacker: Attacker,
    told: Told,
    here: Belongs,
    n: int,
    threshold: float = THRESHOLD,
) -> None:
    """What the phase score tells of candidates `("candidate", quality, size, wrong, ...)` that are `here`."""
    attacker.counts(here, n)
    if not told:
        return
    outcomes = {name: told[f"decisions.{name}"] for name in Outcome if f"decisions.{name}" in told}
    for name, count in outcomes.items():
        attacker.counts(lambda kind, name=name: here(kind) and decision(kind[1], threshold) is name, count)
    for place, count in enumerate(told.get("quality", [])):
        if count != HIDDEN:
            attacker.counts(lambda kind, place=place: here(kind) and tenth(kind[1]) == place, count)
    for size in SIZES:
        if f"not_kept.{size}" in told:
            attacker.counts(
                lambda kind, size=size: (
                    here(kind) and kind[2] == size and decision(kind[1], threshold) is not Outcome.KEEP
                ),
                told[f"not_kept.{size}"],
            )
    for wrong in WRONG:
        if f"diagnosis.{wrong}" in told:
            attacker.counts(
                lambda kind, wrong=wrong: here(kind) and kind[3] is wrong, told[f"diagnosis.{wrong}"]
            )
    attacker.knows_mean(
        lambda kind: kind[1] if here(kind) else 0.0, here, told["quality_mean"], told["quality_sd"]
    )


def has(kind: Kind) -> bool:
    return bool(kind[0] == "volume" and kind[2] > 0)


def dice(kind: Kind) -> float:
    return float(kind[2]) if kind[0] == "tried" else 0.0


def labels(kind: Kind) -> Kind:
    return kind[1:] if kind[0] == "known" else ()


def error(label: tuple[bool, int]) -> float:
    """Between the true DSC of a label and the middle of the tenth that it is predicted to lie in."""
    return abs((label[1] + 0.5) / 10 - BELOW[label[0]])


def learn_run(told: Mapping[str, Told], patients: Sequence[Patient]) -> Attacker:
    """All that a run tells; of the patients the attacker takes no more than is said above."""
    references = [one for one in patients if one.reference]
    n_references, n_candidates = len(references), len(patients) - len(references)
    attacker = Attacker(
        [
            ("candidate", quality, size, wrong)
            for quality in GRID
            for size in SIZES
            for wrong in ((None,) if decision(quality) is Outcome.KEEP else WRONG)
        ]
        + [("checked", quality) for quality in GRID]
        + [("tried", True, dice) for dice in GRID]
        + [("tried", False, dice) for dice in (0.0, 1.0)]  # of what is not there nothing is between
        + [("volume", reference, volume) for reference in (True, False) for volume in VOLUMES]
        + [("known", *pair) for pair in PAIRS]
    )
    for table in ("checked", "tried", "known"):
        attacker.counts(lambda kind, table=table: kind[0] == table, n_references)
    for reference, n in ((True, n_references), (False, n_candidates)):
        attacker.counts(lambda kind, of=reference: kind[:2] == ("volume", of), n)
    # Who has a lesion has it in all phases.
    attacker.knows(
        lambda kind: (kind[:2] == ("tried", True)) - (kind[:2] == ("volume", True) and kind[2] > 0), 0, 0
    )
    data = told["summarise"]
    if "volume_ml.lesion.mean" in data:
        attacker.knows_mean(
            lambda kind: kind[2] if has(kind) else 0.0,
            has,
            data["volume_ml.lesion.mean"],
            data["volume_ml.lesion.sd"],
        )
    checked = told["cross-check"]
    attacker.knows_mean(
        lambda kind: kind[1] if kind[0] == "checked" else 0.0,
        lambda kind: kind[0] == "checked",
        checked["quality_mean"],
        checked["quality_sd"],
    )
    tried = told["evaluate"]
    attacker.knows_mean(dice, lambda kind: kind[0] == "tried", tried["dice_mean"], tried["dice_sd"])
    if "dice.lesion" in tried:
        attacker.knows_mean(dice, lambda kind: kind[:2] == ("tried", True), tried["dice.lesion"], None)
    for size in SIZES:
        n = sum(one.size == size for one in patients if not one.reference)
        attacker.counts(lambda kind, size=size: kind[0] == "candidate" and kind[2] == size, n)
    learn_score(attacker, told["score"], lambda kind: kind[0] == "candidate", n_candidates)
    learn_calibration(attacker, told["calibrate"], n_references)
    return attacker


def learn_calibration(attacker: Attacker, told: Told, n: int) -> None:
    """What the phase calibrate tells of patients `("known", label, label)`."""
    low, high = unrounded(told["mae"])
    attacker.knows(lambda kind: sum(map(error, labels(kind))), 2 * n * low, 2 * n * high)
    low, high = unrounded(told["rmse"])
    attacker.knows(lambda kind: sum(error(one) ** 2 for one in labels(kind)), 2 * n * low**2, 2 * n * high**2)
    for table, failed in (("failures", True), ("others", False)):
        if table not in told:
            continue

        def mass(kind: Kind, places: Collection[int], failed: bool = failed) -> float:
            mine = [place * 10 + 5 for of, place in labels(kind) if of is failed]
            return 1000 * sum(place in places for place in mine) / max(1, len(mine))

        masses = told[table]
        filled = [place for place, one in enumerate(masses) if one]
        for index, place in enumerate(filled):
            if failed:  # taken together from the best on, and counted as the best of them
                group = range(filled[index - 1] + 1 if index else 0, place + 1)
            else:
                group = range(place, filled[index + 1] if index + 1 < len(filled) else 100)
            attacker.knows(
                lambda kind, group=group, mass=mass: mass(kind, group), masses[place], masses[place]
            )


def tenth(quality: float) -> int:
    return min(int(quality * N_BINS + 1e-9), N_BINS - 1)


def properties() -> dict[str, Belongs]:
    """What one may want to know of patients, by name."""
    wanted: dict[str, Belongs] = {}
    for name in Outcome:
        wanted[f"decision {name}"] = lambda kind, name=name: (
            kind[0] == "candidate" and decision(kind[1]) is name
        )
        for size in SIZES:
            wanted[f"{size} {name}"] = lambda kind, name=name, size=size: (
                kind[0] == "candidate" and kind[2] == size and decision(kind[1]) is name
            )
    for wrong in WRONG:
        wanted[f"diagnosis {wrong}"] = lambda kind, wrong=wrong: kind[0] == "candidate" and kind[3] is wrong
    for place in range(N_BINS):
        for table in ("candidate", "checked"):
            wanted[f"{table} in tenth {place}"] = lambda kind, table=table, place=place: (
                kind[0] == table and tenth(kind[1]) == place
            )
        wanted[f"dice in tenth {place}"] = lambda kind, place=place: (
            kind[0] == "tried" and tenth(kind[2]) == place
        )
        wanted[f"failure predicted in tenth {place}"] = lambda kind, place=place: (
            kind[0] == "known" and (True, place) in kind[1:]
        )
    wanted["references without a lesion"] = lambda kind: kind[:2] == ("tried", False)
    wanted["candidates without a lesion"] = lambda kind: kind == ("volume", False, 0)
    wanted["lesions of 15 ml or more"] = lambda kind: kind[0] == "volume" and kind[2] >= 15
    wanted["nothing but failures"] = lambda kind: kind[0] == "known" and kind[1][0] and kind[2][0]
    wanted["no failure"] = lambda kind: kind[0] == "known" and not (kind[1][0] or kind[2][0])
    wanted["a failure and another"] = lambda kind: kind[0] == "known" and kind[1][0] != kind[2][0]
    return wanted


def truth(patients: Sequence[Patient], belongs: Belongs) -> int:
    """How many patients there are of some kinds."""
    count = 0
    for one in patients:
        kinds: list[Kind] = [("volume", one.reference, one.lesion)]
        if one.reference:
            pair = sorted((true < THRESHOLD, int(said * 10)) for true, said in one.labels)
            kinds += [("checked", one.quality), ("tried", one.lesion > 0, one.dice), ("known", *pair)]
        else:
            is_kept = decision(one.quality) is Outcome.KEEP
            kinds.append(("candidate", one.quality, one.size, None if is_kept else one.wrong))
        count += any(belongs(kind) for kind in kinds)
    return count


def made_up(seed: int, n_candidates: int = 60, n_references: int = 24) -> list[Patient]:
    """A site with small groups of every sort."""
    rng = np.random.default_rng(seed)
    patients = []
    for index in range(n_candidates + n_references):
        reference = index >= n_candidates
        labels = []
        for _ in range(2):
            failed = bool(rng.random() < 0.6)
            place = int(np.clip(rng.normal(3 if failed else 7, 2), 0, 9))
            labels.append((BELOW[failed], (place + 0.5) / 10))
        there = rng.random() > 0.15
        lesion = float(rng.integers(1, 21)) if there else 0.0
        dice = GRID[int(np.clip(rng.normal(25, 3), 0, 29))] if there else float(rng.integers(2))
        patients.append(
            Patient(
                name=f"p{index}",
                reference=reference,
                quality=GRID[int(np.clip(rng.normal(21, 5), 0, 29))],
                size=SIZES[index % 3],
                wrong=WRONG[index % 7 % 3],
                lesion=lesion,
                dice=dice,
                labels=tuple(labels) if reference else (),
            )
        )
    return patients


def with_labels(patients: Sequence[Patient], rng: np.random.Generator) -> list[Patient]:
    """Of ten references' patients one has a failure and another label, the others two of the same."""
    references = [one for one in patients if one.reference]
    n = len(references)
    sorts = [(True, True)] * (n * 9 // 20) + [(False, False)] * (n * 9 // 20)
    sorts += [(True, False)] * (n - len(sorts))
    known = {
        one.name: tuple((BELOW[failed], (int(rng.integers(1, 9)) + 0.5) / 10) for failed in sort)
        for one, sort in zip(references, sorts, strict=True)
    }
    return [replace(one, labels=known.get(one.name, ())) for one in patients]


def with_small_ones(patients: Sequence[Patient]) -> list[Patient]:
    """Of the small labels all but three are dropped, of the others every other one, and none is reviewed."""
    few = {one.name for one in [one for one in patients if not one.reference and one.size == "small"][:3]}
    made = []
    for index, one in enumerate(patients):
        kept = one.name in few if one.size == "small" else index % 2
        made.append(one if one.reference else replace(one, quality=GRID[25 if kept else 10]))
    return made


def with_few_kept(patients: Sequence[Patient]) -> list[Patient]:
    """Four are kept, and of the others half are dropped."""
    few = {one.name for one in [one for one in patients if not one.reference][:4]}
    made = []
    for index, one in enumerate(patients):
        quality = GRID[25 if one.name in few else (10, 17)[index % 2]]
        made.append(one if one.reference else replace(one, quality=quality))
    return made


SITES = {
    "small": made_up(1),
    "few dropped": made_up(4),
    "many": made_up(4, n_candidates=150, n_references=60),
    "few with both sorts of labels": with_labels(made_up(3), np.random.default_rng(3)),
    "few small ones kept": with_small_ones(made_up(5, n_candidates=90)),
    "few kept": with_few_kept(made_up(6)),
}


def asked_of(patients: Sequence[Patient]) -> dict[str, Belongs]:
    """The properties that some patients have, but fewer than may be told of."""
    return {
        what: belongs for what, belongs in properties().items() if 0 < truth(patients, belongs) < MIN_COUNT
    }


@pytest.mark.parametrize("name", SITES)
def test_no_group_that_is_too_small_is_reconstructed(tmp_path: Path, name: str) -> None:
    patients = SITES[name]
    attacker = learn_run(Site(tmp_path).run(patients), patients)
    asked = asked_of(patients)
    assert len(asked) >= 15
    for what, belongs in asked.items():
        few, many = attacker.cannot_rule_out(belongs)
        assert few == 0 < many or many - few >= WIDTH, (what, few, many)


@pytest.mark.parametrize("name", SITES)
def test_without_filters_the_same_attack_finds_them(tmp_path: Path, name: str) -> None:
    patients = SITES[name]
    attacker = learn_run(Site(tmp_path, filters=False).run(patients), patients)
    for what, belongs in asked_of(patients).items():
        low, high = attacker.proves(belongs)
        assert low <= truth(patients, belongs) <= high, what  # what the attacker believes is true
    assert sum(attacker.finds(belongs) for belongs in asked_of(patients).values()) >= 3


WITHOUT: dict[str, tuple[str, Any, str, str]] = {
    "a second group is hidden with one": (
        "privacy._shown",
        lambda groups, min_count: [not one or one >= min_count for one in groups.patients],
        "few dropped",
        "decision drop",
    ),
    "hidden groups are enough together": (
        "privacy._gives_away",
        lambda *_: False,
        "few dropped",
        "decision drop",
    ),
    "bins heed decisions": ("privacy._shown_bins", privacy._shown, "few dropped", "decision drop"),
    "bins heed decisions hidden together": (
        "site.combinations",
        lambda groups, n: combinations(groups, 1) if n == 1 else (),
        "few dropped",
        "decision drop",
    ),
    "sizes heed what is kept": (
        "privacy._shown_names",
        lambda table, n: privacy._shown(table.not_kept if isinstance(table, Split) else table, n),
        "few small ones kept",
        "small keep",
    ),
    "diagnoses heed that few are kept": (
        "privacy._shown_names",
        lambda table, n, shown=privacy._shown_names: (
            privacy._shown(table, n) if isinstance(table, Part) else shown(table, n)
        ),
        "few kept",
        "decision keep",
    ),
    "labels of known quality are taken together": (
        "privacy._moved",
        lambda spread, _: list(spread.masses),
        "few dropped",
        "nothing but failures",
    ),
    "patients with both sorts of labels count": (
        "privacy._moved",
        lambda spread, n, moved=privacy._moved: moved(spread.model_copy(update={"shared": 0}), n),
        "few with both sorts of labels",
        "a failure and another",
    ),
    "those without a region count": (
        "site._fewest",
        lambda owner, group, *_: len(set(owner[group])),
        "small",
        "references without a lesion",
    ),
}
"""Filters by what they do: where each is, what is there without it, and what is then found at which site."""


@pytest.mark.parametrize("name", WITHOUT)
def test_without_one_filter_the_same_attack_finds_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    where, instead, site, what = WITHOUT[name]
    patients = SITES[site]
    belongs = asked_of(patients)[what]
    told = Site(tmp_path / "with").run(patients)
    assert not learn_run(told, patients).finds(belongs)
    monkeypatch.setattr(f"fedqc.statistics.{where}", instead)
    told = Site(tmp_path / "without").run(patients)
    assert learn_run(told, patients).finds(belongs)


# ------------------------------------------------------------------------------------------- several runs


def people(names: str) -> list[Patient]:
    """Ten candidates for each letter, such as a0 to a9, who are the same whenever they are asked for."""
    made: list[Patient] = []
    for letter in names:
        rng = np.random.default_rng(ord(letter))
        made += [
            Patient(
                f"{letter}{index}",
                reference=False,
                quality=GRID[rng.choice([*range(10, 17), *range(18, 30)])],
            )
            for index in range(10)
        ]
    return made


X = Patient("x", reference=False, quality=GRID[17])  # to be reviewed
RELABELLED = replace(X, quality=GRID[25], version=1)  # to be kept
OTHERS = [Patient(f"r{index}", reference=True, quality=0.9) for index in range(9)]
AB, ABX = people("ab"), [*people("ab"), X]
SAME = [Patient(f"s{index}", reference=False, quality=GRID[(5, 17, 28)[index % 3]]) for index in range(36)]
MANY = [Patient(f"n{index}", reference=False, quality=GRID[28]) for index in range(12)]
NINE = MANY[:9]
RUNS: dict[str, list[tuple[list[Patient], float]]] = {
    "joins": [(AB, THRESHOLD), (ABX, THRESHOLD)],
    "leaves": [(ABX, THRESHOLD), (AB, THRESHOLD)],
    "is labelled anew": [(ABX, THRESHOLD), ([*AB, RELABELLED], THRESHOLD)],
    "joins with references": [(AB, THRESHOLD), ([*ABX, *OTHERS], THRESHOLD)],
    "comes and goes": [(one, THRESHOLD) for one in (AB, ABX, AB, [*AB, RELABELLED], AB)],
    "joins as nine leave": [([*SAME, *NINE], THRESHOLD), ([*SAME, X], THRESHOLD)],
    "leaves as nine join": [([*SAME, X], THRESHOLD), ([*SAME, *NINE], THRESHOLD)],
    "leaves as many join": [([*SAME, X], THRESHOLD), ([*SAME, *MANY], THRESHOLD)],
    "is left of four groups": [
        (people("ab"), THRESHOLD),
        (people("ac"), THRESHOLD),
        (people("db"), THRESHOLD),
        ([*people("dc"), X], THRESHOLD),
    ],
}


def learn_runs(site: Site, runs: Sequence[tuple[list[Patient], float]]) -> Attacker:
    """What several scorings tell of groups of candidates who were there in the same of them.

    A number that is told again is of the group that it was told of first.
    """
    there = [{(one.name, one.version) for one in patients if not one.reference} for patients, _ in runs]
    groups = {who: tuple(who in present for present in there) for who in set[tuple[str, int]]().union(*there)}
    sizes = {group: sum(of == group for of in groups.values()) for group in sorted(set(groups.values()))}
    attacker = Attacker([("candidate", quality, "small", None, group) for quality in GRID for group in sizes])
    for group, n in sizes.items():
        attacker.counts(lambda kind, group=group: kind[4] == group, n)
    known: list[Told] = []
    for index, (patients, threshold) in enumerate(runs):
        told = site.score(patients, threshold)
        if not (site.filters and told in known):
            learn_score(attacker, told, lambda kind, i=index: kind[4][i], len(there[index]), threshold)
        known.append(told)
    return attacker


def of_x(runs: Sequence[tuple[list[Patient], float]]) -> dict[str, tuple[Any, bool]]:
    """What one may want to know of x, and whether it is true."""
    versions = {one.version: one for patients, _ in runs for one in patients if one.name == "x"}
    wanted = {}
    for version, one in versions.items():
        group = tuple(one in patients for patients, _ in runs)
        for name in Outcome:
            wanted[f"{version} {name}"] = (
                lambda kind, name=name, group=group: kind[4] == group and decision(kind[1]) is name,
                decision(one.quality) is name,
            )
    return wanted


@pytest.mark.parametrize("name", RUNS)
def test_no_patient_is_what_is_left_between_runs(tmp_path: Path, name: str) -> None:
    runs = RUNS[name]
    attacker = learn_runs(Site(tmp_path), runs)
    asked = of_x(runs)
    assert asked
    for what, (belongs, _) in asked.items():
        assert attacker.cannot_rule_out(belongs) == (0, 1), what


@pytest.mark.parametrize("name", RUNS)
def test_without_filters_the_patient_is(tmp_path: Path, name: str) -> None:
    runs = RUNS[name]
    attacker = learn_runs(Site(tmp_path, filters=False), runs)
    found = {what: attacker.proves(belongs) for what, (belongs, _) in of_x(runs).items()}
    assert found == {what: (true, true) for what, (_, true) in of_x(runs).items()}


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("joins", ("_gives_away", "_combine_to_few")),
        ("is labelled anew", ("_gives_away", "_combine_to_few")),
        ("joins as nine leave", ("_gives_away", "_combine_to_few")),
        ("leaves as many join", ("_gives_away",)),
        ("is left of four groups", ("_combine_to_few",)),
    ],
)
def test_a_site_that_forgets_what_it_told_gives_the_patient_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, without: tuple[str, ...]
) -> None:
    for check in without:
        monkeypatch.setattr(f"fedqc.statistics.releases.{check}", lambda *_: False)
    runs = RUNS[name]
    attacker = learn_runs(Site(tmp_path), runs)
    found = [attacker.proves(belongs) == (true, true) for belongs, true in of_x(runs).values()]
    assert any(found)


@pytest.mark.parametrize("filters", [True, False])
def test_nobody_is_found_between_two_thresholds(tmp_path: Path, filters: bool) -> None:
    """Nobody but x has a quality that lies between them."""
    runs = [(ABX, X.quality - 0.01), (ABX, X.quality + 0.01)]
    attacker = learn_runs(Site(tmp_path, filters=filters), runs)
    if filters:
        few, many = attacker.cannot_rule_out(lambda kind: kind[1] == X.quality)
        assert few == 0
        assert many >= WIDTH
    else:
        assert attacker.proves(lambda kind: kind[1] == X.quality) == (1, 1)
