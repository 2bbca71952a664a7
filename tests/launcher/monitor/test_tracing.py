"""The window of the profiler: which steps it covers, what it leaves behind, what a resume inside it does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.monitor.trace import STEP
from launcher.monitor.tracing import Tracing


class Alone:
    rank = local_rank = 0

    def gather(self, value: Any) -> list[Any]:
        return [value]


class Recorder:
    """Stands for PyTorch's profiler: each marked step computes for one second."""

    def __init__(self) -> None:
        self.started = False
        self.events: list[dict[str, Any]] = []

    def start(self) -> None:
        self.started = True

    @contextmanager
    def mark(self, name: str) -> Iterator[None]:
        assert self.started
        at = 1e6 * len(self.events)
        self.events.append({"ph": "X", "name": name, "ts": at, "dur": 1e6, "cat": "user_annotation"})
        self.events.append({"ph": "X", "name": "aten::mm", "ts": at, "dur": 1e6, "cat": "cpu_op"})
        yield

    def stop(self, path: Path) -> None:
        path.write_text(json.dumps({"traceEvents": self.events}))


def run(tracing: Tracing, steps: range) -> None:
    for number in steps:
        with tracing.step(number):
            pass
        tracing.after(number)


def test_a_window_leaves_a_trace_and_a_summary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened: list[Recorder] = []

    def open_one() -> Recorder:
        opened.append(Recorder())
        return opened[-1]

    folder = tmp_path / "trace"
    tracing = Tracing((3, 4), directory=folder, peers=Alone(), open_profiler=open_one)
    with caplog.at_level("INFO"):
        run(tracing, range(1, 7))
    (recorder,) = opened
    marked = [e["name"] for e in recorder.events if e["cat"] == "user_annotation"]
    assert marked == [f"{STEP}3", f"{STEP}4"]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["first_step"], summary["last_step"]) == (3, 4)
    assert summary["ranks"][0]["compute"] == 1.0
    assert (folder / "rank_00000.json").exists()
    assert caplog.messages == [
        "traced steps of 1 s: compute 1 s, communication 0 s, exposed communication 0 s, idle 0 s; "
        f"traces for Perfetto in {folder}"
    ]


@pytest.mark.parametrize(
    ("window", "steps"), [((), range(1, 5)), ((3, 5), range(4, 8)), ((8, 9), range(1, 5))]
)
def test_without_a_whole_window_there_is_no_trace(
    tmp_path: Path, window: tuple[int, ...], steps: range
) -> None:
    tracing = Tracing(window, directory=tmp_path / "trace", peers=Alone(), open_profiler=Recorder)
    run(tracing, steps)
    assert not (tmp_path / "trace").exists()


def test_a_process_without_a_profiler_traces_nothing(tmp_path: Path) -> None:
    run(Tracing((2, 3), directory=tmp_path / "trace", peers=Alone(), open_profiler=None), range(1, 5))
    assert list(tmp_path.iterdir()) == []
