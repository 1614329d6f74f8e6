"""Rules: how a score becomes a decision with a reason."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Protocol

from fedqc.errors import ConfigError, DataError


class Outcome(StrEnum):
    """What becomes of a candidate."""

    KEEP = "keep"
    DROP = "drop"
    REVIEW = "review"


@dataclass(frozen=True)
class Decision:
    """What becomes of one candidate, and why."""

    case_id: str
    outcome: Outcome
    reason: str
    """A sentence with the numbers that decided."""

    @property
    def kept(self) -> bool:
        """The case takes part in training; a review counts as dropped until someone decides."""
        return self.outcome is Outcome.KEEP


class Rule(Protocol):
    """Makes decisions from scores."""

    name: ClassVar[str]

    def decide(self, quality: float, case_id: str) -> Decision:
        """Decide about one candidate.

        Args:
            quality: predicted quality in [0, 1], lower is worse.
            case_id: the candidate's id.

        Raises:
            DataError: the quality is not a number in [0, 1].
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
        if not (0 <= self.threshold <= 1 and 0 <= self.review <= 1):
            raise ConfigError(
                f"threshold is {self.threshold} and review is {self.review}; both must lie between 0 and 1"
            )
        if self.keep_from > 1:
            raise ConfigError(
                f"threshold {self.threshold} and review {self.review} add up to {self.keep_from}, so no case "
                f"could be kept; make review {round(1 - self.threshold, 6)} or less"
            )

    @property
    def keep_from(self) -> float:
        """Lowest quality that is kept."""
        return round(self.threshold + self.review, 9)  # 0.1 + 0.2 is meant as 0.3

    def decide(self, quality: float, case_id: str) -> Decision:
        """Decide about one candidate; see `Rule.decide`."""
        if not (math.isfinite(quality) and 0 <= quality <= 1):
            raise DataError(f"case {case_id}: quality is {quality}; a QC method must give a number in [0, 1]")
        shown = f"predicted DSC {self._shown(quality)}"
        if quality >= self.keep_from:
            return Decision(case_id, Outcome.KEEP, f"{shown} is not below {self._bounds()}")
        if quality >= self.threshold:
            return Decision(
                case_id,
                Outcome.REVIEW,
                f"{shown} is in the review band from {self.threshold:g} to {self.keep_from:g}",
            )
        return Decision(case_id, Outcome.DROP, f"{shown} is below the threshold {self.threshold:g}")

    def _bounds(self) -> str:
        if self.review:
            return f"{self.keep_from:g}, the threshold {self.threshold:g} and the review band {self.review:g}"
        return f"the threshold {self.threshold:g}"

    def _shown(self, quality: float) -> str:
        """Three decimals, or all of them where rounding would contradict the decision."""
        text = f"{quality:.3f}"
        bounds = (self.threshold, self.keep_from)
        return text if all((float(text) >= b) == (quality >= b) for b in bounds) else str(float(quality))
