"""What a site has told before, so that two releases cannot be subtracted from each other.

Whoever holds the counts of a site before and after one patient joined it knows that patient's part. So the
numbers of a phase are told anew only when nobody, or at least `min_count` patients, came since each time that
they were told, and likewise left. One who has other files, another role or another decision by a person left
and came. Each side counts for itself: where one came and nine left, a count that is one higher is of the one.
Until then the latest numbers are told again where they rest on the same model and settings, and none where
they do not. Nor are any where the same model is asked about the same patients with other settings.

More than two can be added and subtracted, too: of four groups A, B, C and D, told as A + B, A + C, B + D and
C + D and one patient more, what is left is the patient. So no such combination, in which the groups of
`min_count` and more cancel out, may rest on fewer patients either.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field
from scipy.linalg import null_space

from fedqc.config import FrozenModel, parse
from fedqc.errors import ConfigError, DataError
from fedqc.files import replacing

RELEASES = "releases.json"
"""In a site's results folder."""
ROUNDING = 1e-9
Values = dict[str, int | float | list[int] | list[float]]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$")]


class Release(FrozenModel):
    """What was told in a phase, and of whom."""

    about: dict[Digest, Digest]
    """By patient, what of the patient the numbers rest on; both as digests."""
    weights: str
    """The model that they rest on."""
    settings: str
    """What else they rest on, such as the federation, the task and a rule."""
    min_count: int
    """Fewest patients behind each of them."""
    values: Values


class _Releases(FrozenModel):
    """The file."""

    phases: dict[str, tuple[Release, ...]]
    """All that was told, the latest last."""


def settle(path: Path, phase: str, new: Release, *, remember: bool = True) -> Values:
    """What may be told, given what was told before; what is new is on disk before it is returned.

    Args:
        path: of the file that remembers.
        phase: of the run, or the type of its message.
        new: what would be told, behind the privacy filters.
        remember: False where it is not told but only looked at.

    Raises:
        DataError: what was told before cannot be read.
    """
    known = _read(path)
    earlier = tuple(one for one in known.get(phase, ()) if one.values)  # of nothing nothing can be subtracted
    if any(_gives_away(one, new) for one in earlier) or (earlier and _combine_to_few((*earlier, new))):
        latest = earlier[-1]
        same = (latest.weights, latest.settings) == (new.weights, new.settings)
        return dict(latest.values) if same and latest.min_count >= new.min_count else {}
    if remember and new.values and new not in earlier:
        _write(path, known | {phase: (*earlier, new)})
    return dict(new.values)


def release_of(
    values: Values, about: Mapping[str, str], weights: str, settings: str, min_count: int
) -> Release:
    """What would be told.

    Args:
        values: behind the privacy filters.
        about: by patient, what of the patient the numbers rest on.
        weights: the model that they rest on.
        settings: what else they rest on.
        min_count: fewest patients behind each number.
    """
    return Release(
        about={_digest(patient): _digest(what) for patient, what in about.items()},
        weights=_digest(weights),
        settings=_digest(settings),
        min_count=min_count,
        values=dict(values),
    )


def _gives_away(earlier: Release, new: Release) -> bool:
    """Whether both together tell something of fewer patients than may be told of.

    A change of few does, and so does the same model by other settings: thresholds that lie close together
    have one patient between them.
    """
    left, came = _only_in(earlier, new), _only_in(new, earlier)
    few = max(earlier.min_count, new.min_count)
    other_settings = earlier.weights == new.weights and earlier.settings != new.settings
    return any(0 < len(side) < few for side in (left, came)) or (len(left | came) < few and other_settings)


def _combine_to_few(releases: Sequence[Release]) -> bool:
    """Whether sums and differences of what was told may come to rest on fewer patients than may be told of.

    Patients who are in the same releases, as they were, cannot be told apart by them. Only combinations in
    which every such group of enough patients cancels out can rest on few. Where there is one of these, the
    patients that it adds are counted, and those that it takes away; where there are more, that would be a
    search through all of them, and it is assumed.
    """
    told = [one for one in releases if one.values]
    few = max((one.min_count for one in told), default=1)
    groups: dict[tuple[bool, ...], set[str]] = {}
    for patient, what in {pair for one in told for pair in one.about.items()}:
        groups.setdefault(tuple(one.about.get(patient) == what for one in told), set()).add(patient)
    many = {which for which, patients in groups.items() if len(patients) >= few}
    small = sorted(groups.keys() - many)
    if not small:
        return False
    cancels = null_space(np.array(sorted(many), dtype=np.float64)) if many else np.eye(len(told))
    left = np.array(small, dtype=np.float64) @ cancels  # [small groups, combinations]
    if not (np.abs(left) > ROUNDING).any():
        return False
    if np.linalg.matrix_rank(left, tol=ROUNDING) > 1:
        return True
    weights = left[:, np.abs(left).max(axis=0).argmax()]  # the columns are multiples of each other
    for added in (weights > ROUNDING, weights < -ROUNDING):
        behind = {one for which, is_in in zip(small, added, strict=True) if is_in for one in groups[which]}
        if 0 < len(behind) < few:
            return True
    return False


def _only_in(first: Release, second: Release) -> set[str]:
    """Patients of the first who are not in the second, or not as they were."""
    return {patient for patient, what in first.about.items() if second.about.get(patient) != what}


def _read(path: Path) -> dict[str, tuple[Release, ...]]:
    if not path.exists():
        return {}
    try:
        return dict(parse(json.loads(path.read_text(encoding="utf-8")), _Releases, source=str(path)).phases)
    except (OSError, ValueError, TypeError, RecursionError, ConfigError) as error:
        raise DataError(
            f"{path}: what was told before cannot be read ({error}), so nothing is told; restore the file, "
            "or remove it if nobody compares the numbers of this run with earlier ones"
        ) from None


def _write(path: Path, phases: Mapping[str, tuple[Release, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.write_text(_Releases(phases=dict(phases)).model_dump_json(indent=1) + "\n", encoding="utf-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
