"""What `fedqc client --dry-run` shows is what a run then sends."""

from pathlib import Path

import pytest
from fedqc_client.dry_run import what_would_leave

from fedqc.config import FederationConfig, load_federation
from fedqc.protocol import PROTOCOL_VERSION, REPLIES
from tests.federation.runs import RecordingGrid, run, write_federation, write_site, write_task

pytestmark = pytest.mark.usefixtures("tiny_method_throughout", "no_report")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return write_site(tmp_path, "a", write_task(tmp_path))


@pytest.fixture
def planned(site: Path, tmp_path: Path) -> FederationConfig:
    return load_federation(write_federation(tmp_path, ["a"], tmp_path / "ball.toml", cross_check_rounds=0))


def test_all_that_a_run_sends_was_shown(site: Path, planned: FederationConfig, tmp_path: Path) -> None:
    shown = list(what_would_leave(site, planned))
    grid = RecordingGrid({"a": site})
    run(grid, tmp_path / "federation.toml", tmp_path / "run")
    assert {(one.kind, one.record) for one in shown if one.kind != "any"} == {
        (kind, record)
        for kind, records in REPLIES.items()
        for record in records
        if kind != "train.segmenter"  # no source of labels that needs any has a share
    }
    for _, reply in grid.sent:
        kind = reply.metadata.message_type
        for name, record in reply.content.items():
            (form,) = [one.content for one in shown if (one.kind, one.record) == (kind, name)]
            if name == "weights":
                assert all(f"{array} (" in form for array in record)
            elif name == "statistics":
                assert all(key in form for key in record)


def test_what_needs_no_model_is_shown_to_the_number(site: Path, planned: FederationConfig) -> None:
    by_kind = {one.kind: one.content for one in what_would_leave(site, planned)}
    assert by_kind["query.handshake"].startswith(f"site = a, protocol = {PROTOCOL_VERSION}, fedqc = ")
    assert "cases = " in by_kind["query.summarise"]
    assert "sha256" in by_kind["query.summarise"]


def test_what_a_run_would_tell_again_is_shown_as_that(
    site: Path, planned: FederationConfig, tmp_path: Path
) -> None:
    """One more case since the last run is fewer than may be told of."""
    text = site.read_text()
    site.write_text(text.replace("min_count = 1", "min_count = 2"))
    assert site.read_text() != text
    run(RecordingGrid({"a": site}), tmp_path / "federation.toml", tmp_path / "run", only=("summarise",))
    before = (site.parent / "results" / "releases.json").read_text()
    first = {one.kind: one.content for one in what_would_leave(site, planned)}["query.summarise"]
    with (site.parent / "data" / "cases.csv").open("a") as file:
        file.write("more,good-4.nii.gz,good-4-label.nii.gz,P9\n")
    second = {one.kind: one.content for one in what_would_leave(site, planned)}["query.summarise"]
    assert second == first
    assert (site.parent / "results" / "releases.json").read_text() == before


def test_a_phase_that_the_site_refuses_is_shown_so(site: Path, planned: FederationConfig) -> None:
    text = site.read_text().replace("segmentation = true", 'segmentation = false\nrefuse = ["summarise"]')
    site.write_text(text)
    shown = [one for one in what_would_leave(site, planned) if one.content.startswith("code = takes-no-part")]
    assert {(one.kind, one.record) for one in shown} == {
        ("query.summarise", "error"),
        ("train.segmentation", "error"),
    }


def test_nothing_is_written_to_the_ledger(site: Path, planned: FederationConfig) -> None:
    list(what_would_leave(site, planned))
    assert not (site.parent / "results" / "ledger.jsonl").exists()
