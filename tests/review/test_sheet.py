import base64
import re
import stat
from io import BytesIO
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from typer.testing import CliRunner

from fedqc.cli import app
from fedqc.config import SiteConfig, load_site
from fedqc.curation.manifest import overrule, read_manifest, write_manifest
from fedqc.errors import DataError
from fedqc.review import sheet
from fedqc.review.sheet import write_sheet
from fedqc.review.worklist import SHEET
from fedqc.task import load_task

ODD = "&lt;b&gt;odd&lt;/b&gt; &amp; &#39;case&#39;"


def written(site: Path) -> tuple[str, list[str]]:
    """The sheet, and what could not be drawn."""
    config = load_site(site)
    not_drawn = write_sheet(config, load_task(config.task))
    return (config.results / SHEET).read_text(), not_drawn


def titles(page: str) -> list[str]:
    """Of the cases, in the sheet's order."""
    return re.findall(r"<h3[^>]*>(\d+\. .*?)</h3>", page)


def pictures(page: str) -> list[bytes]:
    return [base64.b64decode(one) for one in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def excess_on_the_right(png: bytes) -> int:
    """Pixels in the errors' orange, in the right panel more than in the left one, which has the label."""
    pixels = matplotlib.image.imread(BytesIO(png))
    is_orange = pixels[..., 0] - pixels[..., 2] > 0.3
    left, right = np.array_split(is_orange, 2, axis=1)
    return int(right.sum()) - int(left.sum())


def changed(site: Path, **values: object) -> SiteConfig:
    """The manifest, with other values."""
    config = load_site(site)
    path = config.results / "manifest.json"
    write_manifest(path, read_manifest(path).model_copy(update=values))
    return config


def test_cases_that_were_not_kept_are_drawn_the_worst_first(site: Path) -> None:
    page, not_drawn = written(site)
    assert not_drawn == []
    assert titles(page) == ["1. bad", f"2. {ODD}", "3. near"]
    assert "<b>odd" not in page  # a name is text, never markup
    assert "The rule did not keep 3 of 4 candidates; nobody has decided about 3 of them." in page
    assert "scanner &#39;old&#39;: 3 of 4 cases are not kept" in page
    assert "Predicted DSC 0.780, expected 0.68 to 0.88; regions: ball 0.780; patient patient-1." in page
    assert (
        page.count("Probably: moved by 2.0 mm to the left; to mend it, move it by 2.0 mm to the right") == 1
    )
    drawn = pictures(page)
    assert len(drawn) == 9
    assert excess_on_the_right(drawn[0]) > 500
    assert excess_on_the_right(drawn[3]) < 100  # of this one there is no error map


def test_the_sheet_is_one_file_for_its_owner_alone(site: Path) -> None:
    page, _ = written(site)
    assert stat.S_IMODE((load_site(site).results / SHEET).stat().st_mode) == 0o600
    assert not re.search(r"<script|https?://|<link (?!rel=\"icon\" href=\"data:)", page)


def test_where_the_rule_was_not_applied_all_cases_are_listed(site: Path) -> None:
    config = load_site(site)
    rule = read_manifest(config.results / "manifest.json").rule
    changed(site, rule=rule.model_copy(update={"suspended": "the model fails its self-test here"}))
    page, _ = written(site)
    assert len(titles(page)) == 4
    assert "The rule was not applied: all of 4 candidates are kept." in page
    assert "Nothing was dropped: the model fails its self-test here." in page


def test_what_people_decided_is_listed_and_comes_last(site: Path) -> None:
    config = load_site(site)
    overrule(config.results, load_task(config.task), "near", "keep", by="Dr. Doe", reason="rim is <fine>")
    overrule(config.results, load_task(config.task), "good", "drop", by="Dr. Doe", reason="")
    page, _ = written(site)
    assert titles(page) == ["1. bad", f"2. {ODD}", "3. near"]
    assert re.search(
        r"Kept by Dr\. Doe, \d{4}-\d\d-\d\d: rim is &lt;fine&gt;\. The rule: predicted DSC", page
    )
    decided = page[page.index("What people decided") :]
    assert re.search(r"good</t[hd]>\s*<td[^>]*>dropped</td>\s*<td[^>]*>kept</td>", decided, re.DOTALL)
    assert "nobody has decided about 2 of them" in page


def test_only_the_first_cases_are_drawn(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheet, "MOST_SHOWN", 2)
    page, _ = written(site)
    assert titles(page) == ["1. bad", f"2. {ODD}"]
    assert "The first 2 of 3 cases that were not kept, the lowest predicted quality first" in page


def test_a_case_whose_files_changed_is_named_and_not_drawn(site: Path) -> None:
    data = site.parent / "data"
    (data / "1-t1.nii.gz").write_bytes((data / "1-label.nii.gz").read_bytes())
    (data / "2-label.nii.gz").unlink()
    page, not_drawn = written(site)
    assert "2-label.nii.gz" in not_drawn[0]
    assert not_drawn[1] == "case near: 1-t1.nii.gz has changed since it was scored"
    assert "Not drawn: 1-t1.nii.gz has changed since it was scored." in page
    assert len(pictures(page)) == 3


def test_a_site_that_has_not_scored_is_told_to(site: Path) -> None:
    config = changed(site, task="brain")
    with pytest.raises(DataError, match=r"is of site 'hospital-a' and task 'brain', .* score this site's"):
        write_sheet(config, load_task(config.task))


def test_the_command_writes_the_sheet_and_serves_nothing(site: Path) -> None:
    done = CliRunner().invoke(app, ["review", str(site), "--sheet"])
    assert done.exit_code == 0, done.output
    assert str(site.parent / "results" / SHEET) in done.output
    assert titles((site.parent / "results" / SHEET).read_text())[0] == "1. bad"
    refused = CliRunner().invoke(app, ["review", str(site), "--sheet", "--port", "8700"])
    assert refused.exit_code != 0
    assert "--port is for the page, which --sheet does not serve" in str(refused.exception)
