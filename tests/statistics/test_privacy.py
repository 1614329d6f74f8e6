from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedqc.curation.diagnosis import Kind
from fedqc.curation.guards import SIZE, SIZES, Gathering
from fedqc.curation.rules import Outcome
from fedqc.errors import ConfigError, DataError, ProtocolError
from fedqc.statistics.privacy import release
from fedqc.statistics.site import (
    Figure,
    Groups,
    Histogram,
    Spread,
    Tally,
    summarise_calibration,
    summarise_curation,
    summarise_data,
)

steady = settings(deadline=None, database=None)
KEEP, DROP, REVIEW = Outcome.KEEP, Outcome.DROP, Outcome.REVIEW


def histogram(*patients: int) -> Histogram:
    """One case a patient."""
    edges = tuple(float(index) for index in range(len(patients) + 1))
    return Histogram(edges=edges, counts=patients, patients=patients, total_patients=sum(patients))


def tally(**patients: int) -> Tally:
    """One case a patient."""
    counts = tuple(patients.values())
    return Tally(names=tuple(patients), counts=counts, patients=counts, total_patients=sum(counts))


# A table of cases: for each case the bin it falls into and its patient.
tables = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=60)


def tabulate(table: list[tuple[int, int]]) -> Histogram:
    members = [{patient for place, patient in table if place == index} for index in range(5)]
    return Histogram(
        edges=tuple(float(index) for index in range(6)),
        counts=tuple(sum(place == index for place, _ in table) for index in range(5)),
        patients=tuple(len(names) for names in members),
        total_patients=len({patient for _, patient in table}),
    )


def test_a_figure_leaves_only_with_enough_patients() -> None:
    summary = {"few": Figure(value=12, patients=9), "enough": Figure(value=12, patients=10)}
    assert release(summary, 10) == {"enough": 12}
    assert release(summary, 9) == {"few": 12, "enough": 12}


def test_keys_are_dotted_and_an_undefined_number_is_left_out() -> None:
    nested = {"a": {"b": {"c-1": Figure(value=1, patients=5)}, "d": None}, "e": Figure(value=2.5, patients=5)}
    assert release(nested, 5) == {"a.b.c-1": 1, "e": 2.5}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.123456, 0.123),
        (12.3456, 12.3),
        (123456.0, 123000.0),
        (0.00098765, 0.000988),
        (-0.5557, -0.556),
        (0.0, 0.0),
    ],
)
def test_floats_have_three_significant_digits(value: float, told: float) -> None:
    assert release({"x": Figure(value=value, patients=5)}, 5) == {"x": told}


def test_counts_are_exact_integers() -> None:
    told = release({"x": Figure(value=123456, patients=5)}, 5)
    assert told == {"x": 123456}
    assert type(told["x"]) is int


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ((20, 30, 40), [20, 30, 40]),
        ((20, 3, 40), [-1, -1, 40]),  # 3 alone would be the total less the rest: the next smallest goes too
        ((9, 9, 40), [-1, -1, 40]),  # 18 patients hidden together
        ((4, 5, 40, 20), [-1, -1, 40, -1]),  # 9 hidden together are still too few
        ((4, 0, 40, 20), [-1, -1, 40, -1]),  # an empty bin hides nobody
        ((0, 0, 40, 20), [-1, -1, 40, 20]),
        ((0, 40, 20), [-1, 40, -1]),
        ((10, 10, 9), [-1, 10, -1]),  # of equals the first goes
    ],
)
def test_histogram_bins(cells: tuple[int, ...], told: list[int]) -> None:
    assert release({"h": histogram(*cells)}, 10) == {"h": told}


@pytest.mark.parametrize("cells", [(5,), (3, 3), (0, 0), (9, 20)])
def test_a_histogram_with_nothing_to_tell_is_left_out(cells: tuple[int, ...]) -> None:
    assert release({"h": histogram(*cells)}, 10) == {}


def test_bins_count_patients_not_cases() -> None:
    many_cases = Histogram(
        edges=(0.0, 1.0, 2.0, 3.0), counts=(50, 20, 20), patients=(9, 20, 20), total_patients=49
    )
    assert release({"h": many_cases}, 10) == {"h": [-1, -1, 20]}


def test_patients_in_several_bins_do_not_make_the_hidden_ones_look_like_more() -> None:
    # 9 patients with a case in both small bins: hidden together they are still only those 9.
    same = Histogram(
        edges=(0.0, 1.0, 2.0, 3.0, 4.0), counts=(9, 9, 40, 50), patients=(9, 9, 40, 50), total_patients=99
    )
    assert release({"h": same}, 10) == {"h": [-1, -1, -1, 50]}


def test_a_tally_names_its_groups_and_a_hidden_one_takes_the_next_along() -> None:
    assert release({"decisions": tally(keep=80, drop=20)}, 10) == {"decisions.keep": 80, "decisions.drop": 20}
    assert release({"decisions": tally(keep=95, drop=5)}, 10) == {}
    assert release({"d": tally(keep=80, drop=20, review=3)}, 10) == {"d.keep": 80}
    assert release({"d": tally(keep=80)}, 10) == {"d.keep": 80}


@steady
@given(tables, st.integers(1, 12))
def test_no_group_below_min_count_can_be_read_or_worked_out(
    table: list[tuple[int, int]], min_count: int
) -> None:
    whole = tabulate(table)
    told = release({"h": whole}, min_count).get("h", [-1] * 5)
    assert isinstance(told, list)
    hidden = {index for index, count in enumerate(told) if count == -1}
    for index in set(range(5)) - hidden:
        assert told[index] == whole.counts[index]
        assert whole.patients[index] >= min_count
    assert len(hidden) != 1
    behind = {patient for place, patient in table if place in hidden}
    if len(hidden) < 5:
        assert len(behind) == 0 or len(behind) >= min_count


@steady
@given(tables, st.integers(1, 12))
def test_no_more_is_hidden_than_needed(table: list[tuple[int, int]], min_count: int) -> None:
    # With one case a patient: of the smallest bins, the fewest that keep every rule are hidden.
    whole = histogram(*tabulate(table).counts)
    told = release({"h": whole}, min_count).get("h", [-1] * 5)
    assert isinstance(told, list)
    ascending = sorted(whole.patients)
    too_few = sum(patients < min_count for patients in ascending)
    fine = [
        n
        for n in range(too_few, 6)
        if n == 5 or (n != 1 and (sum(ascending[:n]) == 0 or sum(ascending[:n]) >= min_count))
    ]
    assert told.count(-1) == fine[0]


@steady
@given(tables, st.data())
def test_a_stricter_min_count_never_tells_more(table: list[tuple[int, int]], data: st.DataObject) -> None:
    lax = data.draw(st.integers(1, 12))
    strict = data.draw(st.integers(lax, 13))
    quality = [place / 5 + 0.1 for place, _ in table]
    outcomes = [(DROP, DROP, REVIEW, KEEP, KEEP)[place] for place, _ in table]
    summary = summarise_curation(
        quality, {"tumour": quality}, outcomes, [str(patient) for _, patient in table]
    )
    more, less = release(summary, lax), release(summary, strict)
    assert less.keys() <= more.keys()
    for key, told in less.items():
        before = more[key]
        if isinstance(told, list) and isinstance(before, list):
            assert all(after in (-1, count) for count, after in zip(before, told, strict=True))
        else:
            assert told == before


values = st.recursive(
    st.none()
    | st.builds(
        Figure,
        value=st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False),
        patients=st.integers(0, 20),
    )
    | tables.map(tabulate),
    lambda inner: st.dictionaries(st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True), inner, max_size=4),
)


@steady
@given(st.dictionaries(st.sampled_from("abcd"), values), st.integers(1, 12))
def test_only_numbers_leave(summary: dict[str, object], min_count: int) -> None:
    for key, told in release(summary, min_count).items():
        assert isinstance(key, str)
        if isinstance(told, list):
            assert told
            assert all(type(count) is int and (count == -1 or count >= min_count) for count in told)
        else:
            assert type(told) in (int, float)
            if isinstance(told, float):
                assert told == float(f"{told:.2e}")


class Sneaky(int):
    """A number that does not say who is behind it."""


@pytest.mark.parametrize(
    "value",
    [
        3,
        0.5,
        True,
        "case_007",
        ["case_007"],
        [1, 2],
        (Figure(value=1, patients=50),),
        {1.0},
        b"x",
        Sneaky(3),
        Groups(counts=(20, 30), patients=(20, 30), total_patients=50),
    ],
)
def test_anything_else_is_refused(value: object) -> None:
    for summary in ({"x": value}, {"a": {"b": value}}):
        with pytest.raises(ProtocolError, match="only a Figure, Histogram or Tally"):
            release(summary, 1)


@pytest.mark.parametrize("key", ["", "a b", "a.b", "/data/x", "a\n", "é", "x" * 64, 3, None])
def test_a_key_that_is_no_plain_name_is_refused(key: Any) -> None:
    with pytest.raises(ProtocolError, match="plain name"):
        release({"left_out": {key: Figure(value=1, patients=50)}}, 1)
    with pytest.raises(ProtocolError, match="plain name"):
        release({key: Figure(value=1, patients=1)}, 10)  # even where the number would not leave


@pytest.mark.parametrize("min_count", [0, -1])
def test_min_count_below_one_is_refused(min_count: int) -> None:
    with pytest.raises(ConfigError, match=f"min_count is {min_count}"):
        release({}, min_count)


def test_what_leaves_of_each_phase() -> None:
    patients = [f"p{i}" for i in range(12)]
    quality = [0.125] * 4 + [0.875] * 8
    data = summarise_data(
        patients, [True] * 4 + [False] * 8, {"tumour": [2.0] * 12}, {"unreadable": ["q"] * 9}
    )
    assert release(data, 3) == {
        "cases": 12,
        "patients": 12,
        "references": 4,
        "volume_ml.tumour.mean": 2.0,
        "volume_ml.tumour.sd": 0.0,
    }
    calibration = summarise_calibration(quality, [value + 0.0625 for value in quality], patients, 0.75)
    counts: dict[str, Any] = {name: release(calibration, 3)[name] for name in ("failures", "others")}
    assert release(calibration, 3) == counts | {
        "samples": 12,
        "r": 1.0,
        "mae": 0.0625,
        "rmse": 0.0625,
        "auroc": 1.0,
        "bias": -0.0625,
        "difference_sd": 0.0,
        "profile.labels": [3, -1, -1, -1, 9],
        "profile.predicted": [0.125, -1.0, -1.0, -1.0, 0.875],
        "profile.true": [0.188, -1.0, -1.0, -1.0, 0.938],
        "profile.sd": [0.0, -1.0, -1.0, -1.0, 0.0],
    }
    # nobody may know that the best failure is none of the good
    assert {name: (sum(told), told.index(sum(told))) for name, told in counts.items()} == {
        "failures": (4000, 99),
        "others": (8000, 0),
    }
    curation = summarise_curation(quality, {"tumour": quality}, [DROP] * 4 + [KEEP] * 8, patients)
    assert release(curation, 3) == {
        "candidates": 12,
        "curated": 1,
        "decisions.keep": 8,
        "decisions.drop": 4,
        "gatherings": 0,
        "quality": [-1, 4, -1, -1, -1, -1, -1, -1, 8, -1],
        "quality_mean": 0.625,
        "quality_sd": 0.369,
        "regions_mean.tumour": 0.625,
    }
    assert release(curation, 13) == {}


@steady
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 15))
def test_no_difference_of_totals_tells_of_too_few(
    n_references: int, n_candidates: int, min_count: int
) -> None:
    """References and candidates add up to the cases, though two phases tell them."""
    patients = [f"p{i}" for i in range(n_references + n_candidates)]
    reference = [index < n_references for index in range(len(patients))]
    data = release(summarise_data(patients, reference, {}, {}), min_count)
    scored = summarise_curation([0.9] * n_candidates, {}, [KEEP] * n_candidates, patients[n_references:])
    if "cases" in data and release(scored, min_count):
        assert n_references == 0 or n_references >= min_count
    if "cases" in data and "references" in data:
        assert n_candidates == 0 or n_candidates >= min_count
    groups = [size for size in (n_references, n_candidates) if size]
    assert ("cases" in data) == (groups != [] and min(groups) >= min_count)


# ------------------------------------------------------------------------------- labels of known quality


def spread(
    labels: list[tuple[int, int]], cautious: Any, n_bins: int = 8, *, total: int | None = None
) -> Spread:
    """Labels as (bin, patient), each patient coming to 1000 in all."""
    share = {patient: 1000 / sum(one == patient for _, one in labels) for _, patient in labels}
    return Spread(
        masses=tuple(
            round(sum(share[p] for place, p in labels if place == index)) for index in range(n_bins)
        ),
        owners=tuple(frozenset(str(p) for place, p in labels if place == index) for index in range(n_bins)),
        total_patients=len({p for _, p in labels}) if total is None else total,
        cautious=cautious,
    )


known = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 12)), min_size=1, max_size=50)


def test_labels_are_taken_together_until_there_are_patients_enough() -> None:
    one_each = [(0, 0), (1, 1), (1, 2), (2, 3), (5, 4), (6, 5)]
    # from the cautious end: 7, 6, 5 hold patients 4 and 5; 4 to 1 hold 1, 2 and 3; 0 joins them
    assert release({"x": spread(one_each, "up")}, 2) == {"x": [0, 0, 0, 0, 4000, 0, 0, 2000]}
    assert release({"x": spread(one_each, "down")}, 2) == {"x": [3000, 0, 3000, 0, 0, 0, 0, 0]}
    assert release({"x": spread(one_each, "up")}, 7) == {}
    assert release({"x": spread([], "up")}, 1) == {}


def test_a_few_patients_without_such_labels_are_not_told_of_either() -> None:
    """The masses add up to the patients who have some."""
    one_each = [(0, 0), (1, 1), (2, 2)]
    assert release({"x": spread(one_each, "up", total=4)}, 2) == {}
    assert release({"x": spread(one_each, "up", total=5)}, 2) != {}


@steady
@given(known, st.integers(1, 6), st.sampled_from(["up", "down"]))
def test_labels_only_move_to_the_cautious_end(
    labels: list[tuple[int, int]], min_count: int, cautious: Any
) -> None:
    whole = spread(labels, cautious)
    told = release({"x": whole}, min_count)
    if len({patient for _, patient in labels}) < min_count:
        assert told == {}
        return
    masses: Any = told["x"]
    assert sum(masses) == sum(whole.masses)
    before, after = (list(one) if cautious == "up" else list(one)[::-1] for one in (whole.masses, masses))
    for place in range(8):  # so many are at least as good as told, at most
        assert sum(after[place:]) >= sum(before[place:])


@steady
@given(known, st.integers(2, 6), st.sampled_from(["up", "down"]))
def test_no_count_of_labels_rests_on_fewer_patients(
    labels: list[tuple[int, int]], min_count: int, cautious: Any
) -> None:
    """Every number is told of at least `min_count` patients, and they reach to where the next one begins."""
    whole = spread(labels, cautious)
    told: Any = release({"x": whole}, min_count).get("x")
    if told is None:
        return
    places = [index for index in range(8) if told[index]]
    if cautious == "up":
        groups = zip([-1, *places[:-1]], places, strict=True)
        owners = [set().union(*whole.owners[low + 1 : high + 1]) for low, high in groups]
    else:
        groups = zip(places, [*places[1:], 8], strict=True)
        owners = [set().union(*whole.owners[low:high]) for low, high in groups]
    assert all(len(behind) >= min_count for behind in owners)


# Labels of known quality as (patient, predicted, true); many are perfect, as untouched ones are.
judged = st.lists(
    st.tuples(
        st.integers(0, 30),
        st.floats(0, 1),
        st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
    ),
    min_size=1,
    max_size=80,
)


@settings(steady, max_examples=300)
@example([(patient, 0.9, 1.0) for patient in range(12)] + [(12, 0.9, 0.5)], 4)
@example([(patient, 0.1, 0.0) for patient in range(12)] + [(12, 0.1, 0.6)], 4)
@example([(patient, 0.9, 0.8) for patient in range(12)] + [(12, 0.1, 0.1), (13, 0.3, 0.1)], 4)
@given(judged, st.integers(2, 6))
def test_a_profile_gives_no_mean_of_few_away(labels: list[tuple[int, float, float]], min_count: int) -> None:
    """Neither a bin's own, nor what is left of the mean over all labels, nor that of the imperfect ones."""
    owners, predicted, true = zip(*labels, strict=True)
    summary = summarise_calibration(predicted, true, [str(one) for one in owners], 0.75)
    told: Any = release(summary, min_count)
    in_bin = [sum(value >= edge for edge in (0.2, 0.4, 0.6, 0.8)) for value in predicted]
    if "profile.labels" not in told:
        assert not any(key.startswith("profile") for key in told)
        return
    hidden = {index for index, count in enumerate(told["profile.labels"]) if count == -1}
    for index in range(5):
        here = [number for number, place in enumerate(in_bin) if place == index]
        means = [told[f"profile.{name}"][index] for name in ("predicted", "true", "sd")]
        if index in hidden:
            assert means == [-1, -1, -1]
            continue
        assert len({owners[number] for number in here}) >= min_count
        imperfect = {owners[number] for number in here if true[number] < 1}
        not_all_wrong = {owners[number] for number in here if true[number] > 0}
        assert not imperfect or len(imperfect) >= min_count
        assert not not_all_wrong or len(not_all_wrong) >= min_count
        assert means[1] == pytest.approx(sum(true[number] for number in here) / len(here), rel=0.01)
        count = told["profile.labels"][index]
        assert count >= min_count
        assert count % min_count == 0
        assert abs(count - len(here)) <= min_count / 2
    # `bias` is told over all labels, and so the mean over those in the hidden bins follows.
    left = {owners[number] for number, place in enumerate(in_bin) if place in hidden}
    assert not left or len(left) >= min_count


# How many candidates, of as many patients, have which quality; below bin 7 they are dropped.
sizes = st.lists(st.one_of(st.just(0), st.integers(1, 9)), min_size=10, max_size=10).filter(any)


@settings(steady, max_examples=300)
@example([20, 1, 0, 0, 0, 0, 0, 5, 20, 0], 6)
@given(sizes, st.integers(2, 6))
def test_decisions_give_no_hidden_bin_away(counts: list[int], min_count: int) -> None:
    """Whoever knows the threshold knows which bins the dropped lie in, and what the hidden ones come to."""
    cases = [(place, f"{place}-{one}") for place, count in enumerate(counts) for one in range(count)]
    quality = [(place + 0.5) / 10 for place, _ in cases]
    outcomes = [DROP if place < 7 else KEEP for place, _ in cases]
    told: Any = release(summarise_curation(quality, {}, outcomes, [p for _, p in cases]), min_count)
    bins = told.get("quality")
    if bins is None:
        return
    for outcome, side in (("drop", range(7)), ("keep", range(7, 10))):
        if f"decisions.{outcome}" in told:
            hidden = [place for place in side if bins[place] == -1]
            left = told[f"decisions.{outcome}"] - sum(bins[place] for place in side if bins[place] != -1)
            behind = {patient for place, patient in cases if place in hidden}
            assert left == sum(place in hidden for place, _ in cases)
            assert left == 0 or len(behind) >= min_count


@steady
@example([12, 30, 5, 20, 15], 10)
@given(st.lists(st.integers(0, 9), min_size=5, max_size=5).filter(any), st.integers(2, 6))
def test_diagnoses_give_no_hidden_decision_away(counts: list[int], min_count: int) -> None:
    """Whoever adds up what is wrong with labels knows how many are not kept."""
    keep, review, drop, *kinds = counts
    # What is not kept is what there is of each kind: the second and third count share out their sum.
    outcomes = [KEEP] * keep + [REVIEW] * review + [DROP] * drop
    left = review + drop
    flips = min(left, kinds[0])
    diagnoses = [None] * keep + [Kind.FLIP] * flips + [Kind.SHIFT] * (left - flips)
    patients = [str(one) for one in range(len(outcomes))]
    if not outcomes:
        return
    summary = summarise_curation([0.5] * len(outcomes), {}, outcomes, patients, diagnoses=diagnoses)
    told: Any = release(summary, min_count)
    known = {key: value for key, value in told.items() if key.startswith("diagnosis.")}
    n_kinds = len(set(diagnoses) - {None})
    if known and keep:
        assert told["decisions.keep"] == keep
    hidden = left - sum(known.values())
    if 0 < len(known) < n_kinds:
        assert hidden >= min_count
    elif len(known) == n_kinds:
        assert hidden == 0
    if keep >= min_count and review >= min_count and flips >= min_count and left - flips >= min_count:
        assert n_kinds == len(known) or drop in range(1, min_count)


def test_every_candidate_has_its_diagnosis() -> None:
    with pytest.raises(DataError, match="diagnoses"):
        summarise_curation([0.5, 0.9], {}, [DROP, KEEP], ["a", "b"], diagnoses=[Kind.FLIP])


# ------------------------------------------------------------------------------------ drops by label size


def curated_by_size(*cells: tuple[int, int, int], min_count: int) -> dict[str, Any]:
    """What is told of sites with so many kept, dropped and to be reviewed of each size."""
    outcomes: list[Outcome] = []
    sizes: list[str] = []
    for size, counts in zip(SIZES, cells, strict=False):
        for outcome, count in zip((KEEP, DROP, REVIEW), counts, strict=True):
            outcomes += [outcome] * count
            sizes += [size] * count
    names = [f"p{index}" for index in range(len(outcomes))]
    summary = summarise_curation([0.5] * len(names), {}, outcomes, names, groups={SIZE: sizes})
    return dict(release(summary, min_count))


def not_kept(told: dict[str, Any]) -> dict[str, int]:
    return {key.partition(".")[2]: count for key, count in told.items() if key.startswith("not_kept.")}


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        (((12, 20, 0), (20, 12, 0), (15, 5, 12)), {"small": 20, "medium": 12, "large": 17}),
        # 9 of the large are kept, and follow from the size of a third: the next smallest goes too
        (((12, 20, 0), (20, 12, 0), (9, 23, 0)), {"medium": 12}),
        (((32, 0, 0), (20, 12, 0), (16, 16, 0)), {"large": 16}),
        # 5 to be reviewed are hidden among the dropped and the kept; those of all sizes would tell how many
        (((10, 30, 0), (10, 30, 0), (5, 30, 5)), {}),
    ],
)
def test_a_size_is_told_of_where_enough_are_kept_and_are_not(
    cells: tuple[tuple[int, int, int], ...], told: dict[str, int]
) -> None:
    assert not_kept(curated_by_size(*cells, min_count=10)) == told


cells_of_sizes = st.lists(st.tuples(*[st.integers(0, 12)] * 3), min_size=2, max_size=3).filter(
    lambda cells: sum(map(sum, cells)) > 0
)


@settings(steady, max_examples=300)
@example([(15, 30, 5), (15, 30, 0)], 10)
@given(cells_of_sizes, st.integers(2, 8))
def test_no_size_or_decision_follows_from_the_others(
    cells: list[tuple[int, int, int]], min_count: int
) -> None:
    """Whoever knows how large the groups are subtracts what is told from all that is not kept, and so on."""
    told = curated_by_size(*cells, min_count=min_count)
    by_size = not_kept(told)
    kept_in_all, out_in_all = sum(cell[0] for cell in cells), sum(sum(cell[1:]) for cell in cells)
    for size, cell in zip(SIZES, cells, strict=False):
        if size in by_size:
            assert by_size[size] == sum(cell[1:]) >= min_count
            assert cell[0] >= min_count
    hidden = [cell for size, cell in zip(SIZES, cells, strict=False) if size not in by_size and any(cell)]
    if by_size:
        assert told["decisions.keep"] == kept_in_all
        for group in (sum(cell[0] for cell in hidden), sum(sum(cell[1:]) for cell in hidden)):
            assert group == 0 or group >= min_count
        assert len(hidden) != 1
    assert out_in_all - sum(by_size.values()) == sum(sum(cell[1:]) for cell in hidden)


def test_gatherings_count_with_enough_patients_on_both_sides() -> None:
    def gathering(column: str, group: str, n: int) -> Gathering:
        return Gathering(
            column=column, group=group, n_cases=n, n_not_kept=n, n_others=1, n_others_not_kept=0, p_value=0.0
        )

    names = [f"p{index}" for index in range(20)]
    groups = {
        "scanner": ["old"] * 12 + ["new"] * 8,
        "centre": ["A"] * 4 + ["B"] * 16,
        "reader": ["X"] * 15 + ["Y"] * 5,
    }
    found = [gathering("scanner", "old", 12), gathering("centre", "A", 4), gathering("reader", "X", 12)]
    outcomes = [DROP] * 12 + [KEEP] * 8
    summary = summarise_curation([0.5] * 20, {}, outcomes, names, groups=groups, gathered=found)
    # 12 dropped and 8 others; 4 dropped and 16 others; 12 dropped and 5 others
    counts = {least: release(summary, least).get("gatherings") for least in (4, 5, 6, 9, 20, 21)}
    assert counts == {4: 3, 5: 2, 6: 1, 9: 0, 20: 0, 21: None}
    assert not any("scanner" in key or "old" in key for key in release(summary, 1))
