"""How fast QC samples are made and the QC networks run, beside MONAI and beside plain fp32.

    python -m fedqc_simulations.benchmarks.qc_speed [--repeats 7] [--threads 2] [--full-size]

Everything is timed in turn (A B A B ...) and medians are compared, so that a machine's drift does not decide.
With `--full-size` the published network in its journal version (width 32, channel attention) scores a volume
of 160x192x160 voxels with four modalities, beside the same network as PyTorch has it (fp32, contiguous).
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np
import torch
from monai.transforms.compose import Compose
from monai.transforms.spatial.dictionary import Rand3DElasticd, RandAffined
from torch import Tensor
from torch.nn import functional as F

from fedqc.cases.volumes import Case
from fedqc.compute import Compute, choose_compute, freed_memory_returned
from fedqc.config import NetworkConfig, QCConfig
from fedqc.degradation.samples import LabelFactory
from fedqc.methods.qcresunet import QCResUNetMethod
from fedqc.networks.qcresunet import SideMaps
from fedqc.task import Task, load_task

LABELS = 32


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full-size", action="store_true", help="the journal version at full size too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = load_task("msd-hippocampus")
    method = QCResUNetMethod(task, QCConfig())
    rng = np.random.default_rng(0)
    cases = [_case(rng, task.size) for _ in range(8)]

    compare(
        "SegGen labels",
        _seggen(cases, rng),
        "MONAI RandAffined + Rand3DElasticd",
        _monai(cases),
        options.repeats,
    )
    fast, plain = choose_compute(), Compute(torch.device("cpu"), torch.float32)
    name = f"{fast.dtype} on {fast.device}".removeprefix("torch.")
    compare(
        f"training step, {name}",
        _step(method, cases, fast),
        "fp32 on cpu",
        _step(method, cases, plain),
        options.repeats,
    )
    compare(
        f"scoring 8 cases, {name}",
        _score(method, cases, fast),
        "fp32 on cpu",
        _score(method, cases, plain),
        options.repeats,
    )
    if options.full_size:
        full_size(fast, options.repeats)


def full_size(fast: Compute, repeats: int) -> None:
    """The journal version on one large volume, and how far the two scores lie apart."""
    task = Task(
        name="full-size",
        modalities=("t1n", "t1c", "t2w", "t2f"),
        classes={"tumour": (1,)},
        regions={"tumour": ("tumour",)},
        spacing=(1.0, 1.0, 1.0),
        size=(160, 192, 160),
    )
    network = NetworkConfig(architecture="published", width=32, attention=True)
    method = QCResUNetMethod(task, QCConfig(network=network))
    small = _case(np.random.default_rng(0), task.size)
    image = np.concatenate([small.image] * 4)
    case = replace(small, image=image, label=(small.label > 0).astype(np.uint8))
    ours, theirs = method.build(0), method.build(0).eval()
    theirs.get_submodule("side_maps").__class__ = _PlainSideMaps
    with torch.no_grad():  # an untrained network's scores lie around 0, and are cut off there
        for one in (ours, theirs):
            one.get_parameter("quality.bias").fill_(0.5)
    inputs = method.inputs(torch.from_numpy(image)[None], torch.from_numpy(case.label)[None])
    qualities: dict[str, float] = {}

    def score() -> None:
        (found,) = method.score(ours, [case], fast)
        qualities["ours"] = found.quality

    @torch.inference_mode()
    def plain() -> None:
        qualities["theirs"] = theirs(inputs).quality[0, 0].clamp(0, 1).item()

    name = f"{fast.dtype} on {fast.device}".removeprefix("torch.")
    # Plain PyTorch does not ask the C library to keep memory either.
    around = partial(freed_memory_returned, fast)
    compare(f"scoring 160x192x160x5, {name}", score, "fp32, eager", plain, repeats, around=around)
    print(f"scores {qualities['ours']:.4f} and {qualities['theirs']:.4f}, of a network that was not trained")


class _PlainSideMaps(SideMaps):
    """Side maps as the paper draws them: everything is enlarged first, then weighed and joined."""

    def forward(self, decoded: Sequence[Tensor], error: Tensor, label: Tensor) -> Tensor:
        """As the class above."""
        error = F.interpolate(error, size=label.shape[2:], mode="nearest")
        joined: Tensor = self.join(self.attentions[-1](torch.cat([error, label], dim=1)))
        for features, to_maps, attention in zip(decoded, self.maps, self.attentions[:-1], strict=True):
            maps = F.interpolate(to_maps(features), scale_factor=float(self.scale), mode="nearest")
            beside = F.interpolate(label, size=maps.shape[2:], mode="area")
            weighed = self.join(attention(torch.cat([maps, beside], dim=1)))
            joined = joined + F.interpolate(weighed, size=label.shape[2:], mode="nearest")
        return joined


def compare(
    what: str,
    ours: Callable[[], None],
    peer: str,
    theirs: Callable[[], None],
    repeats: int,
    *,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Time two functions in turn and print the ratio of their medians.

    Args:
        what: ours is.
        ours: is run once before each time that it is timed, and so is the other.
        peer: the other's name.
        theirs: the other.
        repeats: how often each is timed.
        around: what the other runs in.
    """
    mine, other = [], []
    for _ in range(repeats):
        mine.append(_seconds(ours))
        with around():
            other.append(_seconds(theirs))
    fast, slow = median(mine), median(other)
    print(f"{what}: {fast * 1e3:.1f} ms; {peer}: {slow * 1e3:.1f} ms; {slow / fast:.1f} times as fast")


def _seconds(function: Callable[[], None]) -> float:
    """How long a function takes once all it needs is there."""
    function()
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _case(rng: np.random.Generator, size: tuple[int, int, int]) -> Case:
    """Noise with two half ellipsoids in its middle."""
    grid = np.indices(size) - (np.array(size) / 2 + rng.uniform(-2, 2, 3)).reshape(3, 1, 1, 1)
    inside = ((grid / (np.array(size) / 5).reshape(3, 1, 1, 1)) ** 2).sum(axis=0) <= 1
    label = np.where(inside, np.where(grid[1] > 0, 1, 2), 0).astype(np.uint8)
    image = (rng.normal(size=size) + label).astype(np.float32)[None]
    return Case("case", "patient", image, label, np.eye(4), size, np.eye(4))


def _seggen(cases: list[Case], rng: np.random.Generator) -> Callable[[], None]:
    factory = LabelFactory([case.label for case in cases], ((1,), (2,)), ["seggen"])

    def run() -> None:
        recipes = [factory.draw(rng, index % len(cases), "seggen") for index in range(LABELS)]
        factory.make([recipe for recipe in recipes if recipe is not None])

    return run


def _monai(cases: list[Case]) -> Callable[[], None]:
    """Labels of the same kind: the ranges of SegGen at this size, each transform as often as there.

    Rotation, scaling and translation are one transform here, applied unless SegGen would leave out all three.
    After a Gaussian of 5 to 7 voxels, as smooth as SegGen's field, little is left of a displacement of 1
    voxel: up to 300 give labels of about the DSC that SegGen's do.
    """
    keys = ["label"]
    transform = Compose(
        [
            RandAffined(
                keys,
                prob=1 - 0.5**3,
                rotate_range=[np.radians(15)] * 3,
                translate_range=[5, 6, 5],
                scale_range=[(-0.15, 0.25)] * 3,
                mode="nearest",
                padding_mode="zeros",
            ),
            Rand3DElasticd(
                keys,
                sigma_range=(5, 7),
                magnitude_range=(0, 300),
                prob=0.5,
                mode="nearest",
                padding_mode="zeros",
            ),
        ]
    )

    def run() -> None:
        for index in range(LABELS):
            transform({"label": cases[index % len(cases)].label[None].astype(np.float32)})

    return run


def _step(method: QCResUNetMethod, cases: list[Case], compute: Compute) -> Callable[[], None]:
    network = compute.place(method.build(0))
    pool = method.pool(cases, compute.device)
    (batch,) = method.batches(cases, pool, np.random.default_rng(0), 1, 8)

    def run() -> None:
        with compute.autocast():
            parts = method.losses(network, batch)
        torch.stack([part.float() for part in parts.values()]).sum().backward()  # type: ignore[no-untyped-call]

    return run


def _score(method: QCResUNetMethod, cases: list[Case], compute: Compute) -> Callable[[], None]:
    network = method.build(0)

    def run() -> None:
        for _ in method.score(network, cases, compute):
            pass

    return run


if __name__ == "__main__":
    main()
