import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fedqc_simulations import simulate as simulate_module
from fedqc_simulations.pathology import Kind
from fedqc_simulations.simulate import Settings, resume, simulate, site_names

from fedqc.cases.layouts import CaseFiles
from fedqc.config import (
    ComputeConfig,
    CurationConfig,
    FederationConfig,
    NetworkConfig,
    QCConfig,
    SegmentationConfig,
    SitesConfig,
)
from fedqc.errors import ConfigError, DataError, FedQCError
from fedqc.task import Task


class Silent:
    """Watches a simulation and keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.events: list[dict[str, Any]] = []

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        assert 0 <= done <= total

    def say(self, line: str) -> None:
        self.lines.append(line)

    def listen(self, event: dict[str, Any]) -> None:
        self.events.append(event)


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def data(tmp_path: Path, make_cases: Callable[..., list[CaseFiles]]) -> Path:
    """Nine patients with ten cases, in the csv layout."""
    folder = tmp_path / "data"
    cases = make_cases(9)
    with (folder / "cases.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "patient", "T1", "label"])
        for case in cases:
            writer.writerow([case.id, case.patient, *(path.name for path in case.files)])
    return folder


@pytest.fixture
def observer() -> Silent:
    return Silent()


@pytest.fixture
def run(tmp_path: Path, task: Task, observer: Silent) -> Run:
    task_file = tmp_path / "blobs.toml"
    task_file.write_text(tomli_w.dumps(task.model_dump(mode="json", exclude_none=True)))

    def run(
        data: Path | None, out: Path, *, sites: int = 2, seeds: tuple[int, ...] = (0,), **qc: Any
    ) -> dict[str, Any]:
        names = site_names(sites)
        network = NetworkConfig(width=4)
        small = {"rounds": 2, "local_steps": 2, "batch_size": 2, "network": network} | qc
        config = FederationConfig(
            task=str(task_file),
            sites=SitesConfig(expected=names, minimum=sites),
            qc=QCConfig(**small),
            curation=CurationConfig(threshold=0.0),  # so little training finds nothing good
            segmentation=SegmentationConfig(rounds=1, local_steps=2, batch_size=2, channels=(4, 8)),
        )
        settings = Settings(
            federation=config,
            data=data,
            layout="csv",
            noise="mixed",
            seeds=seeds,
            compute=ComputeConfig(device="cpu", precision="fp32"),
        )
        return simulate(settings, out, observer)

    return run


def test_site_names() -> None:
    assert site_names(3) == ("hospital-1", "hospital-2", "hospital-3")
    with pytest.raises(ConfigError, match=r"0 sites: .* --sites 1 or more"):
        site_names(0)


def test_a_whole_simulation_twice(run: Run, data: Path, tmp_path: Path, observer: Silent) -> None:
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    (data / "image 3.nii.gz").write_text("no image")  # one bad case does not stop it
    first = run(data, tmp_path / "first", leave_out=("shift",))
    out = tmp_path / "first"
    assert [line for line in observer.lines if line.startswith("left out: case case-3")]
    with (out / "truth" / "left_out.csv").open(newline="") as file:
        assert [(row["case"], row["code"]) for row in csv.DictReader(file)] == [("case-3", "not-nifti")]
    assert json.loads((out / "evaluation.json").read_text()) == first
    assert first["qc"]["by_kind"]["shift"]["in_training"] is False
    assert first["qc"]["unseen"]["n"] == first["qc"]["by_kind"]["shift"]["n"]
    assert set(first["curation"]) == {"all", "hospital-1", "hospital-2"}
    with (out / "truth" / "candidates.csv").open(newline="") as file:
        candidates = list(csv.DictReader(file))
    assert first["curation"]["all"]["n_candidates"] == len(candidates) > 0
    assert {path.name: path.read_bytes() for path in data.iterdir() if path.name != "image 3.nii.gz"} == {
        name: content for name, content in before.items() if name != "image 3.nii.gz"
    }
    assert "<html" in (out / "report.html").read_text()
    second = run(data, tmp_path / "second", leave_out=("shift",))
    assert second == first
    for stage in ("qc", "segmentation"):
        weights = [
            (tmp_path / name / "models" / stage / "weights.safetensors").read_bytes()
            for name in ("first", "second")
        ]
        assert weights[0] == weights[1]
        at_site = out / "sites" / "hospital-2" / "models" / stage / "weights.safetensors"
        assert at_site.read_bytes() == weights[0]


def test_several_seeds_are_pooled(run: Run, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pooled = run(data, out, seeds=(0, 1))
    each = [json.loads((out / f"seed-{seed}" / "evaluation.json").read_text()) for seed in (0, 1)]
    assert pooled["seeds"] == [0, 1]
    assert pooled["qc"]["all"]["n"] == sum(one["qc"]["all"]["n"] for one in each)
    for key in ("n_candidates", "n_failures", "n_dropped"):
        assert pooled["curation"]["all"][key] == sum(one["curation"]["all"][key] for one in each)
    for arm in ("everything", "curated", "weighted", "random", "oracle"):
        assert pooled["segmentation"][arm]["n_train"] == sum(
            one["segmentation"][arm]["n_train"] for one in each
        )
    assert each[0]["qc"] != each[1]["qc"]
    assert (out / "report.html").is_file()
    with pytest.raises(ConfigError, match="name each seed once"):
        run(data, tmp_path / "twice", seeds=(1, 1))


def test_a_finished_simulation_is_only_read(run: Run, data: Path, tmp_path: Path, observer: Silent) -> None:
    out = tmp_path / "run"
    figures = run(data, out)
    events = len(observer.events)
    shutil.rmtree(data)
    assert resume(out, observer) == figures
    assert len(observer.events) == events


def test_a_simulation_can_be_moved_and_resumed(
    run: Run, data: Path, tmp_path: Path, observer: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = run(data, tmp_path / "whole")

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "round-started" and event.get("arm") == "random":
            raise KeyboardInterrupt

    monkeypatch.setattr(observer, "listen", stop)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "cut")
    monkeypatch.undo()
    (tmp_path / "cut").rename(tmp_path / "moved")
    observer.events.clear()
    assert resume(tmp_path / "moved", observer) == figures
    assert {event.get("arm") for event in observer.events} == {"random", "oracle"}


def test_a_damaged_record_is_named(run: Run, data: Path, tmp_path: Path, observer: Silent) -> None:
    out = tmp_path / "run"
    run(data, out)
    (out / "evaluation.json").unlink()
    (out / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json: cannot be read"):
        resume(out, observer)


def test_nothing_to_resume(tmp_path: Path, observer: Silent) -> None:
    with pytest.raises(ConfigError, match="holds no simulation to resume"):
        resume(tmp_path, observer)
    (tmp_path / "simulation.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        resume(tmp_path, observer)
    (tmp_path / "simulation.json").write_text('{"noise": "loud"}')
    with pytest.raises(ConfigError, match=r"simulation\.json: .*noise"):
        resume(tmp_path, observer)


def test_phantoms_have_a_task_of_their_own(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only tasks 'phantom' and 'phantom-lesions' are drawn"):
        run(None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["phantom", "phantom-lesions"])
def test_the_task_says_which_phantoms_are_drawn(
    name: str, tmp_path: Path, observer: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any, kind: Kind, **__: Any) -> None:
        raise DataError(f"asked for {kind.task}")

    monkeypatch.setattr(simulate_module, "write_phantoms", write)
    settings = Settings(
        federation=FederationConfig(task=name, sites=SitesConfig(expected=("a", "b"))),
        data=None,
        layout=None,
        noise="mixed",
        seeds=(0,),
        compute=ComputeConfig(device="cpu", precision="fp32"),
    )
    with pytest.raises(DataError, match=f"^asked for {name}$"):
        simulate(settings, tmp_path / "run", observer)


def test_what_cannot_be_run_is_said_before_anything_is_written(run: Run, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="3 sites need 12 patients"):
        run(data, out, sites=3)
    with pytest.raises(ConfigError, match="'oracle' is unknown"):
        run(data, out, method="oracle")
    for path in data.glob("*.nii.gz"):
        path.write_text("no image")
    with pytest.raises(DataError, match=r"none of 10 cases can be used; the first problem: .*case-0"):
        run(data, out)
    (data / "cases.csv").unlink()
    with pytest.raises(DataError, match=r"cases\.csv"):
        run(data, out)
    assert not out.exists()


def test_an_older_run_is_not_written_over(run: Run, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text("{}")
    with pytest.raises(FedQCError, match="run"):
        run(data, out)
    assert [path.name for path in out.iterdir()] == ["run.json"]
    assert (out / "run.json").read_text() == "{}"
