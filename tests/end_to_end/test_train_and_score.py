"""`fedqc train` and `fedqc score`: a QC model made and used on one machine."""

import csv
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from fedqc_client import tasks
from safetensors.numpy import load_file

import fedqc as library
from fedqc import cli, scoring
from fedqc.alone import NAME
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.preprocessing import preprocess
from fedqc.cases.volumes import Case
from fedqc.config import CurationConfig, SegmentationConfig, load_site
from fedqc.errors import DataError
from fedqc.methods.base import RoundPlan
from fedqc.methods.qcresunet import QCResUNetMethod
from fedqc.model import ModelCard, load_model, save_model
from fedqc.protocol import Provenance, ScoreRequest
from fedqc.segmentation import Segmentation
from fedqc.task import Task, load_task
from tests.end_to_end.conftest import write_data_set

Run = Callable[..., int]
FAST = ("--device", "cpu", "--precision", "fp32", "--threads", 1)


@pytest.fixture(scope="session")
def config(task_file: Path) -> Path:
    """Two rounds of two steps with a network that hardly deserves the name."""
    path = task_file.parent / "federation.toml"
    path.write_text(
        f'task = "{task_file}"\n'
        "[qc]\nrounds = 2\nlocal_steps = 2\nbatch_size = 2\n"
        "[qc.network]\nwidth = 4\nblocks = [1, 1]\n"
    )
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """A folder with `data`, the model `qc` that was trained on it, and its cache."""
    root = tmp_path_factory.mktemp("trained")
    write_data_set(root / "data", 10)
    arguments = ("train", "--data", root / "data", "--config", config, "--out", root / "qc", *FAST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["fedqc", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert not stopped.value.code
    return root


@pytest.fixture
def train(fedqc: Run, trained: Path, config: Path, tmp_path: Path) -> Callable[..., int]:
    """Train once more, with the cases that were prepared already, to a model of its own."""

    def run(*options: object, data: Path = trained / "data", out: Path = tmp_path / "again") -> int:
        cache = () if "--cache" in options else ("--cache", trained / "qc.cache")
        return fedqc("train", "--data", data, "--config", config, "--out", out, *cache, *FAST, *options)

    return run


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "weights.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def table(out: Path) -> list[dict[str, str]]:
    with (out / "scores.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------- train


def test_a_model_and_its_card(trained: Path, config: Path, task_file: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {"data", "qc", "qc.cache"}
    card = load_model(trained / "qc", load_task(str(task_file))).card
    assert (card.federation, card.sites, card.seed, card.licence) == ("", (), 0, None)
    assert (card.rounds, card.samples) == (2, 2 * 2 * 2)
    assert (card.cases, card.patients) == (7, 7)  # of ten, a quarter is held back
    assert card.qc is not None
    assert (card.qc.rounds, card.qc.network.width) == (2, 4)
    figures = card.figures
    assert list(figures) == ["n", "patients", "r", "r_low", "r_high", "mae", "dsc_err_median"]
    assert figures["patients"] == 3
    n, r, low, high, mae = (figures[key] for key in ("n", "r", "r_low", "r_high", "mae"))
    assert n is not None
    assert 30 <= n <= 36
    assert r is not None
    assert low is not None
    assert high is not None
    assert mae is not None
    assert -1 <= low <= r <= high <= 1
    assert 0 < mae < 1


def test_what_is_printed(train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--licence", "CC0-1.0", "--rounds", 1) == 0
    printed = capsys.readouterr().out
    for line in (
        "checking the cases: 10 of 10",
        "preparing the cases: 10 of 10",
        "learns from 7 cases; 3 of other patients are held back",
        "training, steps: 2 of 2",
        "trying the model on held-back cases: 36 of 36",
        f"trained on 7 cases of 7 patients; the model is in {tmp_path / 'again'}",
    ):
        assert line in printed
    rows = {
        match[1].strip(): match[2].split()
        for match in re.finditer(r"^  ([^\n\d]+?)  +(\d.*)$", printed, re.M)
    }
    assert {"good label, untouched", "shift", "swapped classes", "all"} < set(rows)
    n, true, _, mae = rows["good label, untouched"]
    assert (n, true) == ("3", "1.000")
    card = load_model(tmp_path / "again").card
    assert (card.licence, card.rounds) == ("CC0-1.0", 1)
    assert rows["all"][0] == str(card.figures["n"])
    assert float(rows["all"][3]) == pytest.approx(card.figures["mae"], abs=6e-4)
    assert float(mae) <= 1
    assert f"r of predicted and true DSC {card.figures['r']:.3f} (" in printed


def test_a_seed_gives_the_same_model_twice_and_another_one_another(
    train: Run, trained: Path, tmp_path: Path
) -> None:
    assert train() == 0
    assert same(tmp_path / "again", trained / "qc")
    assert (tmp_path / "again" / "card.json").read_text() == (trained / "qc" / "card.json").read_text()
    assert train("--seed", 1, out=tmp_path / "other") == 0
    assert not same(tmp_path / "other", trained / "qc")


def test_only_the_cases_of_the_table_are_learned_from(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = [f"case_{number}" for number in range(70, 82)]
    (tmp_path / "verified.csv").write_text("\n".join(["id", "case_01", "case_03", "case_05", *unknown]))
    assert train("--reference", tmp_path / "verified.csv") == 0
    printed = capsys.readouterr().out
    assert "learns from 2 cases; 1 of other patients are held back" in printed
    assert "left out: case case_77" in printed
    assert "a reference 'case_77' that is no case of this site" in printed
    assert printed.count("left out: case case_") == 10  # one by one; who has hundreds wants no more
    assert "left out: 2 more, which `fedqc check` shows" in printed


def test_a_single_patient_is_learned_from(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "verified.csv").write_text("id\ncase_01\n")
    assert train("--reference", tmp_path / "verified.csv") == 0
    assert "all cases are of one patient, so there is none to try the model on" in capsys.readouterr().out
    card = load_model(tmp_path / "again").card
    assert (card.cases, card.figures) == (1, {})


def test_broken_cases_are_named_and_the_others_are_learned_from(
    train: Run, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(trained / "data", data)
    image = data / "imagesTr" / "case_02.nii.gz"
    image.write_bytes(image.read_bytes()[:-100])
    nibabel.save(
        nibabel.Nifti1Image(np.ones((3, 3, 3), np.uint8), np.eye(4)), data / "labelsTr/case_04.nii.gz"
    )
    assert train(data=data) == 0
    printed = capsys.readouterr().out
    left_out = [line for line in printed.splitlines() if line.startswith("left out: ")]
    assert {line.split(",")[0] for line in left_out} == {"left out: case case_02", "left out: case case_04"}
    assert "its compressed data end too early" in printed
    assert "trained on 6 cases" in printed


def test_training_starts_from_another_model(train: Run, trained: Path, config: Path, tmp_path: Path) -> None:
    further = config.with_name("further.toml")
    further.write_text(config.read_text().replace("[qc]\n", f'[qc]\ninitial = "{trained / "qc"}"\n'))
    starts: list[dict[str, torch.Tensor]] = []
    real = QCResUNetMethod.train_round

    def spy(self: QCResUNetMethod, network: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        starts.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return real(self, network, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QCResUNetMethod, "train_round", spy)
        assert train("--config", further) == 0
    assert all(np.array_equal(starts[0][name], value) for name, value in weights(trained / "qc").items())


# --------------------------------------------------------------------------------------------------- resume


@pytest.fixture
def cut_off(train: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The same training as `trained`, stopped in its second round; the result trains on."""
    real = QCResUNetMethod.train_round

    def stopping(
        self: QCResUNetMethod, network: Any, cases: Any, plan: RoundPlan, *arguments: Any, **options: Any
    ) -> Any:
        if plan.round == 2:
            raise KeyboardInterrupt
        assert plan.site == NAME
        return real(self, network, cases, plan, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(QCResUNetMethod, "train_round", stopping)
        assert train() == 130
    assert "the same command goes on with it" in capsys.readouterr().err
    return train


def test_a_training_that_was_cut_off_goes_on(
    cut_off: Run, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not (tmp_path / "again").exists()
    assert load_model(tmp_path / "again.training" / "model").card.rounds == 1
    assert cut_off("--licence", "CC0-1.0") == 0  # which decides nothing
    printed = capsys.readouterr().out
    assert "goes on after round 1 of 2" in printed
    assert "training, steps: 4 of 4" in printed
    assert same(tmp_path / "again", trained / "qc")
    card = load_model(tmp_path / "again").card
    assert card == load_model(trained / "qc").card.model_copy(update={"licence": "CC0-1.0"})
    assert {path.name for path in tmp_path.iterdir()} == {"again"}


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (("--seed", 1), "seed"),
        (("--rounds", 3, "--local-steps", 4), "qc.local_steps, qc.rounds"),
        (("--reference", "verified.csv"), "cases"),
        (("--task", "wider.toml"), "task"),
    ],
)
def test_another_training_is_refused(
    *,
    options: tuple[object, ...],
    changed: str,
    cut_off: Run,
    task_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("verified.csv").write_text("id\ncase_01\ncase_02\ncase_03\n")
    Path("wider.toml").write_text(task_file.read_text().replace("[16, 16, 16]", "[24, 16, 16]"))
    assert cut_off(*options) == 2
    message = capsys.readouterr().err
    folder = tmp_path / "again.training"
    assert f"{folder}: holds an unfinished training with other {changed}; give what was given" in message
    assert f"or remove {folder} to begin anew" in message
    shutil.rmtree(folder)
    assert cut_off(*options) == 0


def test_cases_that_changed_meanwhile_are_noticed(
    cut_off: Run, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(trained / "data", data)
    image: Any = nibabel.load(data / "imagesTr" / "case_03.nii.gz")
    changed = nibabel.Nifti1Image(image.get_fdata(dtype=np.float32) + 1, image.affine)
    nibabel.save(changed, data / "imagesTr" / "case_03.nii.gz")
    assert cut_off(data=data) == 2
    assert "holds an unfinished training with other cases; give" in capsys.readouterr().err


def test_a_damaged_plan_is_named(cut_off: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("{", '{"task": 1}'):
        (tmp_path / "again.training" / "plan.json").write_text(text)
        assert cut_off() == 2
        message = capsys.readouterr().err
        assert f"{tmp_path / 'again.training' / 'plan.json'}: cannot be read (" in message
        assert message.count("\n") == 1


# ---------------------------------------------------------------------------------------------------- score


@pytest.fixture
def score(fedqc: Run, trained: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*options: object, data: Path = trained / "data", model: Path = trained / "qc") -> int:
        return fedqc("score", "--model", model, "--data", data, "--out", tmp_path / "out", *FAST, *options)

    return run


def test_scores_of_a_folder(
    score: Run, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score() == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"scores.csv", "error_maps"}
    rows = table(out)
    assert list(rows[0]) == ["id", "patient", "quality", "front", "back", "qi"]
    assert [row["id"] for row in rows] == [f"case_{number:02d}" for number in range(10)]
    assert all(0 <= float(row[key]) <= 1 for row in rows for key in ("quality", "front", "back"))
    for row in rows:
        made: Any = nibabel.load(out / "error_maps" / f"{row['id']}.nii.gz")
        image: Any = nibabel.load(trained / "data" / "imagesTr" / f"{row['id']}.nii.gz")
        assert (made.shape, made.get_data_dtype()) == (image.shape, np.uint8)
        assert np.array_equal(made.affine, image.affine)
    printed = capsys.readouterr().out
    assert "scoring: 10 of 10" in printed
    assert f"10 of 10 cases are scored; see {out / 'scores.csv'}" in printed
    shown = re.findall(r"^  (case_\d\d) +(\S+)", printed, re.MULTILINE)
    worst = sorted(rows, key=lambda row: float(row["quality"]))
    assert [quality for _, quality in shown] == [f"{float(row['quality']):.3f}" for row in worst]


def test_the_same_scores_from_python_and_at_a_site(
    score: Run, trained: Path, task_file: Path, tmp_path: Path
) -> None:
    assert score() == 0
    rows = {row["id"]: row for row in table(tmp_path / "out")}
    model = library.load_model(trained / "qc", device="cpu", precision="fp32")
    for name, row in rows.items():
        given = [trained / "data" / folder / f"{name}.nii.gz" for folder in ("imagesTr", "labelsTr")]
        found = model.score(*given)
        assert found.quality == pytest.approx(float(row["quality"]), abs=2e-6)
        assert found.regions["back"] == pytest.approx(float(row["back"]), abs=2e-6)
        made: Any = nibabel.load(tmp_path / "out" / "error_maps" / f"{name}.nii.gz")
        assert found.error_map is not None
        assert np.abs(100 * found.error_map - np.asanyarray(made.dataobj)).max() < 1.01  # rounded twice
    site = tmp_path / "site.toml"
    site.write_text(
        f'name = "north"\ntask = "{task_file}"\n[data]\npath = "{trained / "data"}"\n'
        '[compute]\ndevice = "cpu"\nprecision = "fp32"\n[policy]\nmin_count = 1\n'
    )
    stored = load_model(trained / "qc")
    assert stored.card.qc is not None
    request = ScoreRequest(
        federation="test",
        task=stored.card.task.digest,
        seed=0,
        min_count=1,
        weights=weights(trained / "qc"),
        qc=stored.card.qc,
        curation=CurationConfig(),
        provenance=Provenance(rounds=2, samples=8, sites=("north",)),
    )
    tasks.score(load_site(site), request)
    at_site = table(tmp_path / "results")
    assert [row["id"] for row in at_site] == list(rows)
    assert all(row[key] == rows[row["id"]][key] for row in at_site for key in ("patient", "quality", "front"))
    for name in rows:
        alone, there = (
            folder / "error_maps" / f"{name}.nii.gz" for folder in (tmp_path / "out", site.parent / "results")
        )
        assert alone.read_bytes() == there.read_bytes()


def test_the_worst_are_drawn(score: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score("--review", data=write_data_set(tmp_path / "two", 2)) == 0
    pictures = sorted((tmp_path / "out" / "review").iterdir())
    assert [path.name for path in pictures] == ["case_00.png", "case_01.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert "drawing: 2 of 2" in capsys.readouterr().out


def test_broken_cases_are_named_and_the_others_are_scored(
    score: Run,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tmp_path / "data"
    shutil.copytree(trained / "data", data)
    (data / "labelsTr" / "case_02.nii.gz").unlink()
    nibabel.save(
        nibabel.Nifti1Image(np.full((18, 18, 18), 7, np.uint8), np.eye(4)), data / "labelsTr/case_04.nii.gz"
    )

    def breaking(files: CaseFiles, task: Task) -> Case:
        if files.id == "case_06":
            raise DataError("case case_06: it went away")
        return preprocess(files, task)

    monkeypatch.setattr(scoring, "preprocess", breaking)
    assert score(data=data) == 0
    lines = capsys.readouterr().out.splitlines()
    left_out = [line for line in lines if line.startswith("left out: ")]
    assert {re.split("[,:] ?", line)[1] for line in left_out} == {
        f"case case_0{number}" for number in (2, 4, 6)
    }
    assert [row["id"] for row in table(tmp_path / "out")] == [f"case_0{n}" for n in (0, 1, 3, 5, 7, 8, 9)]
    assert any(line.startswith("7 of 10 cases are scored") for line in lines)


# ---------------------------------------------------------------------------------------------- wrong input


@pytest.fixture
def refused(fedqc: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command on something that cannot work; the result is the sentence it printed."""

    def run(*arguments: object) -> str:
        assert fedqc(*arguments, "--out", tmp_path / "out") == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return message

    return run


@pytest.fixture
def learn(trained: Path, config: Path) -> tuple[object, ...]:
    return ("train", "--data", trained / "data", "--config", config)


@pytest.fixture
def judge(trained: Path) -> tuple[object, ...]:
    return ("score", "--data", trained / "data", "--model", trained / "qc")


@pytest.mark.parametrize("command", ["learn", "judge"])
def test_wrong_data(
    command: str, refused: Callable[..., str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    words = request.getfixturevalue(command)
    empty, odd = tmp_path / "empty", tmp_path / "odd"
    empty.mkdir()
    odd.mkdir()
    (odd / "scan.txt").write_text("x")
    assert f"{tmp_path / 'nowhere'}: there is no such folder" in refused(
        *words, "--data", tmp_path / "nowhere"
    )
    assert f"{empty}: the folder is empty" in refused(*words, "--data", empty)
    assert "no layout fits" in refused(*words, "--data", odd)
    assert "layout 'brast' is not known; did you mean 'brats'?" in refused(*words, "--layout", "brast")
    assert "cases.csv: there is no such file; make a table" in refused(*words, "--layout", "csv")


@pytest.mark.parametrize("command", ["learn", "judge"])
def test_no_usable_case(
    command: str, refused: Callable[..., str], request: pytest.FixtureRequest, trained: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(trained / "data", data)
    for path in (data / "imagesTr").iterdir():
        path.write_text("no image")
    words = request.getfixturevalue(command)
    message = refused(*words, "--data", data)
    assert (
        f"{data}: none of 10 cases can be used for task 'ellipsoids'; the first problem: case case_00"
        in message
    )


@pytest.mark.parametrize("command", ["learn", "judge"])
def test_nothing_is_written_over_or_among_the_data(
    *,
    command: str,
    fedqc: Run,
    request: pytest.FixtureRequest,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = request.getfixturevalue(command)
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "weights.safetensors").write_text("years of work")
    file.write_text("more work")
    for out in (full, file):
        assert fedqc(*words, "--out", out) == 2
        assert f"{out}: is not an empty folder; nothing is written over" in capsys.readouterr().err
    assert fedqc(*words, "--out", trained / "data" / "here") == 2
    assert "lies inside the data folder" in capsys.readouterr().err
    assert (full / "weights.safetensors").read_text() == "years of work"
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file"}


def test_wrong_options_of_train(
    refused: Callable[..., str], learn: tuple[object, ...], trained: Path, tmp_path: Path
) -> None:
    alone = ("train", "--data", trained / "data")
    no_ids = tmp_path / "no-ids.csv"
    no_ids.write_text("case\ncase_01\n")
    strangers = tmp_path / "strangers.csv"
    strangers.write_text("id\ncase_77\n")
    assert "--task is missing; name what the data show" in refused(*alone)
    assert "task 'hippo' is not built in" in refused(*alone, "--task", "hippo")
    assert "qc.method 'qcresnet' is unknown; installed:" in refused(*learn, "--method", "qcresnet")
    assert "rounds: input should be greater than or equal to 1 (found 0)" in refused(*learn, "--rounds", 0)
    assert f"{no_ids}: column id is missing; found case" in refused(*learn, "--reference", no_ids)
    assert f"{strangers}: none of its 1 cases can be used" in refused(*learn, "--reference", strangers)
    assert "there is no such file" in refused(*learn, "--reference", tmp_path / "nowhere.csv")
    assert "there is no such file" in refused(*alone, "--config", tmp_path / "nowhere.toml")
    assert "device 'cuda:99': this machine has" in refused(*learn, "--device", "cuda:99")
    cache = trained / "data" / "cache"
    assert f"{cache}: lies inside the data folder" in refused(*learn, "--cache", cache)


class Bomb:
    """What a pickle runs when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_pickles_are_not_opened(
    refused: Callable[..., str], judge: tuple[object, ...], tmp_path: Path
) -> None:
    marker, folder = tmp_path / "exploded", tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(Bomb(marker), folder / "best.pth")
    (folder / "model.safetensors").touch()
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Bomb(marker)))
    for path, name in ((folder, "best.pth"), (tmp_path / "model.pt", "model.pt")):
        message = refused(*judge, "--model", path)
        assert f"{path}: not a model: {name} looks like a pickle, which can run any program" in message
        assert "name a model that fedqc wrote, a folder with weights.safetensors and card.json" in message
    assert not marker.exists()


def test_what_is_no_qc_model(
    refused: Callable[..., str],
    judge: tuple[object, ...],
    trained: Path,
    task_file: Path,
    tmp_path: Path,
) -> None:
    message = refused(*judge, "--model", trained / "data")
    assert f"{trained / 'data'}: not a model: No such file or directory; a model is a folder" in message
    message = refused(*judge, "--model", trained / "qc" / "weights.safetensors")
    assert f"it is a file of one; name its folder, {trained / 'qc'}" in message
    task, config = load_task(str(task_file)), SegmentationConfig(channels=(4, 8))
    fields = {"federation": "north", "seed": 0, "rounds": 1, "samples": 1, "sites": ("a",)}
    card = ModelCard(task=task, stage="segmentation", segmentation=config, **fields)
    save_model(tmp_path / "segmentation", Segmentation(task, config).build(0).state_dict(), card)
    message = refused(*judge, "--model", tmp_path / "segmentation")
    assert "a segmentation model, expected a QC model; name the folder of one" in message


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"modalities": ["T1", "FLAIR"]},
            "task 'ellipsoids' needs 2 (T1, FLAIR); choose the task that fits the data",
        ),
        ({"classes": {"front": [1], "back": [9]}}, "found label value 2 in"),
    ],
)
def test_a_model_of_another_task(
    change: dict[str, Any], sentence: str, refused: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    """Its task is in its card; what does not fit are the data."""
    other = tmp_path / "other"
    shutil.copytree(trained / "qc", other)
    card = json.loads((other / "card.json").read_text())
    card["task"] |= change
    (other / "card.json").write_text(json.dumps(card))
    if "modalities" in change:
        task = Task.model_validate(card["task"])
        method = load_model(trained / "qc").method
        state = type(method)(task, method.config).build(0).state_dict()
        save_model(other, state, ModelCard.model_validate(card))
    message = refused("score", "--data", trained / "data", "--model", other)
    assert sentence in message
