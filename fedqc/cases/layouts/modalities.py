"""Names of MRI modalities that mean the same: what layouts match the modalities of a task with."""

from fedqc.errors import DataError
from fedqc.task import Task

_SAME = (
    ("t1n", "t1", "t1w"),
    ("t1c", "t1ce", "t1gd"),
    ("t2w", "t2"),
    ("t2f", "flair"),
)
"""The first of each is the name that BraTS has used since 2023. Upper and lower case are the same."""

_COMMON = {name: names[0] for names in _SAME for name in names}


def common_name(modality: str) -> str:
    """One name for all that mean the same modality; that of any other one is its own in lower case."""
    return _COMMON.get(modality.casefold(), modality.casefold())


def common_names(task: Task) -> list[str]:
    """The common name of each modality of a task.

    Raises:
        DataError: two of them mean the same.
    """
    names = [common_name(modality) for modality in task.modalities]
    if len(set(names)) < len(names):
        twins = [
            modality for modality, name in zip(task.modalities, names, strict=True) if names.count(name) > 1
        ]
        raise DataError(
            f"task {task.name!r}: {' and '.join(twins)} are the same modality in this layout; "
            "use layout 'csv', which has a column for each"
        )
    return names


def known_names() -> str:
    """The table as part of a sentence."""
    return ", ".join(f"{first} ({', '.join(others)})" for first, *others in _SAME)
