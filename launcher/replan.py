"""Another plan for a run that has begun, checked against its newest good checkpoint: by hand or as a remedy.

`resume RUN_DIR plan.tp=1` is the former, supervise/remedy.py does the latter. The new plan is frozen in place of
the old one, which stays beside it; everything else of the run is as it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import yaml

import strategies
from launcher import run_dir
from launcher.checkpoint import LAYOUT, check_belongs
from launcher.config import Job
from launcher.decode import decode, encode
from launcher.errors import ConfigError
from launcher.planner import Problem, Ranking
from launcher.planner.search.goals import Goal
from launcher.planner.words.explain import to_json
from launcher.run_dir import RunDir
from strategies.spec import Plan

_CLUSTER_KEYS = ("cluster.num_nodes", "cluster.gpus_per_node")


def replan(
    run: RunDir,
    words: Sequence[str],
    *,
    rank: Callable[[Job], Ranking],
    check: Callable[[Job, Plan], None],
) -> None:
    """Plan `run` anew under `words` and freeze the result; `check` and all else raise before anything is changed."""
    before = run.plan()
    job = with_words(run.job(), words, plan=before)
    lock = run_dir.lock(run)
    try:
        if all(read(word)[0] == "supervise" for word in words):
            run_dir.reconfigure(run, job=job)  # what is allowed from now on; the plan stays
            return
        ranking = rank(job)
        check(job, ranking.choose().plan)
        adopt(run, job, ranking, words=words)
    finally:
        os.close(lock)


def adopt(run: RunDir, job: Job, ranking: Ranking, *, words: Sequence[str], **why: Any) -> None:
    """Freeze the choice of `ranking`, if the newest good checkpoint can be read under it; the run is locked."""
    before, chosen = run.plan(), ranking.choose().plan
    _check_checkpoint(run, job, chosen)
    run_dir.refreeze(run, job=job, plan=to_json(ranking))
    run.log_event("replanned", words=list(words), before=encode(before), after=encode(chosen), **why)


def problem(job: Job, engines: Sequence[str]) -> Problem:
    """Return what is to be planned for a job with these engines."""
    return Problem(
        model=job.model,
        cluster=job.cluster,
        training=job.training,
        request=job.plan,
        strategies=tuple(sorted(engines)),
        engine=job.strategy.engine,
        calibration=job.calibration,
    )


def with_words(job: Job, words: Sequence[str], *, plan: Plan) -> Job:
    """Return the frozen `job` with the plan's, the cluster's and the supervisor's keys in `words` set.

    What was left to the planner stays as in `plan` where the engine's checkpoints depend on it.
    """
    data: dict[str, Any] = encode(job)
    for name in LAYOUT:
        if name not in strategies.capabilities(plan.strategy).reshardable and data["plan"][name] is None:
            data["plan"][name] = encode(getattr(plan, name))
    for word in words:
        section, name, value = read(word)
        data[section][name] = value
    changed = decode(Job, data)
    # Files of one engine are not another's: the planner may not choose again. Nor is another goal meant.
    return replace(changed, strategy=replace(changed.strategy, name=plan.strategy), goal=Goal())


def read(word: str) -> tuple[str, str, Any]:
    """Return section, key and value of one word; raise ConfigError for what stays frozen."""
    key, sign, text = word.partition("=")
    section, _, name = key.partition(".")
    if not sign or not ((section in ("plan", "supervise") and name) or key in _CLUSTER_KEYS):
        raise ConfigError(
            f"'{word}' cannot be changed when a run is resumed; only plan.KEY=VALUE, supervise.KEY=VALUE, "
            f"{' and '.join(f'{key}=N' for key in _CLUSTER_KEYS)} can, the rest is frozen"
        )
    try:
        return section, name, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"'{word}' has a value that cannot be read; write key=value") from error


def _check_checkpoint(run: RunDir, job: Job, plan: Plan) -> None:
    skipped: list[str] = []
    found = run.tiers(job.checkpoint).latest_good(skipped.append)
    if found is not None:
        check_belongs(found[1], plan=plan, model=job.model, dataset_hash=run.dataset().content_hash)
