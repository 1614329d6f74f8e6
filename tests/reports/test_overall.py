import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedqc.reports.overall import overall_section
from fedqc.reports.page import Figure, Note, Section, Table
from fedqc.reports.record import read_run

Change = Callable[..., None]
pytestmark = pytest.mark.usefixtures("no_drawing")

AGREEMENT = "Predicted against known quality, all sites together"
RISK = "How many failures are among what is kept"


def parts(section: Section) -> dict[str, Any]:
    return {part.title: part for part in section.parts if isinstance(part, Figure | Table)}


def values(run_folder: Path) -> dict[str, str]:
    """The table of the section."""
    (table,) = (part for part in overall_section(read_run(run_folder)).parts if isinstance(part, Table))
    return {row[0]: row[1] for row in table.rows}


def test_three_sites_alike_are_as_one(run_folder: Path) -> None:
    found = parts(overall_section(read_run(run_folder)))
    rows = found[AGREEMENT].numbers.rows
    # Nothing is between the sites; n - 1 is 23 instead of three times 7, and so on.
    poor, fair = 0.08 * math.sqrt(21 / 23), 0.06 * math.sqrt(33 / 35)
    assert rows[:3] == (
        ("all sites", 0.2, 0.4, 24, pytest.approx(0.25), pytest.approx(0.31), -0.06, pytest.approx(poor)),
        ("all sites", 0.6, 0.8, 36, pytest.approx(0.7), pytest.approx(0.72), -0.02, pytest.approx(fair)),
        ("all sites", 0.8, 1.0, 24, pytest.approx(0.95), pytest.approx(0.96), -0.01, None),
    )
    assert [row[0] for row in rows[3:]] == ["north"] * 3 + ["south"] * 3 + ["west"] * 3


def test_table_by_hand(run_folder: Path) -> None:
    found = values(run_folder)
    assert found["labels judged"] == "90"
    assert found["bias: predicted minus true DSC, mean"] == "-0.020"
    # a standard deviation of 0.06 in each of three groups of 30: 0.06 times the root of 87 / 89
    assert found["its standard deviation"] == "0.059"
    assert found["lower limit of agreement"] == "-0.136"
    assert found["upper limit of agreement"] == "+0.096"
    # (24 * 0.06 + 36 * 0.02 + 24 * 0.01) / 84
    assert found["calibration error: mean distance from the line"] == "0.029"
    # 9 of 19 patients are failures
    assert found["AURC of one that knows nothing"] == "0.474"
    assert float(found["AURC of this model, at best"]) < float(found["AURC of this model, at worst"])


def test_risk_by_hand(run_folder: Path) -> None:
    numbers = parts(overall_section(read_run(run_folder)))[RISK].numbers
    by_threshold = {row[0]: dict(zip(numbers.columns, row, strict=True)) for row in numbers.rows}
    at = by_threshold[0.75]  # failures at 0.2 and 0.74 are below, of the others those at 0.7
    assert (at["share of the failures below, at worst"], at["share of the others below, at worst"]) == (
        1,
        0.4,
    )
    assert (at["coverage, at worst"], at["risk, at worst"]) == (round(6 / 19, 6), 0)
    assert by_threshold[0.72]["share of the failures below, at worst"] == round(5 / 9, 6)
    assert by_threshold[0.72]["share of the failures below, at best"] == 1
    assert by_threshold[0.72]["risk, at worst"] == round(4 / 10, 6)
    assert by_threshold[1.0]["risk, at worst"] is None


def test_what_nobody_moved_has_no_band(run_folder: Path, change: Change) -> None:
    assert "the bands reach to the best" in parts(overall_section(read_run(run_folder)))[RISK].caption
    change("run.json", ("config", "privacy", "min_count"), 1)
    found = parts(overall_section(read_run(run_folder)))
    assert "bands" not in found[RISK].caption
    assert {"AURC of this model", "AURC of the best possible one"} <= values(run_folder).keys()


def test_suspected_sites_have_no_part(run_folder: Path, change: Change) -> None:
    found = {"west": {"quality": 0.62, "others": 0.93, "references": 17}}
    change("statistics.json", ("suspected",), found)
    rows = parts(overall_section(read_run(run_folder)))[AGREEMENT].numbers.rows
    assert {row[0] for row in rows} == {"all sites", "north", "south"}
    assert values(run_folder)["labels judged"] == "60"


def test_what_sites_may_not_tell_is_left_out(run_folder: Path, change: Change) -> None:
    for site in ("north", "south", "west"):
        change("statistics.json", ("sites", site, "calibrate"), {"samples": 5})
    change("statistics.json", ("calibration",), {"failures": [0] * 100, "others": [0] * 100})
    (note,) = overall_section(read_run(run_folder)).parts
    assert isinstance(note, Note)
    assert "each has fewer than 4 patients" in note.text


@pytest.mark.parametrize("hidden", ["profile", "counts"])
def test_either_half_stands_alone(run_folder: Path, change: Change, hidden: str) -> None:
    told: dict[str, Any] = {"samples": 30, "bias": -0.02, "difference_sd": 0.06}
    if hidden == "profile":
        for site in ("north", "south", "west"):
            change("statistics.json", ("sites", site, "calibrate"), told)
    else:
        change("statistics.json", ("calibration",), {"failures": [0] * 100, "others": [0] * 100})
    found = parts(overall_section(read_run(run_folder)))
    assert (AGREEMENT in found, RISK in found) == (hidden == "counts", hidden == "profile")
    assert values(run_folder)["labels judged"] == "90"
    assert ("AURC of one that knows nothing" in values(run_folder)) == (hidden == "profile")
