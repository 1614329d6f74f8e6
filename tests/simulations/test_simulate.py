import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fedqc_simulations.simulate import Simulation, simulate, site_names

from fedqc.cases.layouts import CaseFiles
from fedqc.config import ComputeConfig, FederationConfig, NetworkConfig, QCConfig, SitesConfig
from fedqc.errors import ConfigError, DataError, FedQCError
from fedqc.task import Task

Run = Callable[..., Simulation]


@pytest.fixture
def data(tmp_path: Path, make_cases: Callable[..., list[CaseFiles]]) -> Path:
    """Nine patients with ten cases, in the csv layout."""
    folder = tmp_path / "data"
    cases = make_cases(9)
    with (folder / "cases.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "patient", "T1", "label"])
        for case in cases:
            assert case.label is not None
            writer.writerow([case.id, case.patient, case.images[0].name, case.label.name])
    return folder


@pytest.fixture
def run(tmp_path: Path, task: Task) -> Run:
    task_file = tmp_path / "blobs.toml"
    task_file.write_text(tomli_w.dumps(task.model_dump(mode="json")))

    def run(data: Path, out: Path, *, sites: int = 2, seed: int = 0, **qc: Any) -> Simulation:
        names = site_names(sites)
        network = NetworkConfig(width=4)
        settings = {"rounds": 2, "local_steps": 2, "batch_size": 2, "network": network} | qc
        config = FederationConfig(
            task=str(task_file), sites=SitesConfig(expected=names, minimum=sites), qc=QCConfig(**settings)
        )
        return simulate(
            config,
            data,
            "csv",
            out,
            seed=seed,
            noise="mixed",
            compute=ComputeConfig(device="cpu", precision="fp32"),
            progress=lambda *_: None,
            listener=lambda _: None,
        )

    return run


def test_site_names() -> None:
    assert site_names(3) == ("hospital-1", "hospital-2", "hospital-3")
    with pytest.raises(ConfigError, match=r"0 sites: .* --sites 1 or more"):
        site_names(0)


def test_a_whole_simulation_twice(run: Run, data: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    (data / "image 3.nii.gz").write_text("no image")  # one bad case does not stop it
    first = run(data, tmp_path / "first", leave_out=("shift",))
    out = tmp_path / "first"
    assert {problem.case for problem in first.problems} == {"case-3"}
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(json.dumps(first.evaluation))
    assert first.evaluation["qc"]["by_kind"]["shift"]["in_training"] is False
    assert first.evaluation["qc"]["unseen"]["n"] == first.evaluation["qc"]["by_kind"]["shift"]["n"]
    assert set(first.evaluation["curation"]) == {"all", "hospital-1", "hospital-2"}
    with (out / "truth" / "candidates.csv").open(newline="") as file:
        candidates = list(csv.DictReader(file))
    assert first.evaluation["curation"]["all"]["n_candidates"] == len(candidates) > 0
    for name in ("run.json", "models/qc/weights.safetensors", "sites/hospital-2/manifest.json"):
        assert (out / name).is_file()
    assert {path.name: path.read_bytes() for path in data.iterdir() if path.name != "image 3.nii.gz"} == {
        name: content for name, content in before.items() if name != "image 3.nii.gz"
    }
    second = run(data, tmp_path / "second", leave_out=("shift",))
    assert second.evaluation == first.evaluation
    weights = [
        (tmp_path / name / "models" / "qc" / "weights.safetensors").read_bytes()
        for name in ("first", "second")
    ]
    assert weights[0] == weights[1]


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
