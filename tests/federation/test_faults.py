"""Sites that fail in training: what it costs them, what is written down, and that it costs nobody else."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedqc_client import tasks
from fedqc_client.guard import Outcome, Trained
from fedqc_simulations.engine import LocalGrid
from flwr.app import Array, ConfigRecord, Message, MetricRecord

from fedqc.config import SiteConfig
from fedqc.errors import QuorumError
from fedqc.protocol import Request, StatisticsReply, reply_to_records
from fedqc.reports import figures
from fedqc.reports.build import build_coordinator_report
from fedqc.reports.words import reason_in_words
from tests.federation.runs import (
    MemoGrid,
    Sites,
    events,
    model_bytes,
    record,
    run,
    statistics,
    write_federation,
    write_site,
    write_task,
)

pytestmark = pytest.mark.usefixtures("tiny_method_throughout", "no_report")
TRAINING = ("train.qc", "train.segmentation")
STAGES = ("qc", "segmentation")
N_ROUNDS = 4  # one more than a site may fail


@dataclass(frozen=True)
class Consortium:
    """Three sites, of which the second is bad, and what the two others come to without it."""

    folder: Path
    sites: Sites
    federation: Path
    memo: dict[Any, Any]
    honest: dict[str, bytes]

    def grid(self, **options: Any) -> MemoGrid:
        return MemoGrid(self.sites, self.memo, **options)


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory, tiny_method_throughout: None) -> Consortium:
    folder = tmp_path_factory.mktemp("faults")
    task = write_task(folder)
    sites = {name: write_site(folder, name, task) for name in "abc"}
    options: dict[str, Any] = {"rounds": N_ROUNDS, "segmentation_rounds": N_ROUNDS}
    without = write_federation(folder, "ac", task, **options)
    memo: dict[Any, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedqc_server.phases.build_coordinator_report", lambda folder: None)
        run(MemoGrid({name: sites[name] for name in "ac"}, memo), without, folder / "without")
    federation = write_federation(folder, sites, task, **options)
    return Consortium(folder, sites, federation, memo, model_bytes(folder / "without"))


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures, which take longer than all the rest."""
    for name, value in list(vars(figures).items()):
        if callable(value) and hasattr(value, "__wrapped__"):
            monkeypatch.setattr(figures, name, lambda *_, **__: "")


# ------------------------------------------------------------------------------------------- each fault

Fault = Callable[[Message], Any]


def first_weight(reply: Message) -> tuple[Any, str, np.ndarray]:
    record = reply.content.array_records["weights"]
    name = next(iter(record))
    return record, name, record[name].numpy()


def nan(reply: Message) -> None:
    record, name, values = first_weight(reply)
    values = values.copy()
    values.flat[0] = np.nan
    record[name] = Array(values)


def dtype(reply: Message) -> None:
    record, name, values = first_weight(reply)
    record[name] = Array(values.astype(np.float64))


def shape(reply: Message) -> None:
    record, name, values = first_weight(reply)
    record[name] = Array(values.reshape(-1))


def names(reply: Message) -> None:
    record, name, _ = first_weight(reply)
    del record[name]


def huge(reply: Message) -> None:
    record, name, values = first_weight(reply)
    record[name] = Array(values + np.float32(1e6))


def samples(reply: Message) -> None:
    reply.content.metric_records["training"]["samples"] = 10**9


def more(reply: Message) -> None:
    reply.content["more"] = MetricRecord({"n": 1})


CHANGES: dict[str, Fault] = {
    "not-finite": nan,
    "names-differ": names,
    "shape-differs": shape,
    "dtype-differs": dtype,
    "norm-exceeds-bound": huge,
    "samples-differ": samples,
    "bad-reply": more,
}


def raises(work: Callable[..., Outcome], site: SiteConfig, request: Request) -> Outcome:
    raise OSError(5, "Input/output error", "/data/Maria_Muster.nii.gz")


def sends_nan(work: Callable[..., Outcome], site: SiteConfig, request: Request) -> Outcome:
    trained = work(site, request)
    assert isinstance(trained, Trained)
    name, values = next(iter(trained.weights.items()))
    return replace(trained, weights=trained.weights | {name: np.full_like(values, np.nan)})


def call(work: Callable[..., Outcome], site: SiteConfig, request: Request) -> Outcome:
    return work(site, request)


AT_THE_SITE = {"internal-error": raises, "refused-by-guard": sends_nan}


def assert_bad_site_cost_itself_only(consortium: Consortium, grid: MemoGrid, out: Path, reason: str) -> None:
    """Site b failed every round of both trainings for `reason`, and nothing else happened."""
    for stage, phase in zip(STAGES, TRAINING, strict=True):
        failed = [e for e in events(out, "site-failed") if e["phase"] == phase]
        assert [(e["site"], e["reason"], e["round"]) for e in failed] == [
            ("b", reason, number) for number in (1, 2, 3)
        ]
        (left,) = [e for e in events(out, "site-out") if e["phase"] == phase]
        assert (left["site"], left["reason"], left["round"]) == ("b", reason, 3)
        # Not asked a fourth time, and asked again when the next training began.
        assert grid.kinds("b").count(phase) == 3
        assert grid.kinds("a").count(phase) == N_ROUNDS
        rounds = statistics(out)["train"][stage]
        assert [entry["failed"] for entry in rounds] == [{"b": reason}] * 3 + [{}]
        assert [set(entry["sites"]) for entry in rounds] == [{"a", "c"}] * N_ROUNDS
        assert statistics(out)["out"][stage] == {"b": reason}
    assert record(out)["outcome"] == "completed"
    assert model_bytes(out) == consortium.honest
    assert list(consortium.honest) == ["qc", "segmentation"]
    assert "Maria" not in "".join(path.read_text() for path in out.glob("*.json*"))
    report = build_coordinator_report(out).read_text()
    assert reason in report
    assert reason_in_words(reason) in report.replace("&#39;", "'")
    assert "Maria" not in report


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("reason", CHANGES)
def test_an_update_that_cannot_be_averaged_costs_that_site_only(
    reason: str, consortium: Consortium, tmp_path: Path
) -> None:
    def lie(site: str, reply: Message) -> None:
        if site == "b" and reply.metadata.message_type in TRAINING:
            CHANGES[reason](reply)

    grid = consortium.grid(change=lie)
    run(grid, consortium.federation, tmp_path)
    assert_bad_site_cost_itself_only(consortium, grid, tmp_path, reason)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("reason", AT_THE_SITE)
def test_a_site_that_fails_by_itself_costs_that_site_only(
    reason: str, consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(work: Callable[..., Outcome]) -> Callable[..., Outcome]:
        return lambda site, request: (AT_THE_SITE[reason] if site.name == "b" else call)(work, site, request)

    for name in ("train", "train_segmentation"):
        monkeypatch.setattr(tasks, name, failing(getattr(tasks, name)))
    grid = consortium.grid(fresh="b")
    run(grid, consortium.federation, tmp_path)
    assert_bad_site_cost_itself_only(consortium, grid, tmp_path, reason)


@pytest.mark.usefixtures("no_figures")
def test_a_site_that_never_answers_costs_that_site_only(
    consortium: Consortium, tmp_path: Path, fake_time: Any
) -> None:
    grid = consortium.grid(
        silent=lambda site, message: site == "b" and message.metadata.message_type in TRAINING
    )
    run(grid, consortium.federation, tmp_path, clock=fake_time.clock)
    assert_bad_site_cost_itself_only(consortium, grid, tmp_path, "late")
    # One deadline of 60 s for each of the rounds that it was asked in.
    assert fake_time.now == 6 * 57  # a twentieth before the messages expire


def test_a_site_that_is_gone_costs_that_site_only(consortium: Consortium, tmp_path: Path) -> None:
    """It shakes hands and goes offline: nothing can be asked of it, and nobody waits."""

    class Leaving(MemoGrid):
        def get_nodes(self) -> Any:
            nodes = list(super().get_nodes())
            return nodes if not self.asked else [node for node in nodes if node.name != "b"]

    grid = Leaving(consortium.sites, consortium.memo)
    run(grid, consortium.federation, tmp_path)
    assert model_bytes(tmp_path) == consortium.honest
    assert grid.kinds("b") == ["query.handshake"]
    assert {(e["site"], e["reason"]) for e in events(tmp_path, "site-failed")} == {("b", "offline")}
    # Whoever has not scored is not asked to train on what it kept.
    assert [(e["phase"], e["round"]) for e in events(tmp_path, "site-out")] == [("train.qc", 3)]


def test_a_late_reply_is_not_waited_for(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real clock: a site that works longer than the deadline."""
    train = tasks.train

    def slow(site: SiteConfig, request: Any) -> Outcome:
        if site.name == "a":
            time.sleep(1.2)
        return train(site, request)

    monkeypatch.setattr(tasks, "train", slow)
    federation = write_federation(
        tmp_path, consortium.sites, consortium.folder / "ball.toml", deadline="1s", rounds=1
    )
    begin = time.monotonic()
    run(LocalGrid(consortium.sites), federation, tmp_path / "run", only=("train.qc",))
    assert time.monotonic() - begin < 20
    failed = [(e["site"], e["reason"]) for e in events(tmp_path / "run", "site-failed")]
    assert ("a", "late") in failed
    assert "a" not in statistics(tmp_path / "run")["train"]["qc"][0]["sites"]


# ---------------------------------------------------------------------------------------------- strikes


def failing_in(rounds: set[int]) -> Callable[[str, Message], None]:
    """Site b sends what is not allowed in these rounds of QC training."""

    def change(site: str, reply: Message) -> None:
        asked = site == "b" and reply.metadata.message_type == "train.qc"
        if asked and int(reply.metadata.group_id) in rounds:
            more(reply)

    return change


@pytest.mark.parametrize(
    ("rounds", "left_in"),
    [
        ({1, 2}, None),
        ({1, 2, 4, 5}, None),  # two, a success, and two again
        ({1, 3, 5}, None),
        ({2, 3, 4}, 4),
        ({1, 2, 4, 5, 6}, 6),
    ],
)
def test_three_failures_in_a_row_are_too_many(
    rounds: set[int], left_in: int | None, consortium: Consortium, tmp_path: Path
) -> None:
    federation = write_federation(tmp_path, consortium.sites, consortium.folder / "ball.toml", rounds=7)
    grid = consortium.grid(change=failing_in(rounds))
    run(grid, federation, tmp_path / "run", only=("train.qc",))
    out = events(tmp_path / "run", "site-out")
    assert [(e["site"], e["round"]) for e in out] == ([("b", left_in)] if left_in else [])
    last = left_in or 7
    assert grid.kinds("b").count("train.qc") == last
    averaged = [
        entry["round"] for entry in statistics(tmp_path / "run")["train"]["qc"] if "b" in entry["sites"]
    ]
    assert averaged == [number for number in range(1, last + 1) if number not in rounds]
    assert ("out" in statistics(tmp_path / "run")) == bool(left_in)


def test_strikes_and_leaving_survive_a_stop(consortium: Consortium, tmp_path: Path) -> None:
    """Two failures before the stop and one after it are three in a row; who is out stays out."""
    federation = write_federation(
        tmp_path, consortium.sites, consortium.folder / "ball.toml", rounds=6, minimum=2
    )
    out = tmp_path / "run"

    def away(number: int) -> Callable[[str, Message], None]:
        """Site c fails too, in round `number`, which ends the run."""

        def change(site: str, reply: Message) -> None:
            failing_in({1, 2, 3})(site, reply)
            if site == "c" and reply.metadata.group_id == str(number):
                more(reply)

        return change

    for number in (3, 5):
        with pytest.raises(QuorumError, match=f"qc, round {number} of 6: 1 sites answered"):
            run(
                consortium.grid(change=away(number)),
                federation,
                out,
                resume=number > 3,
                only=("train.qc",),
            )
    grid = consortium.grid(change=failing_in({3}))
    run(grid, federation, out, resume=True, only=("train.qc",))
    assert [(e["site"], e["round"]) for e in events(out, "site-out")] == [("b", 3)]
    assert grid.kinds("b").count("train.qc") == 0
    assert grid.kinds("a").count("train.qc") == 2


# ------------------------------------------------------------------------------------------- lost quorum


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("stage", "phase"), list(zip(STAGES, TRAINING, strict=True)))
def test_a_lost_quorum_ends_the_run_which_can_go_on(
    stage: str, phase: str, consortium: Consortium, tmp_path: Path
) -> None:
    federation = write_federation(
        tmp_path,
        consortium.sites,
        consortium.folder / "ball.toml",
        minimum=2,
        rounds=3,
        segmentation_rounds=3,
    )

    def lie(site: str, reply: Message) -> None:
        if site in "ab" and reply.metadata.message_type == phase and reply.metadata.group_id == "2":
            more(reply)

    out, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    with pytest.raises(
        QuorumError,
        match=rf"{stage}, round 2 of 3: 1 sites answered, at least 2 are needed "
        r"\(a: bad-reply, b: bad-reply\); mend the sites",
    ) as error:
        run(consortium.grid(change=lie), federation, out)
    assert error.value.exit_code == 3
    found = record(out)
    assert (found["outcome"], found["reason"]) == ("failed", str(error.value))
    assert events(out, "run-finished")[-1]["outcome"] == "failed"
    assert phase not in found["done"]
    # What was learned before is there, and people can read it.
    assert len(statistics(out)["train"][stage]) == 1
    report = build_coordinator_report(out).read_text()
    assert "bad-reply" in report
    assert "The run failed" in report

    grid = consortium.grid()
    run(grid, federation, out, resume=True)
    assert record(out)["outcome"] == "completed"
    assert (record(out)["reason"], record(out)["models"][stage]["rounds"]) == (None, 3)
    assert grid.kinds("a").count(phase) == 2  # rounds 2 and 3
    run(consortium.grid(), federation, undisturbed)
    assert model_bytes(out) == model_bytes(undisturbed)
    assert statistics(out) == statistics(undisturbed)


def test_a_phase_of_questions_is_asked_again_after_a_lost_quorum(
    consortium: Consortium, tmp_path: Path
) -> None:
    federation = write_federation(tmp_path, consortium.sites, consortium.folder / "ball.toml", minimum=2)
    out = tmp_path / "run"

    def lie(site: str, reply: Message) -> None:
        if site in "ab" and reply.metadata.message_type == "query.summarise":
            more(reply)

    with pytest.raises(QuorumError, match=r"summarise: 1 sites answered, at least 2 .* \(a: bad-reply, b: "):
        run(consortium.grid(change=lie), federation, out)
    assert statistics(out)["failed"]["summarise"] == {"a": "bad-reply", "b": "bad-reply"}
    run(consortium.grid(), federation, out, resume=True, only=("summarise",))
    assert statistics(out)["failed"]["summarise"] == {}
    assert {site for site, told in statistics(out)["sites"].items() if told} == {"a", "b", "c"}


def test_sites_that_are_out_count_against_the_quorum(consortium: Consortium, tmp_path: Path) -> None:
    """They would have something to train on; without them, the training is not skipped but stopped."""
    federation = write_federation(
        tmp_path, consortium.sites, consortium.folder / "ball.toml", minimum=2, segmentation_rounds=5
    )

    def change(site: str, reply: Message) -> None:
        if reply.metadata.message_type == "train.segmentation":
            if site == "b":
                more(reply)
            if site == "c" and reply.metadata.group_id == "4":  # a person there has dropped the rest
                reply.content.clear()
                reply.content["error"] = ConfigRecord({"code": "nothing-kept"})

    out = tmp_path / "run"
    with pytest.raises(QuorumError, match=r"segmentation, round 4 of 5: 1 sites answered, .*c: nothing-kept"):
        run(consortium.grid(change=change), federation, out)
    assert [(e["site"], e["round"]) for e in events(out, "site-out")] == [("b", 3)]
    assert record(out)["outcome"] == "failed"


# ----------------------------------------------------------------------------------------- strange numbers


def told_by_b(value: Any, consortium: Consortium, out: Path) -> None:
    """A run in which site b tells `value` under every key of every phase of questions."""
    asked: dict[str, Message] = {}

    class Grid(MemoGrid):
        def _work(self, message: Message) -> Message:
            asked[message.metadata.message_id] = message
            return super()._work(message)

    def lie(site: str, reply: Message) -> Message | None:
        if site != "b" or "statistics" not in reply.content:
            return None
        values = dict.fromkeys(reply.content.metric_records["statistics"], value)
        message = asked[reply.metadata.reply_to_message_id]
        return Message(reply_to_records(StatisticsReply(values)), reply_to=message)

    run(Grid(consortium.sites, consortium.memo, lie), consortium.federation, out)


def refused(out: Path) -> set[str]:
    failed = events(out, "site-failed")
    assert all((e["site"], e["reason"]) == ("b", "bad-reply") for e in failed)
    return {e["phase"] for e in failed}


@pytest.mark.parametrize("value", [0, 1e15, -1e15])
def test_whatever_number_a_site_tells_the_run_goes_on(
    value: float, consortium: Consortium, tmp_path: Path
) -> None:
    told_by_b(value, consortium, tmp_path)
    assert refused(tmp_path) == {"calibrate", "score"}  # where tables are lists
    assert record(tmp_path)["outcome"] == "completed"
    assert statistics(tmp_path)["sites"]["b"]["summarise"]["cases"] == value
    build_coordinator_report(tmp_path)


@pytest.mark.parametrize("value", [1e308, 2**62, [1, 2, 3], [0.5] * 10])
def test_what_is_no_statistic_is_refused(value: Any, consortium: Consortium, tmp_path: Path) -> None:
    told_by_b(value, consortium, tmp_path)
    assert refused(tmp_path) == {"summarise", "calibrate", "score", "evaluate.segmentation"}
    assert record(tmp_path)["outcome"] == "completed"
    assert statistics(tmp_path)["sites"]["b"] == {}


def test_the_bad_site_would_have_changed_both_models(consortium: Consortium, tmp_path: Path) -> None:
    """Else the tests above show nothing."""
    run(consortium.grid(), consortium.federation, tmp_path)
    together = model_bytes(tmp_path)
    assert together.keys() == consortium.honest.keys()
    assert all(together[stage] != values for stage, values in consortium.honest.items())
