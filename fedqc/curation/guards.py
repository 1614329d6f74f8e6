"""Guards on what a rule decided: not too much dropped unseen, and a warning where drops gather in one group.

A group in which a model drops far more than elsewhere has worse labels, or the model does not know such
images: one scanner, small lesions, empty labels. Only a person can tell which.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from pydantic import NonNegativeInt

from fedqc.cases.facts import CaseFacts
from fedqc.cases.layouts import CaseFiles
from fedqc.config import FrozenModel, Share
from fedqc.curation.rules import Decision, Outcome

SIZE = "size of the label"
EMPTY, SIZES = "empty", ("small", "medium", "large")
LEVEL = 0.01
"""A p-value below it is a warning, after Holm's correction for all groups."""
MAX_GROUPS = 20
"""A column with more different values names no groups."""


class Gathering(FrozenModel):
    """A group in which far more cases are not kept than in the rest of the site."""

    column: str
    """What the cases are grouped by, such as scanner."""
    group: str
    n_cases: NonNegativeInt
    n_not_kept: NonNegativeInt
    n_others: NonNegativeInt
    n_others_not_kept: NonNegativeInt
    p_value: Share
    """Fisher's exact test of this group against the rest, after Holm's correction for all groups."""

    @property
    def sentence(self) -> str:
        """In words."""
        return (
            f"{self.column} {self.group!r}: {self.n_not_kept} of {self.n_cases} cases are not kept, of the "
            f"others {self.n_others_not_kept} of {self.n_others} (p = {self.p_value:.2g}, Fisher's exact "
            "test); are the labels worse there, or does the model not know such images? Look at some of them"
        )


def limited(
    decisions: Mapping[str, Decision], quality: Mapping[str, float], most_dropped: float
) -> dict[str, Decision]:
    """At most a share of a site is dropped unseen: the best of what goes beyond it are up to a person.

    Args:
        decisions: of the rule, by the candidate's id.
        quality: predicted quality of each.
        most_dropped: share of all candidates, rounded down.
    """
    dropped = sorted(
        (case for case, one in decisions.items() if one.outcome is Outcome.DROP),
        key=lambda case: (quality[case], case),
    )
    most = int(round(most_dropped * len(decisions), 9))
    why = f"but more than {most_dropped:.4g} of the site would be dropped, so that a person has to look at it"
    return dict(decisions) | {
        case: replace(decisions[case], outcome=Outcome.REVIEW, reason=f"{decisions[case].reason}; {why}")
        for case in dropped[most:]
    }


def groups_of(cases: Sequence[CaseFiles], facts: Mapping[str, CaseFacts]) -> dict[str, list[str]]:
    """The group of each case, by what they are grouped by: columns of the site's list, and the label's size.

    Sizes are thirds of the labels that are not empty. A case without a value in a column is in the group ''.
    """
    names = dict.fromkeys(name for case in cases for name in case.groups)
    columns = {name: [case.groups.get(name, "") for case in cases] for name in names}
    found = {name: values for name, values in columns.items() if 1 < len(set(values)) <= MAX_GROUPS}
    volumes = np.array([sum(facts[case.id].volumes_ml.values()) for case in cases])
    bounds = np.quantile(volumes[volumes > 0], (1 / 3, 2 / 3)) if (volumes > 0).any() else np.zeros(2)
    third = np.searchsorted(bounds, volumes, side="left")
    sizes = [EMPTY if volume == 0 else SIZES[place] for volume, place in zip(volumes, third, strict=True)]
    return found | ({SIZE: sizes} if len(set(sizes)) > 1 else {})


def gatherings(groups: Mapping[str, Sequence[str]], not_kept: Sequence[bool]) -> tuple[Gathering, ...]:
    """The groups in which what is not kept gathers, the least likely by chance first.

    Cases count as independent, which several of one patient are not.

    Args:
        groups: the group of each case, by what they are grouped by.
        not_kept: for each case, whether it is dropped or left to a person.
    """
    from scipy.stats import fisher_exact  # noqa: PLC0415 - half a second

    out = np.asarray(not_kept, dtype=np.bool_)
    found: list[Gathering] = []
    for column, values in groups.items():
        names = sorted(set(values))
        for name in names:
            inside = np.array([value == name for value in values])
            n, n_out, others, others_out = (
                int(part.sum()) for part in (inside, out & inside, ~inside, out & ~inside)
            )
            is_more = n_out * others > others_out * n
            if len(names) == 2 and not is_more:
                continue
            p = float(fisher_exact([[n_out, n - n_out], [others_out, others - others_out]]).pvalue)
            found.append(
                Gathering(
                    column=column,
                    group=name,
                    n_cases=n,
                    n_not_kept=n_out,
                    n_others=others,
                    n_others_not_kept=others_out,
                    p_value=min(p, 1.0),
                )
            )
    return tuple(
        one
        for one in _by_holm(found)
        if one.p_value < LEVEL and one.n_not_kept * one.n_others > one.n_others_not_kept * one.n_cases
    )


def _by_holm(found: Sequence[Gathering]) -> list[Gathering]:
    """With p-values corrected for their number (Holm 1979), in rising order."""
    corrected, so_far = [], 0.0
    for rank, one in enumerate(sorted(found, key=lambda one: one.p_value)):
        so_far = min(1.0, max(so_far, one.p_value * (len(found) - rank)))
        corrected.append(one.model_copy(update={"p_value": so_far}))
    return corrected
