import hashlib
import json
import os
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from fedqc.cases.cache import CaseCache
from fedqc.cases.cached import CachedCases
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import write_volume
from fedqc.config import QCConfig, SegmentationConfig
from fedqc.errors import ConfigError, DataError, ModelError
from fedqc.methods.base import get_method
from fedqc.model import (
    CARD,
    WEIGHTS,
    ModelCard,
    has_model,
    load_model,
    load_segmentation,
    reference_files,
    save_model,
)
from fedqc.segmentation import Segmentation
from fedqc.task import Task


@pytest.fixture
def task() -> Task:
    return Task(
        name="blobs",
        modalities=("T1",),
        classes={"core": (1,), "rim": (2,)},
        regions={"core": ("core",), "whole": ("core", "rim")},
        spacing=(1.0, 1.0, 1.0),
        size=(16, 16, 16),
    )


@pytest.fixture
def card(task: Task) -> ModelCard:
    return ModelCard(
        task=task,
        qc=QCConfig(leave_out=("shift",)),
        federation="north",
        seed=5,
        rounds=3,
        samples=960,
        sites=("a", "b"),
    )


@pytest.fixture
def state(task: Task) -> dict[str, Tensor]:
    """Weights that `build` of the card's seed does not give."""
    network = get_method("qcresunet")(task, QCConfig()).build(1)
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return dict(network.state_dict())


@pytest.fixture
def name(state: dict[str, Tensor]) -> str:
    """One of the weights, a matrix or more."""
    return next(name for name, tensor in state.items() if tensor.ndim > 1)


@pytest.fixture
def folder(tmp_path: Path, state: dict[str, Tensor], card: ModelCard) -> Path:
    save_model(tmp_path / "models" / "qc", state, card)
    return tmp_path / "models" / "qc"


def test_a_model_comes_back_as_it_was_saved(
    folder: Path, state: dict[str, Tensor], card: ModelCard, task: Task
) -> None:
    model = load_model(folder, task)
    assert model.card == card
    assert (model.method.name, model.method.task, model.method.config) == ("qcresunet", task, card.qc)
    loaded = model.network.state_dict()
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert model.sha256 == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert {path.name for path in folder.parent.rglob("*")} == {"qc", WEIGHTS, CARD}  # nothing left aside


def test_saving_returns_the_hash_of_the_weights_and_replaces_an_older_model(
    folder: Path, state: dict[str, Tensor], card: ModelCard, name: str
) -> None:
    (folder / "old").touch()
    other = {name: tensor * 2 for name, tensor in state.items()}
    sha256 = save_model(folder, other, card.model_copy(update={"rounds": 4}))
    model = load_model(folder)
    assert (model.sha256, model.card.rounds) == (sha256, 4)
    assert torch.equal(model.network.state_dict()[name], other[name])
    assert not (folder / "old").exists()


def test_a_model_that_cannot_be_written_leaves_the_older_one(
    folder: Path, state: dict[str, Tensor], card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    before = load_model(folder).sha256
    other = {name: tensor * 2 for name, tensor in state.items()}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            save_model(folder, other, card)
    assert load_model(folder).sha256 == before
    assert os.listdir(folder.parent) == ["qc"]  # noqa: PTH208


class Killed(BaseException):
    """What no `except OSError` catches, as nothing catches a kill."""


@pytest.mark.parametrize("late", [False, True], ids=["before a step", "after a step"])
def test_a_kill_at_any_moment_leaves_a_whole_model(
    tmp_path: Path, state: dict[str, Tensor], card: ModelCard, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Stopped before and after each change of the disk in turn; `rmtree` removes files without `Path`."""
    folder = tmp_path / "models" / "qc"
    other = {name: tensor * 2 for name, tensor in state.items()}
    old = save_model(folder, state, card)
    new = save_model(tmp_path / "new", other, card)
    remaining = 0

    def stopping(owner: Any, name: str) -> Any:
        real = getattr(owner, name)

        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal remaining
            remaining -= 1
            if remaining < 0 and not late:
                raise Killed
            result = real(*arguments, **options)
            if remaining < 0:
                raise Killed
            return result

        return step

    outcomes = []
    for stop in range(100):
        remaining = stop
        with monkeypatch.context() as patch:
            for name in ("write_bytes", "write_text", "mkdir", "rename"):
                patch.setattr(Path, name, stopping(Path, name))
            for name in ("unlink", "rmdir"):  # what `rmtree` calls
                patch.setattr(os, name, stopping(os, name))
            try:
                save_model(folder, other, card)
            except Killed:
                outcomes.append(load_model(folder).sha256)
            else:
                break
        # And the next one goes on from whatever is left.
        assert save_model(folder, state, card) == load_model(folder).sha256 == old
        assert os.listdir(folder.parent) == ["qc"]  # noqa: PTH208
    assert load_model(folder).sha256 == new
    assert set(outcomes) == {old, new}
    assert outcomes == sorted(outcomes, key=[old, new].index)
    assert len(outcomes) > 6


@pytest.fixture
def segmentation_card(card: ModelCard) -> ModelCard:
    config = SegmentationConfig(channels=(4, 8))
    return ModelCard(**(vars(card) | {"stage": "segmentation", "qc": None, "segmentation": config}))


@pytest.fixture
def segmentation_folder(tmp_path: Path, task: Task, segmentation_card: ModelCard) -> Path:
    assert segmentation_card.segmentation is not None
    state = Segmentation(task, segmentation_card.segmentation).build(1).state_dict()
    save_model(tmp_path / "models" / "segmentation", state, segmentation_card)
    return tmp_path / "models" / "segmentation"


def test_a_segmentation_model_comes_back_as_it_was_saved(
    segmentation_folder: Path, task: Task, segmentation_card: ModelCard
) -> None:
    model = load_segmentation(segmentation_folder, task)
    assert model.card == segmentation_card
    assert (model.segmentation.task, model.segmentation.config) == (task, segmentation_card.segmentation)
    expected = model.segmentation.build(1).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.network.state_dict().items())
    assert model.sha256 == hashlib.sha256((segmentation_folder / WEIGHTS).read_bytes()).hexdigest()
    with pytest.raises(ModelError, match="model of task 'blobs'"):
        load_segmentation(segmentation_folder, task.model_copy(update={"name": "others"}))


def test_a_model_of_the_other_kind(folder: Path, segmentation_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"segmentation: a segmentation model, expected a QC model; name"):
        load_model(segmentation_folder)
    with pytest.raises(ModelError, match=r"qc: a QC model, expected a segmentation model; name"):
        load_segmentation(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "segmentation"},
        {"segmentation": SegmentationConfig()},
        {"qc": None},
        {"stage": "segmentation", "segmentation": SegmentationConfig()},
    ],
)
def test_a_card_has_the_configuration_of_its_stage_only(card: ModelCard, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"stage '\w+' needs the table '\w+' and no other"):
        ModelCard(**(vars(card) | change))


def test_a_card_is_json_that_people_can_read(folder: Path) -> None:
    card = json.loads((folder / CARD).read_text())
    assert (card["format"], card["federation"], card["sites"]) == (1, "north", ["a", "b"])
    assert card["task"]["classes"] == {"core": [1], "rim": [2]}


def test_a_card_of_before_what_was_added_is_read(folder: Path) -> None:
    card = json.loads((folder / CARD).read_text())
    for name in ("cases", "patients", "figures", "licence"):
        del card[name]
    (folder / CARD).write_text(json.dumps(card))
    read = load_model(folder).card
    assert (read.cases, read.patients, read.figures, read.licence) == (None, None, {}, None)


def test_what_a_model_learned_from_and_how_well_it_does(
    tmp_path: Path, state: dict[str, Tensor], card: ModelCard
) -> None:
    figures: dict[str, float | int | None] = {"n": 36, "r": 0.25, "r_low": None}
    fuller = ModelCard(**(vars(card) | {"cases": 7, "patients": 5, "figures": figures, "licence": "CC0-1.0"}))
    save_model(tmp_path / "qc", state, fuller)
    read = load_model(tmp_path / "qc").card
    assert read == fuller
    assert isinstance(read.figures["n"], int)
    with pytest.raises(ValueError, match="finite number"):
        ModelCard(**(vars(card) | {"figures": {"r": float("nan")}}))


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "change",
    [
        {"name": "others"},
        {"spacing": (1.0, 1.0, 2.0)},
        {"classes": {"core": (1,), "rim": (3,)}},
        {"classes": {"rim": (2,), "core": (1,)}},  # equal as dictionaries, but other class indices
        {"regions": {"whole": ("core", "rim"), "core": ("core",)}},
    ],
)
def test_a_model_of_another_task(folder: Path, task: Task, change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"model of task 'blobs' .*, not '(blobs|others)'"):
        load_model(folder, task.model_copy(update=change))
    load_model(folder, task.model_copy(update={"description": "in other words"}))


def test_a_folder_without_a_model(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere: not a model: .* holds weights.safetensors and card.json"):
        load_model(tmp_path / "nowhere")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="not a model: No such file"):
        load_model(folder)


def test_whether_there_is_a_model(folder: Path) -> None:
    assert has_model(folder)
    assert not has_model(folder.with_name("other"))
    folder.rename(folder.with_name(".qc.old"))  # as a kill leaves it
    assert has_model(folder)
    load_model(folder)


def test_files_that_are_no_model(tmp_path: Path, folder: Path) -> None:
    for name in (WEIGHTS, CARD):
        with pytest.raises(ModelError, match=rf"not a model: it is a file of one; name its folder, {folder}"):
            load_model(folder / name)
    (folder / CARD).unlink()
    with pytest.raises(ModelError, match=r"not a model: No such file or directory; a model is a folder that"):
        load_model(folder)
    for name in ("last.ckpt", "best.PTH"):
        (folder / name).touch()
        with pytest.raises(ModelError, match=rf"not a model: {name} looks like a pickle, .* opens none"):
            load_model(folder)
        (folder / name).unlink()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"notes\.txt: not a model: Not a directory; a model is a folder"):
        load_model(tmp_path / "notes.txt")


def header(dtype: str, shape: list[int], size: int) -> bytes:
    text = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not safetensors",
        struct.pack("<Q", 2**60) + b"{}",
        header("F32", [2**62, 8], 4),
        header("F4", [2], 1),  # a type of the format that torch does not have
        header("F32", [1], 4)[:-2],
    ],
)
def test_weights_that_are_no_safetensors_file(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ModelError, match=r"weights\.safetensors: not a safetensors file: .*copy it again"):
        load_model(folder)


def test_a_damaged_copy_of_the_weights(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="not a safetensors file"):
        load_model(folder)


class Bomb:
    """What a pickle runs when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("file", [WEIGHTS, CARD])
def test_nothing_is_ever_unpickled(folder: Path, tmp_path: Path, file: str) -> None:
    marker = tmp_path / "exploded"
    torch.save(Bomb(marker), tmp_path / "bomb.pt")
    bomb = pickle.dumps(Bomb(marker))
    for content in ((tmp_path / "bomb.pt").read_bytes(), bomb):
        (folder / file).write_bytes(content)
        with pytest.raises(ModelError, match=re.escape(file)):
            load_model(folder)
        assert not marker.exists()
    pickle.loads(bomb)  # noqa: S301 - it would have worked
    assert marker.exists()


def test_weights_that_do_not_fit(folder: Path, state: dict[str, Tensor], name: str) -> None:
    shape = tuple(state[name].shape)
    less = {other: tensor for other, tensor in state.items() if other != name}
    for changed, found in (
        (less, f"{name} is missing, expected {shape}"),
        (state | {"extra": torch.zeros(2)}, "extra is (2,), expected nothing of that name"),
        (state | {name: state[name].flatten()}, f"{name} is ({state[name].numel()},), expected {shape}"),
        (state | {name: state[name] * torch.nan}, f"{name} holds numbers that are not finite"),
    ):
        (folder / WEIGHTS).write_bytes(
            save({other: tensor.contiguous() for other, tensor in changed.items()})
        )
        with pytest.raises(ModelError, match=rf"weights\.safetensors: .*{re.escape(found)}"):
            load_model(folder)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "not a model card"),
        ("[" * 100_000, "not a model card"),
        ("[]", "no model card"),
        ("{}", "key 'task' is missing"),
    ],
)
def test_a_broken_card(folder: Path, content: str, found: str) -> None:
    (folder / CARD).write_text(content)
    with pytest.raises(ModelError, match=rf"card\.json: .*{found}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"format": 2}, r"format: .*found 2"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_a_card_of_another_version(folder: Path, change: dict[str, Any], found: str) -> None:
    card = json.loads((folder / CARD).read_text()) | change
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(ModelError, match=rf"card\.json: .*{found}.*no model card of this version"):
        load_model(folder)


def test_a_method_that_is_not_installed(folder: Path) -> None:
    card = json.loads((folder / CARD).read_text())
    card["qc"]["method"] = "oracle"
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(ConfigError, match=r"'oracle' is unknown; installed: .*qcresunet"):
        load_model(folder)


# ------------------------------------------------------------------------------------ references


@pytest.fixture
def compares(tmp_path: Path, task: Task, card: ModelCard) -> Path:
    """A model that compares with two reference cases."""
    rng = np.random.default_rng(0)
    cases = []
    for name in ("one", "two"):
        image, label = tmp_path / f"{name}-image.nii", tmp_path / f"{name}-label.nii"
        write_volume(image, rng.normal(size=(16, 16, 16)).astype(np.float32), np.eye(4))
        write_volume(label, rng.integers(3, size=(16, 16, 16)).astype(np.uint8), np.eye(4))
        cases.append(CaseFiles(name, f"patient-{name}", (image,), label))
    references = CachedCases(CaseCache(tmp_path / "cache", task), cases)
    qc = QCConfig(method="rca")
    method = get_method("rca")(task, qc)
    state = method.build(0).state_dict()
    folder = tmp_path / "models" / "rca"
    save_model(
        folder, state, card.model_copy(update={"qc": qc, "references": reference_files(method, references)})
    )
    return folder


def test_references_are_read_where_they_lie_and_only_once(compares: Path, tmp_path: Path) -> None:
    references = load_model(compares).method.references
    assert [case.patient for case in references] == ["patient-one", "patient-two"]
    assert references[0].label.max() == 2
    (tmp_path / "one-image.nii").unlink()
    assert references[0] is references[0]  # prepared before it went
    with pytest.raises(DataError, match=r"one-image\.nii.* cannot be read"):
        load_model(compares).method.references[0]


@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_card_cannot_make_another_file_a_reference(compares: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / f"one-{kind}.nii").write_bytes((tmp_path / f"two-{kind}.nii").read_bytes())
    references = load_model(compares).method.references
    with pytest.raises(DataError, match=rf"one-{kind}\.nii.* is not that of reference one in .*card\.json"):
        references[0]
    assert references[1].patient == "patient-two"


def test_a_reference_without_its_hashes_is_refused(compares: Path) -> None:
    values = json.loads((compares / CARD).read_text())
    values["references"][0]["sha256"].pop()
    (compares / CARD).write_text(json.dumps(values))
    with pytest.raises(ModelError, match="'one' has 2 files, found 1 hashes"):
        load_model(compares)
