"""Whether diagnoses are right on real images: what labels suffer from, and what they are said to suffer from.

    python -m fedqc_simulations.benchmarks.diagnosis RUN --data FOLDER --task TASK [--model FOLDER]
        [--seed 0] [--threads 1]

RUN is the folder of a simulation: its QC model has not seen the patients of its candidates. The labels of
these patients are spoiled in every way once; those with a true DSC of at most 0.9 are diagnosed. Prints a row
for each kind of error and a column for each diagnosis, how many repairs were offered, and what they are
worth.
"""

import argparse
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedqc.cases.volumes import Case
from fedqc.compute import choose_compute
from fedqc.curation.diagnosing import diagnose_cases
from fedqc.curation.diagnosis import Diagnosis, Kind
from fedqc.degradation.annotator import ANNOTATOR_KINDS
from fedqc.degradation.samples import DegradedCase, degrade_cases
from fedqc.errors import DataError
from fedqc.seeding import generator
from fedqc_simulations.benchmarks.unseen_patients import options_of, read_model_and_cases
from fedqc_simulations.evaluation import MEANT, diagnosis_figures

WORST = 0.9
"""Labels that are hardly spoiled are kept, and not diagnosed."""


@dataclass(frozen=True)
class Diagnosed:
    """A spoiled label and what was said of it."""

    patient: str
    kind: str
    """What was done to it."""
    true_dsc: float
    diagnosis: Diagnosis


def main() -> None:
    """Spoil, diagnose, and print."""
    parser = options_of(__doc__)
    options = parser.parse_args()
    begin = time.perf_counter()
    found = _diagnosed(options)
    seconds = time.perf_counter() - begin
    figures = diagnosis_figures((one.kind, one.diagnosis.kind) for one in found)
    if not figures["n"]:
        raise DataError(f"{options.run}: none of the spoiled labels has a DSC of {WORST} or less")
    patients = len({one.patient for one in found})
    print(
        f"\n{figures['n']} labels of {patients} patients in {seconds:.0f} s, scoring included; "
        f"{figures['right']:.1%} are diagnosed as what they are"
    )
    columns = [kind for kind in Kind if any(kind in said for said in figures["by_kind"].values())]
    print(f"\n| what was done | {' | '.join(columns)} | repairs offered | true DSC before, predicted after |")
    print(f"|---|{'---|' * len(columns)}---|---|")
    for kind, said in figures["by_kind"].items():
        counts = " | ".join(
            f"**{said.get(column, 0)}**" if column == MEANT[kind] else str(said.get(column, 0))
            for column in columns
        )
        print(f"| {kind} | {counts} | {_repairs([one for one in found if one.kind == kind])} |")


def _diagnosed(options: argparse.Namespace) -> list[Diagnosed]:
    """Every spoiled label with its diagnosis."""
    model, cases = read_model_and_cases(options)
    pending: deque[DegradedCase] = deque()

    def spoiled() -> Iterator[Case]:
        drawn = degrade_cases(cases, model.card.task, ANNOTATOR_KINDS, generator(options.seed, "diagnosis"))
        for sample in drawn:
            if sample.mean_dsc <= WORST:
                pending.append(sample)
                yield sample.case

    found: list[Diagnosed] = []
    for _, diagnosis in diagnose_cases(model.method, model.network, spoiled(), choose_compute("auto")):
        if diagnosis is None:
            raise DataError(f"{model.method.name} does not tell what a label should be")
        sample = pending.popleft()
        found.append(Diagnosed(sample.case.patient, sample.kind, sample.mean_dsc, diagnosis))
        if len(found) % 100 == 0:
            print(f"diagnosing: {len(found)} of some {len(cases) * len(ANNOTATOR_KINDS)}", flush=True)
    return found


def _repairs(found: Sequence[Diagnosed]) -> str:
    """How many were offered, and the mean true DSC before and the predicted one after."""
    offered = [(one.true_dsc, one.diagnosis.repair.quality) for one in found if one.diagnosis.repair]
    if not offered:
        return "0 | "
    before, after = np.mean(offered, axis=0)
    return f"{len(offered)} | {before:.2f}, {after:.2f}"


if __name__ == "__main__":
    main()
