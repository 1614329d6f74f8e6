"""Whether ratings notice wrong labels: the published DQE and one that phantoms made stricter, side by side.

    python -m fedqc_simulations.benchmarks.dqe_sensitivity FOLDER --model DQE [--label seg.nii.gz]
        [--phantoms 16] [--voxel 4] [--rounds 7] [--steps 60] [--slices 12] [--seed 0] [--device auto]
        [--threads 2] [--out FOLDER]

FOLDER holds one real exam as BraTS names its files, DQE the model that `fedqc import dqe` wrote. A label of
the exam is spoiled in ways whose DSC with the label as it is is known, and both models rate it.

The stricter model is the published one, trained on (`qc.dqe.targets = "distilled"`) with degraded labels of
phantoms alone: it never saw a real image, let alone this one. They are drawn with voxels of 4 mm. Read
under the task `brats-glioma` they are resampled to 1 mm like any scan, so that a brain has the size in
voxels that it has in a real slice; they lack the detail, which the teacher never had to learn from them.
Drawn with voxels of 1 mm (`--voxel 1`) they serve worse: the stricter model then took the real label as it
is for a bad one (2.3 stars of the published 5.3), and its stars hardly followed the DSC (rho 0.25 instead
of 0.90).
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import spearmanr
from torch import nn

from fedqc.cases.cache import CaseCache
from fedqc.cases.cached import CachedCases
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.sources import Source
from fedqc.cases.volumes import Volume, label_to_classes, read_volume, write_volume
from fedqc.compute import Compute, choose_compute
from fedqc.config import DQEConfig
from fedqc.methods.base import RoundPlan, begin_stage
from fedqc.methods.dqe import DQEMethod
from fedqc.metrics.overlap import overlap
from fedqc.model import StoredModel, load_model, load_weights, save_model
from fedqc.seeding import generator
from fedqc_simulations.levels import Grid
from fedqc_simulations.pathology import TUMOUR
from fedqc_simulations.phantoms import draw_scanner, make_phantom

CORE, EDEMA, ENHANCING = 1, 2, 3
CUBE = 20
"""Side of the cube beside the brain, in voxels."""


def main() -> None:
    """Train, rate, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="of `fedqc import dqe`")
    parser.add_argument("--label", default="seg-BraTS23_1.nii.gz", help="name of the label's file")
    parser.add_argument("--phantoms", type=int, default=16)
    parser.add_argument("--voxel", type=float, default=4.0, help="side of a phantom's voxels in mm")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60, help="of a round")
    parser.add_argument("--slices", type=int, default=12, help="of a step")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for the stricter model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    compute = choose_compute(options.device)
    published = load_model(options.model)
    begin = time.monotonic()
    method, stricter = _trained(published, options, compute)
    print(f"trained on {options.phantoms} phantoms in {time.monotonic() - begin:.0f} s")
    images = [_held(next(options.folder.glob(f"*{name}.nii.gz"))) for name in TUMOUR.modalities]
    path = options.folder / options.label
    label = read_volume(path)
    rows = []
    for name, spoiled in spoiled_labels(label.data):
        source = Source(path, Volume(spoiled, label.affine))
        scores = [
            one.score_sources(network, images, source, compute)
            for one, network in ((published.method, published.network), (method, stricter))
        ]
        stars = [float("nan") if score is None else float(score.stars or 0) for score in scores]
        rows.append((name, _dsc(spoiled, label.data, published), stars[0], stars[1]))
    print(
        f"\n| Label of {options.folder.name} | DSC | published, stars | stricter, stars |\n|---|---|---|---|"
    )
    for name, dsc, first, second in rows:
        print(f"| {name} | {dsc:.3f} | {first:.2f} | {second:.2f} |")
    for column, which in ((2, "published"), (3, "stricter")):
        rho = float(spearmanr([row[1] for row in rows], [row[column] for row in rows]).statistic)
        print(f"Spearman's rho of stars and DSC, {which}: {rho:.3f} (n = {len(rows)} labels of one exam)")


def spoiled_labels(label: NDArray[Any]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """A label [X, Y, Z] of BraTS values with voxels of 1 mm, as it is and with errors, by their name."""
    label = np.where(label == 4, ENHANCING, label).astype(np.uint8)
    yield "as it is", label
    for millimetres in (5, 10, 20):
        moved = np.zeros_like(label)
        moved[millimetres:] = label[:-millimetres]
        yield f"shifted by {millimetres} mm", moved
    for voxels in (2, 4):
        inside = ndimage.binary_erosion(label > 0, iterations=voxels)
        yield f"eroded by {voxels} voxels", np.where(inside, label, 0).astype(np.uint8)
    yield "all edema", np.where(label > 0, EDEMA, 0).astype(np.uint8)
    yield "core and enhancing exchanged", np.choose(label, (0, ENHANCING, EDEMA, CORE)).astype(np.uint8)
    cube = np.zeros_like(label)
    cube[2 : 2 + CUBE, 2 : 2 + CUBE, 2 : 2 + CUBE] = ENHANCING
    yield "a cube beside the brain", cube


def _held(path: Path) -> Source:
    """A file that is read once."""
    return Source(path, read_volume(path))


def _dsc(label: NDArray[Any], reference: NDArray[Any], model: StoredModel) -> float:
    """Mean DSC over the regions that the reference holds."""
    task = model.card.task
    judged, right = (torch.from_numpy(label_to_classes(one, task).copy())[None] for one in (label, reference))
    return float(overlap(judged, right, task.region_indices()).mean[0])


def _trained(
    published: StoredModel, options: argparse.Namespace, compute: Compute
) -> tuple[DQEMethod, nn.Module]:
    """The published model, trained on with degraded labels of phantoms."""
    task, qc = published.card.task, published.card.qc
    assert qc is not None  # noqa: S101 - load_model reads QC models only
    dqe = DQEConfig(**(qc.dqe.model_dump() | {"targets": "distilled", "batch_size": options.slices}))
    changes = {"rounds": options.rounds, "local_steps": options.steps, "dqe": dqe}
    qc = qc.model_copy(update={**changes, "learning_rate": options.learning_rate, "schedule": "cosine"})
    method = DQEMethod(task, qc)
    network = method.build(options.seed)
    load_weights(network, method.initial_state(published.network.state_dict()), source=str(options.model))
    (stage,) = method.stages()
    begin_stage(network, stage)
    with tempfile.TemporaryDirectory() as folder:
        files = list(_phantoms(Path(folder), options))
        cache = CaseCache(Path(folder) / "cache", task)
        cache.prepare(files)
        cases = CachedCases(cache, files)
        for number in range(1, stage.rounds + 1):
            plan = RoundPlan(
                seed=options.seed,
                site="phantoms",
                round=number,
                rounds=stage.rounds,
                steps=stage.local_steps,
                batch_size=stage.batch_size,
            )
            result = method.train_round(network, cases, plan, compute)
            print(f"round {number}: squared error {result.losses['stars']:.3f}", flush=True)
    if options.out is not None:
        card = published.card.model_copy(update={"qc": qc, "rounds": stage.rounds})
        save_model(options.out, network.state_dict(), card)
    return method, network


def _phantoms(folder: Path, options: argparse.Namespace) -> Iterator[CaseFiles]:
    """Phantoms of as many scanners, in files."""
    finer = TUMOUR.grid.spacing / options.voxel
    x, y, z = (round(side * finer) for side in TUMOUR.grid.shape)
    kind = replace(TUMOUR, grid=Grid((x, y, z), options.voxel))
    for number in range(options.phantoms):
        rng = generator(options.seed, "phantom", number)
        phantom = make_phantom(rng, draw_scanner(rng, kind), kind)
        name = f"phantom-{number}"
        paths = tuple(folder / f"{name}-{modality}.nii.gz" for modality in TUMOUR.modalities)
        for path, image in zip(paths, phantom.image, strict=True):
            write_volume(path, image, phantom.affine)
        write_volume(folder / f"{name}.nii.gz", phantom.label, phantom.affine)
        yield CaseFiles(name, name, paths, folder / f"{name}.nii.gz")


if __name__ == "__main__":
    main()
