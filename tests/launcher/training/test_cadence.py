from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.checkpoint import CheckpointPolicy
from launcher.run_dir import RunDir
from launcher.training.cadence import Cadence
from strategies.model_spec import ModelSpec
from strategies.spec import Plan

ALONE: Any = SimpleNamespace(rank=0, broadcast=lambda value: value)
PLAN = Plan(strategy="fake", dp=1, precision="fp32")


def cadence(path: Path, model: ModelSpec, **policy: Any) -> Cadence:
    path.mkdir(exist_ok=True)
    run = RunDir(path=path)
    run.plan_file.write_text(json.dumps({"predictions": {"step_s": 0.5}}))
    cluster = SimpleNamespace(mttf_hours_per_gpu=None, storage_gb_per_s=0.001, world_size=1)
    job: Any = SimpleNamespace(checkpoint=CheckpointPolicy(**policy), cluster=cluster, model=model)
    found = Cadence(run=run, job=job, plan=PLAN, ranks=ALONE)
    found.begin()
    return found


def steps_of(found: Cadence) -> list[int]:
    return [step for step in range(1, 2001) if found.is_due(step)][:3]


def test_a_number_is_kept_to(tmp_path: Path, tiny_model: ModelSpec) -> None:
    found = cadence(tmp_path / "run", tiny_model, interval=7)
    assert steps_of(found) == [7, 14, 21]
    found.measured(save_s=100.0, step_s=0.1)
    found.measured(save_s=None, step_s=0.1)
    assert steps_of(found) == [7, 14, 21]
    assert list(found.run.events()) == []
    assert steps_of(cadence(tmp_path / "run", tiny_model, interval=0)) == []


def test_auto_follows_the_first_save_once_and_stays_over_restarts(
    tmp_path: Path, tiny_model: ModelSpec, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        first = cadence(tmp_path / "run", tiny_model, interval="auto", mttf_hours=1.0)
        predicted = steps_of(first)
        first.measured(save_s=None, step_s=1.0)  # it failed
        assert steps_of(first) == predicted
        first.measured(save_s=2.0, step_s=1.0)
        chosen = steps_of(first)
        first.measured(save_s=50.0, step_s=1.0)
    # The square root of 2 x 2 s x 3,600 s is 120 s.
    assert chosen[0] == pytest.approx(120, abs=3)
    assert predicted != chosen == steps_of(first)
    assert [e["measured"] for e in first.run.events()] == [False, True]
    again = cadence(tmp_path / "run", tiny_model, interval="auto", mttf_hours=1.0)
    again.measured(save_s=50.0, step_s=1.0)
    assert steps_of(again) == chosen
    assert len(list(again.run.events())) == 2
    assert any("Young/Daly" in message and "2.00 s" in message for message in caplog.messages)
    assert any(message.startswith("expected goodput 9") for message in caplog.messages)


def test_what_was_predicted_is_frozen_too(tmp_path: Path, tiny_model: ModelSpec) -> None:
    first = steps_of(cadence(tmp_path / "run", tiny_model, interval="auto", mttf_hours=1.0))
    again = cadence(tmp_path / "run", tiny_model, interval="auto", mttf_hours=9.0)
    assert steps_of(again) == first


def test_another_plan_decides_anew(tmp_path: Path, tiny_model: ModelSpec) -> None:
    first = cadence(tmp_path / "run", tiny_model, interval="auto", mttf_hours=1.0)
    first.run.log_event("replanned")
    again = cadence(tmp_path / "run", tiny_model, interval="auto", mttf_hours=9.0)
    assert steps_of(again) != steps_of(first)
