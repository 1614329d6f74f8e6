"""What a site has told before, so that two releases cannot be subtracted from each other.

Whoever holds the counts of a site before and after one patient joined it knows that patient's part. So the
numbers of a phase are told anew only when nobody, or at least `min_count` patients, changed since each time
that they were told: came, left, or have other files, another role or another decision by a person. Until then
the latest numbers are told again where they rest on the same model and settings, and none where they do not.
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
    basis: str
    """The model and the settings that they rest on."""
    values: Values


class _Releases(FrozenModel):
    """The file."""

    phases: dict[str, tuple[Release, ...]]
    """All that was told, the latest last."""


def settle(  # noqa: PLR0917 - what is to be told, of whom, and on what it rests
    path: Path, phase: str, values: Values, about: Mapping[str, str], basis: str, min_count: int
) -> Values:
    """What may be told, given what was told before; what is new is on disk before it is returned.

    Args:
        path: of the file that remembers.
        phase: of the run, or the type of its message.
        values: behind the privacy filters.
        about: by patient, what of the patient the numbers rest on.
        basis: the model and the settings that they rest on.
        min_count: fewest patients whose change may be told.

    Raises:
        DataError: what was told before cannot be read.
    """
    known = _read(path)
    new = Release(
        about={_digest(patient): _digest(what) for patient, what in about.items()},
        basis=_digest(basis),
        values=dict(values),
    )
    earlier = known.get(phase, ())
    if any(0 < _n_changed(one, new) < min_count for one in earlier):
        latest = earlier[-1]
        return dict(latest.values) if latest.basis == new.basis else {}
    if new not in earlier:
        _write(path, known | {phase: (*earlier, new)})
    return dict(values)


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
