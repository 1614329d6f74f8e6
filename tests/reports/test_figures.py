import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from fedqc.metrics.agreement import LimitsOfAgreement
from fedqc.reports import figures
from fedqc.reports.figures import Curve, Dot, KindMeans, Points
from fedqc.statistics.pooled import ProfileBin, RiskCoverage

POOLED = [ProfileBin(0.2, 0.4, 10, 0.3, 0.35, 0.1), ProfileBin(0.8, 1.0, 30, 0.9, 0.88, None)]
CURVE = RiskCoverage(np.linspace(5, 0, 101), np.linspace(9, 0, 101) ** 0.5)
POINTS = Points("kept", [0.1, 0.9], [0.2, 0.8], figures.BLUE, "o")
DRAWINGS: dict[str, Callable[[], str]] = {
    "histograms": lambda: figures.quality_histograms(
        {"north": [-1, -1, 3, 0, 0, 0, 0, 0, 2, 9], "south": [0] * 9 + [4], "west": [1] * 10},
        threshold=0.75,
        keep_from=0.8,
    ),
    "decisions": lambda: figures.decision_bars(
        {"north": {"keep": 5, "review": 2, "drop": 3}, "south": {"keep": 9, "review": None, "drop": None}}
    ),
    "scatter": lambda: figures.scatter_panels([("all", POINTS)]),
    "quality map": lambda: figures.quality_map(
        {"north": [-1, 3, 0, 0, 0, 0, 0, 0, 2, 9], "south": [0] * 9 + [4]},
        [15, 4],
        threshold=0.75,
        keep_from=0.8,
    ),
    "counts": lambda: figures.count_map(
        {"north": [3, None], "south": [None, 40]}, ["empty label", "missing file"], "cases"
    ),
    "agreement": lambda: figures.agreement_panels(
        POOLED, [*POOLED, *POOLED], LimitsOfAgreement(40, -0.02, 0.1, -0.216, 0.176)
    ),
    "risk": lambda: figures.risk_coverage(CURVE, CURVE, 0.75),
    "risk without failures": lambda: figures.risk_coverage(
        RiskCoverage(np.zeros(101), CURVE.others), RiskCoverage(np.zeros(101), CURVE.others), None
    ),
    "candidates": lambda: figures.candidates([POINTS], 0.75, {"north": ([0.9, 0.95], [0.1])}),
    "kinds": lambda: figures.kinds(
        [KindMeans("shift", False, 0.5, 0.6, 0.1), KindMeans("flip", True, 0, 0, 0)]
    ),
    "dots": lambda: figures.dot_panels(
        [("r", [Dot("north", 0.9, 0.8, 0.95, small=(0.85,)), Dot("south", None, note="n = 3")], (0, 1))],
        [("site", figures.BLUE, "o")],
    ),
    "strips": lambda: figures.strips(
        [("ml", {"core": [0.5, 2.0, 40.0], "rim": []}), ("voxels", {"core": [16] * 3, "rim": [1]})]
    ),
    "bands": lambda: figures.intensity_bands(
        {"T1": [(0.0, 40.0, 99.0), (-2.0, 0.01, 3.0), (9.0, 2e5, 3e5)], "T2": [(1.0, 2.0, 3.0)]}
    ),
    "labels": lambda: figures.label_histograms(
        {"north": ([0, 30, 10], [12, 14, 14]), "south": ([0, 0, 0], [0, 0, 0])}
    ),
    "losses": lambda: figures.loss_curves(
        [Curve("QC", [1, 2], [0.9, None], {"north": [0.9, None]}, failed=[2])]
    ),
    "losses of many": lambda: figures.loss_curves(
        [Curve("QC", [1, 2, 3], [0.9, None, 0.5], {str(one): [0.9, None, one / 30] for one in range(30)})]
    ),
    "dots with a line": lambda: figures.dot_panels(
        [("MAE", [Dot("north", 0.1), Dot("south", 0.2, color=figures.VERMILLION, marker="X")], (0, 0.1))],
        lines={"MAE": (0.3, "at most 0.3")},
    ),
    "times": lambda: figures.time_bars(
        [("train.qc", 300.0, "5 min"), ("arm random", 60.0, "60 s")], others="arm "
    ),
}
EACH = pytest.mark.parametrize("name", DRAWINGS)


@cache
def drawing(name: str) -> str:
    return DRAWINGS[name]()


@EACH
def test_is_svg_of_text_and_shapes_only(name: str) -> None:
    root = ElementTree.fromstring(drawing(name))
    tags = {element.tag.removeprefix("{http://www.w3.org/2000/svg}") for element in root.iter()}
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "text" in tags
    assert tags <= {"svg", "g", "defs", "path", "use", "text", "tspan", "clipPath", "rect", "pattern"}


@EACH
def test_every_id_is_there_once_and_used(name: str) -> None:
    svg = drawing(name)
    ids = re.findall(r'\bid="([^"]+)"', svg)
    used = {name for pair in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg) for name in pair if name}
    assert len(ids) == len(set(ids))
    assert set(ids) == used


@EACH
def test_same_numbers_same_bytes_whatever_the_users_settings(name: str) -> None:
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}):
        assert DRAWINGS[name]() == drawing(name)


@EACH
def test_no_number_is_drawn_that_is_none(name: str) -> None:
    assert "nan" not in drawing(name).lower()


def test_ids_can_be_told_apart() -> None:
    svg = drawing("scatter")
    one, other = figures.with_prefix(svg, "one"), figures.with_prefix(svg, "other")
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert all(f"#{name}" in one for name in ids[0])


def test_hidden_bins_are_hatched_and_explained() -> None:
    shown = figures.quality_histograms({"a": [0] * 9 + [5]}, threshold=0.75, keep_from=0.75)
    hidden = figures.quality_histograms({"a": [-1, -1] + [0] * 7 + [5]}, threshold=0.75, keep_from=0.75)
    assert "<pattern" not in shown
    assert "not told" not in shown
    assert hidden.count("fill: url(#") == 2 + 1  # two bins and the legend
    assert "not told" in hidden


def test_review_band_has_a_line_of_its_own() -> None:
    counts = {"a": [0] * 9 + [5]}
    assert "kept from 0.8" in figures.quality_histograms(counts, threshold=0.75, keep_from=0.8)
    assert "kept from" not in figures.quality_histograms(counts, threshold=0.75, keep_from=0.75)


def test_decisions_that_are_not_told_say_so() -> None:
    told = figures.decision_bars({"a": {"keep": 5, "review": 0, "drop": 2}})
    not_told = figures.decision_bars({"a": {"keep": None, "review": None, "drop": None}})
    in_part = figures.decision_bars({"a": {"keep": 5, "review": None, "drop": None}})
    assert ["not told" in svg for svg in (told, not_told, in_part)] == [False, True, True]
    assert "some groups not told" in in_part


def test_names_are_no_markup_no_formula_and_not_too_long() -> None:
    svg = figures.decision_bars(
        {"a<b & $x$": {"keep": 1, "review": 0, "drop": 0}, "n" * 30 + "end": {"keep": 1}}
    )
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]
    assert "a<b & $x$" in texts
    (long,) = [text for text in texts if text and text.endswith("end")]
    assert len(long) == 26


def test_of_many_cases_the_outer_ones_have_marks() -> None:
    marks = figures.strips([("ml", {"core": list(range(1000))})]).count("<use")
    few = figures.strips([("ml", {"core": list(range(100))})]).count("<use")
    assert marks - few == figures.MOST_MARKS - 100


def test_numbers_far_apart_are_written_out() -> None:
    svg = figures.strips([("ml", {"core": [0.02, 30000.0]})])
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]
    assert "10\u202f000" in texts
    assert not any("$" in (text or "") or "e+" in (text or "") for text in texts)


def test_a_map_is_darker_where_more_of_a_sites_own_lie() -> None:
    def fills(counts: list[int], total: int) -> Counter[str]:
        svg = figures.quality_map({"a": counts}, [total], threshold=None, keep_from=None)
        return Counter(re.findall(r"fill: (#\w+|url)", svg))

    halves, few = fills([5, 5], 10), fills([5, 5], 1000)
    assert [*(halves - few).values()] == [2]  # bins of one shade, which is that of 50 % in the legend
    assert (halves - few).keys() < few.keys()
    assert halves == fills([50, 50], 100)
    assert fills([-1, 5], 10)["url"] == halves["url"] + 1


def test_counts_stand_in_their_fields() -> None:
    root = ElementTree.fromstring(drawing("counts"))
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"3", "40", "empty label", "missing file", "north", "south"} <= set(texts)


def test_limits_stand_at_their_lines() -> None:
    with_limits = drawing("agreement")
    assert all(text in with_limits for text in ("-0.02", "-0.22", "+0.18", "limits of agreement"))
    assert "limits of agreement" not in figures.agreement_panels(POOLED, [], None)


def test_many_sites_are_a_band_and_few_are_lines() -> None:
    assert "middle 80 % of the sites" in drawing("losses of many")
    assert "one site" not in drawing("losses of many")
    assert "one site" in drawing("losses")
    assert "all sites" not in drawing("losses")


def test_forty_rows_still_fit_on_a_page() -> None:
    svg = figures.dot_panels([("r", [Dot(str(number), 0.5) for number in range(40)], None)])
    height = float(re.findall(r'height="([\d.]+)pt"', svg)[0]) / 72
    assert height < 10.5
