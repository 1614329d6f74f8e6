"""Runs of a federation in one process: what goes back and forth is kept, and may be changed on the way."""

import csv
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fedqc_server.phases import PHASES, run_federation
from fedqc_server.roster import Clock
from fedqc_server.run_folder import RunFolder
from fedqc_simulations.engine import LocalGrid
from flwr.app import Message
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedqc.cases.volumes import write_volume
from fedqc.config import load_federation
from fedqc.protocol import Reply, reply_from_records, reply_to_records
from fedqc.seeding import generator

Sites = dict[str, Path]
Change = Callable[[str, Message], Message | None]
"""Changes the reply of a site in place, or puts another one in its place."""

USUAL_PHASES = [name for name in PHASES if name != "train.segmenters"]
"""Those of a run whose samples need no segmenters."""
SIDE = 20
TASK = """
name = "ball"
modalities = ["t1"]
spacing = [1.0, 1.0, 1.0]
size = [16, 16, 16]
[classes]
ball = [1]
[regions]
ball = ["ball"]
"""


# ------------------------------------------------------------------------------------------------- on disk


def ball(centre: NDArray[np.float64], radius: float = 5.0) -> NDArray[np.bool_]:
    grid = np.indices((SIDE, SIDE, SIDE))
    offset = grid - centre.reshape(3, 1, 1, 1)
    inside: NDArray[np.bool_] = (offset**2).sum(axis=0) <= radius**2
    return inside


def write_task(folder: Path) -> Path:
    path = folder / "ball.toml"
    path.write_text(TASK)
    return path


def write_site(
    parent: Path,
    name: str,
    task: Path,
    *,
    references: int = 4,
    good: int = 3,
    spoiled: int = 1,
    min_count: int = 1,
    prefix: str = "",
    habit: bool = False,
    segmentation: bool = True,
) -> Path:
    """A site's folder: reference cases, good candidates and candidates with a shifted label.

    With a `habit`, the labels of the references are shifted too.
    """
    folder = parent / "sites" / name
    rng = generator(1, name)
    kinds = ["ref"] * references + ["good"] * good + ["bad"] * spoiled
    rows: list[dict[str, str]] = []
    (folder / "data").mkdir(parents=True)
    for index, kind in enumerate(kinds):
        case = f"{prefix}{kind}-{index}"
        place = 9.5 + rng.uniform(-1, 1, size=3)
        image = np.where(ball(place), 100.0, 10.0) + rng.uniform(0, 1, (SIDE,) * 3)
        is_shifted = kind == "bad" or (habit and kind == "ref")
        label = ball(place + (6 if is_shifted else 0))
        # An axis runs the other way, so that error maps have to find their way back.
        affine = np.diag([-1.0, 1.0, 1.0, 1.0])
        write_volume(folder / "data" / f"{case}.nii.gz", image.astype(np.float32), affine)
        write_volume(folder / "data" / f"{case}-label.nii.gz", label, affine)
        rows.append(
            {"id": case, "t1": f"{case}.nii.gz", "label": f"{case}-label.nii.gz", "patient": f"P{index}"}
        )
    with (folder / "data" / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "t1", "label", "patient"])
        writer.writeheader()
        writer.writerows(rows)
    vouched = [row["id"] for row in rows[:references]]
    (folder / "reference.csv").write_text("\n".join(["id", *vouched]) + "\n")
    site = folder / "site.toml"
    site.write_text(
        f'name = "{name}"\ntask = "{task}"\n'
        '[data]\npath = "data"\nlayout = "csv"\nreference = "reference.csv"\n'
        '[compute]\ndevice = "cpu"\nprecision = "fp32"\nworkers = 1\n'
        f"[policy]\nmin_count = {min_count}\nsegmentation = {str(segmentation).lower()}\nsheet = false\n"
    )
    return site


def write_federation(
    folder: Path,
    sites: Iterable[str],
    task: Path,
    *,
    minimum: int = 1,
    rounds: int = 2,
    deadline: str = "60s",
    method: str = "tiny",
    cross_check_rounds: int = 1,
    segmentation_rounds: int = 1,
    references: bool = False,
    min_count: int = 1,
    averaging: str = 'strategy = "fedavg"',
    local_steps: int = 2,
    qc: str = "",
    curation: str = "",
) -> Path:
    """A federation.toml; `qc` is further text of its table of that name, and of those inside."""
    path = folder / "federation.toml"
    path.write_text(
        f'name = "test"\ntask = "{task}"\n'
        f'[sites]\nexpected = {sorted(sites)}\nminimum = {minimum}\nwait = "1s"\n'
        f'[qc]\nmethod = "{method}"\nrounds = {rounds}\nlocal_steps = {local_steps}\n'
        f'batch_size = 2\ndeadline = "{deadline}"\ncross_check_rounds = {cross_check_rounds}\n{qc}\n'
        f"[segmentation]\nrounds = {segmentation_rounds}\nlocal_steps = 1\nbatch_size = 2\n"
        f'channels = [4, 8]\nreferences = {str(references).lower()}\ndeadline = "{deadline}"\n'
        f"[privacy]\nmin_count = {min_count}\n[averaging]\n{averaging}\n"
        f"[curation]\n{curation}\n"
    )
    return path


# ------------------------------------------------------------------------------------------------- on the way


class RecordingGrid(LocalGrid):
    """Keeps what the sites were asked and what they sent.

    Args:
        sites: `site.toml` of each site, by name.
        change: may change a reply on the way.
        silent: the sites and messages that are never answered.
    """

    def __init__(
        self,
        sites: Mapping[str, Path],
        change: Change | None = None,
        silent: Callable[[str, Message], bool] | None = None,
    ) -> None:
        super().__init__(sites)
        self.asked: list[tuple[str, Message]] = []
        self.sent: list[tuple[str, Message]] = []
        self._change = change or (lambda site, reply: None)
        self._silent = silent or (lambda site, message: False)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.asked += [(self._names[message.metadata.dst_node_id], message) for message in messages]
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        waiting = {name: self._waiting[name] for name in message_ids if name in self._waiting}
        return super().pull_messages(
            [
                name
                for name, message in waiting.items()
                if not self._silent(self._names[message.metadata.dst_node_id], message)
            ]
        )

    def kinds(self, site: str) -> list[str]:
        """The types of the messages to a site."""
        return [message.metadata.message_type for name, message in self.asked if name == site]

    def _work(self, message: Message) -> Message:
        reply = super()._work(message)
        site = self._names[message.metadata.dst_node_id]
        self.sent.append((site, reply))
        return self._change(site, reply) or reply


Memo = dict[tuple[str, str, str], Reply]


class MemoGrid(RecordingGrid):
    """Sites that answer a question which they have heard before as they did then.

    They are deterministic, so runs of a coordinator cost next to nothing, and a question that another run
    did not ask shows: it makes `memo` grow.

    Args:
        sites: `site.toml` of each site, by name.
        memo: what was answered, by site, message type and content of the question.
        change: as in `RecordingGrid`.
        silent: as in `RecordingGrid`.
        fresh: the sites that work on every question.
    """

    def __init__(
        self,
        sites: Mapping[str, Path],
        memo: Memo,
        change: Change | None = None,
        silent: Callable[[str, Message], bool] | None = None,
        fresh: Collection[str] = (),
    ) -> None:
        super().__init__(sites, change, silent)
        self._memo = memo
        self._fresh = fresh

    def _work(self, message: Message) -> Message:
        site = self._names[message.metadata.dst_node_id]
        if site in self._fresh:
            return super()._work(message)
        kind = message.metadata.message_type
        key = (site, kind, message.content.object_id)
        if key not in self._memo:
            answered = LocalGrid._work(self, message)
            self._memo[key] = reply_from_records(answered.content, kind)
        reply = Message(reply_to_records(self._memo[key]), reply_to=message)
        self.sent.append((site, reply))
        return self._change(site, reply) or reply


def run(
    grid: LocalGrid,
    federation: Path,
    out: Path,
    *,
    seed: int = 0,
    clock: Clock | None = None,
    resume: bool = False,
    only: Collection[str] | None = None,
) -> None:
    """Lead a run; `only` some phases where the others do not matter."""
    folder = RunFolder(out, resume=resume)
    quick = clock or Clock(poll=0.01)
    run_federation(grid, load_federation(federation), folder, seed=seed, clock=quick, only=only)


# -------------------------------------------------------------------------------------------- what came of it


def events(out: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events of these kinds, or all of them."""
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if not kinds or line["event"] in kinds]


def statistics(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "statistics.json").read_text())
    return values


def record(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "run.json").read_text())
    return values


def weights(out: Path, stage: str = "qc") -> dict[str, np.ndarray]:
    return load_file(out / "models" / stage / "weights.safetensors")


def model_bytes(out: Path) -> dict[str, bytes]:
    """The weights of both models, as they are in their files."""
    return {path.parent.name: path.read_bytes() for path in sorted(out.glob("models/*/weights.safetensors"))}
