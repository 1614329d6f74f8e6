"""What `fedqc check` and preprocessing cost: seconds beside named peers, and peak memory.

    python -m fedqc_simulations.benchmarks.check_speed [--repeats 5] [--threads 2] [--only check brats ...]

Parts, all of them unless `--only` names some:

    check      the 200 hippocampus cases, checked by 1 and 2 workers, and by processes instead of threads
    brats      the BraTS case (five gzipped volumes of 240x240x155), beside nibabel reading its files
    inflate    the same files inflated by gzip, isal and zlib-ng, and which share of a check that is
    preprocess the BraTS case to 1 and 2 mm, and into the cache, beside MONAI's transforms
    memory     peak memory of checking 20 and 200 copies of the BraTS case
    phantoms   many cases of 64x64x64: first check, second, one with ten changed files, and the cache

Times are medians of runs in turn (A B A B ...), so that a machine's drift does not decide. What is printed is
a table that can be pasted into a page.
"""

import argparse
import csv
import gzip
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

import nibabel
import numpy as np
from isal import igzip
from numpy.typing import NDArray

from fedqc.cases.cache import CaseCache
from fedqc.cases.check import check_cases
from fedqc.cases.layouts import CaseFiles, Listing, find_cases
from fedqc.cases.preprocessing import preprocess
from fedqc.cases.validation import inspect_case
from fedqc.cases.volumes import voxel_size
from fedqc.task import Task, load_task

MEGABYTE = 2**20
BRATS = "BraTS-GLI-00001-000"
HIPPOCAMPUS = "Task04_Hippocampus"
PHANTOM_SIDE = 64
COPIES = (20, 200)
_BUFFER = 2**20
_N_BASES = 8


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    value: str
    peer: str = ""
    its_value: str = ""
    ratio: str = ""
    goal: str = ""

    def __str__(self) -> str:
        """The row in Markdown."""
        cells = (self.what, self.value, self.peer, self.its_value, self.ratio, self.goal)
        return f"| {' | '.join(cells)} |"


HEAD = Row("what", "fedqc", "peer", "peer's", "times as fast", "goal")


def main() -> None:
    """Run the parts and print the table, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, which MONAI runs on")
    parser.add_argument(
        "--data", type=Path, help="real images; FEDQC_REAL_DATA or ../shared/data if left out"
    )
    parser.add_argument("--phantoms", type=int, default=2000)
    parser.add_argument("--copies", type=int, nargs="+", default=COPIES)
    parser.add_argument("--only", nargs="+", choices=list(PARTS))
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        print(json.dumps(measure_inside(json.loads(options.inside))))
        return
    given = options.data or os.environ.get("FEDQC_REAL_DATA")
    options.data = Path(given) if given else Path(__file__).resolve().parents[4] / "shared" / "data"
    print(f"{HEAD}\n|---|---|---|---|---|---|")
    for name in options.only or PARTS:
        print(f"{name} ...", file=sys.stderr)
        for row in PARTS[name](options):
            print(row, flush=True)


def in_turn(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function; all run once before, and then in turn."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begin)
    return {name: median(times) for name, times in seconds.items()}


def against(what: str, seconds: float, peer: str, its_seconds: float, goal: str = "") -> Row:
    """A row of two times and their ratio."""
    return Row(what, f"{seconds:.2f} s", peer, f"{its_seconds:.2f} s", f"{its_seconds / seconds:.2f}", goal)


# ------------------------------------------------------------------------------------------------- checking


def check_rows(options: argparse.Namespace) -> list[Row]:
    """Checking many small cases, by threads and by processes."""
    task = load_task("msd-hippocampus")
    root = options.data / HIPPOCAMPUS
    listing = find_cases(root, task)
    what = f"check {len(listing.cases)} hippocampus cases"
    return compare_workers(what, listing, root, task, repeats=options.repeats, goal="6 s")


def compare_workers(
    what: str, listing: Listing, root: Path, task: Task, *, repeats: int, goal: str = ""
) -> list[Row]:
    """Rows for 1 and 2 workers, each beside as many processes; the goal is one for 2."""
    functions: dict[str, Callable[[], object]] = {}
    for workers in (1, 2):
        functions[f"threads {workers}"] = partial(check_cases, listing, root, task, workers=workers)
        functions[f"processes {workers}"] = partial(by_processes, listing.cases, task, workers)
    seconds = in_turn(functions, repeats)
    return [
        against(
            f"{what}, {workers} workers" if workers > 1 else f"{what}, 1 worker",
            seconds[f"threads {workers}"],
            f"inspect_case in a pool of {workers} process{'es' if workers > 1 else ''}, its start included",
            seconds[f"processes {workers}"],
            goal if workers == 2 else "",
        )
        for workers in (1, 2)
    ]


def brats_rows(options: argparse.Namespace) -> list[Row]:
    """Checking one full case, and eight of them by two workers."""
    task, files = brats_case(options.data)
    return compare_one_case(files, options.data, task, options.repeats)


def compare_one_case(files: CaseFiles, root: Path, task: Task, repeats: int) -> list[Row]:
    """Rows for one case beside nibabel, and for eight times the same case."""
    one = Listing(cases=[files])
    seconds = in_turn(
        {
            "check": partial(check_cases, one, root, task),
            "nibabel": partial(_read_by_nibabel, files.files),
        },
        repeats,
    )
    rows = [
        against(
            f"check the BraTS case, {len(files.files)} volumes",
            seconds["check"],
            "nibabel get_fdata of the same files",
            seconds["nibabel"],
            "2.5 s",
        )
    ]
    many = Listing(cases=[files] * 8)
    return rows + compare_workers("check 8 BraTS cases", many, root, task, repeats=repeats)


def inflate_rows(options: argparse.Namespace) -> list[Row]:
    """How long inflating takes, by each library that is there."""
    task, files = brats_case(options.data)
    hippocampus = load_task("msd-hippocampus")
    listing = find_cases(options.data / HIPPOCAMPUS, hippocampus)
    return [
        *compare_inflate("the BraTS case", Listing(cases=[files]), options.data, task, options.repeats),
        *compare_inflate(
            f"{len(listing.cases)} hippocampus cases", listing, options.data, hippocampus, options.repeats
        ),
    ]


def compare_inflate(what: str, listing: Listing, root: Path, task: Task, repeats: int) -> list[Row]:
    """One row a library: what the files take, and which share of checking them that is."""
    paths = [path for case in listing.cases for path in case.files]
    seconds = in_turn(
        {
            "check": partial(check_cases, listing, root, task),
            **{name: partial(_inflate, paths, opened) for name, opened in _libraries().items()},
        },
        repeats,
    )
    return [
        Row(
            f"inflate {what}, {name}",
            f"{seconds[name]:.3f} s",
            "the whole check by 1 worker",
            f"{seconds['check']:.3f} s",
            f"{seconds[name] / seconds['check']:.0%} of it",
        )
        for name in _libraries()
    ]


def _libraries() -> dict[str, Callable[[BinaryIO], Any]]:
    """How each library opens a compressed file; zlib-ng only where it is installed."""

    def by_isal(file: BinaryIO) -> Any:
        return igzip.IGzipFile(fileobj=file)

    def by_gzip(file: BinaryIO) -> Any:
        return gzip.GzipFile(fileobj=file)

    libraries: dict[str, Callable[[BinaryIO], Any]] = {"isal": by_isal, "gzip": by_gzip}
    try:
        other = importlib.import_module("zlib_ng.gzip_ng")
    except ImportError:
        return libraries

    def by_zlib_ng(file: BinaryIO) -> Any:
        return other.GzipNGFile(fileobj=file)

    return {**libraries, "zlib-ng": by_zlib_ng}


def _inflate(paths: Sequence[Path], opened: Callable[[BinaryIO], Any]) -> None:
    buffer = bytearray(_BUFFER)
    for path in paths:
        with path.open("rb") as file, opened(file) as stream:
            while stream.readinto(buffer):
                pass


def _read_by_nibabel(paths: Sequence[Path]) -> None:
    for path in paths:
        image: Any = nibabel.load(path)
        image.get_fdata()


def by_processes(cases: Sequence[CaseFiles], task: Task, workers: int) -> None:
    """Inspect cases in so many processes, started for it."""
    # Started afresh: a copy of a process with threads may hang.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(inspect_case, task=task), cases, chunksize=max(1, len(cases) // workers // 4)))


# -------------------------------------------------------------------------------------------- preprocessing


def preprocess_rows(options: argparse.Namespace) -> list[Row]:
    """Preprocessing of the BraTS case to two spacings, and into the cache, beside MONAI."""
    importlib.import_module("torch").set_num_threads(options.threads)
    task, files = brats_case(options.data)
    coarse = task.model_copy(
        update={"spacing": (2.0, 2.0, 2.0), "size": tuple(side // 2 for side in task.size)}
    )
    return [
        row
        for each in (task, coarse)
        for row in compare_with_monai(f"BraTS case to {each.spacing[0]:g} mm", files, each, options.repeats)
    ]


def compare_with_monai(what: str, files: CaseFiles, task: Task, repeats: int) -> list[Row]:
    """Rows for preprocessing, for the cache, and for the largest difference of the voxels."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="fedqc-cache-") as folder:
        warnings.simplefilter("ignore")  # MONAI's own deprecations
        theirs = monai_chain(task)
        paths = {"image": [str(path) for path in files.images], "label": str(files.label)}
        seconds = in_turn(
            {
                "preprocess": partial(preprocess, files, task),
                "cache": partial(_cache_anew, Path(folder), files, task),
                "monai": partial(theirs, paths),
            },
            repeats,
        )
        difference = largest_difference(files, task)
    peer = "MONAI: LoadImaged, Orientationd, Spacingd, CropForegroundd, NormalizeIntensityd, label by nearest"
    return [
        against(f"preprocess the {what}", seconds["preprocess"], peer, seconds["monai"], "1.5 times"),
        against(f"the {what}, into the cache on disk", seconds["cache"], "the same", seconds["monai"]),
        Row(
            f"largest difference of a voxel of the {what}",
            f"{difference:.1g}",
            "MONAI's, by SpatialResample onto fedqc's grid (Spacingd moves the origin a little)",
            goal="1e-3",
        ),
    ]


def monai_chain(task: Task) -> Callable[[Mapping[str, Any]], Any]:
    """The plain pipeline of MONAI for the same result."""
    transforms: Any = importlib.import_module("monai.transforms")
    keys = ["image", "label"]
    chain: Callable[[Mapping[str, Any]], Any] = transforms.Compose(
        [
            transforms.LoadImaged(keys=keys),
            transforms.EnsureChannelFirstd(keys=keys),
            transforms.Orientationd(keys=keys, axcodes="RAS", labels=None),
            transforms.Spacingd(
                keys=keys, pixdim=task.spacing, mode=("bilinear", "nearest"), scale_extent=True
            ),
            transforms.CropForegroundd(keys=keys, source_key="image", allow_smaller=True),
            transforms.NormalizeIntensityd(keys="image", nonzero=True, channel_wise=True),
            transforms.ResizeWithPadOrCropd(keys=keys, spatial_size=task.size),
        ]
    )
    return chain


def largest_difference(files: CaseFiles, task: Task) -> float:
    """Of the z-scored voxels from those that MONAI makes of the same files on the same grid."""
    transforms: Any = importlib.import_module("monai.transforms")
    image = transforms.EnsureChannelFirst()(transforms.LoadImage(image_only=True)([*map(str, files.images)]))
    field_of_view = voxel_size(image.affine.numpy()) * image.shape[1:]
    # A window that shows all of the image, however it is turned, for mean and SD are those of all of it.
    size = tuple(np.ceil(max(field_of_view) / np.array(task.spacing)).astype(int).tolist())
    case = preprocess(files, task.model_copy(update={"size": size}))
    values = transforms.SpatialResample(
        mode="bilinear", padding_mode="zeros", align_corners=False, dtype="float64"
    )(image, dst_affine=case.affine, spatial_size=size)
    # Interpolation leaves rounding errors where the image is zero.
    values = values * (abs(values) > 1e-2)
    expected = transforms.NormalizeIntensity(nonzero=True, channel_wise=True)(values)
    return float(np.abs(case.image - expected.numpy()).max())


def _cache_anew(folder: Path, files: CaseFiles, task: Task) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        CaseCache(Path(fresh), task).get(files)


# ---------------------------------------------------------------------------------------------------- memory


def memory_rows(options: argparse.Namespace) -> list[Row]:
    """Peak memory of checking copies of the BraTS case; it must not grow with their number."""
    task, files = brats_case(options.data)
    return compare_copies(files, task, options.copies)


def compare_copies(files: CaseFiles, task: Task, copies: Sequence[int]) -> list[Row]:
    """A row for each number of copies, checked by two workers in a process of its own."""
    rows = []
    for n in copies:
        with tempfile.TemporaryDirectory(prefix="fedqc-copies-") as folder:
            write_copies(Path(folder), files, n)
            figures = _in_a_process({"do": "check", "data": folder, "task": task.name, "workers": 2})
        rows.append(
            Row(
                f"check {n} copies of the BraTS case, 2 workers",
                f"{figures['seconds']:.1f} s, {figures['memory']:.0f} MiB",
                goal="1536 MiB",
            )
        )
    return rows


def write_copies(folder: Path, files: CaseFiles, n: int) -> None:
    """A folder in the layout `csv` that lists one case `n` times, its files linked under other names."""
    task_columns = [f"image-{number}" for number in range(len(files.images))]
    rows = []
    for number in range(n):
        names = []
        for column, path in zip([*task_columns, "label"], files.files, strict=True):
            names.append(f"{number}/{column}.nii.gz")
            link = folder / names[-1]
            link.parent.mkdir(exist_ok=True)
            try:
                link.hardlink_to(path.resolve())
            except OSError:  # another file system
                link.symlink_to(path.resolve())
        rows.append([f"case-{number}", *names])
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def _in_a_process(what: Mapping[str, Any]) -> dict[str, float]:
    """Seconds and peak memory in MiB of a new process that does nothing else."""
    finished = subprocess.run(  # noqa: S603 - ourselves
        [sys.executable, "-m", "fedqc_simulations.benchmarks.check_speed", "--inside", json.dumps(what)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return figures


def measure_inside(what: Mapping[str, Any]) -> dict[str, float]:
    """What such a process does: check a folder, or make its cache."""
    task = load_task(what["task"])
    root = Path(what["data"])
    listing = _copies(root, task) if (root / "rows.json").is_file() else find_cases(root, task)
    begin = time.perf_counter()
    if what["do"] == "check":
        memory = Path(what["memory"]) if "memory" in what else None
        n = len(check_cases(listing, root, task, workers=what["workers"], memory=memory).usable)
    else:
        CaseCache(Path(what["cache"]), task).prepare(listing.cases, workers=what["workers"])
        n = len(listing.cases)
    return {"seconds": time.perf_counter() - begin, "memory": peak_memory() / MEGABYTE, "cases": n}


def _copies(folder: Path, task: Task) -> Listing:
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    cases = []
    for case_id, *names in rows:
        *images, label = (folder / name for name in names)
        cases.append(CaseFiles(case_id, case_id, tuple(images[: len(task.modalities)]), label))
    return Listing(cases=cases)


def peak_memory() -> int:
    """Most memory in bytes that this process has taken since it began (Linux).

    `ru_maxrss` would say more: a process inherits it from the one that started it.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status names no VmHWM")


# -------------------------------------------------------------------------------------------------- phantoms


def phantom_rows(options: argparse.Namespace) -> list[Row]:
    """Many small cases: checked, checked again, checked after ten changed, and made into a cache."""
    with tempfile.TemporaryDirectory(prefix="fedqc-phantoms-") as place:
        return compare_visits(Path(place), options.phantoms, PHANTOM_SIDE)


def compare_visits(place: Path, n: int, side: int) -> list[Row]:
    """Rows for `n` cases of `side` voxels a side in the folder `place`."""
    data, task = place / "data", place / "task.toml"
    task.write_text(
        f'name = "balls"\nmodalities = ["T1"]\nspacing = [1.0, 1.0, 1.0]\nsize = [{side}, {side}, {side}]\n'
        "[classes]\ncore = [1]\nrim = [2]\n[regions]\nwhole = ['core', 'rim']\n",
        encoding="utf-8",
    )
    begin = time.perf_counter()
    names = write_balls(data, n, side)
    print(f"  {n} cases written in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    check = {
        "do": "check",
        "data": str(data),
        "task": str(task),
        "workers": 2,
        "memory": str(place / "memory"),
    }
    cases = f"{n} cases of {side}x{side}x{side}"
    rows = [
        _visit(f"check {cases}, 2 workers, first time", check),
        _visit("second time, nothing changed", check),
    ]
    changed = names[:: max(1, len(names) // 10)][:10]
    for name in changed:
        (data / name).touch()
    rows.append(_visit(f"third time, {len(changed)} files changed", check))
    prepare = {**check, "do": "prepare", "cache": str(place / "cache")}
    rows.append(_visit(f"cache of {cases}, first time", prepare))
    rows.append(_visit("second time", prepare))
    return rows


def _visit(what: str, how: Mapping[str, Any]) -> Row:
    figures = _in_a_process(how)
    return Row(what, f"{figures['seconds']:.1f} s, {figures['memory']:.0f} MiB", goal="1536 MiB")


def write_balls(folder: Path, n: int, side: int) -> list[str]:
    """`n` cases with a ball in a noisy head, in the layout `csv`; no two are the same.

    A few are made, and all others are these, moved and with other noise: 2,000 take seconds.

    Returns:
        Names of the image files in the folder.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    bases = [_ball(rng, side) for _ in range(_N_BASES)]
    noise = rng.integers(0, 60, (2 * side, side, side)).astype(np.int16)
    names = []
    with (folder / "cases.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "T1", "label"])
        for number in range(n):
            image, label = bases[number % _N_BASES]
            way = tuple(int(step) for step in rng.integers(0, side // 4, 3))
            start = int(rng.integers(0, side))
            moved = np.roll(image, way, (0, 1, 2))
            moved = np.where(moved > 0, moved + noise[start : start + side], 0).astype(np.int16)
            names.append(f"ball-{number}.nii.gz")
            _write(folder / names[-1], moved)
            _write(folder / f"ball-{number}-label.nii.gz", np.roll(label, way, (0, 1, 2)))
            writer.writerow([f"ball-{number}", names[-1], f"ball-{number}-label.nii.gz"])
    return names


def _ball(rng: np.random.Generator, side: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    grid = np.indices((side, side, side)) - rng.uniform(0.35, 0.45, 3).reshape(3, 1, 1, 1) * side
    distance = np.sqrt((grid**2).sum(axis=0)) / side
    label = np.select([distance < 0.1, distance < 0.2], [1, 2]).astype(np.uint8)
    image = np.select([distance < 0.1, distance < 0.2, distance < 0.33], [800, 600, 400])
    return image.astype(np.int16), label


def _write(path: Path, volume: NDArray[Any]) -> None:
    header = nibabel.Nifti1Image(volume, np.eye(4)).header
    header.set_xyzt_units("mm")
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    content = header.binaryblock + bytes(4) + volume.tobytes(order="F")
    path.write_bytes(igzip.compress(content, 1))


# ------------------------------------------------------------------------------------------------------ data


def brats_case(data: Path) -> tuple[Task, CaseFiles]:
    """The real BraTS case and its task."""
    task, folder = load_task("brats-glioma"), data / BRATS
    images = tuple(folder / f"{BRATS}-{modality}.nii.gz" for modality in task.modalities)
    return task, CaseFiles(BRATS, BRATS, images, folder / "seg-BraTS23_1.nii.gz")


PARTS: Mapping[str, Callable[[argparse.Namespace], list[Row]]] = {
    "check": check_rows,
    "brats": brats_rows,
    "inflate": inflate_rows,
    "preprocess": preprocess_rows,
    "memory": memory_rows,
    "phantoms": phantom_rows,
}


if __name__ == "__main__":
    main()
