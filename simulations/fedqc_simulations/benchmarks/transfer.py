"""Weights in fp16 on the way: half the bytes, and how much that changes what a federation comes to.

    python -m fedqc_simulations.benchmarks.transfer [--sites 4] [--rounds 3] [--steps 4] [--width 32]

The same federation on phantoms, twice: QC training of the published network in its journal version (16.6
million parameters), scoring, and nothing else. Compared are the bytes of a round as `run.json` has them, the
weights in the end, the losses of the last round and the qualities that the candidates are given.
"""

import argparse
import csv
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedqc.config import (
    AveragingConfig,
    FederationConfig,
    NetworkConfig,
    PrivacyConfig,
    QCConfig,
    SitesConfig,
)
from fedqc.task import load_task
from fedqc_simulations.benchmarks.many_sites import write_sites
from fedqc_simulations.consortium import site_files, write_federation
from fedqc_simulations.engine import run_local


def main() -> None:
    """Run both, print the figures side by side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="fedqc-transfer-") as temporary:
        before, after = (
            run(
                Path(temporary) / transfer,
                transfer,
                options.sites,
                options.rounds,
                options.steps,
                options.width,
            )
            for transfer in ("fp32", "fp16")
        )
    print(f"{before.weights.size:,} numbers, {options.sites} sites, {options.rounds} rounds\n")
    print(f"{'':24}{'fp32':>14}{'fp16':>14}{'ratio':>8}")
    for name, value in before.figures.items():
        other = after.figures[name]
        print(f"{name:24}{value:14.4g}{other:14.4g}{other / value:8.4f}")
    print(f"\nweights, relative change (L2): {100 * after.change_of_weights(before):.3f} %")
    difference = np.abs(after.qualities - before.qualities)
    print(f"quality of {difference.size} candidates, change: {difference.mean():.5f}")
    print(f"the largest of these changes:  {difference.max():.5f}")


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    figures: dict[str, float]
    """Bytes and seconds of a round (medians), and the last loss."""
    weights: NDArray[np.float64]
    """All numbers of the model, one behind the other."""
    qualities: NDArray[np.float64]
    """What each candidate's label is said to be worth, in the order of sites and cases."""

    def change_of_weights(self, other: "Result") -> float:
        """L2 norm of the difference over that of the other."""
        return float(np.linalg.norm(self.weights - other.weights) / np.linalg.norm(other.weights))


def run(  # noqa: PLR0917 - what there is to be chosen
    out: Path, transfer: str, n_sites: int, rounds: int, steps: int, width: int
) -> Result:
    """QC training and scoring on phantoms, in the folder `out`."""
    names = tuple(f"site-{number:04d}" for number in range(n_sites))
    config = FederationConfig(
        name="transfer",
        task="phantom",
        sites=SitesConfig(expected=names),
        qc=QCConfig(
            rounds=rounds,
            local_steps=steps,
            batch_size=2,
            cross_check_rounds=0,
            network=NetworkConfig(architecture="published", width=width),
        ),
        averaging=AveragingConfig.model_validate({"transfer": transfer}),
        privacy=PrivacyConfig(min_count=1),  # the losses are compared, of few patients
    )
    task = str(write_task(out))
    write_sites(out, names, n_cases=4, task=task)
    write_federation(out, config, task=task)
    phases = ("train.qc", "score")
    run_local(out / "federation.toml", site_files(out, names), out, seed=0, phases=phases)
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))["rounds"]["qc"]
    statistics = json.loads((out / "statistics.json").read_text(encoding="utf-8"))
    arrays = load_file(out / "models" / "qc" / "weights.safetensors")
    qualities: list[float] = []
    for name in names:
        with (out / "sites" / name / "scores.csv").open(encoding="utf-8", newline="") as file:
            qualities += [float(row["quality"]) for row in csv.DictReader(file)]
    return Result(
        figures={
            "bytes sent a round": median(one["bytes_sent"] for one in record),
            "bytes received a round": median(one["bytes_received"] for one in record),
            "seconds a round": median(one["seconds"] for one in record),
            "loss of the last round": statistics["train"]["qc"][-1]["loss"],
        },
        weights=np.concatenate([values.ravel().astype(np.float64) for _, values in sorted(arrays.items())]),
        qualities=np.array(qualities),
    )


def write_task(out: Path) -> Path:
    """Phantoms on a grid that the published network's stride of 32 divides."""
    task = load_task("phantom").model_copy(update={"size": (32, 64, 32)})
    out.mkdir(parents=True, exist_ok=True)
    path = out / "task.toml"
    path.write_text(tomli_w.dumps(task.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    return path.resolve()


if __name__ == "__main__":
    main()
