"""What is fitted to labels of known quality: a monotone map to it, and how far off a quality may be."""

import math
from typing import Literal, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from fedqc.errors import TrainingError

KNOTS = 33

COVERAGE = 0.95
"""Share of the labels whose true quality an interval is to hold."""


class Widening(nn.Module):
    """By how much intervals are wider than they were, so that 95 % of them hold the truth.

    Conformalised quantile regression (Romano et al. 2019): among labels that are like those it was fitted to,
    so many hold it, however wrong the intervals were. Until it is fitted they stay as they are.
    """

    by: Tensor
    """`[]` float32, on each side; below 0 where they were too wide."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("by", torch.zeros(()))

    def fit(self, low: ArrayLike, high: ArrayLike, true: ArrayLike) -> None:
        """Fit in place to intervals `[n]` whose truth `[n]` is known, and was not when they were made.

        Below 19 of them nothing is certain, and every interval goes from 0 to 1.
        """
        low, high, true = (np.asarray(values, dtype=np.float64) for values in (low, high, true))
        outside = np.sort(np.maximum(low - true, true - high))
        rank = math.ceil(COVERAGE * (len(outside) + 1))
        self.by.fill_(outside[rank - 1] if rank <= len(outside) else 1.0)

    def forward(self, low: float, high: float, quality: float) -> tuple[float, float]:
        """The wider interval; it holds the quality that is predicted, and nothing outside [0, 1]."""
        by = float(self.by)
        return max(0.0, min(low - by, quality)), min(1.0, max(high + by, quality))


class MonotoneMap(nn.Module):
    """A piecewise linear, monotone map into [0, 1]; beyond the outermost knots it is constant.

    Until it is fitted it leaves values in [0, 1] as they are and cuts off others.

    Args:
        knots: how many points it is stored as, two or more.
        sign: `increasing`, or `learned`: whichever way the values it is fitted to run together.
    """

    raw: Tensor
    """`[knots]` float32, what was measured, ascending; the last one may be repeated."""
    quality: Tensor
    """`[knots]` float32 in [0, 1], what it means."""

    def __init__(self, knots: int = KNOTS, *, sign: Literal["increasing", "learned"] = "increasing") -> None:
        super().__init__()
        self.sign = sign
        self.register_buffer("raw", torch.linspace(0, 1, knots))
        self.register_buffer("quality", torch.linspace(0, 1, knots))

    def fit(self, raw: ArrayLike, true: ArrayLike) -> None:
        """Fit in place to measured values whose quality is known, by isotonic regression.

        The regression's own corners become the knots where there are no more of them than knots; else it is
        read at equal quantiles of `raw`.

        Args:
            raw: `[n]`, finite.
            true: `[n]` in [0, 1], the quality of each.

        Raises:
            TrainingError: there is nothing to fit to, or a value is not finite.
        """
        from scipy.stats import spearmanr  # noqa: PLC0415 - takes long, only where something is fitted
        from sklearn.isotonic import IsotonicRegression  # noqa: PLC0415

        x, y = np.asarray(raw, dtype=np.float64), np.asarray(true, dtype=np.float64)
        if x.shape != y.shape or x.ndim != 1 or not x.size or not (np.isfinite(x) & np.isfinite(y)).all():
            raise TrainingError(
                "a calibration is fitted to one or more finite pairs of numbers, found values of shapes "
                f"{x.shape} and {y.shape}; measure reference cases whose label's quality is known"
            )
        varies = np.ptp(x) > 0 and np.ptp(y) > 0
        increasing = self.sign == "increasing" or not varies or spearmanr(x, y).statistic >= 0
        regression = IsotonicRegression(y_min=0, y_max=1, increasing=bool(increasing), out_of_bounds="clip")
        regression.fit(x, y)
        corners, knots = regression.X_thresholds_, len(self.raw)
        if len(corners) > knots:
            corners = np.quantile(x, np.linspace(0, 1, knots))
        corners = np.pad(corners, (0, knots - len(corners)), mode="edge")
        self.raw.copy_(torch.from_numpy(corners))
        self.quality.copy_(torch.from_numpy(regression.predict(corners)))

    @overload
    def forward(self, raw: Tensor) -> Tensor: ...
    @overload
    def forward(self, raw: NDArray[np.floating]) -> NDArray[np.float32]: ...
    def forward(self, raw: Tensor | NDArray[np.floating]) -> Tensor | NDArray[np.float32]:
        """The quality that measured values of any shape mean, float32 in [0, 1]."""
        if not isinstance(raw, Tensor):
            found: NDArray[np.float32] = self(torch.as_tensor(raw, device=self.raw.device)).cpu().numpy()
            return found
        value = raw.to(self.raw.dtype).contiguous()
        right = torch.searchsorted(self.raw, value).clamp(1, len(self.raw) - 1)
        begin, end = self.raw[right - 1], self.raw[right]
        # Between knots in one place there is nothing to weigh: the value lies on them, or beyond the last.
        share = ((value - begin) / (end - begin).clamp(min=torch.finfo(value.dtype).tiny)).clamp(0, 1)
        return torch.lerp(self.quality[right - 1], self.quality[right], share).clamp(0, 1)
