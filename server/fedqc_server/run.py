"""What all phases of a run share."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedqc.config import FederationConfig
from fedqc.errors import QuorumError
from fedqc.methods.base import Method
from fedqc.protocol import ErrorCode
from fedqc.reports.words import reason_in_words
from fedqc.segmentation import Segmentation
from fedqc.task import Task
from fedqc_server.exchange import Exchange
from fedqc_server.roster import Roster
from fedqc_server.run_folder import RunFolder

EXCUSED = (ErrorCode.NO_REFERENCE, ErrorCode.NOTHING_KEPT, ErrorCode.NO_PART, ErrorCode.TOO_LARGE)
"""Words with which a site says that a phase is not for it; no fault of its own."""


@dataclass
class Run:
    """One run of a federation."""

    exchange: Exchange
    config: FederationConfig
    task: Task
    method: Method
    segmentation: Segmentation
    folder: RunFolder
    seed: int
    roster: Roster = field(default_factory=Roster)

    def common(self) -> dict[str, Any]:
        """The fields of every request."""
        return {
            "federation": self.config.name,
            "task": self.task.digest,
            "seed": self.seed,
            "min_count": self.config.privacy.min_count,
        }

    @property
    def suspected(self) -> frozenset[str]:
        """Sites whose references the cross-check does not trust."""
        return frozenset(self.folder.statistics.get("suspected", {}))

    def online(self, sites: Collection[str]) -> tuple[dict[str, int], dict[str, str]]:
        """Those of the joined `sites` that are there now with their nodes, and the others with the reason."""
        online = self.roster.online(self.exchange.grid)
        targets = {site: node for site, node in online.items() if site in sites}
        missing = sorted(set(sites) & set(self.roster.joined) - set(targets))
        return targets, dict.fromkeys(missing, "offline")

    def report_failed(self, failed: Mapping[str, str], **where: Any) -> None:
        """Write down which sites failed, and why, as a word and in words."""
        for site, reason in failed.items():
            event = "site-excused" if reason in EXCUSED else "site-failed"
            self.folder.event(event, site=site, reason=reason, meaning=reason_in_words(reason), **where)

    def check_quorum(self, answered: int, minimum: int, failed: Mapping[str, str], what: str) -> None:
        """Stop where fewer sites than needed are left.

        Raises:
            QuorumError: with the sites that failed and why.
        """
        if answered < minimum:
            reasons = ", ".join(f"{site}: {reason}" for site, reason in sorted(failed.items()))
            raise QuorumError(
                f"{what}: {answered} sites answered, at least {minimum} are needed "
                f"({reasons or 'none failed'}); mend the sites (their site.log says more)"
            )
