"""Progress where there is no terminal: lines, and how soon the first one comes."""

import pytest

from fused_beit.engine.training import metrics
from fused_beit.engine.training.metrics import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock to set: `clock[0]` is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_a_slow_run_says_how_long_it_will_take_before_its_first_figures(clock, capsys):
    progress = Progress(100, 0)
    for step in range(1, 10):
        clock[0] += 6.0
        progress.step(step)
    assert capsys.readouterr().out == "step 2/100  9 min 48 s left\n"


def test_figures_come_with_the_time_left_and_not_too_often(clock, capsys):
    progress = Progress(100, 0)
    for step in range(1, 11):
        clock[0] += 2.0
        progress.update(step, "loss 1.0")
    assert capsys.readouterr().out.splitlines() == [
        "step 5/100  loss 1.0  3 min 10 s left",
        "step 10/100  loss 1.0  3 min 0 s left",
    ]


def test_a_resumed_run_counts_only_its_own_steps_for_the_time_left(clock, capsys):
    progress = Progress(100, 50)
    clock[0] += 20.0
    progress.update(52, "loss 1.0")
    assert capsys.readouterr().out == "step 52/100  loss 1.0  8 min 0 s left\n"
