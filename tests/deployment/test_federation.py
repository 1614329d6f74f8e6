"""A whole federation between processes, with TLS, keys and nginx."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fedqc_simulations.engine import run_local
from safetensors.numpy import load_file

from fedqc.certificates import make_server_files, make_site_key
from fedqc.curation.manifest import read_manifest
from tests.deployment.consortium import (
    SITES,
    Consortium,
    processes_of,
    running,
    wait_until,
    write_consortium,
)

pytestmark = pytest.mark.deploy


@pytest.fixture
def consortium(tmp_path: Path) -> Iterator[Consortium]:
    with running(write_consortium(tmp_path)) as made:
        yield made


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "models" / "qc" / "weights.safetensors")


def finished_rounds(consortium: Consortium) -> list[tuple[str, int]]:
    return [(event["stage"], event["round"]) for event in consortium.events("round-finished")]


def assert_nothing_was_done_twice(consortium: Consortium) -> None:
    rounds = finished_rounds(consortium)
    assert len(rounds) == len(set(rounds))
    for name in SITES:
        results = consortium.site(name).parent / "results"
        manifest = read_manifest(results / "manifest.json")
        assert len(manifest.entries) == 4
        lines = (results / "ledger.jsonl").read_text().splitlines()
        assert all(line.endswith("}") for line in lines)


def test_all_phases_between_processes_give_what_one_process_gives(consortium: Consortium) -> None:
    server = consortium.serve()
    for name in SITES:
        consortium.join(name)
    consortium.finish(server)
    assert (consortium.run / "report.html").is_file()
    assert consortium.record()["sites"]["joined"] == list(SITES)
    assert_nothing_was_done_twice(consortium)
    rounds = consortium.record()["rounds"]["qc"]
    assert [one["round"] for one in rounds] == [1, 2]
    assert all(one["bytes_received"] > 0 and one["seconds"] > 0 for one in rounds)
    local = consortium.folder / "local"
    run_local(consortium.federation, {name: consortium.site(name) for name in SITES}, local, seed=0)
    apart, together = weights(consortium.run), weights(local)
    for name, values in together.items():
        np.testing.assert_allclose(apart[name], values, atol=1e-5)


def process_called(consortium: Consortium, name: str, *, folder: Path | None = None) -> int | None:
    found = processes_of(folder or consortium.folder)
    return next((pid for pid, line in found.items() if name in line), None)


@pytest.mark.parametrize("killed", ["flwr-serverapp", "flower-superlink"])
def test_a_part_that_is_killed_costs_at_most_its_round(tmp_path: Path, killed: str) -> None:
    with running(write_consortium(tmp_path, rounds=4, local_steps=4)) as consortium:
        server = consortium.serve()
        for name in SITES:
            consortium.join(name)
        wait_until(lambda: finished_rounds(consortium), say=server.said)
        pid = process_called(consortium, killed)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        consortium.finish(server)
        assert_nothing_was_done_twice(consortium)
        assert finished_rounds(consortium)[:4] == [("qc", number) for number in (1, 2, 3, 4)]


def test_a_server_that_was_stopped_goes_on(tmp_path: Path) -> None:
    with running(write_consortium(tmp_path, rounds=3)) as consortium:
        server = consortium.serve()
        for name in SITES:
            consortium.join(name)
        wait_until(lambda: finished_rounds(consortium), say=server.said)
        assert server.stop() == 130
        assert not [line for line in processes_of(consortium.run).values() if "client" not in line]
        consortium.finish(consortium.serve())
        assert_nothing_was_done_twice(consortium)


def test_who_is_kept_out(tmp_path: Path) -> None:
    """An unknown key and another authority; each is told so at the site."""
    with running(write_consortium(tmp_path, wait="20s", minimum=3)) as consortium:
        stranger = consortium.site("hospital-a")
        make_site_key(stranger.parent / "other.key", "hospital-a")
        stranger.write_text(stranger.read_text().replace('key = "hospital-a.key"', 'key = "other.key"'))
        misled = consortium.site("hospital-b")
        other = make_server_files(tmp_path / "other", ["127.0.0.1"], name="test")
        misled.write_text(misled.read_text().replace("../../certificates/ca.crt", str(other.authority)))
        server = consortium.serve()
        wait_until(lambda: "listening" in server.said(), say=server.said)
        unknown, wrong = consortium.join("hospital-a"), consortium.join("hospital-b")
        good = consortium.join("hospital-c")
        assert wrong.process.wait(60) == 2
        assert "not vouched for" in wrong.said()
        wait_until(lambda: "does not know this site's key" in unknown.said(), say=unknown.said)
        assert "answers" in good.said()
        assert server.process.wait(180) == 3  # too few sites
        assert "hospital-c" in server.said()


def test_no_text_of_an_exception_reaches_the_coordinator(tmp_path: Path) -> None:
    person = "patient_0001"
    with running(write_consortium(tmp_path)) as consortium:
        site = consortium.site("hospital-a")
        site.write_text(site.read_text().replace('path = "data"', f'path = "{person}"'))
        server = consortium.serve()
        for name in SITES:
            consortium.join(name)
        consortium.finish(server)
        assert person in (site.parent / "results" / "site.log").read_text()
        for path in consortium.run.rglob("*"):
            if path.is_file():
                assert person.encode() not in path.read_bytes(), path
        assert any(event["site"] == "hospital-a" for event in consortium.events("site-failed"))
