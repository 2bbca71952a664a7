"""Saving and restoring on one rank with the fake strategy: no torch, no processes, real files."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.checkpoint import CheckpointPolicy
from launcher.cluster import detect
from launcher.errors import CheckpointError
from launcher.run_dir import RunDir
from launcher.training.saver import Position, RandomState, Saver
from strategies.fake import FakeStrategy
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

PLAN = Plan(strategy="fake", dp=1, precision="fp32")


class Copying(FakeStrategy):
    """Takes copies, and writes them when it is let."""

    may_write: threading.Event
    bytes_needed = 1000

    def snapshot_bytes(self) -> int:
        return self.bytes_needed

    def snapshot(self, directory: Path) -> Callable[[], None]:
        taken = self._steps

        def write() -> None:
            assert self.may_write.wait(60)
            now, self._steps = self._steps, taken
            self.save(directory)
            self._steps = now

        return write


@pytest.fixture
def make(
    tmp_path: Path, tiny_model: ModelSpec, training: TrainingSpec, alone: Callable[[], Any]
) -> Callable[..., Saver]:
    run = RunDir(path=tmp_path / "run")
    for folder in (run.metrics, run.checkpoints, run.logs):
        folder.mkdir(parents=True)

    def build(strategy: FakeStrategy | None = None, **policy: Any) -> Saver:
        strategy = strategy or FakeStrategy()
        strategy.setup(PLAN, tiny_model, training, run.weights)
        job: Any = SimpleNamespace(
            checkpoint=CheckpointPolicy(**policy),
            model=tiny_model,
            training=training,
            cluster=SimpleNamespace(gpus_per_node=1),
        )
        dataset: Any = SimpleNamespace(content_hash="abc")
        return Saver(
            run=run,
            job=job,
            plan=PLAN,
            dataset=dataset,
            strategy=strategy,
            ranks=alone(),
            random=RandomState(get=lambda: {"seed": 7}, set=lambda state: None),
            versions={},
        )

    return build


def copying(*, may_write: bool = True) -> Copying:
    strategy = Copying()
    strategy.may_write = threading.Event()
    if may_write:
        strategy.may_write.set()
    return strategy


def at(step: int) -> Position:
    return Position(step=step, consumed_samples=8 * step)


def named(saver: Saver, event: str) -> list[dict[str, Any]]:
    return [each for each in saver.run.events() if each["event"] == event]


def test_training_goes_on_while_a_copy_is_written(make: Callable[..., Saver]) -> None:
    strategy = copying(may_write=False)
    saver = make(strategy)
    strategy._steps = 4
    saver.save(at(4), last=False)
    assert saver.tiers.committed() == [], "nothing counts before it is whole"
    strategy._steps = 9  # training goes on
    strategy.may_write.set()
    saver.settle()
    again = make()
    assert again.restore() == at(4)
    assert again.strategy._steps == 4, "the copy was written, not what came later"
    (event,) = named(saver, "checkpoint")
    assert event["step"] == 4 and 0 <= event["stall_s"] <= event["seconds"]


def test_a_save_waits_for_the_one_before(make: Callable[..., Saver]) -> None:
    strategy = copying(may_write=False)
    saver = make(strategy, keep_last=5)
    saver.save(at(1), last=False)
    threading.Timer(0.2, strategy.may_write.set).start()
    waited_s = saver.save(at(2), last=False)
    assert waited_s is not None and waited_s >= 0.1
    assert [path.name[-1] for path in saver.tiers.committed()][-1:] == ["1"]
    saver.settle()
    assert [path.name[-1] for path in saver.tiers.committed()] == ["2", "1"]


def test_the_last_save_is_there_when_the_call_returns(make: Callable[..., Saver]) -> None:
    saver = make(copying())
    saver.save(at(3), last=True)
    assert [path.name[-1] for path in saver.tiers.committed()] == ["3"]


@pytest.mark.parametrize(
    ("strategy", "asynchronous", "words"),
    [
        (copying(), True, "copied to host memory"),
        (FakeStrategy(), True, "strategy=fake cannot write a copy"),
        (FakeStrategy(), False, None),
    ],
)
def test_how_it_saves_is_said_once(
    make: Callable[..., Saver],
    caplog: pytest.LogCaptureFixture,
    strategy: FakeStrategy,
    asynchronous: bool,
    words: str | None,
) -> None:
    saver = make(strategy, asynchronous=asynchronous)
    with caplog.at_level("INFO"):
        for step in (1, 2, 3):
            saver.save(at(step), last=False)
        saver.settle()
    said = [message for message in caplog.messages if message.startswith("checkpoints ")]
    assert len(said) == (words is not None)
    assert words is None or words in said[0]
    assert make().restore() == at(3)


def test_a_copy_that_does_not_fit_is_not_taken(
    make: Callable[..., Saver], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = copying(may_write=False)
    monkeypatch.setattr(detect, "free_memory_bytes", lambda: 1.2 * strategy.bytes_needed)  # of a container
    saver = make(strategy)
    with caplog.at_level("INFO"):
        saver.save(at(1), last=False)
        saver.settle()
    assert any("more than a host has to spare" in message for message in caplog.messages)
    assert make().restore() == at(1)


class Failing(Copying):
    """Cannot write while `full`."""

    full = True

    def save(self, directory: Path) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        super().save(directory)


def failing() -> Failing:
    strategy = Failing()
    strategy.may_write = threading.Event()
    strategy.may_write.set()
    return strategy


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_stops_by_policy(make: Callable[..., Saver], asynchronous: bool) -> None:
    strategy = failing()
    strategy.full = False
    saver = make(strategy, asynchronous=asynchronous)
    saver.save(at(1), last=False)
    saver.settle()
    strategy.full = True
    with pytest.raises(CheckpointError, match=r"checkpoint of step 2 .*No space left"):
        saver.save(at(2), last=False)
        saver._background._thread.join()
        assert saver.has_failed
        saver.settle()
    assert named(saver, "checkpoint_failed")[0]["step"] == 2
    assert make().restore() == at(1)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_or_training_goes_on_but_not_past_the_last_one(
    make: Callable[..., Saver], asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = failing()
    saver = make(strategy, asynchronous=asynchronous, on_failed_save="continue")
    saver.save(at(1), last=False)
    saver.settle()
    assert not saver.has_failed
    assert any("training goes on" in message for message in caplog.messages)
    strategy.full = False
    saver.save(at(2), last=False)
    strategy.full = True
    with pytest.raises(CheckpointError, match="step 3"):
        saver.save(at(3), last=True)
    assert make().restore() == at(2)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_too_full_for_the_events_fails_no_save(
    make: Callable[..., Saver], asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(run: RunDir, event: str, **facts: Any) -> None:
        raise OSError(28, "No space left on device")

    strategy = failing()
    saver = make(strategy, asynchronous=asynchronous, on_failed_save="continue")
    monkeypatch.setattr(RunDir, "log_event", full)
    saver.save(at(1), last=False)
    saver.settle()
    strategy.full = False
    saver.save(at(2), last=True)
    assert make().restore() == at(2)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_only_a_save_like_those_to_come_is_measured(make: Callable[..., Saver], asynchronous: bool) -> None:
    strategy = failing()
    saver = make(strategy, asynchronous=asynchronous, on_failed_save="continue")
    if not asynchronous:  # beside the training it has not failed yet
        assert saver.save(at(1), last=False) is None
    strategy.full = False
    assert saver.save(at(2), last=False) is not None
    assert (saver.save(at(3), last=True) is None) == asynchronous


def test_a_save_longer_than_the_grace_time_is_said(
    make: Callable[..., Saver], caplog: pytest.LogCaptureFixture
) -> None:
    saver = make(copying(), grace_s=1e-9)
    saver.warn_of_grace()
    assert not caplog.messages
    saver.save(at(1), last=True)
    saver.warn_of_grace()
    assert "longer than checkpoint.grace_s=1e-09" in caplog.messages[0]


def test_on_the_way_out_the_save_under_way_gets_the_grace_time(make: Callable[..., Saver]) -> None:
    strategy = copying(may_write=False)
    saver = make(strategy, grace_s=30.0)
    saver.save(at(1), last=False)
    threading.Timer(0.2, strategy.may_write.set).start()
    saver.leave()
    assert len(saver.tiers.committed()) == 1


def test_what_has_to_be_repeated_is_told(make: Callable[..., Saver]) -> None:
    saver = make()
    saver.save(at(4), last=True)
    lines = [{"step": step, "step_time_s": 0.5, "time": 100.0 + step} for step in range(1, 8)]
    saver.run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = make()
    assert again.restore() == at(4)
    assert not named(again, "lost") and not named(again, "resumed"), "an export restores as well"
    again.log_restored(step=4)
    (event,) = named(again, "lost")
    assert (event["steps"], event["seconds"], event["until"]) == (3, 1.5, 107.0)
    assert named(again, "resumed")[0]["tier"] == "shared"


def test_a_newer_checkpoint_on_the_fast_tier_is_taken(make: Callable[..., Saver], tmp_path: Path) -> None:
    saver = make(fast_dir=str(tmp_path / "fast"), keep_last=5)
    saver.save(at(1), last=False)
    saver.save(at(2), last=True)
    assert saver.tiers.fast is not None
    assert [path.parent == saver.tiers.fast.root for path in saver.tiers.committed()] == [True, False, False]
    saver.tiers.shared._remove(saver.tiers.shared.path_of(2))
    again = make(fast_dir=str(tmp_path / "fast"))
    assert again.restore() == at(2)
    again.log_restored(step=2)
    assert named(again, "resumed")[0]["tier"] == "fast"


@pytest.mark.parametrize(
    ("rank", "local_rank", "fast", "kept"),
    [(8, 0, True, False), (9, 1, True, True), (8, 0, False, True), (0, 0, True, False), (0, 0, False, False)],
)
def test_what_a_killed_start_left_on_any_node_is_not_adopted(
    make: Callable[..., Saver], tmp_path: Path, rank: int, local_rank: int, fast: bool, kept: bool
) -> None:
    """One rank of each node clears its own disk, rank 0 alone the shared one."""
    saver = make(fast_dir=str(tmp_path / "fast") if fast else None)
    saver.ranks.rank, saver.ranks.local_rank = rank, local_rank
    left = saver.tiers.first.aside_of(3) / "engine" / "left.bin"
    left.parent.mkdir(parents=True)
    left.touch()
    assert saver._begin(3) == left.parent.parent
    assert left.exists() == kept


def test_a_run_that_saved_once_does_not_begin_again(make: Callable[..., Saver]) -> None:
    saver = make()
    saver.save(at(1), last=True)
    (saver.tiers.committed()[0] / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        make().restore()
