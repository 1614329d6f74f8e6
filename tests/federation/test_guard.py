import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedqc_client.guard import (
    GuardError,
    Outcome,
    Told,
    Trained,
    answer,
    error_code,
    outgoing,
)
from fedqc_client.ledger import Ledger, in_words
from fedqc_simulations.engine import LocalGrid
from flwr.app import Context, Message, MetricRecord, RecordDict

from fedqc.config import QCConfig, SegmentationConfig, SiteConfig, load_site
from fedqc.errors import ConfigError, DataError, ModelError, ProtocolError, TrainingError
from fedqc.protocol import (
    CrossCheckRequest,
    ErrorCode,
    ErrorReply,
    EvaluateSegmentationRequest,
    HandshakeReply,
    HandshakeRequest,
    ModelRequest,
    Provenance,
    Request,
    ScoreRequest,
    StatisticsReply,
    SummariseRequest,
    TrainReply,
    TrainRequest,
    TrainSegmentationRequest,
    Weights,
    content_digest,
    request_to_records,
)
from fedqc.statistics.allowed import not_allowed, statistic_keys
from fedqc.statistics.site import (
    CrossCheckSummary,
    DataSummary,
    Figure,
    LabelsSummary,
    SegmentationSummary,
    Volume,
    summarise_cross_check,
    summarise_labels,
    summarise_segmentation,
)
from fedqc.task import load_task

WEIGHTS: Weights = {"w": np.ones((2, 2), np.float32), "n": np.array(1, np.int64)}
FORMS = {"w": "float32 2x2", "n": "int64 scalar"}
COMMON: dict[str, Any] = {"federation": "f", "task": "0" * 64, "seed": 1, "min_count": 2}
HELLO = HandshakeReply(site="a", protocol=1, fedqc="0.1.0", task="f" * 64)


def train_request() -> TrainRequest:
    return TrainRequest(**COMMON, qc=QCConfig(), weights=WEIGHTS, round=3, rounds=5)


CROSS_CHECK = CrossCheckRequest(**COMMON, qc=QCConfig(), weights=WEIGHTS)
TRAIN_SEGMENTATION = TrainSegmentationRequest(
    **COMMON, segmentation=SegmentationConfig(), weights=WEIGHTS, round=1, rounds=2
)
EVALUATE = EvaluateSegmentationRequest(
    **COMMON,
    segmentation=SegmentationConfig(),
    weights=WEIGHTS,
    provenance=Provenance(rounds=2, samples=8, sites=("a",)),
)


ABOUT = {"p": "1", "q": "1"}


def data_told(patients: int, **changes: Any) -> Told:
    """The same as a phase hands it to the guard."""
    return Told(data_summary(patients, **changes), ABOUT)


def data_summary(patients: int, **changes: Any) -> DataSummary:
    figure = Figure(value=5, patients=patients)
    values: dict[str, Any] = {
        "cases": figure,
        "patients": figure,
        "references": Figure(value=2, patients=2),
        "left_out": {"unreadable": Figure(value=2, patients=2)},
        "volume_ml": {"ball": Volume(mean=Figure(value=0.123456, patients=patients), sd=None)},
        "spacing_mm": {"x": Figure(value=1.23456, patients=patients)},
        "shape": {},
        "intensity": {"t1": Figure(value=100.0, patients=1)},
    }
    return DataSummary(**values | changes)


@pytest.fixture
def site_file(make_site: Callable[..., Path]) -> Path:
    return make_site("a", references=0, good=0, spoiled=0, min_count=2)


def ask(site_file: Path, request: Request, work: Callable[[SiteConfig, Any], Outcome]) -> Message:
    LocalGrid({})  # gives this process the identity that messages need
    message = Message(request_to_records(request), 2, request.kind)
    context = Context(1, 2, {"site": str(site_file)}, RecordDict(), {})
    return answer(message, context, type(request), work)


def ledger(site_file: Path) -> list[dict[str, Any]]:
    path = site_file.parent / "results" / "ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_answer_leaves_with_a_line_in_the_ledger(site_file: Path) -> None:
    trained = Trained(WEIGHTS, 16, {"loss": Figure(value=0.56789, patients=4)})
    reply = ask(site_file, train_request(), lambda site, request: trained)
    assert dict(reply.content["training"]) == {"samples": 16, "loss.loss": 0.568}
    size, sha256 = content_digest(reply.content)
    (line,) = ledger(site_file)
    assert line.pop("time")
    assert line == {
        "to": "f",
        "kind": "train.qc",
        "round": 3,
        "bytes": size,
        "sha256": sha256,
        "content": {"weights": FORMS, "training": {"samples": 16, "loss.loss": 0.568}},
    }


def test_counts_of_labels_are_filtered_by_the_patients_behind_them(site_file: Path) -> None:
    made = [(patient, 0.5) for patient in "aabbc"] + [("a", 0.75), ("b", 0.75), ("a", 0.95)]
    chosen = [(patient, "seggen", 0.5) for patient in "abc"]
    trained = Trained(WEIGHTS, 4, {}, summarise_labels(made, chosen))
    reply = ask(site_file, train_request(), lambda site, request: trained)
    told = dict(reply.content["training"])
    # Patient a alone would follow from the total if the bin of two patients were told.
    assert told["labels.made"] == [-1, -1, -1, -1, -1, 5, -1, -1, -1, -1]
    assert told["labels.chosen"] == [-1, -1, -1, -1, -1, 3, -1, -1, -1, -1]
    assert told["labels.sources.seggen"] == 3


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("/data/Maria_Muster.nii.gz: broken"), "data-error"),
        (ConfigError("/home/x/site.toml"), "config-error"),
        (ModelError("/x"), "model-error"),
        (TrainingError("/x"), "training-error"),
        (ProtocolError("/x"), "protocol-error"),
        (FileNotFoundError(2, "No such file", "/data/Maria_Muster.nii.gz"), "internal-error"),
        (MemoryError(), "internal-error"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "bad"), "internal-error"),
    ],
)
def test_the_text_of_an_exception_stays(site_file: Path, error: Exception, code: str) -> None:
    def work(site: SiteConfig, request: Request) -> Outcome:
        raise error

    reply = ask(site_file, SummariseRequest(**COMMON), work)
    assert not reply.has_error()
    assert {name: dict(record) for name, record in reply.content.items()} == {"error": {"code": code}}
    (line,) = ledger(site_file)
    assert line["content"] == {"error": {"code": code}}
    assert line["sha256"] == content_digest(reply.content)[1]
    log = (site_file.parent / "results" / "site.log").read_text()
    assert type(error).__name__ in log
    assert "Traceback" in log
    if isinstance(error, DataError):
        assert "Maria_Muster" in log


def test_a_broken_site_file_is_a_word_too(site_file: Path) -> None:
    site_file.write_text("name = [")
    reply = ask(site_file, SummariseRequest(**COMMON), lambda site, request: HELLO)
    assert dict(reply.content["error"]) == {"code": "config-error"}
    assert [line["to"] for line in ledger(site_file)] == ["unknown"]


def test_another_kind_of_request_is_a_protocol_error(site_file: Path) -> None:
    LocalGrid({})
    message = Message(request_to_records(SummariseRequest(**COMMON)), 2, "train.qc")
    context = Context(1, 2, {"site": str(site_file)}, RecordDict(), {})
    reply = answer(message, context, TrainRequest, lambda site, request: HELLO)
    assert dict(reply.content["error"]) == {"code": "protocol-error"}


def test_nothing_leaves_without_a_ledger(site_file: Path) -> None:
    (site_file.parent / "results" / "ledger.jsonl").mkdir(parents=True)
    reply = ask(site_file, SummariseRequest(**COMMON), lambda site, request: data_told(9))
    assert {name: dict(record) for name, record in reply.content.items()} == {
        "error": {"code": "ledger-error"}
    }


def test_numbers_go_through_the_privacy_filters(site_file: Path) -> None:
    reply = ask(site_file, SummariseRequest(**COMMON), lambda site, request: data_told(4))
    assert dict(reply.content["statistics"]) == {
        "cases": 5,
        "patients": 5,
        "references": 2,
        "left_out.unreadable": 2,
        "volume_ml.ball.mean": 0.123,
        "spacing_mm.x": 1.23,
    }


@pytest.mark.parametrize(("site_count", "federation_count"), [(1, 5), (5, 1)])
def test_the_stricter_min_count_holds(
    make_site: Callable[..., Path], site_count: int, federation_count: int
) -> None:
    site = make_site("a", references=0, good=0, spoiled=0, min_count=site_count)
    request = SummariseRequest(**COMMON | {"min_count": federation_count})
    reply = ask(site, request, lambda site, request: data_told(4))
    assert dict(reply.content["statistics"]) == {}
    trained = Trained(WEIGHTS, 16, {"loss": Figure(value=0.5, patients=4)})
    train = train_request().model_copy(update={"min_count": federation_count})
    reply = ask(site, train, lambda site, request: trained)
    assert dict(reply.content["training"]) == {"samples": 16}


def labels_from(source: str) -> LabelsSummary:
    """A label of each of two patients, enough to be told."""
    return summarise_labels([("p", 0.5), ("q", 0.5)], [("p", source, 0.5), ("q", source, 0.5)])


FORBIDDEN: list[tuple[Request, Outcome]] = [
    (HandshakeRequest(**COMMON), HELLO.model_copy(update={"site": "b"})),
    (HandshakeRequest(**COMMON), HELLO.model_copy(update={"task": "Maria Muster"})),
    (SummariseRequest(**COMMON), HELLO),
    (SummariseRequest(**COMMON), data_told(4, left_out={"Maria-Muster": Figure(value=2, patients=4)})),
    (
        SummariseRequest(**COMMON),
        data_told(4, volume_ml={"Maria": Volume(mean=Figure(value=1, patients=4), sd=None)}),
    ),
    (HandshakeRequest(**COMMON), data_told(4)),
    (SummariseRequest(**COMMON), {"cases": 3}),  # type: ignore[list-item]
    (SummariseRequest(**COMMON), Trained(WEIGHTS, 1, {})),
    (train_request(), Trained(WEIGHTS | {"more": np.ones(3, np.float32)}, 1, {})),
    (train_request(), Trained({"w": WEIGHTS["w"]}, 1, {})),
    (train_request(), Trained(WEIGHTS | {"w": np.ones((2, 3), np.float32)}, 1, {})),
    (train_request(), Trained(WEIGHTS | {"w": np.ones((2, 2), np.float64)}, 1, {})),
    (train_request(), Trained(WEIGHTS | {"w": np.full((2, 2), np.nan, np.float32)}, 1, {})),
    (train_request(), Trained(WEIGHTS | {"w": np.ones((2, 2), np.uint8)}, 1, {})),
    (train_request(), Trained(dict(reversed(WEIGHTS.items())), 1, {})),
    (train_request(), Trained(WEIGHTS, 1, {"Maria-Muster": Figure(value=1.0, patients=4)})),
    (train_request(), Trained(WEIGHTS, 1, {f"a{'b' * n}": Figure(value=1.0, patients=4) for n in range(17)})),
    (train_request(), Trained(WEIGHTS, 1, {"loss": 0.5})),  # type: ignore[dict-item]
    (train_request(), Trained(WEIGHTS, 1, {}, labels_from("Maria"))),
    (TRAIN_SEGMENTATION, Trained(WEIGHTS, 1, {}, labels_from("seggen"))),
    (TRAIN_SEGMENTATION, Trained({"w": WEIGHTS["w"]}, 1, {})),
    (TRAIN_SEGMENTATION, Trained(WEIGHTS | {"w": np.full((2, 2), np.nan, np.float32)}, 1, {})),
    (TRAIN_SEGMENTATION, Told(summarise_cross_check([0.5, 0.6], ["p", "q"]), ABOUT)),
    (CROSS_CHECK, Trained(WEIGHTS, 1, {})),
    (CROSS_CHECK, Told(summarise_segmentation([0.5, 0.6], {}, ["p", "q"]), ABOUT)),
    (CROSS_CHECK, data_told(4)),
    (EVALUATE, Trained(WEIGHTS, 1, {})),
    (EVALUATE, Told(summarise_cross_check([0.5, 0.6], ["p", "q"]), ABOUT)),
    (EVALUATE, Told(summarise_segmentation([0.5, 0.6], {"Maria": [0.5, 0.6]}, ["p", "q"]), ABOUT)),
    (HandshakeRequest(**COMMON), Told(summarise_segmentation([0.5, 0.6], {}, ["p", "q"]), ABOUT)),
]


@pytest.mark.parametrize(("request_", "outcome"), FORBIDDEN)
def test_what_is_not_on_the_list_does_not_leave(site_file: Path, request_: Request, outcome: Outcome) -> None:
    with pytest.raises(GuardError):
        outgoing(outcome, load_site(site_file), request_)
    reply = ask(site_file, request_, lambda site, request: outcome)
    assert {name: dict(record) for name, record in reply.content.items()} == {
        "error": {"code": "refused-by-guard"}
    }


NEW: list[tuple[Request, CrossCheckSummary | SegmentationSummary, dict[str, float]]] = [
    (
        CROSS_CHECK,
        summarise_cross_check([0.5, 0.75, 1.0], ["p", "q", "q"]),
        {"references": 3, "quality_mean": 0.75, "quality_sd": 0.25},
    ),
    (
        EVALUATE,
        summarise_segmentation([0.5, 0.75, 1.0], {"ball": [0.1, 0.2, 0.30009]}, ["p", "q", "q"]),
        {"cases": 3, "dice_mean": 0.75, "dice_sd": 0.25, "dice.ball": 0.2},
    ),
]


@pytest.mark.parametrize(("request_", "summary", "expected"), NEW, ids=["cross-check", "evaluation"])
def test_new_statistics_leave_with_enough_patients_only(
    make_site: Callable[..., Path],
    request_: Request,
    summary: CrossCheckSummary | SegmentationSummary,
    expected: dict[str, float],
) -> None:
    for min_count, allowed in ((2, expected), (3, {})):
        site = make_site(f"a{min_count}", references=0, good=0, spoiled=0, min_count=min_count)
        reply = ask(site, request_, lambda site, request: Told(summary, ABOUT))
        assert dict(reply.content["statistics"]) == allowed
    strict = request_.model_copy(update={"min_count": 3})
    reply = ask(
        make_site("a", references=0, good=0, spoiled=0, min_count=1), strict, lambda *_: Told(summary, ABOUT)
    )
    assert dict(reply.content["statistics"]) == {}


def test_cases_of_one_patient_are_one_patient(site_file: Path) -> None:
    site = load_site(site_file)
    records = outgoing(Told(summarise_cross_check([0.5, 0.6], ["p", "p"]), ABOUT), site, CROSS_CHECK)
    assert dict(records["statistics"]) == {}


def test_a_segmentation_update_leaves_with_a_line_in_the_ledger(site_file: Path) -> None:
    trained = Trained(WEIGHTS, 16, {"dice": Figure(value=0.56789, patients=4)})
    reply = ask(site_file, TRAIN_SEGMENTATION, lambda site, request: trained)
    assert dict(reply.content["training"]) == {"samples": 16, "loss.dice": 0.568}
    (line,) = ledger(site_file)
    assert (line["kind"], line["round"]) == ("train.segmentation", 1)
    assert line["content"] == {"weights": FORMS, "training": {"samples": 16, "loss.dice": 0.568}}


@pytest.mark.parametrize(
    ("losses", "labels", "is_allowed"),
    [
        ({"loss": 0.5}, {}, True),
        ({f"part_{'abcdefghijklmnop'[n]}": 0.5 for n in range(16)}, {}, True),
        ({f"part_{'abcdefghijklmnopq'[n]}": 0.5 for n in range(17)}, {}, False),
        ({"Maria Muster": 0.5}, {}, False),
        ({"a" * 33: 0.5}, {}, False),
        ({}, {"sources.seggen": 3}, True),
        ({}, {"sources.invented": 3}, False),
    ],
)
def test_what_a_coordinator_takes_of_a_round(
    losses: dict[str, float], labels: dict[str, int], is_allowed: bool
) -> None:
    reply = TrainReply(weights={}, samples=1, losses=losses, labels=labels)
    assert (not_allowed(reply, "train.qc", load_task("phantom")) is None) == is_allowed


@pytest.mark.parametrize(
    ("name", "value", "is_allowed"),
    [
        ("bias", -0.1, True),
        ("bias", [-0.1], False),
        ("profile.labels", [3, -1, -1, 0, 12], True),
        ("profile.labels", [3, -1, -1, 12], False),
        ("profile.labels", [3.0, -1.0, -1.0, 0.0, 12.0], False),
        ("profile.labels", 12, False),
        ("profile.true", [0.5, -1.0, -1.0, 0.0, 1.0], True),
        ("profile.true", [0.5, -1.0, -1.0, 0.0, 1.1], False),
        ("profile.true", [0.5, -0.5, -1.0, 0.0, 1.0], False),
        ("profile.predicted", [0.5, -1.0, -1.0, 0.0], False),
        ("profile.predicted", [1, -1, -1, 0, 1], False),
        ("profile.sd", [1.41, -1.0, -1.0, 0.0, 0.1], True),
        ("profile.sd", [2.01, -1.0, -1.0, 0.0, 0.1], False),
        ("profile.median", 0.5, False),
    ],
)
def test_what_a_coordinator_takes_of_a_calibration(name: str, value: Any, is_allowed: bool) -> None:
    reply = StatisticsReply(values={name: value})
    assert (not_allowed(reply, "query.calibrate", load_task("phantom")) is None) == is_allowed


def test_statistic_keys_are_those_of_the_phase() -> None:
    task = load_task("msd-hippocampus")
    assert statistic_keys("query.cross_check", task) == {"references", "quality_mean", "quality_sd"}
    dice = {"dice.anterior", "dice.posterior"}
    assert statistic_keys("evaluate.segmentation", task) == {"cases", "dice_mean", "dice_sd"} | dice
    for kind in ("train.qc", "train.segmentation", "query.handshake", "query.other"):
        assert statistic_keys(kind, task) == frozenset()


def test_error_codes() -> None:
    assert error_code(GuardError("x")) is ErrorCode.REFUSED
    assert error_code(KeyError("x")) is ErrorCode.INTERNAL
    assert issubclass(ScoreRequest, ModelRequest)


def test_a_refusal_of_a_task_is_handed_on(site_file: Path) -> None:
    reply = ask(site_file, train_request(), lambda site, request: ErrorReply(ErrorCode.NO_REFERENCE))
    assert dict(reply.content["error"]) == {"code": "no-reference"}


def test_a_torn_line_of_the_ledger_stays_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    records = RecordDict({"statistics": MetricRecord({"cases": 3})})
    ledger.write(records, to="f", kind="query.summarise", round=0)
    whole = ledger.path.read_text()
    ledger.path.write_text(whole + whole[:20])  # killed while it wrote half a line
    ledger.write(records, to="f", kind="query.score", round=0)
    lines = ledger.path.read_text().splitlines()
    assert lines[0] + "\n" == whole
    assert lines[1] == whole[:20]
    assert json.loads(lines[2])["kind"] == "query.score"
    assert len(lines) == 3
    (text, first), torn, (_, last) = ledger.lines()
    assert first is not None
    assert last is not None
    assert (first.kind, first.content) == ("query.summarise", {"statistics": {"cases": 3}})
    assert (text + "\n", torn) == (whole, (whole[:20], None))
    assert list(in_words(last))[1:] == ["    statistics.cases = 3"]


def test_a_ledger_in_words_names_weights_when_asked(site_file: Path) -> None:
    ask(site_file, train_request(), lambda site, request: Trained(WEIGHTS, 16, {}))
    ((_, line),) = Ledger(site_file.parent / "results" / "ledger.jsonl").lines()
    assert line is not None
    head, *told = in_words(line)
    assert head.endswith(f"SHA-256 {line.sha256}")
    assert "to f: train.qc, round 3, " in head
    assert told == ["    weights: 2 arrays", "    training.samples = 16"]
    assert {f"    weights.{name} = {form}" for name, form in FORMS.items()} < set(
        in_words(line, weights=True)
    )


def test_a_site_that_sent_nothing_has_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing has left this site yet"):
        list(Ledger(tmp_path / "ledger.jsonl").lines())
