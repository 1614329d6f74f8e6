"""What of a site's statistics may leave: the only way from a summary to numbers in a message.

- A number with fewer than `min_count` distinct patients behind it is left out.
- Groups that add up to a known total (a histogram's bins, the decisions): a group below `min_count` is
  hidden. The sum of the hidden ones is the total less the shown ones, so as long as only one group is hidden,
  or the hidden ones hold fewer than `min_count` patients together, the next smallest is hidden too.
- What is not kept, by what is wrong with it, is told only where the decisions tell how many are kept: the sum
  of the groups would tell it.
- What is not kept, by size of the label, is told of a size only where enough patients are behind what is not
  kept and behind what is kept, which follows from it; and of none where the sum is not told.
- Labels of known quality by predicted quality (`Spread`) are not hidden but moved: bins are taken together
  until `min_count` patients stand behind them. Rules rest on how few failures are predicted to be good, which
  in the end a single patient decides: the best of them therefore count as perfect.
- A profile (agreement by predicted quality) tells means of the bins that a histogram would tell. The same
  labels are counted by `Spread`, whose bins end elsewhere: that no difference of the two counts a single
  patient, a profile's counts are multiples of `min_count`.
- Floats are rounded to three significant digits.
- It fails closed: anything that does not say how many patients stand behind it is an error.

Each table is protected against its own total, and the histogram of qualities against the decisions, which are
totals of some of its bins where the threshold is the edge of one.
"""

import re
from collections.abc import Iterator, Mapping

from pydantic import BaseModel

from fedqc.curation.rules import Outcome
from fedqc.errors import ConfigError, ProtocolError
from fedqc.statistics.site import Figure, Found, Groups, Histogram, Part, Profile, Split, Spread, Tally

HIDDEN = -1
"""Stands for a bin of a histogram or a profile that may not be told."""

Released = dict[str, int | float | list[int] | list[float]]

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


def release(summary: BaseModel | Mapping[str, object], min_count: int) -> Released:
    """The numbers of a summary that may leave the site, by dotted key.

    A histogram becomes the list of its counts, -1 for a hidden bin; it is left out where every bin is hidden.
    A profile becomes four lists, in which -1 also stands for a number that is not defined.
    A tally becomes one number a group. Edges are not sent: they are part of the program, not of the data.

    Args:
        summary: a model or mapping of Figure, Histogram, Tally, Split, Spread, Found or None (a number that
            is not defined), nested as deep as wanted.
        min_count: fewest distinct patients behind a number that leaves.

    Returns:
        Integers, finite floats and lists of integers only (what a Flower MetricRecord holds).

    Raises:
        ConfigError: `min_count` is below 1.
        ProtocolError: the summary holds anything else, or a key that is no plain name.
    """
    if min_count < 1:
        raise ConfigError(f"min_count is {min_count}; it must be 1 or more")
    return dict(_walk("", summary, min_count))


def _walk(
    key: str, value: object, min_count: int
) -> Iterator[tuple[str, int | float | list[int] | list[float]]]:
    """The released numbers below `key`."""
    if isinstance(value, Figure | Found | Spread):
        told = _told(value, min_count)
        if told is not None:
            yield key, told
    elif isinstance(value, Histogram):
        yield from _walk_bins(key, value, min_count)
    elif isinstance(value, Tally | Split):
        counts = value.counts if isinstance(value, Tally) else value.not_kept.counts
        for name, count, show in zip(value.names, counts, _shown_names(value, min_count), strict=True):
            if show:
                yield _join(key, name), count
    elif isinstance(value, BaseModel | Mapping):
        members = value.items() if isinstance(value, Mapping) else iter(value)
        for name, member in members:
            yield from _walk(_join(key, name), member, min_count)
    elif value is not None:
        raise ProtocolError(
            f"statistics hold {key!r} of type {type(value).__name__}; only a Figure, Histogram or Tally, "
            "which say how many patients are behind them, may leave a site"
        )


def _told(value: Figure | Found | Spread, min_count: int) -> int | float | list[int] | None:
    """What may be told of a number, of findings, or of labels of known quality; None: nothing."""
    match value:
        case Figure():
            return _rounded(value.value) if value.patients >= min_count else None
        case Found():
            count = sum(patients >= min_count for patients in value.patients)
            return count if value.total_patients >= min_count else None
        case Spread():
            masses = _moved(value, min_count)
            return masses if any(masses) else None


def _walk_bins(
    key: str, histogram: Histogram, min_count: int
) -> Iterator[tuple[str, list[int] | list[float]]]:
    """The list of a histogram, or the lists of a profile, as far as its bins are shown."""
    shown = _shown_bins(histogram, min_count)
    if not any(shown):
        return
    if not isinstance(histogram, Profile):
        yield key, [count if show else HIDDEN for count, show in zip(histogram.counts, shown, strict=True)]
        return
    counts = [min_count * round(count / min_count) for count in histogram.counts]
    yield _join(key, "labels"), [count if show else HIDDEN for count, show in zip(counts, shown, strict=True)]
    for name in ("predicted", "true", "sd"):
        told = [HIDDEN if one is None else _rounded(one) for one in getattr(histogram, name)]
        yield (
            _join(key, name),
            [float(number) if show else float(HIDDEN) for number, show in zip(told, shown, strict=True)],
        )


def _moved(spread: Spread, min_count: int) -> list[int]:
    """The masses of a spread, each in one of the bins that it was taken together with; zeros if too few.

    Alone a patient may stand where `min_count` is 1, and nothing is moved. Else, from the cautious end on,
    bins are taken together until there are patients enough, and their mass lies in the one nearest to that
    end; what is too little in the end joins those before it.
    """
    if min_count == 1:
        return list(spread.masses)
    n_bins = len(spread.masses)
    moved = [0] * n_bins
    n_without = spread.total_patients - len(frozenset[str]().union(*spread.owners))
    # The sum of the masses tells how many have such a label, and so how many not, and how many have both.
    if any(0 < few < min_count for few in (n_without, spread.shared)):
        return moved
    places = range(n_bins - 1, -1, -1) if spread.cautious == "up" else range(n_bins)
    first, last, mass, owners = places[0], None, 0, set[str]()
    for place in places:
        mass += spread.masses[place]
        owners |= spread.owners[place]
        if len(owners) >= min_count:
            moved[first], last = mass, first
            first, mass, owners = place + places.step, 0, set()
    if last is not None:
        moved[last] += mass
    return moved


def _shown_bins(histogram: Histogram, min_count: int) -> list[bool]:
    """Which bins may be told: those that may of all cases, and of each part of them that a bin holds."""
    shown = _shown(histogram, min_count)
    for part in histogram.parts:
        of_part = zip(part.counts, _shown(part, min_count), strict=True)
        shown = [show and (may or not count) for show, (count, may) in zip(shown, of_part, strict=True)]
    return shown


def _shown_names(table: Tally | Split, min_count: int) -> list[bool]:
    """Which named groups may be told: none where it is not told how many are kept, which their sum tells.

    Of a split, those of which enough are not kept, and enough are.
    """
    if isinstance(table, Part | Split):
        decisions = table.decisions
        told = dict(zip(decisions.names, _shown(decisions, min_count), strict=True))
        if not told.get(Outcome.KEEP.value, True):
            return [False] * len(table.names)
    if isinstance(table, Tally):
        return _shown(table, min_count)
    both = zip(_shown(table.not_kept, min_count), _shown(table.kept, min_count), strict=True)
    return [out and kept for out, kept in both]


def _shown(groups: Groups, min_count: int) -> list[bool]:
    """Which groups may be told."""
    ascending = sorted(range(len(groups.patients)), key=lambda index: groups.patients[index])
    n_hidden = sum(patients < min_count for patients in groups.patients)
    while 0 < n_hidden < len(ascending) and (
        n_hidden == 1 or _gives_away(groups, ascending, n_hidden, min_count)
    ):
        n_hidden += 1
    hidden = set(ascending[:n_hidden])
    return [index not in hidden for index in range(len(ascending))]


def _gives_away(groups: Groups, ascending: list[int], n_hidden: int, min_count: int) -> bool:
    """Whether the hidden groups together hold someone, but fewer than `min_count` patients for certain.

    A patient may be in several groups, so the patients of the hidden ones do not simply add up: at least as
    many as in the largest, and at least those that no shown group can hold.
    """
    largest = groups.patients[ascending[n_hidden - 1]]
    shown = sum(groups.patients[index] for index in ascending[n_hidden:])
    return 0 < max(largest, groups.total_patients - shown) < min_count


def _rounded(value: float) -> int | float:
    return value if isinstance(value, int) else float(f"{value:.3g}")


def _join(key: str, name: object) -> str:
    if not isinstance(name, str) or _KEY.fullmatch(name) is None:
        raise ProtocolError(
            f"statistics hold the key {name!r} below {key!r}; a key that leaves a site is a plain name of "
            "letters, digits, '-' and '_'"
        )
    return f"{key}.{name}" if key else name
