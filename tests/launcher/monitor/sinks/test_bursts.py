"""A writer behind a thread: whole, in order, in bursts; and what becomes of one that fails or hangs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest

from launcher.monitor.metrics import StepMetrics
from launcher.monitor.sinks import bursts
from launcher.monitor.sinks.bursts import Bursts

NEVER_S = 3600.0  # no burst comes by itself


class Collecting:
    """Keeps each burst; hangs in `write` while the door is shut."""

    def __init__(self) -> None:
        self.bursts: list[list[int]] = []
        self.door = threading.Event()
        self.door.set()
        self.closed = 0

    def write(self, steps: Sequence[StepMetrics]) -> None:
        self.door.wait()
        self.bursts.append([metrics.step for metrics in steps])

    def close(self) -> None:
        self.closed += 1


class Broken:
    def write(self, steps: Sequence[StepMetrics]) -> None:
        raise OSError("disk\nfull")

    def close(self) -> None:
        raise OSError("still full")


@pytest.fixture
def writer() -> Iterator[Collecting]:
    found = Collecting()
    yield found
    found.door.set()


def test_steps_wait_for_the_next_burst_and_go_over_together(
    writer: Collecting, steps: SimpleNamespace
) -> None:
    behind = Bursts("x", writer, every_s=NEVER_S)
    for step in (1, 2, 3):
        behind.write(steps.at(step))
    assert writer.bursts == []
    behind.flush()
    assert writer.bursts == [[1, 2, 3]]
    behind.write(steps.at(4))
    behind.close()
    behind.close()
    assert (writer.bursts, writer.closed) == ([[1, 2, 3], [4]], 1)


def test_bursts_come_by_themselves(writer: Collecting, steps: SimpleNamespace) -> None:
    behind = Bursts("x", writer, every_s=0.01)
    behind.write(steps.at(1))
    deadline = time.monotonic() + 60
    while not writer.bursts and time.monotonic() < deadline:
        time.sleep(0.01)
    assert writer.bursts == [[1]]
    behind.close()


def test_no_step_waits_for_a_writer_that_hangs(
    writer: Collecting,
    steps: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(bursts, "_STALL_S", 0.1)
    writer.door.clear()
    behind = Bursts("x", writer, every_s=0.01)
    behind.write(steps.at(1))
    behind.flush()
    behind.write(steps.at(2))
    assert (writer.bursts, behind.is_off, caplog.messages) == ([], False, [])
    writer.door.set()  # a server that is back finds everything that came meanwhile
    behind.close()
    assert [step for burst in writer.bursts for step in burst] == [1, 2]


def test_a_writer_that_hangs_too_long_is_given_up_in_one_line(
    writer: Collecting, steps: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    writer.door.clear()
    behind = Bursts("x", writer, every_s=0.01, patience_s=0.2)
    behind.write(steps.at(7))
    time.sleep(0.3)
    behind.write(steps.at(8))
    behind.write(steps.at(9))
    behind.close()
    assert caplog.messages == ["x is off from step 7 on: it has taken nothing for 0.2 s"]
    assert writer.closed == 0


def test_a_run_ends_though_a_writer_hangs(
    writer: Collecting,
    steps: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(bursts, "_PARTING_S", 0.1)
    writer.door.clear()
    behind = Bursts("x", writer, every_s=0.01)
    behind.write(steps.at(5))
    behind.close()
    assert caplog.messages == ["x is off from step 5 on: it has not taken the last steps within 0.1 s"]


def test_a_writer_that_fails_is_given_up_in_one_line(
    steps: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    behind = Bursts("x", Broken(), every_s=NEVER_S)
    behind.write(steps.at(1))
    behind.flush()
    behind.write(steps.at(2))
    behind.close()
    assert behind.is_off
    assert caplog.messages == ["x is off from step 1 on: disk full"]


def test_a_failing_close_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    Bursts("x", Broken()).close()
    assert caplog.record_tuples == [
        ("launcher.monitor.sinks.bursts", logging.WARNING, "x could not be closed: still full")
    ]
