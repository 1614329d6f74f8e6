"""What curation kept, in the forms that other tools read."""

import csv
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from fedqc.curation.manifest import Entry, Manifest, kept
from fedqc.errors import DataError
from fedqc.task import Task

FOLDS = 5
"""As many as nnU-Net has."""
LABEL = "label"


def as_list(manifest: Manifest, task: Task) -> str:
    """The kept cases' files, one a line, relative to the data folder."""
    del task
    return "".join(f"{file.path}\n" for entry in kept(manifest) for file in entry.files.values())


def as_csv(manifest: Manifest, task: Task) -> str:
    """All candidates as a table, with what the rule decided, what holds in the end, and who decided it."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    overruled = ["by", "when", "why"]
    writer.writerow(
        [
            "id",
            "patient",
            "quality",
            *task.regions,
            "rule",
            "reason",
            "diagnosis",
            "outcome",
            *overruled,
            "weight",
            "label",
        ]
    )
    for entry in manifest.entries:
        one = entry.overruled
        writer.writerow(
            [
                entry.id,
                entry.patient,
                f"{entry.quality:.6f}",
                *(f"{entry.regions[name]:.6f}" if name in entry.regions else "" for name in task.regions),
                entry.decision.value,
                entry.reason,
                entry.diagnosis.found if entry.diagnosis else "",
                entry.outcome.value,
                *((one.by, one.when, one.reason) if one else ("", "", "")),
                f"{entry.weight:.6f}",
                entry.files[LABEL].path,
            ]
        )
    return table.getvalue()


def as_msd(manifest: Manifest, task: Task) -> str:
    """`dataset.json` of the Medical Segmentation Decathlon, for the data folder, with the kept cases.

    Raises:
        DataError: a class has several label values, which the form cannot say.
    """
    several = [name for name, values in task.classes.items() if len(values) > 1]
    if several:
        raise DataError(
            f"task {task.name!r}: class {several[0]!r} has several label values, and a dataset.json has one "
            "for each class; export in another form"
        )
    training = [
        {"image": _image(entry, task), "label": f"./{entry.files[LABEL].path}"} for entry in kept(manifest)
    ]
    dataset = {
        "name": task.name,
        "description": f"what fedqc kept at {manifest.site}, {manifest.created}",
        "modality": {str(index): name for index, name in enumerate(task.modalities)},
        "labels": {"0": "background"} | {str(values[0]): name for name, values in task.classes.items()},
        "numTraining": len(training),
        "numTest": 0,
        "training": training,
        "test": [],
    }
    return json.dumps(dataset, indent=2) + "\n"


def as_nnunet(manifest: Manifest, task: Task) -> str:
    """`splits_final.json` of nnU-Net: five folds of the kept cases, by patient.

    Raises:
        DataError: the kept cases have fewer than five patients.
    """
    from sklearn.model_selection import GroupKFold  # noqa: PLC0415 - takes a second

    del task
    entries = sorted(kept(manifest), key=lambda entry: entry.id)
    patients = [entry.patient for entry in entries]
    if len(set(patients)) < FOLDS:
        raise DataError(
            f"the kept cases are of {len(set(patients))} patients; nnU-Net has {FOLDS} folds, one patient "
            "each at least"
        )
    names = np.array([entry.id for entry in entries])
    folds = GroupKFold(FOLDS, shuffle=True, random_state=0).split(names, groups=patients)
    splits = [{"train": names[train].tolist(), "val": names[test].tolist()} for train, test in folds]
    return json.dumps(splits, indent=2) + "\n"


FORMS: dict[str, Callable[[Manifest, Task], str]] = {
    "csv": as_csv,
    "list": as_list,
    "msd": as_msd,
    "nnunet": as_nnunet,
}
"""By the name of the form."""


def _image(entry: Entry, task: Task) -> Any:
    """The file of all modalities, or one of each, in the task's order."""
    roles = [role for role in dict.fromkeys(("image", *task.modalities)) if role in entry.files]
    paths = [f"./{entry.files[role].path}" for role in roles]
    return paths[0] if len(paths) == 1 else paths
