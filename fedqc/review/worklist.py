"""What a person reviews: a site's candidates, those first where looking is worth most."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedqc.config import SiteConfig
from fedqc.curation.manifest import MANIFEST, Entry, overrule, read_manifest
from fedqc.curation.rules import Outcome
from fedqc.curation.self_test import SELF_TEST, read_self_test
from fedqc.scoring import ERROR_MAPS
from fedqc.task import Task

LABEL, ERRORS = "label", "errors"
USUAL_ERROR = 0.1
"""Standard deviation of predicted minus true DSC where the site's labels of known quality do not tell."""
COLORS = ("#56B4E9", "#F0E442", "#009E73", "#CC79A7", "#0072B2", "#999999")
"""Of the classes, by Okabe and Ito, who made them for all eyes; they repeat."""

Choice = Literal["keep", "drop"] | None


@dataclass(frozen=True)
class Volume:
    """A file that the viewer shows."""

    name: str
    """A modality, `label` or `errors`."""
    path: Path

    @property
    def file(self) -> str:
        """What the page calls it; the viewer goes by the ending."""
        return f"{self.name}.nii.gz" if self.path.suffix == ".gz" else f"{self.name}.nii"


class Worklist:
    """A site's candidates in the order in which they are worth a look; decisions are on disk at once.

    Args:
        site: whose results they are.
        task: of the site.
        by: who decides.

    Raises:
        DataError: the site has no manifest, or it cannot be read.
    """

    def __init__(self, site: SiteConfig, task: Task, *, by: str) -> None:
        self._site = site
        self._task = task
        self._by = by
        self._lock = threading.Lock()
        self._manifest = read_manifest(site.results / MANIFEST)
        test = read_self_test(site.results / SELF_TEST)
        errors = np.array([one.predicted - one.true for one in test.labels]) if test else _usual_errors()
        tau = self._manifest.rule.config.threshold
        self._gain = {entry.id: expected_gain(entry, tau, errors) for entry in self._manifest.entries}
        order = sorted(self._manifest.entries, key=lambda entry: (-self._gain[entry.id], entry.id))
        self.ids = [entry.id for entry in order]
        """Of the candidates; their place in this list is what the page calls them by."""

    def overview(self) -> dict[str, Any]:
        """What the page shows of all: the run, and each case in a line."""
        manifest = self._manifest
        entries = {entry.id: entry for entry in manifest.entries}
        return {
            "site": manifest.site,
            "federation": manifest.federation,
            "created": manifest.created,
            "method": manifest.model.method,
            "rule": manifest.rule.config.rule,
            "threshold": manifest.rule.config.threshold,
            "suspended": manifest.rule.suspended,
            "warnings": [one.sentence for one in manifest.gatherings],
            "modalities": list(self._task.modalities),
            "classes": [
                {"name": name, "values": list(values), "color": COLORS[index % len(COLORS)]}
                for index, (name, values) in enumerate(self._task.classes.items())
            ],
            "cases": [self._line(entries[case]) for case in self.ids],
        }

    def case(self, number: int) -> dict[str, Any]:
        """All that is known of a case, and the names of the volumes that can be shown.

        Raises:
            IndexError: there is no such case.
        """
        entry = self._entry(number)
        return self._line(entry) | {
            "reason": entry.reason,
            "regions": entry.regions,
            "interval": entry.interval,
            "stars": entry.stars,
            "volumes": [{"name": one.name, "file": one.file} for one in self._volumes(entry)],
        }

    def volume(self, number: int, name: str) -> Path | None:
        """The file of a volume of a case; None where there is none of that name.

        Raises:
            IndexError: there is no such case.
        """
        return next((one.path for one in self._volumes(self._entry(number)) if one.name == name), None)

    def decide(self, number: int, choice: Choice, reason: str) -> dict[str, Any]:
        """Write down what a person decided, or that the rule is to hold again, and say how the case stands.

        Raises:
            IndexError: there is no such case.
            DataError: the manifest is not there any more, or has not this case.
        """
        with self._lock:
            case = self._entry(number).id
            overrule(self._site.results, self._task, case, choice, by=self._by, reason=reason)
            self._manifest = read_manifest(self._site.results / MANIFEST)
        return self.case(number)

    def _entry(self, number: int) -> Entry:
        if number < 0:
            raise IndexError(number)
        case = self.ids[number]
        return next(entry for entry in self._manifest.entries if entry.id == case)

    def _line(self, entry: Entry) -> dict[str, Any]:
        return {
            "id": entry.id,
            "patient": entry.patient,
            "quality": entry.quality,
            "decision": entry.decision,
            "outcome": entry.outcome,
            "gain": self._gain.get(entry.id, 0.0),
            "overruled": entry.overruled.model_dump(mode="json") if entry.overruled else None,
        }

    def _volumes(self, entry: Entry) -> list[Volume]:
        """The images in the task's order, the label, and where it is probably wrong."""
        roles = [role for role in ("image", *self._task.modalities, LABEL) if role in entry.files]
        volumes = [Volume(role, self._site.data.folder / entry.files[role].path) for role in roles]
        errors = self._site.results / ERROR_MAPS / f"{entry.id}.nii.gz"
        return [*volumes, *([Volume(ERRORS, errors)] if errors.is_file() else [])]


def expected_gain(entry: Entry, tau: float, errors: NDArray[np.float64]) -> float:
    """How likely a look changes what becomes of a case: that a kept one is a failure, or another is none.

    Args:
        entry: of the manifest.
        tau: a true DSC below it is a failure.
        errors: `[n]` predicted minus true DSC of labels whose DSC is known.

    Returns:
        In [0, 1]; 0 where a person has decided.
    """
    if entry.overruled:
        return 0.0
    is_good = float((entry.quality - errors >= tau).mean())
    return 1 - is_good if entry.outcome is Outcome.KEEP else is_good


def _usual_errors() -> NDArray[np.float64]:
    from scipy.stats import norm  # noqa: PLC0415 - half a second

    return np.asarray(norm.ppf(np.arange(0.005, 1, 0.01)) * USUAL_ERROR)
