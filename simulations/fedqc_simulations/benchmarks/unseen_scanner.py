"""Whether the self-test keeps a site whose images the QC model does not know from dropping good labels.

    python -m fedqc_simulations.benchmarks.unseen_scanner RUN --data FOLDER --task TASK [--model FOLDER]
        [--splits 200] [--calibrating 8] [--candidates 24] [--seed 0] [--threads 1]

RUN is the folder of a simulation: its QC model has not seen the patients of its candidates. Their labels
are spoiled in every way once and scored, with the images as they are, inverted, and with noise
of twice their own standard deviation. Then, over and over, a site is drawn: some patients for its self-test,
and candidates with one label each, a third of them spoiled. Prints for each kind of image how the self-tests
went, and the share of good labels that is dropped with the self-test and would be without it.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedqc.cases.volumes import Case
from fedqc.compute import choose_compute
from fedqc.config import CurationConfig
from fedqc.curation.deciding import decide
from fedqc.curation.rules import Outcome
from fedqc.curation.self_test import KnownLabel, SelfTest
from fedqc.degradation.base import Untouched
from fedqc.lazy import Lazy
from fedqc.metrics.agreement import mae
from fedqc.metrics.filtering import auroc
from fedqc.model import StoredModel
from fedqc.seeding import generator
from fedqc.trial import Tried, try_model
from fedqc_simulations.benchmarks.unseen_patients import options_of, read_model_and_cases

BAD = 1 / 3
NOISE = 2.0
IMAGES = ("as they are", "inverted", "noisy")


@dataclass(frozen=True)
class Site:
    """How it went at a site that was drawn."""

    mae: float
    auroc: float
    suspended: bool
    dropped: float
    """Share of its good labels."""
    otherwise: float
    """The same without a self-test."""


class Changed(Lazy[Case]):
    """Cases with other images, which are drawn anew but alike each time they are read."""

    def __init__(self, cases: Sequence[Case], image: str, seed: int) -> None:
        self._cases, self._image, self._seed = cases, image, seed

    def __len__(self) -> int:
        return len(self._cases)

    def make(self, index: int) -> Case:
        """Read a case and change its image; what is outside of it stays 0."""
        case = self._cases[index]
        return replace(case, image=self._changed(case.image, index))

    def _changed(self, image: NDArray[np.float32], index: int) -> NDArray[np.float32]:
        inside = image != 0
        if self._image == "inverted":
            ends = np.percentile(image[inside], (1, 99))
            return np.where(inside, ends.sum() - image, 0).astype(np.float32)
        if self._image == "noisy":
            rng = generator(self._seed, "noise", str(index))
            noise = rng.normal(0, NOISE * image[inside].std(), image.shape)
            return np.where(inside, image + noise, 0).astype(np.float32)
        return image


def main() -> None:
    """Score, draw sites, and print."""
    parser = options_of(__doc__)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--calibrating", type=int, default=8, help="patients of a site's self-test")
    parser.add_argument("--candidates", type=int, default=24)
    options = parser.parse_args()
    model, cases = read_model_and_cases(options)
    tried = {
        image: _tried(model, Changed(cases, image, options.seed), image, options.seed) for image in IMAGES
    }
    print(
        f"\n{options.splits} sites of {options.calibrating} + {options.candidates} patients, "
        f"out of {len(cases.patients)}\n"
    )
    print("| images | MAE | AUROC | self-tests failed | good labels dropped | without the self-test |")
    print("|---|---|---|---|---|---|")
    for image, labels in tried.items():
        sites = list(_sites(labels, options))
        means = [float(np.nanmean([getattr(one, key) for one in sites])) for key in Site.__dataclass_fields__]
        error, area, failed, dropped, otherwise = means
        print(f"| {image} | {error:.3f} | {area:.3f} | {failed:.0%} | {dropped:.1%} | {otherwise:.1%} |")


def _tried(model: StoredModel, cases: Sequence[Case], image: str, seed: int) -> list[Tried]:
    """Every label of every patient, and what the model says of it."""

    def progress(done: int, most: int) -> None:
        if done % 200 == 0 or done == most:
            print(f"scoring, images {image}: {done} of {most}", flush=True)

    rng = generator(seed, "unseen scanner")
    return try_model(model.method, model.network, cases, rng, choose_compute("auto"), progress=progress)


def _sites(tried: Sequence[Tried], options: argparse.Namespace) -> Iterator[Site]:
    """Sites with patients of their own; the same ones whatever the images are."""
    labels = {one.patient: [other for other in tried if other.patient == one.patient] for one in tried}
    config = CurationConfig()
    for split in range(options.splits):
        rng = generator(options.seed, "unseen scanner", str(split))
        everyone = rng.permutation(sorted(labels)).tolist()
        known = [one for who in everyone[: options.calibrating] for one in labels[who]]
        test = SelfTest(
            key="0" * 64,
            labels=tuple(
                KnownLabel(patient=one.patient, true=one.true_dsc, predicted=one.predicted_dsc)
                for one in known
            ),
        )
        drawn = {}
        for who in everyone[options.calibrating : options.calibrating + options.candidates]:
            is_bad = rng.uniform() < BAD
            of_kind = [one for one in labels[who] if (one.kind != Untouched.kind) == is_bad]
            drawn[who] = of_kind[int(rng.integers(len(of_kind)))]
        quality = {who: one.predicted_dsc for who, one in drawn.items()}
        good = [who for who, one in drawn.items() if one.kind == Untouched.kind]
        shares = []
        for tested in (test, None):
            _, decisions = decide(quality, config, tested)
            shares.append(sum(decisions[who].outcome is not Outcome.KEEP for who in good) / max(1, len(good)))
        predicted, true = [one.predicted_dsc for one in known], [one.true_dsc for one in known]
        area = auroc([-one for one in predicted], [one < config.threshold for one in true])
        yield Site(
            mae(predicted, true) or 0.0,
            float("nan") if area is None else area,
            test.failed(config) is not None,
            *shares,
        )


if __name__ == "__main__":
    main()
