"""What the run directory of a point tells: where it stands, its steps after warm-up, and what it died of."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from launcher import run_dir
from launcher.decode import encode
from launcher.errors import LauncherError, TrainingError
from launcher.monitor.metrics import read
from launcher.planner.words.tables import describe
from launcher.run_dir import RunDir
from launcher.submit import slurm
from launcher.submit.slurm import JobState
from launcher.sweep.folder import Entry, SweepDir
from launcher.sweep.standings import Standing, Standings, ranked


def stand(sweep: SweepDir) -> Standings:
    """Look at all points as they are now."""
    points = [standing(sweep.run(entry), entry) for entry in sweep.record.points]
    return ranked(points, [encode(found) for found in sweep.record.dropped])


def standing(run: RunDir, entry: Entry) -> Standing:
    """Look at one point."""
    job, plan, told = run.job(), run.plan(), run.plan_data()["predictions"]
    events, metrics = list(run.events()), read(run.metrics_file)
    state, cause, code = _state(run, events)
    warm = warm_steps(metrics, events, warmup=job.monitor.warmup_steps)
    return Standing(
        name=entry.name,
        shown=entry.shown,
        strategy=plan.strategy,
        plan=describe(plan),
        num_nodes=job.cluster.num_nodes,
        num_gpus=job.cluster.world_size,
        tokens_per_step=job.training.tokens_per_step,
        predicted_s=told["step_s"],
        predicted_bytes=told["memory_bytes"],
        state=state,
        step=metrics[-1]["step"] if metrics else 0,
        num_steps=job.training.num_steps,
        measured_s=statistics.median(warm) if warm else None,
        measured_bytes=_peak(metrics, events),
        cause=cause,
        exit_code=code,
    )


def warm_steps(
    metrics: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]], *, warmup: int
) -> list[float]:
    """Return the seconds of the steps that are not among the first ones of any start, and were not traced."""
    starts = {event["step"] for event in events if event["event"] == "started"}
    cold = {first + offset for first in starts for offset in range(1, warmup + 1)}
    return [
        record["step_time_s"] for record in metrics if record["step"] not in cold and not record.get("traced")
    ]


def _peak(metrics: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> int | None:
    """Return the peak memory of the fullest rank: as the trainer compared it, else as it was sampled."""
    for event in reversed(events):
        if (event.get("measured") or {}).get("memory_bytes"):
            return int(event["measured"]["memory_bytes"])
    sampled = [record["memory_peak_gib"] for record in metrics if record.get("memory_peak_gib")]
    return round(max(sampled) * 2**30) if sampled else None


def _state(run: RunDir, events: list[dict[str, Any]]) -> tuple[str, str | None, int | None]:
    """Return the word for where a point stands, and cause and exit code where it failed."""
    state = run_dir.state(events)
    if state == "finished":
        return state, None, None
    job = _job(slurm.numbers(events))
    if state == "failed" and (job is None or job.has_ended):  # else of a start that Slurm has made good
        last = next(event for event in reversed(events) if event["event"] == "failed")
        return state, last["message"], last["exit_code"]
    if job is None:
        return state, None, None
    if job.has_ended and state != "stopped":
        return "failed", *_cause(run, job)
    if job.state == "PENDING":
        return "queued", None, None
    return ("starting" if state in ("created", "failed") else state), None, None


def _job(numbers: Sequence[str]) -> JobState | None:
    """Return the job that runs or comes next of a chain, else the last; None where there is none, or no Slurm."""
    job = None
    for number in numbers:
        job = _ask(number)
        if job is None or not job.has_ended:
            break
    return job


def _ask(number: str) -> JobState | None:
    try:
        return slurm.ask(number)
    except LauncherError:  # a host without Slurm: the files have to do
        return None


def _cause(run: RunDir, job: JobState) -> tuple[str, int]:
    """Return what the first rank of a job's last start died of, else what Slurm calls its end."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in run.errors.glob("rank_*.json")]
    if found:
        first = min(found, key=lambda error: error["time"])
        return first["message"], first["exit_code"]
    ended = f"the job ended as {job.state}; see {run.path / slurm.LOG}"
    return ended, job.exit_code or TrainingError.exit_code
