import os
from pathlib import Path

import numpy as np
import pytest
from fedqc_server import checkpoint
from fedqc_server.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from fedqc_server.fedadam import Moments
from safetensors.numpy import save_file

from fedqc.errors import ModelError
from fedqc.protocol import Weights

WEIGHTS: Weights = {
    "z.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "m.num_batches_tracked": np.array(2**53 + 1, np.int64),
    "a.weight": np.array([1e-300, np.pi]),
}
STATE = TrainingState(
    rounds=2,
    samples=48,
    sites=("a", "b"),
    excused=("d",),
    strikes={"c": 2},
    out={"e": "late"},
    history=(
        {"round": 1, "loss": 0.1 + 0.2, "sites": {"a": {"samples": 4, "losses": {"loss": 0.1}}}},
        {"round": 2, "loss": None, "sites": {}, "failed": {"c": "bad-reply"}},
    ),
)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "qc.safetensors"
    assert load_checkpoint(path) is None
    save_checkpoint(path, WEIGHTS, STATE)
    loaded = load_checkpoint(path)
    assert loaded is not None
    weights, state, moments = loaded
    assert moments == Moments()
    assert state == STATE
    assert list(weights) == list(WEIGHTS)
    for name, values in WEIGHTS.items():
        assert (weights[name].dtype, weights[name].shape) == (values.dtype, values.shape)
        assert weights[name].tobytes() == values.tobytes()


def test_what_fedadam_remembers_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "qc.safetensors"
    moments = Moments({"w": np.array([0.1, 1e-300])}, {"w": np.array([2.0, 3.0])})
    save_checkpoint(path, {"w": np.zeros(2, np.float32)}, STATE, moments)
    loaded = load_checkpoint(path)
    assert loaded is not None
    assert list(loaded.weights) == ["w"]
    for kept, given in ((loaded.moments.first, moments.first), (loaded.moments.second, moments.second)):
        assert kept["w"].tobytes() == given["w"].tobytes()


def test_only_the_last_one_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "qc.safetensors"
    save_checkpoint(path, WEIGHTS, STATE)
    save_checkpoint(path, {"w": np.zeros(3)}, TrainingState(rounds=3))
    loaded = load_checkpoint(path)
    assert loaded is not None
    assert (list(loaded[0]), loaded[1].rounds) == (["w"], 3)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["save_file", "fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "qc.safetensors"
    save_checkpoint(path, WEIGHTS, STATE)

    def cut_off(*arguments: object, **options: object) -> None:
        if step == "save_file":
            Path(str(arguments[1])).write_bytes(b"half a fi")
        raise KeyboardInterrupt

    owner: object = {"save_file": checkpoint, "fsync": os, "replace": Path}[step]
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, cut_off)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, {"w": np.zeros(3)}, TrainingState(rounds=3))
    loaded = load_checkpoint(path)
    assert loaded is not None
    assert loaded[1] == STATE
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_leaves_beside_it_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL runs no `finally`, and a network may be large."""
    path = tmp_path / "qc.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        patch.setattr(Path, "replace", lambda *_: None)
        for _ in range(3):
            save_checkpoint(path, WEIGHTS, STATE)
    assert len(list(tmp_path.iterdir())) == 1
    save_checkpoint(path, WEIGHTS, STATE)
    assert list(tmp_path.iterdir()) == [path]


def _whole(path: Path) -> bytes:
    save_checkpoint(path, WEIGHTS, STATE)
    return path.read_bytes()


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "metadata", "names", "state", "folder"])
def test_a_damaged_checkpoint_is_a_sentence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "qc.safetensors"
    good = {"names": "\n".join(WEIGHTS), "state": STATE.model_dump_json()}
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(_whole(path)[:-8])
        case "noise":
            path.write_bytes(np.random.default_rng(0).bytes(500))
        case "metadata":
            save_file(WEIGHTS, path)
        case "names":
            save_file(WEIGHTS, path, metadata=good | {"names": "z.weight\nother"})
        case "state":
            save_file(WEIGHTS, path, metadata=good | {"state": '{"rounds": "many"}'})
        case "folder":
            path.mkdir()
    with pytest.raises(ModelError, match=r"qc.safetensors: not a checkpoint \(") as error:
        load_checkpoint(path)
    assert str(error.value).endswith("; restore the file or start the run anew")
