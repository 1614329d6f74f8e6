"""What a person reviews: a site's candidates, those first where looking is worth most."""

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedqc.cases.layouts import read_ids
from fedqc.cases.volumes import sha256_file
from fedqc.config import SiteConfig, parse
from fedqc.curation.manifest import MANIFEST, Entry, Manifest, Overruled, changing, manifest_of, overrule
from fedqc.curation.rules import Outcome
from fedqc.curation.self_test import SELF_TEST, read_self_test
from fedqc.curation.verified import read_verified, write_verified
from fedqc.errors import DataError
from fedqc.reports.looks import CONTOURS
from fedqc.scoring import ERROR_MAPS
from fedqc.seeding import derive_seed
from fedqc.task import Task

LABEL, ERRORS = "label", "errors"
SHEET = "review.html"
"""In the results folder: the sheet of the worst cases."""
USUAL_ERROR = 0.1
"""Standard deviation of predicted minus true DSC where the site's labels of known quality do not tell."""

Choice = Literal["keep", "drop"] | None


@dataclass(frozen=True)
class Volume:
    """A file that the viewer shows."""

    name: str
    """A modality, `label`, `errors`, or `errors-CLASS`."""
    kind: Literal["image", "label", "errors"]
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
        pick: so many cases, drawn at random, whose labels are to be verified; None: all.

    Raises:
        ConfigError: nobody can be called that.
        DataError: the site has no manifest, it cannot be read, or it is of another site or task.
    """

    def __init__(self, site: SiteConfig, task: Task, *, by: str, pick: int | None = None) -> None:
        checked = {"decision": "keep", "by": by, "when": "2026-01-01", "reason": ""}
        parse(checked, Overruled, source="--by")
        self.by = by
        self._site = site
        self._task = task
        self._lock = threading.Lock()
        self._path = site.results / MANIFEST
        self._manifest = manifest_of(site, task)
        self._state = self._path.stat()
        self._gain = expected_gains(self._manifest, site.results)
        order = list(self._gain)
        if pick is not None:  # whatever the others are, so that a second draw begins with the first one
            order = sorted(order, key=lambda case: derive_seed(0, "pick", site.name, case))[:pick]
        self._is_pick = pick is not None
        self.ids = order
        """Of the cases under review; their place in this list is what the page calls them by."""

    def overview(self) -> dict[str, Any]:
        """What the page shows of all: the run, and each case in a line."""
        entries = self._entries()
        manifest = self._manifest
        return {
            "site": manifest.site,
            "federation": manifest.federation,
            "created": manifest.created,
            "method": manifest.model.method,
            "rule": manifest.rule.config.rule,
            "threshold": manifest.rule.config.threshold,
            "suspended": manifest.rule.suspended,
            "warnings": [one.sentence for one in manifest.gatherings],
            "is_pick": self._is_pick,
            "by": self.by,
            "modalities": list(self._task.modalities),
            "classes": [
                {"name": name, "values": list(values), "color": CONTOURS[index % len(CONTOURS)][0]}
                for index, (name, values) in enumerate(self._task.classes.items())
            ],
            "cases": [self._line(entries[case]) for case in self.ids],
        }

    def case(self, number: int) -> dict[str, Any]:
        """All that is known of a case, and the names of the volumes that can be shown.

        Raises:
            IndexError: there is no such case.
        """
        entry, manifest = self._entry(number), self._manifest
        return self._line(entry) | {
            "number": number,
            "seen": _seen(manifest, entry),
            "reason": entry.reason,
            "diagnosis": entry.diagnosis.sentence if entry.diagnosis else None,
            "regions": entry.regions,
            "interval": entry.interval,
            "volumes": [
                {"name": one.name, "kind": one.kind, "file": one.file} for one in self._volumes(entry)
            ],
        }

    def volume(self, number: int, name: str) -> Path | None:
        """The file of a volume of a case; None where there is none of that name.

        Raises:
            IndexError: there is no such case.
        """
        return next((one.path for one in self._volumes(self._entry(number)) if one.name == name), None)

    def decide(self, number: int, choice: Choice, reason: str, seen: str) -> dict[str, Any]:
        """Write down what a person decided, or that the rule is to hold again, and say how the case stands.

        Args:
            number: of the case.
            choice: keep, drop, or None for what the rule says.
            reason: why.
            seen: what `case` said under that name: it is about what was looked at.

        Raises:
            IndexError: there is no such case.
            DataError: the case is not what was looked at any more, or the decision cannot be saved.
        """
        with self._lock:
            case, reference = self._entry(number).id, self._site.data.reference
            references = read_ids(reference) if self._is_pick and reference is not None else frozenset()

            def check(manifest: Manifest) -> None:
                entry = next((one for one in manifest.entries if one.id == case), None)
                if entry is None or seen != _seen(manifest, entry):
                    raise DataError(
                        "the site has scored its cases anew since this one was opened; open it again"
                    )
                label = entry.files[LABEL]
                if sha256_file(self._site.data.folder / label.path) != label.sha256:
                    raise DataError(
                        f"{label.path} has changed since it was scored; score the site's cases first"
                    )

            overrule(self._site.results, self._task, case, choice, by=self.by, reason=reason, check=check)
            if self._is_pick:
                self._write_verified(references)
        return self.case(number)

    def _write_verified(self, references: frozenset[str]) -> None:
        """The site's references, and with them the drawn cases that a person kept, as a table of ids."""
        results = self._site.results
        with changing(results):
            entries = self._entries()
            kept = {
                case for case in self.ids if (one := entries[case].overruled) and one.decision is Outcome.KEEP
            }
            before = references | read_verified(results)
            write_verified(results, (before - set(self.ids)) | kept)

    def _entries(self) -> dict[str, Entry]:
        """All candidates as they stand on disk now, by their id.

        Raises:
            DataError: the site has scored other cases meanwhile.
        """
        state = self._path.stat()
        if (state.st_mtime_ns, state.st_ino) != (self._state.st_mtime_ns, self._state.st_ino):
            self._manifest, self._state = manifest_of(self._site, self._task), state
        entries = {entry.id: entry for entry in self._manifest.entries}
        if not set(self.ids) <= set(entries) or (not self._is_pick and len(entries) != len(self.ids)):
            raise DataError("the site has scored other cases meanwhile; stop fedqc review and start it again")
        return entries

    def _entry(self, number: int) -> Entry:
        if number < 0:
            raise IndexError(number)
        return self._entries()[self.ids[number]]

    def _line(self, entry: Entry) -> dict[str, Any]:
        return {
            "id": entry.id,
            "patient": entry.patient,
            "quality": entry.quality,
            "stars": entry.stars,
            "decision": entry.decision,
            "outcome": entry.outcome,
            "gain": 0.0 if entry.overruled else self._gain[entry.id],
            "overruled": entry.overruled.model_dump(mode="json") if entry.overruled else None,
        }

    def _volumes(self, entry: Entry) -> list[Volume]:
        """The images in the task's order, the label, and where it is probably wrong, also of each class."""
        volumes = [
            Volume(
                role, "label" if role == LABEL else "image", self._site.data.folder / entry.files[role].path
            )
            for role in ("image", *self._task.modalities, LABEL)
            if role in entry.files
        ]
        maps, file = self._site.results / ERROR_MAPS, f"{entry.id}.nii.gz"
        errors = {ERRORS: maps / file} | {
            f"{ERRORS}-{name}": maps / name / file for name in self._task.classes
        }
        return volumes + [Volume(name, "errors", path) for name, path in errors.items() if path.is_file()]


def _seen(manifest: Manifest, entry: Entry) -> str:
    """What a person looks at: this run's scores of these files."""
    content = [manifest.created, *(file.sha256 for file in entry.files.values())]
    return hashlib.sha256(" ".join(content).encode()).hexdigest()


def expected_gains(manifest: Manifest, results: Path) -> dict[str, float]:
    """The expected gain of a look at each candidate, by its id, the largest first.

    Args:
        manifest: of the site.
        results: the site's folder, which may hold labels of known quality.
    """
    test = read_self_test(results / SELF_TEST)
    errors = np.array([one.predicted - one.true for one in test.labels]) if test else _usual_errors()
    tau = manifest.rule.config.threshold
    gains = {entry.id: expected_gain(entry, tau, errors) for entry in manifest.entries}
    return dict(sorted(gains.items(), key=lambda one: (-one[1], one[0])))


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
