"""What people thought of labels: a site's table of ratings, one to six stars each."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from fedqc.cases.layouts.table import read_table
from fedqc.cases.problems import Problem
from fedqc.errors import DataError

View = Literal["axial", "coronal", "sagittal", "all"]
COLUMNS = ("id", "rater", "view", "stars")
FEWEST_STARS, MOST_STARS = 1.0, 6.0


@dataclass(frozen=True)
class Rating:
    """One rater's opinion of one label, seen in one view or in all three.

    Rows may repeat: the same rater may have rated a label twice, which tells how far raters agree with
    themselves.
    """

    case: str
    """Id of the case."""
    rater: str
    view: View
    stars: float
    """From 1 to 6, the best; fractions come from finer scales or means."""


def read_ratings(path: Path) -> list[Rating]:
    """The ratings of a table with the columns `id`, `rater`, `view` and `stars`, in its order.

    Raises:
        DataError: there is no such file, a column is missing, or a row is wrong; with file and line.
    """
    return [_rating(f"{path}: line {line}", row) for line, row in read_table(path, COLUMNS)]


def ratings_by_case(path: Path | None) -> dict[str, list[Rating]]:
    """The ratings of a table by the id of the case; none where there is no table.

    Raises:
        DataError: as `read_ratings`.
    """
    found: dict[str, list[Rating]] = {}
    for rating in [] if path is None else read_ratings(path):
        found.setdefault(rating.case, []).append(rating)
    return found


def rating_problems(ratings: Sequence[Rating], ids: Collection[str], path: Path) -> list[Problem]:
    """One problem for each id that is rated and no case.

    Args:
        ratings: of the table.
        ids: of the site's cases.
        path: of the table, named in the problems.
    """
    known = frozenset(ids)
    unknown = Counter(rating.case for rating in ratings if rating.case not in known)
    return [
        Problem(
            code="unknown-rating",
            case=None,
            file=path,
            found=f"{times} rating{'s' if times > 1 else ''} of {case!r}, which is no case",
            expected="the id of a case",
            fix="correct the id, or remove its rows",
        )
        for case, times in unknown.items()
    ]


def _rating(place: str, row: dict[str, str]) -> Rating:
    for column in COLUMNS:
        if not row[column]:
            raise DataError(f"{place}: {column} is empty; give each rating {', '.join(COLUMNS)}")
    if row["view"] not in get_args(View):
        raise DataError(
            f"{place}: view is {row['view']!r}, expected {', '.join(get_args(View)[:-1])} or all; correct it"
        )
    return Rating(row["id"], row["rater"], cast(View, row["view"]), _stars(place, row["stars"]))


def _stars(place: str, text: str) -> float:
    try:
        stars = float(text.replace(",", "."))  # the decimal sign of half the world
    except ValueError:
        stars = math.nan
    if not FEWEST_STARS <= stars <= MOST_STARS:  # false for what is no number, too
        raise DataError(
            f"{place}: stars is {text!r}, expected a number from 1 to 6, such as 4 or 4.5; correct it"
        )
    return stars
