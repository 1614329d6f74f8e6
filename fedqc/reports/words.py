"""Numbers, times and reasons as people read them. What is not known is a dash, never a made-up number."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from fedqc.protocol import ErrorCode
from fedqc.statistics.datasheet import DataSheet

UNKNOWN = "-"
SECONDS_PER_MINUTE = 60
SECONDS_PER_HOUR = 3600

# Words that the coordinator finds itself; those that sites send have their sentence in the protocol.
_REASONS = {
    "offline": "it was not there when asked",
    "not-sent": "the request could not be sent",
    "late": "no answer came before the deadline",
    "unavailable": "the connection to it was lost",
    "bad-reply": "it answered something that the protocol does not allow",
    "reply-too-large": "its answer was larger than any answer to that request is",
    "names-differ": "its weights have other names than the model's",
    "shape-differs": "its weights have another shape than the model's",
    "dtype-differs": "its weights are of another type than the model's",
    "not-finite": "its weights or its loss are not finite numbers",
    "norm-exceeds-bound": "its update is far larger than those of the other sites",
    "samples-differ": "it claims more training samples than it was asked for",
    "not-expected": "it is not on the list of expected sites",
    "protocol-differs": "it speaks another version of the protocol",
    "task-differs": "its task is another one",
    "name-claimed-twice": "two sites claimed this name",
    "name-differs-from-key": "its name is not the one its key belongs to",
}

_KINDS = {
    "untouched": "good label, untouched",
    "seggen": "deformed at random (SegGen)",
    "under-contouring": "under-contouring",
    "over-contouring": "over-contouring",
    "left-right-flip": "left-right flip",
}


def reason_in_words(reason: str) -> str:
    """What a reason of `events.jsonl` means; a word that is not known stands for itself."""
    if reason in set(ErrorCode):
        return ErrorCode(reason).sentence
    return _REASONS.get(reason, reason)


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals; a dash where there is none."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def significant(value: float, digits: int = 3) -> str:
    """A number of any size with so many significant digits, never as a power of ten where it is large."""
    rounded = float(f"{value:.{digits}g}")
    return count(int(rounded)) if abs(rounded) >= 10**digits else f"{rounded:.{digits}g}"


def count(value: int | None) -> str:
    """A whole number with thousands apart; a dash where there is none."""
    return UNKNOWN if value is None else f"{value:,}".replace(",", "\u202f")


def mean_sd(mean: float | None, sd: float | None) -> str:
    """A mean and its standard deviation, as far as they are known."""
    return number(mean) if sd is None else f"{number(mean)} \u00b1 {number(sd)}"


def percent(share: float | None) -> str:
    """A share as per cent; a dash where there is none."""
    return UNKNOWN if share is None or not math.isfinite(share) else f"{100 * share:.0f}\u00a0%"


def with_interval(value: float | None, interval: Sequence[float] | None, digits: int = 3) -> str:
    """A number and its interval in brackets."""
    if value is None or interval is None:
        return number(value, digits)
    low, high = interval
    return f"{number(value, digits)} ({number(low, digits)} to {number(high, digits)})"


def percent_with_interval(share: float | None, interval: Sequence[float | None] | None) -> str:
    """A share as per cent, with its interval in brackets."""
    if share is None or interval is None:
        return percent(share)
    low, high = interval
    if low is None or high is None:
        return percent(share)
    return f"{percent(share)} ({100 * low:.0f} to {100 * high:.0f})"


def plural(amount: int, one: str, many: str | None = None) -> str:
    """The number with its noun."""
    return f"{count(amount)} {one if amount == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """A time that somebody waited."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 2 * SECONDS_PER_MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * SECONDS_PER_HOUR:
        return f"{seconds / SECONDS_PER_MINUTE:.0f} min"
    return f"{seconds / SECONDS_PER_HOUR:.1f} h"


def moment(text: str | None) -> str:
    """A time of `run.json` to the minute, in the zone it was written in (UTC)."""
    return UNKNOWN if text is None else f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC"


def listed(names: Iterable[str], shown: int = 12) -> str:
    """Names with commas and an `and`; only the first of many."""
    names = list(names)
    if len(names) > shown:
        return f"{', '.join(names[:shown])} and {len(names) - shown} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def rule_in_words(curation: Mapping[str, Any]) -> str | None:
    """What a rule does, from the `[curation]` table; None where that is not known."""
    get = curation.get
    threshold = f"{get('threshold', 0):g}"
    known = {
        "threshold": f"a predicted DSC under {threshold} is dropped",
        "stars": f"fewer than {get('stars', 0):g} stars are dropped",
        "target": f"dropped below the predicted DSC that reached a {get('target')} of {get('level', 0):g} in "
        f"finding labels with a true DSC under {threshold}",
        "conformal": "as many are kept as go with at most "
        f"{100 * get('alpha', 0):.3g} % labels with a true DSC under {threshold} among them, on average",
        "quantile": f"the worst {100 * get('share', 0):.3g} % of each site are dropped",
        "weights": f"a predicted DSC of {threshold} or under is dropped, better ones are drawn more often",
    }
    if (rule := get("rule")) not in known:
        return None
    band = f", the {get('review'):g} above it are left to a person" if get("review") else ""
    return f"{rule}: {known[rule]}{band}"


def rounds_in_words(rounds: Iterable[int]) -> str:
    """Rounds with runs of them drawn together: 1, 3 to 5."""
    parts: list[list[int]] = []
    for one in sorted(set(rounds)):
        if parts and one == parts[-1][1] + 1:
            parts[-1][1] = one
        else:
            parts.append([one, one])
    return ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in parts) or UNKNOWN


def kind_in_words(kind: str) -> str:
    """A kind of error as people say it."""
    return _KINDS.get(kind, kind.replace("-", " "))


def stage_in_words(stage: str) -> str:
    """What a training is for that a run's folder calls `stage`: of a whole model, or of a part of one."""
    if stage == "segmentation":
        return "segmentation model"
    trained, _, part = stage.removeprefix("check-").partition("-")
    suffix = f", {part}" if part else ""
    if stage.startswith("check-"):
        half = {"1": "first", "2": "second"}.get(trained, trained)
        return f"cross-check, {half} half of the sites{suffix}"
    return f"QC model{suffix}" if trained == "qc" else f"segmenter that makes labels, {stage}"


def spread_rows(sheet: DataSheet) -> Iterator[tuple[str, ...]]:
    """How numbers spread over the cases: what, cases, smallest and its case, median, largest and its case.

    Where all are alike, no case is named.
    """
    spreads = {
        **{f"volume of {name}, ml": spread for name, spread in sheet.volumes_ml.items()},
        **{f"voxel side {axis}, mm": spread for axis, spread in sheet.spacing_mm.items()},
        **{f"voxels along {axis}": spread for axis, spread in sheet.shape.items()},
        **{f"intensity of {name}": spread for name, spread in sheet.intensities.items()},
    }
    for what, spread in spreads.items():
        if spread is None:
            yield what, "0", *[UNKNOWN] * 5
            continue
        is_one = spread.smallest == spread.largest
        yield (
            what,
            count(spread.n),
            significant(spread.smallest),
            UNKNOWN if is_one else spread.smallest_case,
            significant(spread.median),
            significant(spread.largest),
            UNKNOWN if is_one else spread.largest_case,
        )
