"""The manifest: every decision of one site and run, with what it was made from.

It stays at the site. It holds the hash of every input file, the model and the rule, so that a decision can be
checked and made again, and it is what the segmentation stage reads to know which cases take part.
"""

import contextlib
import csv
import fcntl
import io
import json
import os
import pwd
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from fedqc.config import CurationConfig, FrozenModel, Share, SiteConfig, parse
from fedqc.curation.calibration import Calibration
from fedqc.curation.diagnosis import Diagnosis
from fedqc.curation.guards import Gathering
from fedqc.curation.rules import Outcome
from fedqc.curation.verified import read_verified, write_verified
from fedqc.errors import ConfigError, DataError, did_you_mean
from fedqc.files import replacing
from fedqc.ratings import FEWEST_STARS, MOST_STARS
from fedqc.task import Task

MANIFEST = "manifest.json"
"""In a site's results folder."""
VERSION: Literal[1] = 1
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _is_a_time(text: str) -> str:
    datetime.fromisoformat(text)
    return text


Timestamp = Annotated[str, AfterValidator(_is_a_time)]
"""ISO 8601 date and time."""


class InputFile(FrozenModel):
    """One file a decision rests on."""

    path: str = Field(min_length=1)
    """Relative to the site's data folder, with forward slashes."""
    sha256: Sha256
    """Of the file's bytes."""

    @field_validator("path")
    @classmethod
    def _inside_the_data_folder(cls, path: str) -> str:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            msg = "a path must be relative to the site's data folder and stay inside it"
            raise ValueError(msg)
        return path


class Overruled(FrozenModel):
    """What a person decided against, or in place of, the rule."""

    decision: Literal[Outcome.KEEP, Outcome.DROP]
    by: str = Field(min_length=1, max_length=200)
    when: Timestamp
    reason: str = Field(default="", max_length=2000)


class Entry(FrozenModel):
    """One candidate: its score and what became of it."""

    id: str = Field(min_length=1)
    patient: str = Field(min_length=1)
    quality: Share
    regions: dict[str, Share]
    """Predicted DSC of each region; empty where the method gives none."""
    interval: tuple[Share, Share] | None = None
    """Between which the true DSC is expected, where the method tells."""
    stars: float | None = Field(default=None, ge=FEWEST_STARS, le=MOST_STARS)
    """Where the method rates."""
    decision: Outcome
    """Of the rule."""
    reason: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0, le=1)
    """How often it is drawn in training beside a case of weight 1, if it is kept."""
    diagnosis: Diagnosis | None = None
    """What is probably wrong with the label, where the rule does not keep it and the method tells."""
    files: dict[str, InputFile] = Field(min_length=1)
    """By role: a modality's name, or `label`."""
    overruled: Overruled | None = None
    """By a person, whose decision holds as long as the files are the same."""

    @property
    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of each file, images first."""
        return tuple(file.sha256 for file in self.files.values())

    @property
    def outcome(self) -> Outcome:
        """What holds in the end."""
        return self.overruled.decision if self.overruled else self.decision


class Remembered(FrozenModel):
    """What a person decided about a case that is not among the candidates at present."""

    id: str = Field(min_length=1)
    hashes: tuple[Sha256, ...]
    """Of the files that it was about, images first."""
    overruled: Overruled


class LeftOut(FrozenModel):
    """One problem of a case that could not be used; a case may stand here with several."""

    case: str
    code: str
    file: str | None
    found: str
    fix: str


class UsedModel(FrozenModel):
    """The model that scored."""

    method: str
    sha256: Sha256
    """Of the stored weights."""
    fedqc: str
    """The version that applied it."""


class UsedRule(FrozenModel):
    """The rule that decided: with `make_rule` every decision can be made again."""

    config: CurationConfig
    """The federation's `[curation]` table."""
    calibration: Calibration | None = None
    """The labels of known quality that it rests on, where it needs some."""
    suspended: str | None = None
    """Why it was not applied at this site, so that all candidates are kept."""


class Manifest(FrozenModel):
    """All decisions of one site and run."""

    version: Literal[1] = VERSION
    site: str
    federation: str
    task: str
    created: Timestamp
    model: UsedModel
    rule: UsedRule
    entries: tuple[Entry, ...]
    gatherings: tuple[Gathering, ...] = ()
    """Groups in which what is not kept gathers: a warning for a person."""
    left_out: tuple[LeftOut, ...] = ()
    remembered: tuple[Remembered, ...] = ()

    @model_validator(mode="after")
    def _no_case_twice(self) -> Self:
        times = Counter(entry.id for entry in self.entries)
        twice = sorted(case for case, count in times.items() if count > 1)
        if twice:
            msg = f"case listed twice: {', '.join(twice)}; every candidate has one decision"
            raise ValueError(msg)
        return self


def kept(manifest: Manifest) -> tuple[Entry, ...]:
    """The candidates that take part in training, in the manifest's order."""
    return tuple(entry for entry in manifest.entries if entry.outcome is Outcome.KEEP)


def with_overruled(manifest: Manifest, case: str, overruled: Overruled | None) -> Manifest:
    """The manifest after a person decided about a case, or took a decision back.

    Raises:
        DataError: it has no such case.
    """
    if all(entry.id != case for entry in manifest.entries):
        hint = did_you_mean(case, [entry.id for entry in manifest.entries])
        raise DataError(
            f"case {case!r} is not among the {len(manifest.entries)} candidates; {hint}check its id"
        )
    entries = (
        entry.model_copy(update={"overruled": overruled}) if entry.id == case else entry
        for entry in manifest.entries
    )
    return manifest.model_copy(update={"entries": tuple(entries)})


def overrule(
    results: Path,
    task: Task,
    case: str,
    decision: str | None,
    *,
    by: str,
    reason: str,
    check: Callable[[Manifest], None] = lambda manifest: None,
) -> Entry:
    """Write down what a person decided about a case, in the manifest and the table of a results folder.

    A case that is not kept, or not any more, is not among the verified ones either.

    Args:
        results: the site's folder, which holds the manifest.
        task: the site's.
        case: id of a candidate.
        decision: `keep` or `drop`; None takes an earlier decision back.
        by: who decided.
        reason: why.
        check: raises where the manifest, which nobody else changes meanwhile, is not what was decided on.

    Returns:
        The case as it stands now.

    Raises:
        ConfigError: the manifest belongs to another user.
        DataError: there is no manifest, or no such case in it.
    """
    path = results / MANIFEST
    overruled = None
    if decision is not None:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        values = {"decision": decision, "by": by, "when": when, "reason": reason}
        overruled = parse(values, Overruled, source=f"case {case}")
    refuse_another_user(results)
    with changing(results):
        before = read_manifest(path)
        check(before)
        manifest = with_overruled(before, case, overruled)
        write_scores(results / "scores.csv", manifest, task)
        write_manifest(path, manifest)
        verified = read_verified(results)
        if case in verified and (overruled is None or overruled.decision is not Outcome.KEEP):
            write_verified(results, verified - {case})  # or the next run would take it for a reference
    return next(entry for entry in manifest.entries if entry.id == case)


def refuse_another_user(results: Path) -> None:
    """Refuse to write into a results folder as somebody else than the service that has to read it.

    Raises:
        ConfigError: its manifest belongs to another user.
    """
    path = results / MANIFEST
    owner = path.stat().st_uid if path.exists() else os.geteuid()
    if owner != os.geteuid():
        raise ConfigError(
            f"{path}: belongs to {_name(owner)}; do this as that user: sudo -u {_name(owner)} fedqc ..."
        )


@contextlib.contextmanager
def changing(results: Path) -> Iterator[None]:
    """Nobody else changes the manifest of a results folder meanwhile: not another process either."""
    results.mkdir(parents=True, exist_ok=True)
    with (results / ".manifest.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


def carried_over(
    earlier: Manifest | None, entries: Iterable[Entry]
) -> tuple[tuple[Entry, ...], tuple[Remembered, ...]]:
    """New entries with what people decided before, as far as it was about files of the same content.

    Returns:
        The entries, and what was decided about others: they may be back in the next run.
    """
    known: dict[tuple[str, tuple[str, ...]], Remembered] = {}
    if earlier is not None:
        decided = [
            Remembered(id=entry.id, hashes=entry.hashes, overruled=entry.overruled)
            for entry in earlier.entries
            if entry.overruled
        ]
        known = {(one.id, one.hashes): one for one in (*earlier.remembered, *decided)}
    carried = []
    for entry in entries:
        before = known.pop((entry.id, entry.hashes), None)
        carried.append(entry.model_copy(update={"overruled": before.overruled}) if before else entry)
    return tuple(carried), tuple(known.values())


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest` as JSON; a reader sees the old file or the whole new one, never a part."""
    _write(path, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        DataError: there is no such file, or it is not a manifest; with what is wrong.
    """
    fix = "restore the file, or score the site's cases again"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; score the site's cases first") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; check the path and its permissions"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); {fix}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: holds a {type(values).__name__}, a manifest is an object; {fix}")
    version = values.get("version")
    if version != VERSION:
        raise DataError(f"{path}: is a manifest of version {version!r}, this fedqc reads {VERSION}; {fix}")
    try:
        return parse(values, Manifest, source=str(path))
    except ConfigError as error:
        raise DataError(f"{error}; {fix}") from None


def manifest_of(site: SiteConfig, task: Task) -> Manifest:
    """The manifest in a site's results folder.

    Raises:
        DataError: there is none, it cannot be read, or it is of another site or task.
    """
    path = site.results / MANIFEST
    manifest = read_manifest(path)
    if (manifest.site, manifest.task) != (site.name, task.name):
        raise DataError(
            f"{path}: is of site {manifest.site!r} and task {manifest.task!r}, not of "
            f"{site.name!r} and {task.name!r}; score this site's cases first"
        )
    return manifest


def write_scores(path: Path, manifest: Manifest, task: Task) -> None:
    """Write the manifest's entries as a table: id, patient, quality, one column a region, decision, reason.

    The decision is what holds in the end, with who overruled the rule as the reason. A region that the method
    gave no number for is an empty cell.

    Raises:
        DataError: the manifest is of another task.
    """
    if manifest.task != task.name:
        raise DataError(
            f"{path}: the manifest is of task {manifest.task!r}, not {task.name!r}; give that task"
        )
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["id", "patient", "quality", *task.regions, "decision", "reason"])
    for entry in manifest.entries:
        regions = [f"{entry.regions[name]:.6f}" if name in entry.regions else "" for name in task.regions]
        reason = entry.reason
        if entry.overruled:
            reason = f"{entry.overruled.by}: {entry.overruled.reason or 'no reason given'}"
        writer.writerow(
            [entry.id, entry.patient, f"{entry.quality:.6f}", *regions, entry.outcome.value, reason]
        )
    _write(path, table.getvalue())


def _write(path: Path, text: str) -> None:
    """Write a file that keeps the permissions it had."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="")
        if path.exists():
            shutil.copymode(path, aside)
