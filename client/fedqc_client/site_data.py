"""The cases of this site, as every phase needs them."""

import contextlib
import json
from dataclasses import dataclass

from fedqc.cases.cache import CaseCache
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.layouts.table import read_ids
from fedqc.cases.splits import split_references
from fedqc.config import FrozenModel, SiteConfig, parse
from fedqc.curation.manifest import Manifest, manifest_of
from fedqc.curation.rules import Outcome
from fedqc.errors import ConfigError, DataError
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


ROLES = "roles.json"
"""In the site's cache: references, and what people had kept, as a run began; the same in all its rounds."""


class _Roles(FrozenModel):
    """The file."""

    run: tuple[str, int, str]
    """Federation, seed and the task's digest."""
    references: frozenset[str]
    """Ids."""
    kept: dict[str, tuple[str, ...]]
    """The hashes of each candidate that a person kept before this run, by its id."""


def training_references(
    site: SiteConfig, task: Task, data: SiteData, request: Request
) -> tuple[tuple[CaseFiles, ...], tuple[CaseFiles, ...]]:
    """What QC models learn from, and the references that are held back to calibrate on.

    A candidate that a person kept, with the very files that it has now, is learned from like a reference. It
    is never calibrated on: people look at what seemed wrong, which is no random draw.
    """
    training, held_back = split_references(data.references, request.seed)
    patients = {files.patient for files in held_back}
    kept = _roles(site, task, request).kept
    verified = tuple(
        files
        for files in data.candidates
        if files.patient not in patients and kept.get(files.id) == data.cache.hashes(files)
    )
    return training + verified, held_back


def forget_roles(site: SiteConfig) -> None:
    """Have the next run begin with the references, and with what people kept, as it is by then."""
    (site.compute.cache / ROLES).unlink(missing_ok=True)


def _roles(site: SiteConfig, task: Task, request: Request) -> _Roles:
    """What each case is for in this run: whoever verifies labels meanwhile does so for the next one.

    Raises:
        DataError: the list of references cannot be read.
    """
    path, run = site.compute.cache / ROLES, (request.federation, request.seed, request.task)
    with contextlib.suppress(OSError, ValueError, RecursionError, ConfigError):  # not there, or damaged
        known = parse(json.loads(path.read_text(encoding="utf-8")), _Roles, source=str(path))
        if known.run == run:
            return known
    earlier = earlier_manifest(site, task)
    roles = _Roles(
        run=run,
        references=read_ids(site.data.reference) if site.data.reference else frozenset(),
        kept={
            entry.id: entry.hashes
            for entry in (earlier.entries if earlier else ())
            if entry.overruled and entry.overruled.decision is Outcome.KEEP
        },
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, roles.model_dump(mode="json"))
    return roles


def earlier_manifest(site: SiteConfig, task: Task) -> Manifest | None:
    """The manifest of the run before this one; None where there is none of this site and task to read."""
    try:
        return manifest_of(site, task)
    except DataError:
        return None


def load_site_data(site: SiteConfig, task: Task, request: Request | None = None) -> SiteData:
    """Find and check the site's cases; what was checked once is not read again until a file changes.

    Args:
        site: whose cases they are.
        task: what they show.
        request: of a run, whose references stay those that it began with; None: those of now.

    Raises:
        DataError: the data folder or a list of cases cannot be used, or no case can.
    """
    references = None if request is None else _roles(site, task, request).references
    check = check_site(site, task, memory=site.compute.cache / "checks", references=references)
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
