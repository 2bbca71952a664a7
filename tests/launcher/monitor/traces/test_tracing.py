"""Which steps are traced, alone or in a window, what is left of them, what a resume and a full disk do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.monitor.config import MonitorConfig
from launcher.monitor.traces.trace import STEP
from launcher.monitor.traces.tracing import Profiler, Tracing
from strategies.spec import Plan


class Alone:
    rank = local_rank = 0

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None: ...


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
        opened = {"pg_config": [{"pg_name": "0", "pg_desc": "default_pg", "ranks": [0, 1]}]}
        path.write_text(json.dumps({"traceEvents": self.events, "distributedInfo": opened}))

    def collectives(self) -> list[tuple[str, str]]:
        return [("gloo:all_reduce", "0")] * len(self.events)


class Sender(Recorder):
    """Half of each of its steps is sent as well."""

    @contextmanager
    def mark(self, name: str) -> Iterator[None]:
        with super().mark(name):
            at = self.events[-1]["ts"]
            sent = {"name": "gloo:all_reduce", "ts": at, "dur": 5e5, "cat": "user_annotation"}
            self.events.append({"ph": "X", "tid": 3, **sent})
            yield


def trace(folder: Path, opened: Callable[[], Profiler] | None, **config: Any) -> Tracing:
    return Tracing(
        MonitorConfig(**config),
        plan=Plan(strategy="fake", dp=2),
        directory=folder,
        team=Alone(),
        open_profiler=opened,
    )


def run(tracing: Tracing, steps: range) -> dict[int, dict[str, Any]]:
    told = {}
    for number in steps:
        with tracing.step(number):
            pass
        told[number] = tracing.after(number)
    return {number: figures for number, figures in told.items() if figures}


def test_a_window_leaves_a_trace_and_a_summary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened: list[Recorder] = []

    def open_one() -> Recorder:
        opened.append(Recorder())
        return opened[-1]

    folder = tmp_path / "trace"
    tracing = trace(folder, open_one, profile=(3, 4))
    with caplog.at_level("INFO"):
        told = run(tracing, range(1, 7))
    assert told[3] == {"traced": True}
    assert told[4] == {
        "traced": True,
        "communication_s": {},
        "exposed_communication_s": 0.0,
        "idle_s": 0.0,
    }
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
    run(trace(tmp_path / "trace", Recorder, profile=window), steps)
    assert not (tmp_path / "trace").exists()


def test_a_process_without_a_profiler_traces_nothing(tmp_path: Path) -> None:
    tracing = trace(tmp_path / "trace", None, profile=(2, 3), trace_interval=2)
    assert run(tracing, range(1, 9)) == {}
    assert list(tmp_path.iterdir()) == []


def test_single_steps_leave_figures_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aside = tmp_path / "aside"
    aside.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(aside))
    told = run(trace(tmp_path / "trace", Sender, trace_interval=5), range(1, 13))
    figures = {"communication_s": {"dp": 0.5}, "exposed_communication_s": 0.0, "idle_s": 0.0}
    assert told == {5: {"traced": True, **figures}, 10: {"traced": True, **figures}}
    assert list(aside.iterdir()) == []
    assert list(tmp_path.iterdir()) == [aside]


@pytest.mark.parametrize(
    ("config", "steps", "traced"),
    [
        ({}, range(1, 9), [4, 6, 8]),  # the first three of a start compile and allocate
        ({}, range(7, 13), [10, 12]),  # of a resumed one as well
        ({"warmup_steps": 0}, range(2, 5), [4]),  # the very first step is never traced
        ({"profile": (5, 7)}, range(1, 11), [4, 5, 6, 7, 8, 10]),  # the window wins
        ({"profile": (5, 9)}, range(6, 13), [10, 12]),  # also where it was missed
    ],
)
def test_which_steps_are_traced(
    tmp_path: Path, config: dict[str, Any], steps: range, traced: list[int]
) -> None:
    told = run(trace(tmp_path / "trace", Recorder, trace_interval=2, **config), steps)
    assert list(told) == traced
    window = config.get("profile", ())
    assert [step for step in told if "idle_s" not in told[step]] == [5, 6][: 2 if window == (5, 7) else 0]


def test_a_trace_that_cannot_be_written_is_lost_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(Recorder):
        def stop(self, path: Path) -> None:
            path.write_text('{"traceEvents": [')

    told = run(trace(tmp_path / "trace", Full, trace_interval=5), range(1, 11))
    assert told == {5: {"traced": True}, 10: {"traced": True}}
    assert "the trace of step 5 is lost" in caplog.messages[0]
