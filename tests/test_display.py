from io import StringIO

import pytest
from rich.console import Console

from fedqc.display import Display


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("fedqc.display.time.monotonic", clock.monotonic)
    return clock


def shown(console: Console) -> list[str]:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO(), width=40)


def test_plain_lines_say_how_long_it_will_take(console: Console, clock: Clock) -> None:
    with Display(console) as lines:
        for done in range(5):
            lines.progress("training, rounds", done, 4, "loss 0.5" if done else "")
            clock.now += 60
    assert shown(console) == [
        "training, rounds: 0 of 4",
        "training, rounds: 1 of 4, loss 0.5, about 3 min left",
        "training, rounds: 2 of 4, loss 0.5, about 2 min left",
        "training, rounds: 3 of 4, loss 0.5, about 60 s left",
        "training, rounds: 4 of 4, loss 0.5",
    ]


def test_not_more_than_a_line_in_ten_seconds(console: Console, clock: Clock) -> None:
    with Display(console) as lines:
        for done in range(1, 101):
            lines.progress("cases", done, 100)
            clock.now += 1
    assert len(shown(console)) == 11
    assert shown(console)[-1] == "cases: 100 of 100"


def test_the_same_work_once_more_has_its_own_pace(console: Console, clock: Clock) -> None:
    with Display(console) as lines:
        for done in (0, 1):
            lines.progress("rounds", done, 2)
            clock.now += 20
        clock.now += 3600  # other work
        for done in (0, 1):
            lines.progress("rounds", done, 2)
            clock.now += 20
    assert shown(console)[-1] == "rounds: 1 of 2, about 20 s left"


def test_work_that_goes_on_where_it_stopped(console: Console, clock: Clock) -> None:
    with Display(console) as lines:
        for done in (6, 7, 8):
            lines.progress("rounds", done, 10)
            clock.now += 30
    assert shown(console)[1:] == ["rounds: 7 of 10, about 2 min left", "rounds: 8 of 10, about 60 s left"]


def test_what_a_run_says(console: Console, clock: Clock) -> None:
    with Display(console) as lines:
        lines.listen({"event": "phase-started", "phase": "train.qc"})
        lines.listen({"event": "phase-started", "phase": "train.qc", "arm": "oracle"})
        lines.listen({"event": "round-finished", "stage": "qc", "round": 1, "rounds": 2, "loss": None})
        lines.listen(
            {"event": "site-failed", "site": "a", "phase": "score", "reason": "late", "meaning": "too late"}
        )
        lines.listen({"event": "site-out", "site": "a", "phase": "train.qc"})
        lines.listen({"event": "sites-awaited", "online": [], "missing": ["a", "b"], "seconds": 1800})
        lines.listen({"event": "sites-awaited", "online": ["a"], "missing": ["b"], "seconds": 60})
        lines.listen({"event": "site-suspected", "site": "b", "quality": 0.7, "others": 0.9})
    assert shown(console) == [
        "phase train.qc",
        "training: QC model, rounds: 1 of 2",
        "a (score): too late",
        "a (train.qc): out after three failed rounds in a row",
        "there: nobody; missing: a, b; waiting for 30 min at most",
        "there: a; missing: b; waiting for 1 min at most",
        "b: its references look wrong to a model that never saw them "
        "(predicted DSC 0.70, other sites 0.90); not used",
    ]
