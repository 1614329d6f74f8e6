"""A site that sends what it should not: `fedqc client` with a program of its own that answers the messages.

`python hostile_site.py client SITE.toml` takes part as any site does. What it sends instead of its updates is
in the environment variable HOSTILE, a JSON object of `<message type> <round>` and a name out of `TRICKS`;
`old` anywhere makes it speak another protocol.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fedqc_client import bundle, guard, supernode, tasks
from flwr.app import Array, ArrayRecord, RecordDict

from fedqc import protocol
from fedqc.cli import main
from fedqc.config import SiteConfig
from fedqc.protocol import WEIGHTS, ModelRequest, Request, Weights, weights_to_record

GIBIBYTES = 2


class Payload:
    """Unpickled, it leaves a file."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path.touch, (Path(os.environ["HOSTILE_FILE"]),)  # type: ignore[return-value]


def not_numbers(sent: Weights, trained: Weights) -> ArrayRecord:
    return weights_to_record({name: np.full_like(values, np.nan) for name, values in sent.items()})


def other_shapes(sent: Weights, trained: Weights) -> ArrayRecord:
    larger = {name: np.zeros((*values.shape, 2), values.dtype) for name, values in sent.items()}
    return weights_to_record(larger)


def thousandfold(sent: Weights, trained: Weights) -> ArrayRecord:
    return weights_to_record({name: old + 1000 * (trained[name] - old) for name, old in sent.items()})


def pickled(sent: Weights, trained: Weights) -> ArrayRecord:
    from io import BytesIO

    record = weights_to_record(sent)
    file = BytesIO()
    np.save(file, np.array([Payload()], dtype=object), allow_pickle=True)
    name = next(iter(record))
    shape = tuple(record[name].shape)
    record[name] = Array(dtype=record[name].dtype, shape=shape, stype="numpy.ndarray", data=file.getvalue())
    return record


def two_gibibytes(sent: Weights, trained: Weights) -> ArrayRecord:
    rng = np.random.default_rng(0)
    size = 5 << 20
    return ArrayRecord(
        {
            str(number): Array(rng.integers(0, 255, size, dtype=np.uint8))
            for number in range((GIBIBYTES << 30) // size)
        }
    )


TRICKS = {
    "not-numbers": not_numbers,
    "other-shapes": other_shapes,
    "thousandfold": thousandfold,
    "pickled": pickled,
    "two-gibibytes": two_gibibytes,
}


def answer_messages() -> None:
    """What Flower starts for each message."""
    planned: dict[str, str] = json.loads(os.environ["HOSTILE"])
    if "old" in planned:
        protocol.PROTOCOL_VERSION = 0
        vars(tasks).update(PROTOCOL_VERSION=0)
    honest = guard.outgoing

    def outgoing(
        outcome: guard.Outcome, site: SiteConfig, request: Request, *, remember: bool = True
    ) -> RecordDict:
        trick = planned.get(f"{request.kind} {request.round}")
        records = honest(outcome, site, request, remember=remember)
        if trick is not None and isinstance(request, ModelRequest) and isinstance(outcome, guard.Trained):
            records[WEIGHTS] = TRICKS[trick](request.weights, outcome.weights)
        return records

    guard.outgoing = outgoing
    bundle.main()


def write_program(folder: Path) -> Path:
    """Stands for `fedqc_client.supernode._own_programs`."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    program = programs / "flwr-clientapp"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} answer "$@"\n')
    program.chmod(0o700)
    return programs


if __name__ == "__main__":
    if sys.argv[1] == "answer":
        del sys.argv[1]
        answer_messages()
    else:
        supernode._own_programs = write_program
        main()
