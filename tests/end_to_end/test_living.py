"""`fedqc manifest` and `fedqc ledger`: what a site does with the results of a run."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from fedqc_simulations.engine import LocalGrid

from fedqc.curation.manifest import read_manifest
from tests.federation.conftest import make_federation, make_site, no_report, task_file, tiny_method
from tests.federation.runs import run

__all__ = ["make_federation", "make_site", "no_report", "task_file", "tiny_method"]
Call = Callable[..., int]


@pytest.fixture
def site(
    make_site: Callable[..., Path],
    make_federation: Callable[..., Path],
    tmp_path: Path,
    tiny_method: None,
    no_report: None,
) -> Path:
    """A site behind a run, which dropped `bad-7`."""
    sites = {"a": make_site("a")}
    run(LocalGrid(sites), make_federation(sites), tmp_path / "run", only=("train.qc", "calibrate", "score"))
    return sites["a"]


def test_a_manifest_is_verified(site: Path, fedqc: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedqc("manifest", "verify", site) == 0
    assert "4 cases, the model and all decisions are as they were" in capsys.readouterr().out
    label = site.parent / "data" / "good-4-label.nii.gz"
    label.write_bytes(label.read_bytes() + b"\0")
    assert fedqc("manifest", "verify", site) == 1
    assert "case good-4, label: good-4-label.nii.gz has changed since" in capsys.readouterr().out


def test_a_person_overrules_and_takes_it_back(
    site: Path, fedqc: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, table = (site.parent / "results" / name for name in ("manifest.json", "scores.csv"))
    before = manifest.read_bytes()
    assert (
        fedqc("manifest", "overrule", site, "bad-7", "keep", "--by", "Dr. Doe", "--reason", "it is fine") == 0
    )
    assert "bad-7: keep (the rule said drop: predicted DSC" in capsys.readouterr().out
    (entry,) = (one for one in read_manifest(manifest).entries if one.id == "bad-7")
    assert entry.overruled is not None
    assert (entry.overruled.by, entry.overruled.reason) == ("Dr. Doe", "it is fine")
    rows = {row["id"]: row for row in csv.DictReader(table.read_text().splitlines())}
    assert (rows["bad-7"]["decision"], rows["bad-7"]["reason"]) == ("keep", "Dr. Doe: it is fine")
    assert fedqc("manifest", "verify", site) == 0
    assert fedqc("manifest", "overrule", site, "bad-7", "rule") == 0
    assert manifest.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("overrule", "SITE", "bad-8", "keep"),
            "case 'bad-8' is not among the 4 candidates; did you mean 'bad-7'?",
        ),
        (("overrule", "SITE", "bad-7", "keep", "--by", ""), "by: string should have at least 1 character"),
        (("export", "SITE", "--out", "SITE"), "is there already"),
    ],
)
def test_wrong_input_is_one_sentence(
    site: Path, fedqc: Call, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert fedqc("manifest", *(site if part == "SITE" else part for part in arguments)) == 2
    assert message in capsys.readouterr().err


def test_what_is_kept_is_exported(
    site: Path, fedqc: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedqc("manifest", "export", site, "--form", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all((site.parent / "data" / line).is_file() for line in lines)
    assert not any("bad" in line for line in lines)
    assert fedqc("manifest", "export", site, "--out", tmp_path / "all.csv") == 0
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    assert [row["outcome"] for row in rows] == ["drop", "keep", "keep", "keep"]


def test_a_manifest_is_as_its_schema_says(
    site: Path, fedqc: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedqc("manifest", "schema") == 0
    schema = json.loads(capsys.readouterr().out)
    manifest = json.loads((site.parent / "results" / "manifest.json").read_text())
    jsonschema.validate(manifest, schema)
    manifest["entries"][0]["quality"] = 2
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, schema)


def test_the_ledger_is_shown(site: Path, fedqc: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedqc("ledger", site) == 0
    shown = capsys.readouterr().out
    assert "UTC to test: query.handshake, " in shown
    assert "    statistics.decisions.drop = 1" in shown
    assert "    weights: 7 arrays" in shown
    assert fedqc("ledger", site, "--kind", "train.qc", "--weights") == 0
    assert "weights.0.weight = float32 2x3" in capsys.readouterr().out
    assert fedqc("ledger", site, "--kind", "query.score", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["content"]["statistics"]["candidates"] == 4
    assert fedqc("ledger", site, "--kind", "query.nothing") == 0
    assert "no message of type query.nothing has left" in capsys.readouterr().err


def test_a_site_that_took_no_part_yet(
    make_site: Callable[..., Path], fedqc: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    site = make_site("b")
    assert fedqc("ledger", site) == 2
    assert "nothing has left this site yet" in capsys.readouterr().err
    assert fedqc("manifest", "verify", site) == 2
    assert "score the site's cases first" in capsys.readouterr().err
