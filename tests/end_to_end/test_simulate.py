"""`fedqc simulate` as a researcher uses it."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedqc_simulations.arms import ARMS
from fedqc_simulations.benchmarks.rules import decided_again
from fedqc_simulations.consortium import read_candidates
from fedqc_simulations.evaluation import read_curated
from safetensors.torch import load_file

from fedqc.cases.volumes import read_volume
from fedqc.curation.manifest import read_manifest
from fedqc.degradation.samples import ALL_KINDS
from tests.federation.runs import USUAL_PHASES

SHORT = ("--local-steps", 2, "--segmentation-rounds", 1)
QUICK = ("--rounds", 2, *SHORT, "--precision", "fp32", "--sites", 2, "--seed", 3)


@pytest.fixture
def simulate(fedqc: Callable[..., int], data: Path, task_file: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(name: str, *options: object) -> Path:
        out = tmp_path / name
        common = ("--data", data, "--layout", "msd", "--task", task_file, "--out", out)
        threads = torch.get_num_threads()
        try:
            assert fedqc("simulate", *common, *QUICK, *options) == 0
        finally:
            torch.set_num_threads(threads)
        return out

    return run


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_run_folder_holds_what_the_docs_promise(simulate: Callable[..., Path]) -> None:
    out = simulate("run")

    run = read(out / "run.json")
    assert run["outcome"] == "completed"
    assert run["seed"] == 3
    assert list(run["seconds"]) == run["done"] == ["handshake", *USUAL_PHASES]
    assert (out / "models" / "qc" / "weights.safetensors").is_file()
    assert read(out / "models" / "qc" / "card.json")["rounds"] == 2
    for site in ("hospital-1", "hospital-2"):
        folder = out / "sites" / site
        manifest = read_manifest(folder / "manifest.json")
        with (folder / "scores.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["id"] for row in rows] == [entry.id for entry in manifest.entries]
        assert set(rows[0]) == {"id", "patient", "quality", "front", "back", "decision", "reason"}
        for entry in manifest.entries:
            error_map = read_volume(folder / "error_maps" / f"{entry.id}.nii.gz")
            assert error_map.data.shape == (18, 18, 18)


def test_evaluation_counts_what_was_there(simulate: Callable[..., Path]) -> None:
    out = simulate("run")

    figures = read(out / "evaluation.json")
    n_test = len(list((out / "truth" / "test" / "labels").iterdir()))
    kinds = figures["qc"]["by_kind"]
    assert set(kinds) == set(ALL_KINDS)
    assert all(kind["n"] == n_test for kind in kinds.values())
    unseen = {name for name, kind in kinds.items() if not kind["in_training"]}
    assert unseen == {"slices-left-out", "another-patient", "left-right-flip"}
    assert figures["qc"]["unseen"]["n"] == 3 * n_test
    candidates = read_candidates(out)
    both = ("hospital-1", "hospital-2")
    again = [one.dropped for one in decided_again(out, {"rule": "threshold"})]
    assert again == [one.dropped for one in read_curated(out, both)]
    half = {"rule": "quantile", "share": 0.5, "max_mae": 1.0, "min_auroc": 0.0}  # no self-test fails
    assert sum(one.dropped for one in decided_again(out, half)) == sum(
        len(read_curated(out, [site])) // 2 for site in both
    )
    everyone = figures["curation"]["all"]
    assert everyone["n_candidates"] == len(candidates)
    assert everyone["n_spoiled"] == sum(candidate.kind != "untouched" for candidate in candidates) > 0
    assert everyone["n_failures"] == sum(candidate.dsc < 0.75 for candidate in candidates)
    assert set(figures["segmentation"]) == {*ARMS, "gap_closed"}
    assert figures["segmentation"]["everything"]["n_train"] == len(candidates)
    assert figures["segmentation"]["oracle"]["n_train"] == len(candidates) - everyone["n_spoiled"]
    sites = [figures["curation"][name]["n_candidates"] for name in ("hospital-1", "hospital-2")]
    assert sum(sites) == len(candidates)


def test_one_seed_gives_one_result(simulate: Callable[..., Path]) -> None:
    first, second = simulate("first"), simulate("second")

    assert (first / "evaluation.json").read_bytes() == (second / "evaluation.json").read_bytes()
    assert (first / "models/qc/weights.safetensors").read_bytes() == (
        second / "models/qc/weights.safetensors"
    ).read_bytes()
    assert read(first / "evaluation.json") != read(simulate("third", "--seed", 4) / "evaluation.json")


def test_threads_do_not_change_the_weights(simulate: Callable[..., Path]) -> None:
    one, two = simulate("one", "--threads", 1), simulate("two", "--threads", 2)

    weights = [
        np.concatenate([v.numpy().ravel() for _, v in sorted(load_file(path).items())]).astype(np.float64)
        for path in (run / "models/qc/weights.safetensors" for run in (one, two))
    ]
    # Threads add up in another order, and Adam turns the rounding noise of a gradient near 0 into a small
    # step, so single weights may differ by some 1e-4 on some processors. With another seed this is 1.
    assert np.linalg.norm(weights[0] - weights[1]) < 2e-3 * np.linalg.norm(weights[0])


def test_the_data_set_is_only_read(simulate: Callable[..., Path], data: Path) -> None:
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}

    simulate("run", "--noise", "systematic")

    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


def test_a_federation_file_is_beaten_by_options(
    fedqc: Callable[..., int], data: Path, task_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(
        f"""
        name = "trial"
        task = "{task_file}"
        [sites]
        expected = ["north", "south"]
        [qc]
        rounds = 7
        local_steps = 1
        leave_out = ["shift"]
        """
    )
    out = tmp_path / "run"

    assert (
        fedqc("simulate", path, "--data", data, "--out", out, "--rounds", 1, *SHORT, "--noise", "none") == 0
    )

    config = read(out / "run.json")["config"]
    assert (config["name"], config["qc"]["rounds"], config["qc"]["leave_out"]) == ("trial", 1, ["shift"])
    assert sorted(path.name for path in (out / "sites").iterdir()) == ["north", "south"]
    assert all(candidate.kind == "untouched" for candidate in read_candidates(out))


def test_a_task_file_is_seen_from_here(
    fedqc: Callable[..., int], data: Path, task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(task_file.parent)
    options = ("--rounds", 1, *SHORT, "--sites", 1, "--out", tmp_path / "run")
    assert fedqc("simulate", "--data", data, "--task", task_file.name, *options) == 0


@pytest.mark.real_data
def test_on_real_images(fedqc: Callable[..., int], real_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    folder = real_data / "Task04_Hippocampus"

    federation = tmp_path / "federation.toml"
    federation.write_text(
        """
        task = "msd-hippocampus"
        [qc]
        rounds = 1
        local_steps = 1
        cross_check_rounds = 0
        [segmentation]
        rounds = 1
        local_steps = 1
        """
    )
    assert fedqc("simulate", federation, "--data", folder, "--sites", 10, "--out", out) == 0

    figures = read(out / "evaluation.json")["curation"]["all"]
    assert figures["n_candidates"] == 100
    assert figures["n_spoiled"] == pytest.approx(35, abs=5)
