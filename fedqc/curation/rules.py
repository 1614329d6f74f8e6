"""Rules: how the scores of a site's candidates become decisions, each with a reason.

threshold   drop what is predicted to be below a DSC
stars       drop what is rated with fewer stars
target      drop below the predicted DSC under which a wanted share of the failures lies, or above which
            hardly anything good is dropped, on labels of known quality (`fedqc.curation.calibration`)
conformal   keep as many as can be kept with at most a wanted share of failures among them
quantile    drop the worst so many per cent of each site
weights     drop below a DSC, and draw the others for training the more often, the better they are
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike

from fedqc.config import CurationConfig
from fedqc.curation.calibration import Calibration
from fedqc.errors import ConfigError, DataError
from fedqc.ratings import FEWEST_STARS, MOST_STARS


class Outcome(StrEnum):
    """What becomes of a candidate."""

    KEEP = "keep"
    DROP = "drop"
    REVIEW = "review"


@dataclass(frozen=True)
class Decision:
    """What becomes of one candidate, and why."""

    outcome: Outcome
    """Only what is kept takes part in training; a review counts as dropped until someone decides."""
    reason: str
    """A sentence with the numbers that decided."""
    weight: float = 1.0
    """How often a kept case is drawn in training, beside one of weight 1; in (0, 1]."""


class Rule(Protocol):
    """Makes decisions from scores."""

    name: ClassVar[str]

    def decide(self, quality: Mapping[str, float]) -> dict[str, Decision]:
        """Decide about a site's candidates.

        Args:
            quality: predicted quality of each in [0, 1], lower is worse, by the candidate's id.

        Raises:
            DataError: a quality is not a number in [0, 1].
        """
        ...


@dataclass(frozen=True)
class ThresholdRule:
    """Drop below a threshold; within the review band above it, leave it to a person; keep the rest."""

    threshold: float = 0.75
    """Lowest predicted DSC that is not dropped."""
    review: float = 0.0
    """Width of the band from the threshold upwards (its upper end is kept)."""

    name: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        _check_band(self.threshold, self.review, 1)

    def decide(self, quality: Mapping[str, float]) -> dict[str, Decision]:
        """Decide about each candidate on its own; see `Rule.decide`."""
        _check(quality)
        words = _Words("predicted DSC", "the threshold {:g}")
        return {case: _by_band(value, self.threshold, self.review, words) for case, value in quality.items()}


@dataclass(frozen=True)
class StarsRule:
    """Drop below so many stars, of methods that rate as people do; leave a band above them to a person."""

    stars: float = 4.0
    """Fewest stars that are not dropped."""
    review: float = 0.0
    """Width of the band from there upwards, in stars."""

    name: ClassVar[str] = "stars"

    def __post_init__(self) -> None:
        _check_band(self.stars, self.review, MOST_STARS)

    def decide(self, quality: Mapping[str, float]) -> dict[str, Decision]:
        """Decide about each candidate on its own; see `Rule.decide`."""
        _check(quality)
        words = _Words("a rating of", "{:g} stars")
        rated = {
            case: round(FEWEST_STARS + value * (MOST_STARS - FEWEST_STARS), 9)
            for case, value in quality.items()
        }
        return {case: _by_band(stars, self.stars, self.review, words) for case, stars in rated.items()}


@dataclass(frozen=True)
class TargetRule:
    """Drop below the predicted DSC that reached a wanted recall or precision on labels of known quality."""

    threshold: float
    """Lowest predicted DSC that is not dropped."""
    why: str
    """What it reached, to be read behind "the threshold 0.7, "."""
    review: float = 0.0
    """Width of the band from there upwards."""

    name: ClassVar[str] = "target"

    def decide(self, quality: Mapping[str, float]) -> dict[str, Decision]:
        """Decide about each candidate on its own; see `Rule.decide`."""
        _check(quality)
        words = _Words("predicted DSC", f"the threshold {{:g}} ({self.why})")
        return {case: _by_band(value, self.threshold, self.review, words) for case, value in quality.items()}


@dataclass(frozen=True)
class ConformalRule:
    """Keep as many as possible so that on average at most a share `alpha` of the kept ones are failures.

    Conformal selection (Jin & Candes 2023, JMLR 24:244): a p-value for "this label is a failure" of each
    candidate, then Benjamini & Hochberg 1995. Holds where real failures resemble those of the calibration.
    """

    calibration: Calibration
    alpha: float
    threshold: float
    """A true DSC below this is a failure; what cannot be vouched for is dropped if it is predicted below."""

    name: ClassVar[str] = "conformal"

    def decide(self, quality: Mapping[str, float]) -> dict[str, Decision]:
        """Decide about all candidates together; see `Rule.decide`."""
        _check(quality)
        p_values = self.calibration.p_values(list(quality.values()))
        largest = largest_kept(p_values, self.alpha)
        return {
            case: self._decision(value, float(p), largest)
            for (case, value), p in zip(quality.items(), p_values, strict=True)
        }

    def _decision(self, quality: float, p: float, largest: float) -> Decision:
        shown = f"predicted DSC {_shown(quality, self.threshold)}, as good in {p:.1%} of failures"
        if p <= largest:
            why = f"up to {largest:.1%} keep failures at {100 * self.alpha:.3g} % of what is kept"
            return Decision(Outcome.KEEP, f"{shown}: {why}")
        if quality < self.threshold:
            return Decision(Outcome.DROP, f"{shown}, and below {self.threshold:g}")
        why = f"keeping it could bring failures above {100 * self.alpha:.3g} % of what is kept"
        return Decision(Outcome.REVIEW, f"{shown}: {why}")


@dataclass(frozen=True)
class QuantileRule:
    """Drop the worst share of a site, whatever its quality; of equal ones the first by id."""

    share: float = 0.1
    """Of the site's candidates, rounded down."""

    name: ClassVar[str] = "quantile"

    def decide(self, quality: Mapping[str, float]) -> dict[str, Decision]:
        """Decide about all candidates together; see `Rule.decide`."""
        _check(quality)
        worst_first = sorted(quality, key=lambda case: (quality[case], case))
        n_dropped = math.floor(round(self.share * len(worst_first), 9))
        dropped = set(worst_first[:n_dropped])
        among = f"the lowest {self.share:.4g} of the site ({n_dropped} of {len(worst_first)})"
        return {
            case: Decision(Outcome.DROP, f"predicted DSC {value:.3f} is among {among}")
            if case in dropped
            else Decision(Outcome.KEEP, f"predicted DSC {value:.3f} is not among {among}")
            for case, value in quality.items()
        }


@dataclass(frozen=True)
class WeightsRule:
    """Drop below a threshold; above it a case is drawn in training as often as it is better than that."""

    threshold: float = 0.75

    name: ClassVar[str] = "weights"

    def decide(self, quality: Mapping[str, float]) -> dict[str, Decision]:
        """Decide about each candidate on its own; see `Rule.decide`."""
        _check(quality)
        return {case: self._decision(value) for case, value in quality.items()}

    def _decision(self, quality: float) -> Decision:
        # At the threshold itself a weight of 0 would be no other than dropping.
        if quality <= self.threshold:
            shown = _shown(quality, self.threshold)
            return Decision(
                Outcome.DROP, f"predicted DSC {shown} is not above the threshold {self.threshold:g}"
            )
        weight = (quality - self.threshold) / (1 - self.threshold)
        shown = _shown(quality, self.threshold)
        reason = f"predicted DSC {shown} gives weight {weight:.3g} above the threshold {self.threshold:g}"
        return Decision(Outcome.KEEP, reason, weight)


def needs_calibration(config: CurationConfig) -> bool:
    """Whether a rule cannot be made without labels of known quality."""
    return config.rule in {"target", "conformal"}


def make_rule(config: CurationConfig, calibration: Calibration | None = None) -> Rule:
    """The rule of a configuration.

    Args:
        config: of the federation.
        calibration: labels of known quality, for rules that need some.

    Raises:
        DataError: the rule needs calibration, and there is none or it cannot reach what is wanted.
    """
    match config.rule:
        case "threshold":
            return ThresholdRule(config.threshold, config.review)
        case "stars":
            return StarsRule(config.stars, config.review)
        case "quantile":
            return QuantileRule(config.share)
        case "weights":
            return WeightsRule(config.threshold)
        case "target":
            return _target_rule(config, _there(config, calibration))
        case "conformal":
            known = _there(config, calibration)
            if 1 / (1 + round(known.n_failing)) > config.alpha:
                raise DataError(
                    f"rule conformal: there are failures of {known.n_failing:.0f} patients among the labels "
                    f"of known quality; at alpha {config.alpha:g} it takes {math.ceil(1 / config.alpha) - 1}"
                )
            return ConformalRule(known, config.alpha, config.threshold)


def _target_rule(config: CurationConfig, calibration: Calibration) -> TargetRule:
    level = config.level
    if config.target == "recall":
        cut = calibration.cut_for_recall(level)
        why = f"under which {level:.4g} of the failures lie, by {calibration.n_failing:.0f} patients' labels"
    else:
        cut = calibration.cut_for_precision(level)
        why = f"under which {level:.4g} are failures, by {calibration.n_failing:.0f} patients' labels"
    if cut is None or cut >= 1:
        raise DataError(
            f"rule target: no threshold reaches a {config.target} of {level:g} on the labels of known quality"
        )
    return TargetRule(cut, why, min(config.review, 1 - cut))


def _there(config: CurationConfig, calibration: Calibration | None) -> Calibration:
    if calibration is None:
        raise DataError(f"rule {config.rule}: there are no labels of known quality")
    return calibration


def largest_kept(p_values: ArrayLike, alpha: float) -> float:
    """The largest p-value that Benjamini & Hochberg's procedure selects; -1 where it selects none."""
    ordered = np.sort(np.asarray(p_values, dtype=np.float64))
    selected = np.flatnonzero(ordered <= alpha * np.arange(1, len(ordered) + 1) / len(ordered))
    return float(ordered[selected[-1]]) if selected.size else -1.0


@dataclass(frozen=True)
class _Words:
    """How a rule speaks of a value and of its bound."""

    value: str
    bound: str


def _by_band(value: float, lowest: float, review: float, words: _Words) -> Decision:
    """Drop below a bound, leave a band above it to a person, keep the rest."""
    keep_from = round(lowest + review, 9)  # 0.1 + 0.2 is meant as 0.3
    shown = f"{words.value} {_shown(value, lowest, keep_from)}"
    bound = words.bound.format(lowest)
    if value < lowest:
        return Decision(Outcome.DROP, f"{shown} is below {bound}")
    if value < keep_from:
        return Decision(Outcome.REVIEW, f"{shown} is in the review band from {bound} to {keep_from:g}")
    until = f"{keep_from:g}, {bound} and the review band {review:g}" if review else bound
    return Decision(Outcome.KEEP, f"{shown} is not below {until}")


def _shown(value: float, *bounds: float) -> str:
    """Three decimals, or all of them where rounding would contradict the decision."""
    text = f"{value:.3f}"
    same = all((float(text) >= bound) == (value >= bound) for bound in bounds)
    return text if same else str(float(value))


def _check(quality: Mapping[str, float]) -> None:
    for case, value in quality.items():
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise DataError(f"case {case}: quality is {value}; a QC method must give a number in [0, 1]")


def _check_band(lowest: float, review: float, most: float) -> None:
    if not (0 <= lowest <= most and 0 <= review <= most):
        raise ConfigError(
            f"threshold is {lowest} and review is {review}; both must lie between 0 and {most:g}"
        )
    if (total := round(lowest + review, 9)) > most:
        raise ConfigError(
            f"threshold {lowest} and review {review} add up to {total}, so no case could be kept; make "
            f"review {round(most - lowest, 6)} or less"
        )
