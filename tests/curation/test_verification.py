import hashlib
from pathlib import Path

import pytest

from fedqc.config import CurationConfig
from fedqc.curation.manifest import Entry, InputFile, Manifest, UsedModel, UsedRule
from fedqc.curation.rules import Outcome
from fedqc.curation.verification import changes


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Two cases on disk, one of them dropped."""
    entries = []
    for case, quality, outcome in (("a", 0.9, Outcome.KEEP), ("b", 0.2, Outcome.DROP)):
        files = {}
        for role in ("T1", "label"):
            (tmp_path / f"{case}-{role}.nii").write_bytes(f"{case} {role}".encode())
            files[role] = InputFile(path=f"{case}-{role}.nii", sha256=sha256(f"{case} {role}".encode()))
        entries.append(
            Entry(
                id=case, patient=case, quality=quality, regions={}, decision=outcome, reason="so", files=files
            )
        )
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    return Manifest(
        site="a",
        federation="f",
        task="t",
        created="2026-03-01T12:30:00+00:00",
        model=UsedModel(method="m", sha256=sha256(b"weights"), fedqc="0.1.0"),
        rule=UsedRule(config=CurationConfig()),
        entries=tuple(entries),
    )


def test_what_is_as_it_was_has_no_changes(manifest: Manifest, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    weights = tmp_path / "weights.safetensors"
    assert changes(manifest, tmp_path, weights, lambda *done: seen.append(done)) == []
    assert seen == [(1, 2), (2, 2)]


def test_every_change_is_told(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "a-label.nii").write_bytes(b"corrected")
    (tmp_path / "b-T1.nii").unlink()
    (tmp_path / "weights.safetensors").write_bytes(b"other")
    label, image, model = changes(manifest, tmp_path, tmp_path / "weights.safetensors")
    assert label.startswith("case a, label: a-label.nii has changed since it was scored; SHA-256 was")
    assert image.startswith("case b, T1: ")
    assert "No such file" in image
    assert "weights.safetensors is another one" in model
    assert "cannot be read" in changes(manifest, tmp_path, tmp_path / "gone")[-1]


def test_a_decision_that_the_rule_does_not_make_is_told(manifest: Manifest, tmp_path: Path) -> None:
    forged = manifest.entries[1].model_copy(update={"decision": Outcome.KEEP})
    altered = manifest.model_copy(update={"entries": (manifest.entries[0], forged)})
    assert changes(altered, tmp_path) == ["case b: the rule says drop, the manifest keep"]


def test_where_the_rule_was_suspended_all_are_kept(manifest: Manifest, tmp_path: Path) -> None:
    rule = UsedRule(config=CurationConfig(), suspended="the model failed")
    assert changes(manifest.model_copy(update={"rule": rule}), tmp_path) == [
        "case b: the rule says keep, the manifest drop"
    ]


def test_a_rule_without_its_ground_is_told(manifest: Manifest, tmp_path: Path) -> None:
    rule = UsedRule(config=CurationConfig(rule="target"))
    (told,) = changes(manifest.model_copy(update={"rule": rule}), tmp_path)
    assert told == "the rule cannot be applied again: rule target: there are no labels of known quality"
