"""What a site has told before, so that two releases cannot be subtracted from each other.

Whoever holds the counts of a site before and after one patient joined it knows that patient's part. So the
numbers of a phase are told anew only when nobody, or at least `min_count` patients, changed since each time
that they were told: came, left, or have other files, another role or another decision by a person. Until then
the latest numbers are told again where they rest on the same model and settings, and none where they do not.
Nor are any where the same model is asked about the same patients with other settings.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fedqc.config import FrozenModel, parse
from fedqc.errors import ConfigError, DataError
from fedqc.files import replacing

RELEASES = "releases.json"
"""In a site's results folder."""
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


def settle(path: Path, phase: str, new: Release) -> Values:
    """What may be told, given what was told before; what is new is on disk before it is returned.

    Args:
        path: of the file that remembers.
        phase: of the run, or the type of its message.
        new: what would be told, behind the privacy filters.

    Raises:
        DataError: what was told before cannot be read.
    """
    known = _read(path)
    earlier = known.get(phase, ())
    if any(_gives_away(one, new) for one in earlier):
        latest = earlier[-1]
        same = (latest.weights, latest.settings) == (new.weights, new.settings)
        return dict(latest.values) if same and latest.min_count >= new.min_count else {}
    if new not in earlier:
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
    changed = _n_changed(earlier, new)
    few = max(earlier.min_count, new.min_count)
    other_settings = earlier.weights == new.weights and earlier.settings != new.settings
    return 0 < changed < few or (changed < few and other_settings)


def _n_changed(first: Release, second: Release) -> int:
    """Patients who are not in both, or not as they were."""
    patients = first.about.keys() | second.about.keys()
    return sum(first.about.get(patient) != second.about.get(patient) for patient in patients)


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
