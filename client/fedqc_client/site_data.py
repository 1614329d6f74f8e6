"""The cases of this site, as every phase needs them."""

from dataclasses import dataclass

from fedqc.cases.cache import CaseCache
from fedqc.cases.layouts import CaseFiles
from fedqc.config import SiteConfig
from fedqc.errors import DataError
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
