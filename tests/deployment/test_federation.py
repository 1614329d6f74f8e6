"""A whole federation between processes, with TLS, keys and nginx."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fedqc_simulations.engine import run_local

from tests.deployment.consortium import (
    SITES,
    Consortium,
    assert_nothing_was_done_twice,
    finished_rounds,
    running,
    wait_until,
    weights,
    write_consortium,
)
from tests.deployment.proxy import proxy

pytestmark = pytest.mark.deploy


@pytest.fixture
def consortium(tmp_path: Path) -> Iterator[Consortium]:
    with running(write_consortium(tmp_path)) as made:
        yield made


def test_all_phases_between_processes_give_what_one_process_gives(consortium: Consortium) -> None:
    """One of the sites is behind an HTTPS proxy."""
    behind = consortium.site(SITES[2])
    behind.write_text(behind.read_text().replace("127.0.0.1:", "localhost:"))
    server = consortium.serve()
    with proxy() as hospital:
        consortium.join(SITES[0])
        consortium.join(SITES[1])
        # The lower-case names count more where both are there.
        consortium.join(
            SITES[2], HTTPS_PROXY=hospital.url, https_proxy=hospital.url, NO_PROXY="", no_proxy=""
        )
        wait_until(lambda: finished_rounds(consortium), say=server.said)
        stands = consortium.status()
        consortium.finish(server)
    assert "server: up" in stands
    assert "sites now: hospital-a online, hospital-b online, hospital-c online" in stands
    assert hospital.asked == {f"localhost:{consortium.port}"}
    assert (consortium.run / "report.html").is_file()
    assert consortium.record()["sites"]["joined"] == list(SITES)
    assert_nothing_was_done_twice(consortium)
    rounds = consortium.record()["rounds"]["qc"]
    assert [one["round"] for one in rounds] == [1, 2]
    assert all(one["bytes_received"] > 0 and one["seconds"] > 0 for one in rounds)
    local = consortium.folder / "local"
    run_local(consortium.federation, {name: consortium.site(name) for name in SITES}, local, seed=0)
    for stage in ("qc", "segmentation"):
        apart, together = weights(consortium.run, stage), weights(local, stage)
        for name, values in together.items():
            np.testing.assert_allclose(apart[name], values, atol=1e-5)


def test_no_text_of_an_exception_reaches_the_coordinator(consortium: Consortium) -> None:
    person = "patient_0001.nii.gz"
    site = consortium.site("hospital-a")
    site.write_text(site.read_text().replace('path = "data"', f'path = "/data/{person}"'))
    server = consortium.serve()
    for name in SITES:
        consortium.join(name)
    consortium.finish(server)
    assert f"/data/{person}" in (site.parent / "results" / "site.log").read_text()
    for path in consortium.run.rglob("*"):
        if path.is_file():
            assert person.encode() not in path.read_bytes(), path
    assert any(event["site"] == "hospital-a" for event in consortium.events("site-failed"))
