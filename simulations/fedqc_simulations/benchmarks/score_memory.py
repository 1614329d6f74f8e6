"""How much memory and time `fedqc score` takes at full size.

    python -m fedqc_simulations.benchmarks.score_memory [--threads 2] [--cases 2] [--methods qcresunet ...]

The command itself scores cases of noise with a tumour in their middle, four modalities each, with an
untrained network of each method in its default size. Each has a process of its own; memory is the most that
this process ever held, time that of the whole command by the number of cases.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np

from fedqc.cli import main as fedqc
from fedqc.config import NetworkConfig, QCConfig
from fedqc.methods.base import get_method
from fedqc.model import ModelCard, save_model
from fedqc.task import Task
from fedqc_simulations.benchmarks.check_speed import MEGABYTE, peak_memory

MODULE = "fedqc_simulations.benchmarks.score_memory"
SIZES = ((160, 192, 160), (240, 240, 155))
MODALITIES = ("t1n", "t1c", "t2w", "t2f")
JOURNAL = NetworkConfig(architecture="published", width=32, attention=True)
CONFIGURATIONS = {
    "qcresunet": QCConfig(),
    "qcresunet-published": QCConfig(network=NetworkConfig(architecture="published")),
    "qcresunet-journal": QCConfig(network=JOURNAL),
    "voxresnet": QCConfig(method="voxresnet"),
    "robinson": QCConfig(method="robinson"),
    "unet": QCConfig(method="unet"),
    "resnet34": QCConfig(method="resnet34"),
    "resnet50": QCConfig(method="resnet50"),
}
"""By name; `qcresunet` is the corrective form."""


def main() -> None:
    """Measure each case in a process of its own and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--one", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(Path(options.one), options.threads)
        return
    print(f"{'network':22}{'size':>14}{'parameters':>13}{'s a case':>10}{'peak MiB':>10}")
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="fedqc-score-") as temporary:
            folder = Path(temporary)
            _write_cases(folder / "data", size, options.cases)
            for name in options.methods:
                parameters = _write_model(folder / "model", name, size)
                command = [sys.executable, "-m", MODULE, "--one", str(folder)]
                command += ["--threads", str(options.threads)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
                if done.returncode:
                    sys.exit(done.stderr)
                figures = json.loads(done.stdout.splitlines()[-1])
                seconds = figures["seconds"] / options.cases
                shape = "x".join(map(str, size))
                print(
                    f"{name:22}{shape:>14}{parameters:13,}{seconds:10.1f}{figures['peak']:10.0f}", flush=True
                )


def measure(folder: Path, threads: int) -> None:
    """Run the command in this process, and print what it took as a line of JSON."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        paths = {"--model": folder / "model", "--data": folder / "data", "--out": Path(out) / "scores"}
        words = ["score", *(str(word) for pair in paths.items() for word in pair), "--threads", str(threads)]
        begin = time.perf_counter()
        sys.argv = ["fedqc", *words]
        try:
            fedqc()
        except SystemExit as ending:
            if ending.code:
                raise
        seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "peak": peak_memory() / MEGABYTE}))


def _write_model(folder: Path, name: str, size: tuple[int, int, int]) -> int:
    """An untrained model; how many parameters it has."""
    config = CONFIGURATIONS[name]
    x, y, z = (-(-axis // 8) * 8 for axis in size) if name == "qcresunet" else size
    task = Task(
        name="full-size",
        modalities=MODALITIES,
        classes={"tumour": (1,)},
        regions={"tumour": ("tumour",)},
        spacing=(1.0, 1.0, 1.0),
        size=(x, y, z),
    )
    network = get_method(config.method)(task, config).build(0)
    card = ModelCard(task=task, qc=config, federation="", seed=0, rounds=0, samples=0, sites=())
    save_model(folder, network.state_dict(), card)
    return sum(parameter.numel() for parameter in network.parameters())


def _write_cases(folder: Path, size: tuple[int, int, int], count: int) -> None:
    """Cases in the layout csv: noise, and an ellipsoid that is brighter and labelled."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    grid = np.indices(size) - (np.array(size) / 2).reshape(3, 1, 1, 1)
    label = (((grid / (np.array(size) / 5).reshape(3, 1, 1, 1)) ** 2).sum(axis=0) <= 1).astype(np.uint8)
    rows = [",".join(["id", *MODALITIES, "label"])]
    for number in range(count):
        names = [f"case-{number}-{modality}.nii.gz" for modality in (*MODALITIES, "label")]
        rows.append(",".join([f"case-{number}", *names]))
        for name in names[:-1]:
            noise = rng.normal(500, 60, size) + 200 * label
            nibabel.save(nibabel.Nifti1Image(noise.astype(np.int16), np.eye(4)), folder / name)
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), folder / names[-1])
    (folder / "cases.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
