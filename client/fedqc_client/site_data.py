"""The cases of this site, as every phase needs them."""

import json
from dataclasses import dataclass

from fedqc.cases.cache import CaseCache
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.splits import split_references
from fedqc.config import SiteConfig
from fedqc.curation.manifest import Manifest, manifest_of
from fedqc.curation.rules import Outcome
from fedqc.errors import DataError
from fedqc.files import write_json
from fedqc.protocol import Request
from fedqc.site_check import SiteCheck, check_site
from fedqc.task import Task


@dataclass(frozen=True)
class SiteData:
    """A site's cases by what they are for, and what is wrong with the others."""

    cache: CaseCache
    check: SiteCheck
    """What was found in the site's data, the unusable cases too."""
    references: tuple[CaseFiles, ...]
    """Usable cases whose label the site vouches for."""
    candidates: tuple[CaseFiles, ...]
    """The other usable cases."""

    @property
    def usable(self) -> tuple[CaseFiles, ...]:
        """References and candidates."""
        return self.references + self.candidates


VOUCHED = "vouched.json"
"""In the site's cache: what people vouched for when a run began, the same in all its rounds."""


def training_references(
    site: SiteConfig, task: Task, data: SiteData, request: Request
) -> tuple[tuple[CaseFiles, ...], tuple[CaseFiles, ...]]:
    """What QC models learn from, and the references that are held back to calibrate on.

    A candidate that a person kept, with the very files that it has now, is learned from like a reference. It
    is never calibrated on: people look at what seemed wrong, which is no random draw.
    """
    training, held_back = split_references(data.references, request.seed)
    patients = {files.patient for files in held_back}
    vouched = _vouched(site, task, request)
    verified = tuple(
        files
        for files in data.candidates
        if files.patient not in patients and vouched.get(files.id) == list(data.cache.hashes(files))
    )
    return training + verified, held_back


def forget_vouched(site: SiteConfig) -> None:
    """Have the next run begin with what people vouch for by then."""
    (site.compute.cache / VOUCHED).unlink(missing_ok=True)


def _vouched(site: SiteConfig, task: Task, request: Request) -> dict[str, list[str]]:
    """The hashes of each case that a person kept before this run, by its id."""
    path, run = site.compute.cache / VOUCHED, [request.federation, request.seed, request.task]
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["run"] == run:
            return dict(known["cases"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        pass
    earlier = earlier_manifest(site, task)
    found = {
        entry.id: list(entry.hashes)
        for entry in (earlier.entries if earlier else ())
        if entry.overruled and entry.overruled.decision is Outcome.KEEP
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"run": run, "cases": found})
    return found


def earlier_manifest(site: SiteConfig, task: Task) -> Manifest | None:
    """The manifest of the run before this one; None where there is none of this site and task to read."""
    try:
        return manifest_of(site, task)
    except DataError:
        return None


def load_site_data(site: SiteConfig, task: Task) -> SiteData:
    """Find and check the site's cases; what was checked once is not read again until a file changes.

    Raises:
        DataError: the data folder or a list of cases cannot be used, or no case can.
    """
    check = check_site(site, task, memory=site.compute.cache / "checks")
    if not check.checked.usable:
        first = next(problem for problem in check.problems if problem.is_error)
        raise DataError(
            f"{site.data.path}: none of {len(check.checked.cases)} cases can be used; "
            f"the first problem: {first}"
        )
    return SiteData(
        cache=CaseCache(site.compute.cache, task),
        check=check,
        references=check.usable_references,
        candidates=check.candidates,
    )
