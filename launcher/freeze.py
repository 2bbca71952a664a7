"""From a job to a run directory: plan, prepare the data, and write all of it down once."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

import launcher.planner.words.explain as explain
from launcher import compose, planner, provenance, replan, run_dir, torchrun
from launcher.cluster import nccl
from launcher.config import Job
from launcher.data.tokens import prepare
from launcher.environments import catalogue
from launcher.environments.interpreter import Interpreter
from launcher.errors import ConfigError, RunDirError
from launcher.output import Output
from launcher.planner.words.tables import describe
from launcher.report.document import write as write_page
from launcher.report.page import page
from launcher.run_dir import RunDir
from launcher.submit import local
from strategies.spec import Plan


@dataclass(frozen=True, kw_only=True)
class Decision:
    """All that is found out about a job before anything is written: its plans, its folder, the workers' Python."""

    job: Job
    ranking: planner.Ranking
    plan: Plan  # the ranking's choice
    path: Path
    python: Interpreter


def rank(job: Job) -> planner.Ranking:
    """Plan a job: every candidate of the engines it may use."""
    return planner.achieve(job.goal, replan.problem(job, compose.strategies_of(job)))


def decide(job: Job) -> Decision:
    """Plan a job, and write nothing; raise PlanError where nothing fits, ConfigError where the goal is another job."""
    ranking = rank(job)
    plan = ranking.choose().plan
    _check_goal(job, ranking)
    python = _python(job, plan.strategy)
    return Decision(job=job, ranking=ranking, plan=plan, path=_run_path(job, plan.strategy), python=python)


def possible(jobs: list[Job]) -> list[Job]:
    """Raise what any of several jobs cannot be, before the first one is written; return them."""
    if len(jobs) > 1:
        for job in jobs:
            decide(job)
    return jobs


def freeze(job: Job, output: Output, *, in_full: bool = True, runs_here: bool = True) -> RunDir:
    """Decide, and write it down; both as `write` says."""
    return write(decide(job), output, in_full=in_full, runs_here=runs_here)


def write(decision: Decision, output: Output, *, in_full: bool = True, runs_here: bool = True) -> RunDir:
    """Prepare the data, and write the run directory; under a restarted torchrun find it again.

    `in_full` tells how the plan was found, else only what it is; `runs_here` asks whether this host can run it.
    """
    ranking, plan, path = decision.ranking, decision.plan, decision.path
    job = replace(decision.job, run_dir=str(path))
    if runs_here and not torchrun.started_us():
        local.check_host(job.cluster, plan, start="train ...` with the same words and a shared run_dir")
    if torchrun.started_us() and (path / "plan.json").exists():
        return _same_run(run_dir.open_run(path), job)
    run_dir.check_free(path)
    output.say(explain.table(ranking) if in_full else f"chosen    {describe(plan)}")
    if job.report is not None:
        output.say(f"report {write_page(job.report, page(ranking))}")
    dataset = prepare(
        job.data, model_vocab_size=job.model.vocab_size, sequence_length=job.training.sequence_length
    )
    facts = provenance.collect(command=sys.argv, directory=Path.cwd(), interpreter=decision.python)
    facts["nccl"] = nccl.to_json(nccl.report(job.cluster, deterministic=job.training.deterministic))
    run = run_dir.create(path, job=job, plan=explain.to_json(ranking), dataset=dataset, provenance=facts)
    output.say(f"run directory {run.path}")
    return run


def _python(job: Job, strategy: str) -> Interpreter:
    if job.submit.inside is not None:  # nobody can ask a container that is not open
        return Interpreter(path=job.submit.inside, kind="named")
    return catalogue.choose(strategy, named=job.submit.python, is_given=torchrun.started_us())


def _check_goal(job: Job, ranking: planner.Ranking) -> None:
    """Raise where a goal was reached on another cluster or with another training section than the job's."""
    planned = ranking.problem
    if (planned.cluster, planned.training) != (job.cluster, job.training):
        raise ConfigError(
            f"goal={job.goal.name} plans other hardware or sequences than the run would have; "
            "see what `meshwright plan` answers, set that, and train with goal=fastest"
        )


def _run_path(job: Job, strategy: str) -> Path:
    if job.run_dir:
        return Path(job.run_dir).expanduser().resolve()
    # Restarted by torchrun the same start must find its folder: the agent's own start time names it.
    started = psutil.Process(os.getppid()).create_time() if torchrun.started_us() else None
    return run_dir.default_path(model=job.model.name, strategy=strategy, root=Path.cwd(), started=started)


def _same_run(run: RunDir, job: Job) -> RunDir:
    frozen = run.job()
    # What was detected (free memory, say) differs from start to start; the number of ranks must not.
    if replace(job, cluster=frozen.cluster) != frozen or job.cluster.world_size != frozen.cluster.world_size:
        raise RunDirError(
            f"run_dir={run.path} holds a run with another configuration; "
            "choose another folder, or start `meshwright resume` on it"
        )
    return run
