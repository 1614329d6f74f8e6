"""A coordinator that asks for too much gets nothing; a site that sends nonsense costs only itself."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedqc_client.bundle import _NO_REASON
from fedqc_server.limits import Limit
from fedqc_server.superlink import SuperLink
from fedqc_simulations.engine import run_local

from fedqc.config import QCConfig
from fedqc.supervision import stopping_at_the_end
from fedqc.task import load_task
from tests.deployment.consortium import (
    HERE,
    Consortium,
    process_called,
    running,
    wait_until,
    weights,
    write_consortium,
)

SITE = "hospital-a"


@pytest.fixture
def consortium(tmp_path: Path) -> Iterator[Consortium]:
    with running(write_consortium(tmp_path, rounds=3, segmentation_rounds=3)) as made:
        yield made


# ----------------------------------------------------------------------------------- a hostile coordinator


def ask(consortium: Consortium, requests: Sequence[dict[str, Any]], bundle: dict[str, str]) -> dict[str, Any]:
    """Have a coordinator of its own making ask a site; returns the answers by the requests' names.

    Args:
        consortium: whose first site is asked.
        requests: see `hostile_coordinator.py`.
        bundle: files to be put into the bundle that Flower brings to the site.
    """
    folder = consortium.folder / "coordinator"
    folder.mkdir()
    superlink = SuperLink.prepare(folder / "flower", folder / "state.db")
    for name, text in bundle.items():
        path = folder / "flower" / "bundle" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    project = folder / "flower" / "bundle" / "pyproject.toml"
    included = ", ".join(map(repr, ["README.md", *bundle]))
    project.write_text(project.read_text().replace('"README.md"', included))
    shadow = folder / "shadow" / "fedqc_server"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").touch()
    shutil.copy(HERE / "hostile_coordinator.py", shadow / "app.py")
    answers = folder / "answers.json"
    services = superlink.services(
        folder / "logs", {"out": str(answers), "requests": list(requests)}, Limit.of(1 << 20, 10)
    )
    superexec = services[1]
    superexec.environment = {**superexec.environment, "PYTHONPATH": str(shadow.parent)}
    site = consortium.site(SITE)
    text = site.read_text()
    begin = text.index("[coordinator]")
    site.write_text(
        f'{text[:begin]}[coordinator]\naddress = "{superlink.address}"\n'
        f'ca = "{folder / "flower" / "tls" / "ca.crt"}"\nkey = "{SITE}.key"\n'
    )
    with stopping_at_the_end(services):
        for service in services:
            service.start()
        wait_until(superlink.is_up, say=services[0].last_words)
        superlink.register({SITE: consortium.folder / "keys" / f"{SITE}.pub"})
        program = consortium.join(SITE)
        superlink.submit()
        wait_until(answers.exists, say=lambda: services[1].last_words() + program.said())
        program.stop()
    found: list[dict[str, Any]] = json.loads(answers.read_text())
    return {answer["asked"]: answer for answer in found}


@pytest.mark.deploy
def test_code_that_comes_with_a_request_is_not_run(consortium: Consortium) -> None:
    payload = consortium.folder / "payload"
    code = (
        "import os\nfrom pathlib import Path\n"
        # Not at the coordinator, whose own flwr imports it, too.
        f"if {str(consortium.site(SITE).parent)!r} in os.environ.get('FLWR_HOME', ''):\n"
        f"    Path({str(payload)!r}).touch()\n"
        "app = None\n"  # which Flower looks for
    )
    answers = ask(
        consortium,
        [{"name": "handshake", "type": "query.handshake"}],
        {"fedqc_client/__init__.py": code, "fedqc_client/app.py": code},
    )
    assert not payload.exists()
    assert answers["handshake"]["error"][1] == _NO_REASON
    assert not (consortium.site(SITE).parent / "results" / "ledger.jsonl").exists()


@pytest.mark.deploy
def test_a_request_for_more_than_the_site_allows_is_refused(consortium: Consortium) -> None:
    site = consortium.site(SITE)
    site.write_text(
        site.read_text().replace("[policy]\n", '[policy]\nlargest_model = 1000\nrefuse = ["summarise"]\n')
    )
    common = {
        "federation": "test",
        "task": load_task(str(consortium.folder / "ball.toml")).digest,
        "seed": 0,
        "min_count": 1,
    }
    training = {**common, "qc": QCConfig().model_dump(mode="json"), "round": 1, "rounds": 1}
    secret = {**training, "qc": QCConfig(initial=Path("/etc/passwd")).model_dump(mode="json")}
    answers = ask(
        consortium,
        [
            {"name": "fair", "type": "query.handshake", "body": common},
            {"name": "unknown query", "type": "query.everything", "body": common},
            {"name": "refused phase", "type": "query.summarise", "body": common},
            {"name": "large model", "type": "train.qc", "body": training, "numbers": 1001},
            {"name": "path", "type": "train.qc", "body": secret, "numbers": 1},
            {"name": "more fields", "type": "query.handshake", "body": {**common, "voxels": True}},
        ],
        {},
    )
    said = {name: answer["records"].get("error", {}).get("code") for name, answer in answers.items()}
    assert said == {
        "fair": None,
        "unknown query": None,
        "refused phase": "takes-no-part",
        "large model": "model-too-large",
        "path": "protocol-error",
        "more fields": "protocol-error",
    }
    assert answers["fair"]["records"]["handshake"]["site"] == SITE
    assert answers["unknown query"]["error"][1] == _NO_REASON
    assert "/etc/passwd" in (site.parent / "results" / "site.log").read_text()


# ------------------------------------------------------------------------------------------ a hostile site


@pytest.mark.deploy_long
def test_a_hostile_site_costs_only_itself(
    consortium: Consortium, record_property: Callable[[str, object], None]
) -> None:
    """Refused, named, and the models are those of the other two; nothing of it stays."""
    server = consortium.serve()
    consortium.join_hostile(
        SITE,
        {
            "train.qc 1": "not-numbers",
            "train.qc 2": "pickled",
            "train.qc 3": "other-shapes",
            "train.segmentation 1": "thousandfold",
            "train.segmentation 2": "two-gibibytes",
            "train.segmentation 3": "not-numbers",
        },
    )
    others = [name for name in ("hospital-b", "hospital-c") if consortium.join(name)]
    memory = disk = 0

    def is_over() -> bool:
        nonlocal memory, disk
        memory = max(memory, peak_memory(process_called(consortium.folder, "flwr-serverapp")))
        memory = max(memory, peak_memory(process_called(consortium.folder, "fedqc_server.limits")))
        disk = max(disk, sum(path.stat().st_size for path in consortium.run.glob("state.db*")))
        return server.process.poll() is not None

    wait_until(is_over, 600, server.said)
    consortium.finish(server)
    record_property("largest process, MiB", memory >> 20)
    record_property("database, MiB", disk >> 20)
    refused = [(event["stage"], event["reason"]) for event in consortium.events("site-failed")]
    assert refused == [
        ("qc", "not-finite"),
        ("qc", "bad-reply"),
        ("qc", "shape-differs"),
        ("segmentation", "norm-exceeds-bound"),
        ("segmentation", "reply-too-large"),
        ("segmentation", "not-finite"),
    ]
    assert {event["site"] for event in consortium.events("site-failed", "site-out")} == {SITE}
    assert SITE in (consortium.run / "report.html").read_text()
    assert not (consortium.folder / "unpickled").exists()
    assert memory < 1.5 * 2**30
    assert disk < 64 << 20
    alone = consortium.folder / "without.toml"
    alone.write_text(consortium.federation.read_text().replace("'hospital-a', ", ""))
    run_local(alone, {name: consortium.site(name) for name in others}, consortium.folder / "without", seed=0)
    for stage in ("qc", "segmentation"):
        found, expected = weights(consortium.run, stage), weights(consortium.folder / "without", stage)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, atol=1e-5)


def peak_memory(pid: int | None) -> int:
    """Most bytes that a process ever held; 0 where there is none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)
