"""The self-test: whether a QC model can be trusted at a site, before anything there is dropped.

A site degrades the labels of its own calibration patients and lets the model judge them. What comes out stays
in the site's results folder, label by label: it tells whether the model does here what it should, and it is
the site's own calibration where none is pooled over the sites.
"""

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fedqc.config import CurationConfig, FrozenModel, Share, parse
from fedqc.curation.calibration import Calibration, calibration_of
from fedqc.errors import ConfigError
from fedqc.files import replacing
from fedqc.metrics.agreement import mae
from fedqc.metrics.filtering import auroc

SELF_TEST = "self_test.json"
"""In a site's results folder."""


class KnownLabel(FrozenModel):
    """A degraded label and what the model says of it."""

    patient: str = Field(min_length=1)
    true: Share
    """Its DSC."""
    predicted: Share
    """The quality that the model predicts."""
    regions: dict[str, tuple[Share, Share]] = Field(default_factory=dict)
    """True and predicted DSC of each region that the true label holds, where the model tells them apart."""


class SelfTest(FrozenModel):
    """What a model said of a site's labels of known quality."""

    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Stands for the model, its settings and the cases that it was tested with."""
    is_dsc: bool = True
    """Whether it predicts DSC, and no other quality, such as stars."""
    labels: tuple[KnownLabel, ...] = Field(min_length=1)

    @property
    def patients(self) -> int:
        """Distinct patients behind it."""
        return len({one.patient for one in self.labels})

    def failed(self, config: CurationConfig) -> str | None:
        """Why the model must not drop anything at this site, in words; None if it may."""
        predicted, true = ([getattr(one, name) for one in self.labels] for name in ("predicted", "true"))
        here = "on this site's own labels of known quality"
        error = mae(predicted, true)
        if self.is_dsc and error is not None and error > config.max_mae:
            return f"{here} it errs by {error:.2f} DSC on average, more than {config.max_mae:g}"
        area = auroc([-one for one in predicted], [one < config.threshold for one in true])
        if area is not None and area < config.min_auroc:
            return f"{here} it finds failures with an AUROC of {area:.2f}, below {config.min_auroc:g}"
        return None

    def calibration(self, tau: float) -> Calibration:
        """The labels as counts; one with a true DSC below `tau` is a failure."""
        return calibration_of(
            [one.predicted for one in self.labels],
            [one.true for one in self.labels],
            [one.patient for one in self.labels],
            tau,
        )


def write_self_test(path: Path, test: SelfTest) -> None:
    """Write it as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.write_text(test.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_self_test(path: Path) -> SelfTest | None:
    """What was tested last; None where there is none that can be read."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")), SelfTest, source=str(path))
    except (OSError, ValueError, RecursionError, TypeError, ConfigError):
        return None
