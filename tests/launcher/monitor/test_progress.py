from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from launcher.monitor.progress import Reporter, format_step


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_step_is_one_line(steps: SimpleNamespace) -> None:
    line = format_step(steps.at(20), total_steps=200, eta_s=20.0)
    assert line == "step 20/200 loss 2.5 lr 3.0e-04 grad 0.9 12.3k tok/s/gpu 0.11 s eta 20 s"


def test_a_traced_step_has_no_speed(steps: SimpleNamespace) -> None:
    line = format_step(
        steps.at(20, traced=True, tokens_per_s_per_gpu=None, mfu=None), total_steps=200, eta_s=20.0
    )
    assert line == "step 20/200 loss 2.5 lr 3.0e-04 grad 0.9 0.11 s traced eta 20 s"


def test_measured_extras_are_added(steps: SimpleNamespace) -> None:
    line = format_step(
        steps.at(20, skipped=True, mfu=0.4123, validation_loss=2.5), total_steps=200, eta_s=3725.0
    )
    assert "mfu 41.2% validation 2.5 skipped: gradients overflowed eta 1 h 02 min" in line


@pytest.mark.parametrize(("seconds", "text"), [(59.6, "1 min 00 s"), (0.2, "0 s"), (7199.9, "2 h 00 min")])
def test_durations_round_upwards_through_units(seconds: float, text: str, steps: SimpleNamespace) -> None:
    assert format_step(steps.at(1), total_steps=2, eta_s=seconds).endswith(f"eta {text}")


def test_a_log_gets_every_interval_the_last_step_and_the_remarkable_ones(steps: SimpleNamespace) -> None:
    stream = io.StringIO()
    reporter = Reporter(25, start_step=10, interval=10, stream=stream)
    for step in range(11, 26):
        reporter.write(steps.at(step, skipped=step == 13))
    reporter.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["13/25", "20/25", "25/25"]
    assert "\x1b" not in stream.getvalue()


def test_the_rest_is_estimated_from_recent_steps_only(steps: SimpleNamespace) -> None:
    stream = io.StringIO()
    reporter = Reporter(100, start_step=0, interval=50, stream=stream)
    reporter.write(steps.at(1, step_time_s=1000.0))  # the first step compiles
    for step in range(2, 51):
        reporter.write(steps.at(step, step_time_s=0.5))
    assert stream.getvalue().strip().endswith("eta 25 s")


def test_a_terminal_gets_a_bar_that_starts_where_the_run_resumes(
    monkeypatch: pytest.MonkeyPatch, steps: SimpleNamespace
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    reporter = Reporter(20, start_step=10, interval=1, stream=stream)
    reporter.write(steps.at(11))
    reporter.close()
    reporter.close()
    assert "\x1b[" in stream.getvalue()
    assert "step 11/20 loss 2.5" in stream.getvalue()
