"""What averaging costs the coordinator: memory that must not grow with the number of sites, and time.

    python -m fedqc_simulations.benchmarks.server_memory [--sites 4 100] [--rounds 2] [--width 32]

The real ServerApp leads a run of QC training; instead of sites there is a stub that replays each request's
weights with noise on them, so that nothing but the coordinator's own work is measured. The network is the
published one in its journal version (16.6 million parameters). Each rule and number of sites has a process of
its own, and memory is the most that this process ever held; the last column compares with the fewest sites.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import fedqc
from fedqc.config import AveragingConfig, FederationConfig, NetworkConfig, QCConfig, SitesConfig
from fedqc.errors import ModelError
from fedqc.methods.base import get_method
from fedqc.protocol import (
    PROTOCOL_VERSION,
    HandshakeReply,
    HandshakeRequest,
    TrainReply,
    TrainRequest,
    reply_to_records,
    request_from_records,
)
from fedqc.task import load_task
from fedqc_simulations.consortium import write_federation
from fedqc_simulations.engine import LocalGrid, lead, run_config

MODULE = "fedqc_simulations.benchmarks.server_memory"
TASK = "brats-glioma"
RULES = ("fedavg", "trimmed-mean", "median")
NOISE = 1e-3

stub = ClientApp()


@stub.query("handshake")
def handshake(message: Message, context: Context) -> Message:
    """Say what any site says."""
    reply = HandshakeReply(
        site=str(context.node_config["site"]),
        protocol=PROTOCOL_VERSION,
        fedqc=fedqc.__version__,
        task=request_from_records(message.content, HandshakeRequest).task,
    )
    return Message(reply_to_records(reply), reply_to=message)


@stub.train("qc")
def replay(message: Message, context: Context) -> Message:
    """Send back what came, with noise on it, array by array."""
    request = request_from_records(message.content, TrainRequest)
    site = str(context.node_config["site"])
    rng = np.random.default_rng([request.round, *site.encode()])
    weights = {
        name: values + NOISE * rng.standard_normal(values.shape, dtype=np.float32)
        if values.dtype == np.float32
        else values
        for name, values in request.weights.items()
    }
    return Message(reply_to_records(TrainReply(weights, samples=1, losses={})), reply_to=message)


def main() -> None:
    """Measure each case in a process of its own and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 100])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--width", type=int, default=32, help="channels of the network's first layer")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--one", nargs=2, metavar=("RULE", "SITES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        rule, sites = options.one
        print(json.dumps(measure(rule, int(sites), options.rounds, options.width)))
        return
    print(f"{'rule':14}{'sites':>7}{'parameters':>13}{'s a round':>11}{'peak MiB':>10}{'ratio':>8}")
    for rule in options.rules:
        fewest = 0.0
        for sites in options.sites:
            figures = measure_apart(rule, sites, options.rounds, options.width)
            fewest = fewest or figures["peak"]
            print(
                f"{rule:14}{sites:7}{figures['parameters']:13,}{figures['seconds']:11.1f}"
                f"{figures['peak']:10.0f}{figures['peak'] / fewest:8.3f}",
                flush=True,
            )


def measure_apart(rule: str, n_sites: int, rounds: int, width: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    size = ("--rounds", str(rounds), "--width", str(width))
    command = [sys.executable, "-m", MODULE, *size, "--one", rule, str(n_sites)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no shell
    if done.returncode:
        sys.exit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(rule: str, n_sites: int, rounds: int, width: int) -> dict[str, float]:
    """One run; seconds a round (median), largest memory of this process in MiB, parameters."""
    names = tuple(f"site-{number:04d}" for number in range(n_sites))
    config = FederationConfig(
        name="server-memory",
        task=TASK,
        sites=SitesConfig(expected=names),
        qc=QCConfig(
            rounds=rounds,
            cross_check_rounds=0,
            network=NetworkConfig(architecture="published", width=width),
        ),
        averaging=AveragingConfig.model_validate({"strategy": rule}),
    )
    with tempfile.TemporaryDirectory(prefix="fedqc-server-") as temporary:
        out = Path(temporary)
        write_federation(out, config, task=TASK)
        grid = LocalGrid({name: Path(name) for name in names}, stub)
        lead(
            grid,
            run_config(out / "federation.toml", out / "run", seed=0, resume=False, phases=["train.qc"]),
        )
        record = json.loads((out / "run" / "run.json").read_text(encoding="utf-8"))
        card = json.loads((out / "run" / "models" / "qc" / "card.json").read_text(encoding="utf-8"))
    if card["sites"] != list(names):  # else less was measured than is said
        raise ModelError(f"the last round is the mean of {len(card['sites'])} sites, not of {n_sites}")
    return {
        "seconds": median(one["seconds"] for one in record["rounds"]["qc"]),
        "peak": peak(),
        "parameters": n_parameters(config),
    }


def n_parameters(config: FederationConfig) -> int:
    """Of the QC network."""
    network = get_method(config.qc.method)(load_task(TASK), config.qc).build(0)
    return sum(parameter.numel() for parameter in network.parameters())


def peak() -> float:
    """The most memory that this process ever held, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
