import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedqc.reports import figures
from fedqc.reports.build import build_coordinator_report, coordinator_sections
from fedqc.reports.page import Figure, Headline, Note, Section, Table, write_report
from fedqc.reports.record import decisions, read_run

Change = Callable[..., None]
ReadPage = Callable[[Path], Any]
SECTIONS = [
    "consortium",
    "quality",
    "overall",
    "references",
    "calibration",
    "segmentation",
    "training",
    "faults",
    "time",
    "files",
]
# What is said, without the time that drawing takes.
TEXT_ONLY = pytest.mark.usefixtures("no_drawing")


def tone(path: Path) -> str:
    found = re.search(r'<header id="top" class="(\w+)">', path.read_text(encoding="utf-8"))
    assert found
    return found[1]


def section_text(path: Path, slug: str) -> str:
    html = path.read_text(encoding="utf-8")
    found = re.search(rf'<section id="{slug}".*?</section>', html, re.DOTALL)
    assert found
    return re.sub(r"<style.*?</style>|<[^>]+>", " ", found[0])


# ------------------------------------------------------------------------------------------- complete data


def test_complete_run_has_every_section_with_its_figure(run_folder: Path) -> None:
    sections = {section.slug: section for section in coordinator_sections(read_run(run_folder))}
    assert list(sections) == SECTIONS
    kinds = {slug: [part.kind for part in section.parts] for slug, section in sections.items()}
    with_figure = {slug for slug, parts in kinds.items() if "figure" in parts}
    assert with_figure == set(SECTIONS) - {"faults", "files"}
    figures = [part for section in sections.values() for part in section.parts if isinstance(part, Figure)]
    assert all(figure.caption and figure.title for figure in figures)


def test_page_is_whole_self_contained_and_holds_no_image(run_folder: Path, read_page: ReadPage) -> None:
    path = build_coordinator_report(run_folder)
    assert path == run_folder / "report.html"
    page = read_page(path)
    assert len(page.ids) == len(set(page.ids))
    assert not {"img", "image", "script", "iframe"} & set(page.tags)
    assert "data:image" not in path.read_text(encoding="utf-8")
    inside = [link for link in page.links if link.startswith("#")]
    assert {link.removeprefix("#") for link in inside} <= set(page.ids)
    beside = set(page.links) - set(inside) - {"data:,"}
    assert beside == {f"report/{file.name}" for file in (run_folder / "report").glob("*.csv")}
    assert "http" not in re.sub(r'xmlns="[^"]+"', "", path.read_text(encoding="utf-8"))
    assert not re.search(r"\b(nan|None|undefined)\b", page.text)


@TEXT_ONLY
def test_headline_counts_over_the_sites(run_folder: Path, read_page: ReadPage) -> None:
    text = read_page(build_coordinator_report(run_folder)).text
    assert "All 3 sites judged their annotations: of 60, 24 are dropped and 36 kept." in text
    assert "3 of 4" in text
    assert "its task is another one" in text


def test_equal_input_gives_equal_bytes(run_folder: Path) -> None:
    first = build_coordinator_report(run_folder).read_bytes()
    assert build_coordinator_report(run_folder).read_bytes() == first


@TEXT_ONLY
def test_run_without_a_fault_is_good_and_says_none(run_folder: Path, change: Change) -> None:
    (run_folder / "events.jsonl").write_text("")
    change("run.json", ("sites", "left_out"), {})
    path = build_coordinator_report(run_folder)
    assert tone(path) == "good"
    assert "No fault: every site answered every request." in section_text(path, "faults")


# --------------------------------------------------------------------------------------- runs that ended


@TEXT_ONLY
@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        ("failed", "The run failed in phase train.qc, round 2 of 3."),
        ("interrupted", "The run was interrupted in phase train.qc, round 2 of 3."),
        ("running", "The run has not ended: it is still at work in phase train.qc, round 2 of 3"),
    ],
)
def test_run_that_did_not_complete_says_so(
    run_folder: Path, change: Change, read_page: ReadPage, outcome: str, verdict: str
) -> None:
    change("run.json", ("outcome",), outcome)
    change("run.json", ("reason",), "train.qc: 1 sites answered, sites.minimum is 2")
    change("statistics.json", ("sites",), {})
    change("statistics.json", ("suspected",), None)
    path = build_coordinator_report(run_folder)
    text = read_page(path).text
    assert tone(path) == "bad"
    assert verdict in text
    assert "Reason: train.qc: 1 sites answered, sites.minimum is 2." in text
    assert "No site has judged its annotations yet." in text
    for slug in ("quality", "references", "calibration", "segmentation"):
        assert verdict[:20] in section_text(path, slug)


@TEXT_ONLY
def test_folder_without_anything_still_gets_a_report(tmp_path: Path, read_page: ReadPage) -> None:
    page = read_page(build_coordinator_report(tmp_path))
    assert "There is no run.json" in page.text
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS


@TEXT_ONLY
def test_half_an_event_is_no_obstacle(run_folder: Path) -> None:
    with (run_folder / "events.jsonl").open("a") as file:
        file.write('{"event": "site-fai')
    assert read_run(run_folder).last_round == (2, 3)


@TEXT_ONLY
def test_labels_that_were_trained_on(
    run_folder: Path, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []

    def draw(sites: Any) -> str:
        drawn.append(sites)
        return "<svg></svg>"

    monkeypatch.setattr(figures, "label_histograms", draw)
    path = build_coordinator_report(run_folder)
    assert "learned from" not in section_text(path, "training")  # nobody told
    labels = {"made": [-1, 4, *[2] * 8], "chosen": [2] * 10, "sources.seggen": 15, "sources.snapshots": 5}
    train = json.loads((run_folder / "statistics.json").read_text())["train"]
    for number, one in enumerate(train["qc"]):
        one["sites"]["north"]["labels"] = labels
        if number:
            one["sites"]["south"]["labels"] = {"sources.untouched": 10}  # no bin may be told
    change("statistics.json", ("train",), train)
    text = section_text(build_coordinator_report(run_folder), "training")
    assert drawn == [{"north": ([0, 12, *[6] * 8], [6] * 10)}]
    assert "Sources: seggen 56%, untouched 25% and snapshots 19%." in text


@TEXT_ONLY
def test_phase_that_every_site_failed_says_why(run_folder: Path, change: Change) -> None:
    for site in ("north", "south", "west"):
        change("statistics.json", ("sites", site, "calibrate"), None)
    change("statistics.json", ("failed",), {"calibrate": {"north": "late", "south": "late"}})
    text = section_text(build_coordinator_report(run_folder), "calibration")
    assert "No site answered in phase calibrate (2 sites: no answer came before the deadline)" in text


# ------------------------------------------------------------------------------------------------- faults


@TEXT_ONLY
def test_faults_stand_with_site_phase_rounds_and_reason(run_folder: Path, add_event: Change) -> None:
    for number in (3, 4, 5, 9):
        add_event("site-failed", site="west", phase="train.qc", round=number, reason="not-finite")
    add_event("site-out", site="west", phase="train.qc", round=5, reason="not-finite")
    add_event(
        "site-excused", site="south", phase="train.segmentation", reason="takes-no-part", meaning="it may"
    )
    text = " ".join(section_text(build_coordinator_report(run_folder), "faults").split())
    assert "west train.qc 3 to 5, 9 gave no usable answer its weights or its loss are not finite" in text
    assert "west train.qc 5 out of this phase after three rounds in a row without it" in text
    assert "south train.segmentation - takes no part in this phase, no fault of its own it may" in text


def test_texts_from_outside_are_no_markup(
    run_folder: Path, add_event: Change, change: Change, read_page: ReadPage
) -> None:
    evil = "<script>alert(1)</script>"
    add_event("site-failed", site=evil, phase="train.qc", round=1, reason=evil)
    change("run.json", ("sites", "left_out"), {evil: evil})
    change("run.json", ("federation",), evil)
    change("run.json", ("reason",), evil)
    change("run.json", ("outcome",), "failed")
    change("run.json", ("sites", "joined"), ["north", "south", "west", evil])
    change("statistics.json", ("sites", evil), {"score": {"candidates": 9, "decisions.keep": 9}})
    page = read_page(build_coordinator_report(run_folder))
    assert "script" not in page.tags
    assert page.text.count("alert(1)") >= 5


# ------------------------------------------------------------------------------------------ what is hidden


def test_decision_that_nobody_has_is_zero_and_a_hidden_one_is_not() -> None:
    assert decisions({"candidates": 9, "decisions.keep": 9}) == {"keep": 9, "review": 0, "drop": 0}
    assert decisions({"candidates": 9, "decisions.keep": 5}) == {"keep": 5, "review": None, "drop": None}
    assert decisions({}) == {"keep": None, "review": None, "drop": None}


@TEXT_ONLY
def test_hidden_numbers_are_dashes_with_the_reason(run_folder: Path, change: Change) -> None:
    change("statistics.json", ("sites", "north", "score"), {"candidates": 20, "decisions.keep": 15})
    path = build_coordinator_report(run_folder)
    text = " ".join(section_text(path, "quality").split())
    assert "north 20 15 - - 75 % (53 to 89) - -" in text
    assert "fewer than 4 patients" in text
    assert "north may not tell any bin." in text
    html = path.read_text(encoding="utf-8")
    assert "of at least 55, at least 16 are dropped" in html


def test_hidden_bins_are_drawn_as_such(run_folder: Path, change: Change) -> None:
    change("statistics.json", ("sites", "north", "score", "quality"), [8, -1, -1, 0, 0, 0, 0, 0, 0, 9])
    assert "not told: few" in build_coordinator_report(run_folder).read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------- what stands out


@TEXT_ONLY
def test_suspected_site_is_named_with_its_figures(run_folder: Path, change: Change) -> None:
    found = {"west": {"quality": 0.62, "others": 0.93, "references": 17}}
    change("statistics.json", ("suspected",), found)
    change("statistics.json", ("sites", "west", "calibrate"), None)
    path = build_coordinator_report(run_folder)
    text = section_text(path, "references")
    assert tone(path) == "caution"
    assert "The references of west look wrong." in text
    assert "its 17 references have a mean predicted DSC of 0.62, those of the other sites 0.93" in text
    assert "west calibrates nothing" in section_text(path, "calibration")


@TEXT_ONLY
def test_checked_and_unchecked_references_differ(run_folder: Path, change: Change, add_event: Change) -> None:
    assert "references stand out" in section_text(build_coordinator_report(run_folder), "references")
    change("statistics.json", ("suspected",), None)
    for site in ("north", "south", "west"):
        change("statistics.json", ("sites", site, "cross-check"), None)
    add_event("phase-skipped", phase="cross-check", reason="switched off")
    text = section_text(build_coordinator_report(run_folder), "references")
    assert "Not checked in this run (switched off)." in text


@TEXT_ONLY
def test_untrained_model_is_called_so(run_folder: Path, change: Change, read_page: ReadPage) -> None:
    for site in ("north", "south", "west"):
        change("statistics.json", ("sites", site, "score"), {"candidates": 20, "decisions.drop": 20})
        change("statistics.json", ("sites", site, "calibrate", "r"), 0.05)
    path = build_coordinator_report(run_folder)
    text = read_page(path).text
    assert tone(path) == "bad"
    assert "The QC model looks untrained: 60 of 60 annotations are not kept" in text
    assert "3 rounds of 5 steps" in text


@TEXT_ONLY
def test_a_method_that_is_not_trained_is_not_told_to_train_longer(
    run_folder: Path, change: Change, read_page: ReadPage
) -> None:
    change("run.json", ("models", "qc", "rounds"), 0)
    for site in ("north", "south", "west"):
        change("statistics.json", ("sites", site, "calibrate", "r"), 0.05)
    text = read_page(build_coordinator_report(run_folder)).text
    assert "nothing is trained across the sites" in text
    assert "The QC method cannot judge these labels: its predictions hardly follow the truth" in text
    assert "train longer" not in text


@TEXT_ONLY
def test_parts_of_a_method_have_their_own_rounds(
    run_folder: Path, change: Change, read_page: ReadPage
) -> None:
    rounds = json.loads((run_folder / "statistics.json").read_text())["train"]["qc"]
    change("statistics.json", ("train",), {"qc-segmenter-1": rounds, "qc-segmenter-2": rounds[:1]})
    text = read_page(build_coordinator_report(run_folder)).text
    assert "3 rounds of segmenter-1 and 1 round of segmenter-2" in text


@TEXT_ONLY
def test_run_without_segmentation_says_so(run_folder: Path, change: Change) -> None:
    change("statistics.json", ("train", "segmentation"), None)
    for site in ("north", "south", "west"):
        change("statistics.json", ("sites", site, "evaluate.segmentation"), None)
    text = section_text(build_coordinator_report(run_folder), "segmentation")
    assert "This run trained no segmentation model." in text


@TEXT_ONLY
def test_of_many_sites_the_first_are_shown(run_folder: Path) -> None:
    names = [f"site-{number:03d}" for number in range(110)]
    content = json.loads((run_folder / "statistics.json").read_text())
    content["sites"] = dict.fromkeys(names, content["sites"]["north"])
    (run_folder / "statistics.json").write_text(json.dumps(content))
    text = section_text(build_coordinator_report(run_folder), "quality")
    assert "The first 100 of 110 sites are shown" in text
    assert "site-109" in text  # the table has all


@TEXT_ONLY
def test_segmentation_over_all_sites_stands_first(run_folder: Path, change: Change) -> None:
    change(
        "statistics.json",
        ("sites", "west", "evaluate.segmentation"),
        {"cases": 10, "dice_mean": 0.6, "dice_sd": 0.1},
    )
    path = build_coordinator_report(run_folder)
    text = " ".join(section_text(path, "segmentation").split())
    # 5, 5 and 10 cases; squares within 4 + 4 + 9 times 0.01, between 20 times 0.01
    assert "Over all sites: a mean Dice of 0.700 (0.639 to 0.761) on 20 reference cases" in text
    assert "all sites 20 0.700 ± 0.140 - north" in text
    assert "0.700" in path.read_text(encoding="utf-8").split("</header>")[0]


# ------------------------------------------------------------------------------------------- the numbers


def numbers_of(folder: Path, name: str) -> list[list[str]]:
    with (folder / "report" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@TEXT_ONLY
def test_every_figure_and_table_has_its_numbers_beside_it(run_folder: Path) -> None:
    path = build_coordinator_report(run_folder)
    together = json.loads((run_folder / "report" / "numbers.json").read_text())
    html = path.read_text(encoding="utf-8")
    drawn = [
        part
        for section in coordinator_sections(read_run(run_folder))
        for part in section.parts
        if isinstance(part, Figure) or (isinstance(part, Table) and part.has_file)
    ]
    assert [one["title"] for one in together["parts"]] == [part.title for part in drawn]
    for one in together["parts"]:
        assert f'href="report/{one["file"]}"' in html
        columns, *rows = numbers_of(run_folder, one["file"])
        assert columns == one["columns"]
        assert rows == [["" if value is None else str(value) for value in row] for row in one["rows"]]
        assert all(len(row) == len(columns) for row in rows)


@TEXT_ONLY
def test_numbers_of_the_sites(run_folder: Path, change: Change) -> None:
    change("statistics.json", ("sites", "north", "score", "quality"), [8, -1, -1, 0, 0, 0, 0, 0, 0, 9])
    change("statistics.json", ("sites", "north", "summarise", "left_out.empty-label"), 4)
    build_coordinator_report(run_folder)
    columns, north, *_ = numbers_of(run_folder, "quality-predicted-quality-at-each-site.csv")
    assert columns[:3] == ["site", "0 to 0.1", "0.1 to 0.2"]
    assert north == ["north", "8", "", "", "0", "0", "0", "0", "0", "0", "9"]
    columns, north, south, _ = numbers_of(run_folder, "consortium-cases-left-out-by-problem.csv")
    assert (columns, north, south) == (["site", "empty-label"], ["north", "4"], ["south", ""])
    columns, north, *_ = numbers_of(run_folder, "quality-share-of-the-annotations-that-is-kept.csv")
    assert columns[:4] == ["site", "share kept", "share kept, low end", "share kept, high end"]
    assert [north[0], *(round(float(end), 3) for end in north[1:4])] == ["north", 0.6, 0.387, 0.781]


@TEXT_ONLY
def test_what_is_wrong_with_labels_by_site(run_folder: Path, change: Change, read_page: ReadPage) -> None:
    page = read_page(build_coordinator_report(run_folder))
    for title in ("What is probably wrong", "by the size of its label", "gathers in few groups"):
        assert title not in page.text  # of which nobody told
    change("statistics.json", ("sites", "north", "score", "diagnosis.shift"), 12)
    change("statistics.json", ("sites", "north", "score", "diagnosis.flip"), 11)
    change("statistics.json", ("sites", "south", "score", "diagnosis.shift"), 10)
    change("statistics.json", ("sites", "south", "score", "not_kept.small"), 10)
    change("statistics.json", ("sites", "south", "score", "gatherings"), 2)
    page = read_page(build_coordinator_report(run_folder))
    assert "gathers in few groups of cases, such as those of one scanner, at south (2 groups)" in page.text
    columns, north, south, _ = numbers_of(
        run_folder, "quality-what-is-probably-wrong-with-what-is-not-kept.csv"
    )
    assert columns == ["site", "flip", "shift"]  # the simpler kinds first
    assert (north, south) == (["north", "11", "12"], ["south", "", "10"])
    columns, _, south, _ = numbers_of(run_folder, "quality-what-is-not-kept-by-the-size-of-its-label.csv")
    assert (columns, south) == (["site", "small"], ["south", "10"])


@TEXT_ONLY
def test_numbers_of_an_earlier_report_go(run_folder: Path, change: Change) -> None:
    build_coordinator_report(run_folder)
    file = run_folder / "report" / "segmentation-segmentation-in-numbers.csv"
    assert file.is_file()
    change("statistics.json", ("train", "segmentation"), None)
    for site in ("north", "south", "west"):
        change("statistics.json", ("sites", site, "evaluate.segmentation"), None)
    build_coordinator_report(run_folder)
    assert not file.exists()


def test_a_report_without_numbers_leads_to_none(run_folder: Path, tmp_path: Path) -> None:
    path = build_coordinator_report(run_folder, tmp_path / "live.html", numbers=None)
    assert {file.name for file in tmp_path.iterdir()} == {"live.html", "run"}
    assert not (run_folder / "report").exists()
    assert "Numbers:" not in path.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------- the page


def test_code_between_backticks_is_escaped_too(tmp_path: Path, read_page: ReadPage) -> None:
    path = tmp_path / "report.html"
    parts = (Note("see `<b>`"), Table("t", ("a", "b"), (("`x`", "<i>"),)))
    write_report(path, "T", [Section("one", "One", "", parts)], headline=Headline("v", "good"))
    html = path.read_text(encoding="utf-8")
    assert "<code>&lt;b&gt;</code>" in html
    assert "<code>x</code>" in html
    assert not {"b", "i"} & set(read_page(path).tags)
