"""Whether rule `conformal` keeps its word on real images: the share of failures among what it keeps.

    python -m fedqc_simulations.benchmarks.conformal RUN --data FOLDER --task TASK [--model FOLDER]
        [--splits 200] [--sites 4] [--seed 0] [--threads 1]

RUN is the folder of a simulation: its QC model has not seen the patients of its candidates. The labels of
these patients are spoiled in every way once and scored. Then, over and over, half of the patients calibrate
with all of their labels, and each of the others is a candidate with one label, a failure with a set
probability. Three tables: one calibration for all candidates; one for each of several sites, of its own
patients; and one that has not seen the kinds of error that the candidates have, where nothing is promised.
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np

from fedqc.compute import choose_compute
from fedqc.config import CurationConfig
from fedqc.curation.calibration import Calibration, calibration_of
from fedqc.curation.rules import Outcome, make_rule
from fedqc.errors import DataError
from fedqc.seeding import generator
from fedqc.trial import Tried, try_model
from fedqc_simulations.benchmarks.unseen_patients import options_of, read_model_and_cases

ALPHAS, BAD = (0.05, 0.1, 0.2), (0.1, 0.35, 0.8)
UNSEEN = ("slices-left-out", "another-patient", "left-right-flip")
"""Kinds that the third table keeps from the calibration."""
TAU = 0.75
Labels = dict[str, list[Tried]]
"""By patient."""


def main() -> None:
    """Score, split, and print."""
    parser = options_of(__doc__)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--sites", type=int, default=4)
    options = parser.parse_args()
    labels = _scored(options)
    n_bad = sum(one.true_dsc < TAU for mine in labels.values() for one in mine)
    n_labels = sum(map(len, labels.values()))
    print(f"{n_labels} labels of {len(labels)} patients, {n_bad} of them failures (true DSC below {TAU})")
    others: Labels = {who: [one for one in mine if one.kind not in UNSEEN] for who, mine in labels.items()}
    only: Labels = {
        who: [one for one in mine if one.kind in UNSEEN or one.true_dsc >= TAU]
        for who, mine in labels.items()
    }
    tables: tuple[tuple[str, Labels, Labels, int], ...] = (
        ("one calibration for all", labels, labels, 1),
        (f"one for each of {options.sites} sites", labels, labels, options.sites),
        ("of kinds that the calibration has not seen", others, only, 1),
    )
    for title, calibrating, candidates, sites in tables:
        print(f"\n{title}\n\n| alpha | bad labels | failures among the kept (SE) | good ones kept |")
        print("|---|---|---|---|")
        for alpha in ALPHAS:
            for bad in BAD:
                rng = generator(options.seed, title, f"{alpha} {bad}")
                found = [
                    _split(calibrating, candidates, alpha, bad, sites, rng) for _ in range(options.splits)
                ]
                share, kept = (np.array([one[place] for one in found]) for place in (0, 1))
                error = share.std(ddof=1) / np.sqrt(len(share))
                print(f"| {alpha:g} | {bad:.0%} | {share.mean():.3f} ({error:.3f}) | {kept.mean():.1%} |")


def _scored(options: argparse.Namespace) -> Labels:
    """Every label of every patient, and what the model says of it."""
    model, cases = read_model_and_cases(options)
    rng = generator(options.seed, "conformal")
    tried = try_model(model.method, model.network, cases, rng, choose_compute("auto"), progress=_progress)
    return {one.patient: [other for other in tried if other.patient == one.patient] for one in tried}


def _progress(done: int, most: int) -> None:
    if done % 100 == 0 or done == most:
        print(f"scoring: {done} of {most}", flush=True)


def _split(  # noqa: PLR0917 - what is split, and how
    calibrating: Labels, candidates: Labels, alpha: float, bad: float, sites: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Share of failures among what is kept, and of the good ones that are."""
    n_kept = n_failures = n_good = n_good_kept = 0
    everyone = rng.permutation(sorted(calibrating)).tolist()
    for site in range(sites):
        mine = everyone[site::sites]
        half = len(mine) // 2
        decide = _rule(calibrating, mine[:half], alpha)
        drawn = [_drawn(candidates[who], bad, rng) for who in mine[half:]]
        kept = [
            one for one, keep in zip(drawn, decide([one.predicted_dsc for one in drawn]), strict=True) if keep
        ]
        n_kept += len(kept)
        n_failures += sum(one.true_dsc < TAU for one in kept)
        n_good += sum(one.true_dsc >= TAU for one in drawn)
        n_good_kept += sum(one.true_dsc >= TAU for one in kept)
    return (n_failures / n_kept if n_kept else 0.0), (n_good_kept / n_good if n_good else 1.0)


def _rule(labels: Labels, patients: Sequence[str], alpha: float) -> Callable[[list[float]], list[bool]]:
    """Keeps what the rule keeps; nothing where there are too few patients for it."""
    known = [one for who in patients for one in labels[who]]
    calibration: Calibration = calibration_of(
        [one.predicted_dsc for one in known],
        [one.true_dsc for one in known],
        [one.patient for one in known],
        TAU,
    )
    try:
        rule = make_rule(CurationConfig(rule="conformal", alpha=alpha), calibration)
    except DataError:
        return lambda quality: [False] * len(quality)

    def decide(quality: list[float]) -> list[bool]:
        decided = rule.decide({str(index): value for index, value in enumerate(quality)})
        return [one.outcome is Outcome.KEEP for one in decided.values()]

    return decide


def _drawn(labels: Sequence[Tried], bad: float, rng: np.random.Generator) -> Tried:
    """One label of a patient: a failure with some probability, where there is one of both."""
    is_bad = rng.uniform() < bad
    wanted = [one for one in labels if (one.true_dsc < TAU) == is_bad] or list(labels)
    return wanted[int(rng.integers(len(wanted)))]


if __name__ == "__main__":
    main()
