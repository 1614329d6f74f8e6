"""Whether a manifest still holds: its files, its model, and the decisions that its rule makes."""

from collections.abc import Callable
from pathlib import Path

from fedqc.cases.volumes import sha256_file
from fedqc.curation.guards import limited
from fedqc.curation.manifest import Manifest
from fedqc.curation.rules import Outcome, make_rule
from fedqc.errors import DataError, FedQCError


def changes(
    manifest: Manifest,
    folder: Path,
    weights: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What is not as it was when the manifest was written, a sentence each.

    Args:
        manifest: of a site.
        folder: the site's data folder.
        weights: file of the model that scored; None: it is not looked at.
        progress: called with (cases done, all cases).
    """
    found = []
    for number, entry in enumerate(manifest.entries, start=1):
        for role, file in entry.files.items():
            try:
                sha256 = sha256_file(folder / file.path)
            except DataError as error:
                found.append(f"case {entry.id}, {role}: {error}")
                continue
            if sha256 != file.sha256:
                found.append(
                    f"case {entry.id}, {role}: {file.path} has changed since it was scored; SHA-256 was "
                    f"{file.sha256[:12]}, is {sha256[:12]}"
                )
        if progress is not None:
            progress(number, len(manifest.entries))
    return [*found, *_other_decisions(manifest), *_other_model(manifest, weights)]


def _other_decisions(manifest: Manifest) -> list[str]:
    """Decisions that the rule would not make again of the same qualities."""
    quality = {entry.id: entry.quality for entry in manifest.entries}
    if manifest.rule.suspended:
        expected = dict.fromkeys(quality, (Outcome.KEEP, 1.0))
    else:
        try:
            decided = make_rule(manifest.rule.config, manifest.rule.calibration).decide(quality)
        except FedQCError as error:
            return [f"the rule cannot be applied again: {error}"]
        limit = manifest.rule.config.most_dropped
        made = limited(decided, quality, limit)
        expected = {case: (one.outcome, one.weight) for case, one in made.items()}
    found = []
    for entry in manifest.entries:
        outcome, weight = expected[entry.id]
        if outcome is not entry.decision:
            found.append(f"case {entry.id}: the rule says {outcome}, the manifest {entry.decision}")
        elif abs(weight - entry.weight) > 1e-9:
            found.append(f"case {entry.id}: the rule gives weight {weight:g}, the manifest {entry.weight:g}")
    return found


def _other_model(manifest: Manifest, weights: Path | None) -> list[str]:
    if weights is None:
        return []
    try:
        sha256 = sha256_file(weights)
    except DataError as error:
        return [f"the model: {error}"]
    if sha256 == manifest.model.sha256:
        return []
    return [f"the model {weights} is another one: SHA-256 was {manifest.model.sha256[:12]}, is {sha256[:12]}"]
