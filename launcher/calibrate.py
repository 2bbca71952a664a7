"""`plan.calibration=RUN_DIR`: reads what a finished run measured, and sets it against what would be predicted now."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import strategies
from launcher.config import Job
from launcher.errors import ConfigError, RunDirError
from launcher.planner.calibration import Calibration
from launcher.planner.price.estimate import process_bytes
from launcher.planner.problem import PlanRequest, Problem
from launcher.planner.search.ranking import predict
from launcher.run_dir import RunDir, open_run, since_replanned

LEAST = 3  # runs of a folder, of which the one in the middle is no chance


def read(folder: Path, job: Job) -> Calibration:
    """Return measured over predicted of the run in `folder`, or the median of the runs in it that are like `job`.

    Raise ConfigError when it says nothing about `job`.
    """
    inside = sorted(path.parent for path in folder.glob("*/plan.json"))
    if (folder / "plan.json").exists() or not inside:
        return _read_one(folder, job)
    found: list[Calibration] = []
    refusals: list[ConfigError] = []
    for path in inside:
        try:
            found.append(_read_one(path, job))
        except ConfigError as error:
            refusals.append(error)
    if len(found) < LEAST:
        why = f"; {refusals[0]}" if refusals else ""
        raise ConfigError(
            f"plan.calibration={folder} holds {len(found)} runs that tell about this job and {LEAST} are needed{why}"
        )
    return Calibration(
        time=statistics.median(one.time for one in found),
        memory=statistics.median(one.memory for one in found),
        run=str(folder.absolute()),
        date=max(one.date for one in found),
        host=", ".join(dict.fromkeys(one.host for one in found)),
    )


def _read_one(folder: Path, job: Job) -> Calibration:
    try:
        run = open_run(folder)
        then = run.job()
        plan = run.plan()
    except RunDirError as error:
        raise ConfigError(f"plan.calibration: {error}") from error
    measured = _measured(run)
    _check_alike(folder, job, then, strategy=plan.strategy)
    # The run is predicted anew, by today's cost model and the cluster at hand: its own prediction may rest on others.
    problem = Problem(
        model=then.model,
        cluster=replace(
            job.cluster, num_nodes=then.cluster.num_nodes, gpus_per_node=then.cluster.gpus_per_node
        ),
        training=then.training,
        request=PlanRequest(),
        strategies=(plan.strategy,),
        engine=plan.engine,
    )
    cost = predict(problem, plan, strategies.capabilities(plan.strategy))
    return Calibration(
        time=measured["step_s"] / cost.step_s,
        memory=measured["memory_bytes"] / (cost.memory.total + process_bytes(job.cluster)),
        run=str(run.path),
        date=datetime.fromtimestamp(measured["time"], tz=timezone.utc).isoformat(timespec="seconds"),
        host=", ".join(json.loads(run.env_file.read_text(encoding="utf-8"))["hosts"]),
    )


def _measured(run: RunDir) -> dict[str, Any]:
    for event in reversed(since_replanned(list(run.events()))):
        figures = event.get("measured") or {}
        if figures.get("step_s") and figures.get("memory_bytes"):
            return {**figures, "time": event["time"]}
    raise ConfigError(
        f"plan.calibration={run.path} holds no measured step time and memory; let that run finish, or give another"
    )


def _check_alike(folder: Path, job: Job, then: Job, *, strategy: str) -> None:
    """Raise unless the run was of the kind that is planned now."""
    if job.strategy.name != strategy:
        raise ConfigError(
            f"plan.calibration={folder} was measured with strategy={strategy}, not strategy={job.strategy.name}; "
            f"use strategy={strategy}, or a run of {job.strategy.name}"
        )
    pairs = (
        ("cluster.gpu.name", then.cluster.gpu.name, job.cluster.gpu.name),
        ("cluster.gpu.device", then.cluster.gpu.device, job.cluster.gpu.device),
        ("training.precision", then.training.precision, job.training.precision),
        ("model", then.model.name, job.model.name),
    )
    for key, was, now in pairs:
        if was != now:
            raise ConfigError(
                f"plan.calibration={folder} was measured with {key}={was}, not {key}={now}; give a run of the same"
            )
    if then.model != job.model:
        raise ConfigError(
            f"plan.calibration={folder} was measured with another shape of model={job.model.name}; "
            "give a run of the same"
        )
