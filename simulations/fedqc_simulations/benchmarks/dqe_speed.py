"""How fast a label is rated, beside the published package deep-quality-estimation on the same files.

    python -m fedqc_simulations.benchmarks.dqe_speed FOLDER [--label seg.nii.gz] [--repeats 7] [--threads 2]

FOLDER holds one exam as BraTS names its files (`*t1n.nii.gz`, `*t1c.nii.gz`, `*t2w.nii.gz`, `*t2f.nii.gz`).
Both are timed in turn (A B A B ...) in one process: from the files, and with all volumes in memory, each in
the type of numbers that its own reader gives. Medians are compared, and the ratings must agree to 0.001.
"""

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from fedqc import load_model
from fedqc.cases.volumes import read_volume
from fedqc.importing import import_dqe

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
_THEIRS = {"t1n": "t1", "t1c": "t1c", "t2w": "t2", "t2f": "flair"}
"""Our names and the package's arguments."""


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--label", default="seg-BraTS23_1.nii.gz", help="name of the label's file")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = {name: next(options.folder.glob(f"*{name}.nii.gz")) for name in MODALITIES}
    label = options.folder / options.label
    affine = read_volume(label).affine
    package = _package()
    with tempfile.TemporaryDirectory() as folder:
        import_dqe(Path(folder) / "model")
        model = load_model(Path(folder) / "model", device="cpu")
    their_files = {_THEIRS[name]: path for name, path in files.items()}
    compare(
        "files",
        lambda: model.score(files, label).stars,
        lambda: package.predict(**their_files, segmentation=label)[0],
        options.repeats,
    )
    ours = {name: read_volume(path).data for name, path in files.items()}
    theirs = {_THEIRS[name]: read_volume(path).data.astype(np.float64) for name, path in files.items()}
    our_label = read_volume(label).data
    their_label = our_label.astype(np.float64)
    compare(
        "arrays in memory",
        lambda: model.score(ours, our_label, affine=affine).stars,
        lambda: package.predict(**theirs, segmentation=their_label)[0],
        options.repeats,
    )


def compare(what: str, ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> None:
    """Time two ways in turn, wall and processor time, and print medians."""
    ways = {"fedqc": ours, "package": theirs}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}
    stars: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            begin, busy_before = time.perf_counter(), _processor_time()
            stars[name] = float(way())
            if turn:  # the first warms up
                wall[name].append(time.perf_counter() - begin)
                busy[name].append(_processor_time() - busy_before)
    if abs(stars["fedqc"] - stars["package"]) > 1e-3:
        raise SystemExit(f"the ratings differ: {stars}")
    print(f"{what} (n = {repeats}, {torch.get_num_threads()} threads), rating {stars['fedqc']:.4f}")
    for name in ways:
        print(f"  {name:8} {median(wall[name]):7.3f} s   {median(busy[name]):7.3f} s of processors")
    for kind, times in (("wall", wall), ("processor time", busy)):
        print(f"  {median(times['package']) / median(times['fedqc']):5.1f} times as fast ({kind})")


def _package() -> Any:
    """The published package's model."""
    from deep_quality_estimation.model import DQE  # noqa: PLC0415 - only this benchmark runs it
    from loguru import logger  # noqa: PLC0415

    logger.remove()
    warnings.filterwarnings("ignore", message="This DataLoader will create 8 worker processes")
    return DQE(device="cpu")


def _processor_time() -> float:
    """Seconds of this process and of its children that ended; the package starts eight for an exam."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
