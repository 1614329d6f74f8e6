"""The table of cases whose label a person verified; a site may use it as its list of references."""

import csv
from collections.abc import Collection
from pathlib import Path

from fedqc.cases.layouts.table import read_ids
from fedqc.errors import DataError
from fedqc.files import replacing

VERIFIED = "verified.csv"
"""In the results folder: a table of references, for `[data] reference`."""


def read_verified(results: Path) -> frozenset[str]:
    """Ids of the cases in the table; none where there is no table.

    Raises:
        DataError: it cannot be read.
    """
    path = results / VERIFIED
    return read_ids(path) if path.exists() else frozenset()


def write_verified(results: Path, ids: Collection[str]) -> None:
    """Write the table; a reader sees the old one or the whole new one.

    Raises:
        DataError: it cannot be written.
    """
    path = results / VERIFIED
    try:
        with replacing(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([case] for case in ("id", *sorted(ids)))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); the decision itself is saved"
        ) from None
