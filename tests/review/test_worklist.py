import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedqc.cases.layouts import read_ids
from fedqc.config import load_site
from fedqc.curation.manifest import Overruled, overrule, read_manifest
from fedqc.curation.rules import Outcome
from fedqc.curation.self_test import KnownLabel, SelfTest, write_self_test
from fedqc.errors import ConfigError, DataError
from fedqc.reports.looks import CONTOURS
from fedqc.review.worklist import Worklist, expected_gain
from fedqc.task import load_task

ODD = "<b>odd</b> & 'case'"


def test_what_is_nearest_to_turning_over_comes_first(worklist: Worklist) -> None:
    # near is probably good and not kept; odd is hardly below the bound; bad and good are beyond doubt
    assert worklist.ids == ["near", ODD, "good", "bad"]
    gains = [case["gain"] for case in worklist.overview()["cases"]]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 0.5 > gains[1] > 0.2
    assert gains[3] < 0.01


def test_the_gain_is_the_share_of_known_errors_that_would_turn_a_decision_over(
    worklist: Worklist, site: Path
) -> None:
    manifest = read_manifest(load_site(site).results / "manifest.json")
    entries = {entry.id: entry for entry in manifest.entries}
    errors = np.array([-0.1, 0.0, 0.1, 0.3])  # predicted minus true
    assert expected_gain(entries["good"], 0.75, errors) == 0.25  # 0.97 - 0.3 is below
    assert expected_gain(entries["near"], 0.75, errors) == 0.5  # 0.88 and 0.78 are good after all
    assert expected_gain(entries["bad"], 0.75, errors) == 0
    seen = Overruled(decision=Outcome.KEEP, by="x", when="2026-03-01")
    assert expected_gain(entries["near"].model_copy(update={"overruled": seen}), 0.75, errors) == 0


def test_errors_are_those_of_the_sites_own_labels_of_known_quality(site: Path) -> None:
    config = load_site(site)
    labels = tuple(KnownLabel(patient=str(i), true=0.5, predicted=0.9) for i in range(5))  # far too high
    write_self_test(config.results / "self_test.json", SelfTest(key="a" * 64, labels=labels))
    worklist = Worklist(config, load_task(config.task), by="x")
    assert worklist.ids[0] == "good"
    assert worklist.overview()["cases"][0]["gain"] == 1


def test_overview_says_what_the_run_was(worklist: Worklist) -> None:
    seen = worklist.overview()
    assert {key: seen[key] for key in ("site", "federation", "method", "rule", "threshold", "suspended")} == {
        "site": "hospital-a", "federation": "balls-2026", "method": "qcresunet", "rule": "threshold",
        "threshold": 0.75, "suspended": None,
    }  # fmt: skip
    assert seen["warnings"][0].startswith("scanner 'old': 3 of 4 cases are not kept")
    assert [(one["name"], one["values"]) for one in seen["classes"]] == [("core", [1]), ("rim", [2, 4])]
    assert [one["color"] for one in seen["classes"]] == [color for color, _ in CONTOURS[:2]]  # as in pictures
    json.dumps(seen)


def test_a_case_has_its_volumes_in_the_order_of_the_task(worklist: Worklist, site: Path) -> None:
    assert [one["name"] for one in worklist.case(0)["volumes"]] == ["t1", "t2", "label", "errors"]
    assert worklist.case(0)["volumes"][0]["file"] == "t1.nii.gz"
    assert worklist.case(0)["interval"] == (0.78 - 0.1, 0.88)
    assert worklist.case(0)["diagnosis"] is None
    assert worklist.volume(0, "label") == site.parent / "data" / "1-label.nii.gz"
    assert worklist.volume(0, "errors") == site.parent / "results" / "error_maps" / "near.nii.gz"
    assert worklist.volume(0, "t3") is None
    volumes = worklist.case(2)["volumes"]
    assert volumes[-1] == {"name": "errors-rim", "kind": "errors", "file": "errors-rim.nii.gz"}
    assert [one["kind"] for one in volumes] == ["image", "image", "label", "errors", "errors"]
    assert worklist.volume(2, "errors-rim") == site.parent / "results" / "error_maps" / "rim" / "good.nii.gz"
    assert [one["name"] for one in worklist.case(1)["volumes"]] == [
        "t1",
        "t2",
        "label",
    ]  # no map of that name
    for number in (-1, 4):
        with pytest.raises(IndexError):
            worklist.case(number)


def test_a_case_says_what_is_probably_wrong(worklist: Worklist) -> None:
    assert worklist.case(worklist.ids.index("bad"))["diagnosis"] == (
        "Probably: moved by 2.0 mm to the left; to mend it, move it by 2.0 mm to the right; the predicted "
        "DSC would then be 0.93"
    )


def test_a_decision_is_on_disk_at_once(worklist: Worklist, site: Path) -> None:
    case = worklist.decide(3, "keep", "I know this patient", seen(worklist))
    assert (case["outcome"], case["decision"], case["gain"]) == ("keep", "drop", 0)
    path = load_site(site).results / "manifest.json"
    (entry,) = (entry for entry in read_manifest(path).entries if entry.id == "bad")
    assert entry.overruled is not None
    assert (entry.overruled.by, entry.overruled.reason) == ("Dr. Doe", "I know this patient")
    assert worklist.ids[3] == "bad"  # the list does not move under the hand
    again = Worklist(load_site(site), load_task(load_site(site).task), by="x")
    assert next(one for one in again.overview()["cases"] if one["id"] == "bad")["outcome"] == "keep"
    assert worklist.decide(3, None, "", seen(worklist))["overruled"] is None


def seen(worklist: Worklist) -> str:
    return str(worklist.case(3)["seen"])


def changed(where: Path, **values: Any) -> None:
    path = load_site(where).results / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_was_not_looked_at_is_not_decided(worklist: Worklist, site: Path) -> None:
    before = seen(worklist)
    changed(site, created="2026-03-02T12:30:00+00:00")  # the site has scored its cases anew
    with pytest.raises(DataError, match="scored its cases anew since this one was opened"):
        worklist.decide(3, "keep", "", before)
    assert worklist.overview()["created"].startswith("2026-03-02")
    assert worklist.decide(3, "keep", "", seen(worklist))["outcome"] == "keep"


def test_a_label_that_changed_since_it_was_scored_is_not_decided_about(
    worklist: Worklist, site: Path
) -> None:
    label = worklist.volume(3, "label")
    assert label is not None
    label.write_bytes(label.read_bytes() + b"\0")
    with pytest.raises(DataError, match="has changed since it was scored"):
        worklist.decide(3, "keep", "", seen(worklist))
    assert worklist.case(3)["overruled"] is None


def test_a_decision_made_elsewhere_is_seen(worklist: Worklist, site: Path) -> None:
    config = load_site(site)
    overrule(config.results, load_task(config.task), "bad", "keep", by="another", reason="")
    assert worklist.overview()["cases"][3]["overruled"]["by"] == "another"
    assert worklist.case(3)["outcome"] == "keep"


def test_other_cases_meanwhile_are_told(worklist: Worklist, site: Path) -> None:
    path = load_site(site).results / "manifest.json"
    changed(site, entries=json.loads(path.read_text())["entries"][:1])
    for ask in (worklist.overview, lambda: worklist.case(0), lambda: worklist.decide(3, "keep", "", "x")):
        with pytest.raises(DataError, match="stop fedqc review and start it again"):
            ask()


def test_a_manifest_of_another_site_is_refused(site: Path) -> None:
    changed(site, site="hospital-b")
    config = load_site(site)
    with pytest.raises(DataError, match="is of site 'hospital-b'"):
        Worklist(config, load_task(config.task), by="x")


def test_a_draw_is_random_and_the_next_one_begins_with_it(site: Path) -> None:
    config = load_site(site)
    task = load_task(config.task)
    draws = [Worklist(config, task, by="x", pick=count).ids for count in (1, 2, 3, 9)]
    assert [len(ids) for ids in draws] == [1, 2, 3, 4]
    assert all(draws[3][: len(ids)] == ids for ids in draws)
    elsewhere = set()
    for name in "bcdefg":
        changed(site, site=name)
        elsewhere.add(tuple(Worklist(config.model_copy(update={"name": name}), task, by="x", pick=4).ids))
    assert len(elsewhere) > 2


def test_drawn_labels_that_a_person_keeps_are_listed_as_references(site: Path) -> None:
    (site.parent / "known.csv").write_text("id\nold\n")
    site.write_text(site.read_text() + 'reference = "known.csv"\n')
    config = load_site(site)
    worklist = Worklist(config, load_task(config.task), by="x", pick=3)
    assert worklist.overview()["is_pick"]
    for number, choice in enumerate(("keep", "drop", "keep")):
        worklist.decide(number, choice, "", str(worklist.case(number)["seen"]))  # type: ignore[arg-type]
    assert read_ids(config.results / "verified.csv") == {"old", worklist.ids[0], worklist.ids[2]}
    worklist.decide(0, None, "", str(worklist.case(0)["seen"]))
    assert read_ids(config.results / "verified.csv") == {"old", worklist.ids[2]}
    (site.parent / "known.csv").write_text((config.results / "verified.csv").read_text())  # as it is told
    fewer = Worklist(config, load_task(config.task), by="x", pick=1)
    fewer.decide(0, "keep", "", str(fewer.case(0)["seen"]))
    assert read_ids(config.results / "verified.csv") == {"old", worklist.ids[0], worklist.ids[2]}
    worklist.decide(2, "drop", "", str(worklist.case(2)["seen"]))
    assert read_ids(config.results / "verified.csv") == {"old", worklist.ids[0]}


def test_a_verified_label_that_is_not_kept_any_more_is_no_reference_either(site: Path) -> None:
    config = load_site(site)
    task = load_task(config.task)
    worklist = Worklist(config, task, by="Dr. Doe", pick=3)
    for number in range(3):
        worklist.decide(number, "keep", "", worklist.case(number)["seen"])
    first, second, third = worklist.ids
    overrule(config.results, task, first, "drop", by="Dr. Roe", reason="")  # fedqc manifest overrule
    assert read_ids(config.results / "verified.csv") == {second, third}
    everything = Worklist(config, task, by="Dr. Doe")
    number = everything.ids.index(second)
    everything.decide(number, "drop", "", everything.case(number)["seen"])
    assert read_ids(config.results / "verified.csv") == {third}
    overrule(config.results, task, third, None, by="Dr. Roe", reason="")
    assert read_ids(config.results / "verified.csv") == frozenset()


@pytest.mark.parametrize("by", ["", "x" * 201])
def test_nobody_is_called_that(site: Path, by: str) -> None:
    config = load_site(site)
    with pytest.raises(ConfigError, match="--by: by: string should have at"):
        Worklist(config, load_task(config.task), by=by)


def test_a_site_that_has_not_scored_has_nothing_to_review(site: Path) -> None:
    config = load_site(site)
    (config.results / "manifest.json").unlink()
    with pytest.raises(DataError, match="score the site's cases first"):
        Worklist(config, load_task(config.task), by="x")
