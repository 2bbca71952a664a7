"""`meshwright submit|status|cancel|logs`: queue a run, and ask after it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config import Job
from launcher.environments.interpreter import surroundings
from launcher.errors import FINISHED, ConfigError, TrainingError
from launcher.freeze import Decision, decide, freeze, possible
from launcher.output import Output
from launcher.run_dir import RunDir
from launcher.submit import hosts, slurm
from launcher.verbs import see, show, words
from launcher.verbs.drive import drive
from launcher.verbs.over import End
from strategies.spec import Plan

DRY_RUN, NODE_RANK, NOW, FOLLOW = "--dry-run", "--node-rank", "--now", ("-f", "--follow")
_LOOK_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The flags of the verb."""

    dry_run: bool = False
    node: int | None = None  # start the part of this host here


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A run to start: where it lies or would lie, and with what."""

    path: Path
    job: Job
    plan: Plan
    python: str


def take_flags(arguments: Sequence[str]) -> tuple[Asked, list[str]]:
    """Take --dry-run and --node-rank out of the words."""
    rest = [word for word in arguments if word != DRY_RUN]
    dry_run, node = len(rest) < len(arguments), None
    for place, word in enumerate(rest):
        flag, equals, value = word.partition("=")
        if flag != NODE_RANK:
            continue
        value = value if equals else next(iter(rest[place + 1 :]), "")
        if not value.isdecimal():
            raise ConfigError(f"{NODE_RANK} {value} is no host; count the hosts of the run from 0")
        node = int(value)
        del rest[place : place + (1 if equals else 2)]
        break
    return Asked(dry_run=dry_run, node=node), rest


def submit(arguments: list[str], output: Output) -> int:
    """Start each job where its submit=NAME says, or a frozen run again."""
    asked, rest = take_flags(arguments)
    if words.names_a_run(rest):
        return submit_run(words.open_run("submit", rest), output, asked=asked)
    jobs = possible(words.jobs("submit", rest, output))
    codes = [submit_job(job, output, asked=asked) for job in jobs]
    return next((code for code in codes if code != FINISHED), FINISHED)


def submit_job(job: Job, output: Output, *, asked: Asked) -> int:
    """Plan, freeze and start one job where submit=NAME says."""
    _check_place(job)
    if job.submit.name != "slurm":
        job = hosts.settled(job)
    if asked.dry_run:
        found = decide(job)
        subject = _Subject(path=found.path, job=job, plan=found.plan, python=found.python.path)
        return _tell(subject, output)
    return submit_run(freeze(job, output, runs_here=False), output, asked=asked)


def submit_run(run: RunDir, output: Output, *, asked: Asked) -> int:
    """Start a run that is frozen: a new one, or again one that was given up."""
    subject = _subject(run)
    job = subject.job
    _check_place(job)
    if asked.dry_run:
        return _tell(subject, output)
    if show.describe(run)["state"] == "finished":
        if asked.node is not None:  # a host that is late, or entered again
            return see.tell(run, output)
        raise ConfigError(f"{run.path} is finished, there is nothing to submit; `show` tells of it")
    if job.submit.name == "slurm":
        return _queue(run, subject, output)
    return _on_hosts(run, subject, output, node=asked.node)


def _subject(run: RunDir) -> _Subject:
    python = run.interpreter()
    return _Subject(
        path=run.path, job=run.job(), plan=run.plan(), python=python.path if python else sys.executable
    )


def _check_place(job: Job) -> None:
    if job.submit.name == "local":
        raise ConfigError(
            "submit=local starts a run here, which `meshwright train` does; "
            "name another place with submit=slurm, submit=torchrun or submit=ssh"
        )
    if job.submit.name == "slurm":
        return
    hosts.given(job)  # before anything is frozen
    hosts.check_port(job)
    for key, asked in (
        ("supervise.elastic", job.supervise.elastic),
        ("checks.resume_is_exact", job.checks.resume_is_exact),
    ):
        if asked and job.cluster.num_nodes > 1:
            raise ConfigError(
                f"{key}=true works on one host, and cluster.num_nodes={job.cluster.num_nodes}; leave it out"
            )


# ---- Slurm --------------------------------------------------------------------------------------------------------


def queue(run: RunDir, *, behind: str | None = None) -> list[str]:
    """Queue a frozen run, begun when the job `behind` has ended; return the numbers of its jobs."""
    subject = _subject(run)
    for memory in slurm.MEMORY:  # a person asks: the count of starts begins anew
        (run.path / memory).unlink(missing_ok=True)
    environment = surroundings(os.environ, subject.python)
    ids: list[str] = []
    for _ in range(subject.job.submit.chain):
        after = slurm.dependency(subject.job.submit, before=ids[-1] if ids else None, behind=behind)
        argv = _sbatch(subject, after)
        ids.append(slurm.queue(argv, environment=environment, directory=run.path))
        run.log_event("submitted", job=ids[-1], command=argv)
    return ids


def call(decision: Decision, path: Path, *, behind: str | None) -> list[str]:
    """Return what `queue` would run first for a run that would be frozen in `path`."""
    job = decision.job
    subject = _Subject(path=path, job=job, plan=decision.plan, python=decision.python.path)
    return _sbatch(subject, slurm.dependency(job.submit, before=None, behind=behind))


def _queue(run: RunDir, subject: _Subject, output: Output) -> int:
    ids = queue(run)
    output.say(f"log       {run.path / slurm.LOG}")
    told = f"submitted {' '.join(ids)}; `meshwright status {run.path}` tells how it goes"
    output.say(told)
    if subject.job.submit.wait:
        _wait(run, ids)
    output.result({"run_dir": str(run.path), "jobs": ids})  # behind a fault it would be a second document
    return FINISHED


def _sbatch(subject: _Subject, after: str | None) -> list[str]:
    return slurm.sbatch_argv(
        subject.path, job=subject.job, plan=subject.plan, python=subject.python, after=after
    )


def _wait(run: RunDir, ids: Sequence[str]) -> None:
    jobs = [slurm.ask(number) for number in ids]
    while not all(job.has_ended for job in jobs):
        time.sleep(_LOOK_S)
        jobs = [slurm.ask(number) for number in ids]
    state = show.describe(run)["state"]
    if state not in ("finished", "stopped"):
        raise TrainingError(
            f"job {ids[-1]} ended as {jobs[-1].state} and the run is {state}; see {run.path / slurm.LOG}"
        )


# ---- hosts --------------------------------------------------------------------------------------------------------


def _commands(subject: _Subject, names: Sequence[str]) -> dict[str, list[str]]:
    environment = surroundings(os.environ, subject.python)
    return {
        host: hosts.argv(
            subject.path, job=subject.job, node=node, python=subject.python, environment=environment
        )
        for node, host in enumerate(names)
    }


def _on_hosts(run: RunDir, subject: _Subject, output: Output, *, node: int | None) -> int:
    commands = _commands(subject, hosts.of_run(run))
    if node is not None and node >= len(commands):
        raise ConfigError(
            f"{NODE_RANK}={node} is none of the {len(commands)} hosts of {run.path}; count them from 0"
        )
    if subject.job.submit.name == "torchrun":
        node = hosts.node_here(list(commands)) if node is None else node
        if node is None:
            output.result({"run_dir": str(run.path), "commands": commands}, hosts.shown(commands))
            return FINISHED
        elsewhere = {host: words for place, (host, words) in enumerate(commands.items()) if place != node}
        output.say(hosts.shown(elsewhere))
    if node is not None:
        return drive(run, output, node=node)
    log = run.logs / "ssh.log"
    calls = {host: hosts.ssh_argv(subject.job.submit.ssh, host, words) for host, words in commands.items()}
    run.log_event("submitted", command=calls)
    output.say(f"log       {log}")
    patience_s = subject.job.supervise.host_wait_s
    hosts.start(calls, log=log, stop_file=run.stop_file, patience_s=patience_s)
    return see.tell(run, output)


def _tell(subject: _Subject, output: Output) -> int:
    """Print what would be started, and start nothing."""
    submit = subject.job.submit
    if submit.name == "slurm":
        calls = [_sbatch(subject, slurm.dependency(submit, before=None))]
        # Only sbatch knows the numbers that the others wait for.
        calls += [_sbatch(subject, "afterany:JOB") for _ in range(submit.chain - 1)]
        script = slurm.SCRIPT.read_text(encoding="utf-8")
        text = "\n".join(map(hosts.quoted, calls)) + f"\n\n{script}"
        output.result({"run_dir": str(subject.path), "commands": calls, "script": script}, text)
        return FINISHED
    commands = _commands(subject, hosts.named(subject.job, subject.plan))
    if submit.name == "ssh":
        commands = {host: hosts.ssh_argv(submit.ssh, host, words) for host, words in commands.items()}
    output.result({"run_dir": str(subject.path), "commands": commands}, hosts.shown(commands))
    return FINISHED


# ---- after a run --------------------------------------------------------------------------------------------------


def status(arguments: list[str], output: Output) -> int:
    """Tell where the run and its jobs stand."""
    run = words.open_run("status", arguments)
    jobs = {number: slurm.ask(number) for number in slurm.numbers(run.events())}
    facts = show.describe(run)
    lines = [
        f"job {number}  {job.state.lower()} {job.reason if not job.has_ended else ''}".rstrip()
        + (f"  on {job.hosts}" if job.hosts and not job.has_ended else "")
        + (f"  restarts {job.restarts}" if job.restarts else "")
        for number, job in jobs.items()
    ]
    lines.append(f"run    {facts['state']}, step {facts['step']} of {facts['num_steps']}")
    told: dict[str, Any] = {
        "run_dir": str(run.path),
        "state": facts["state"],
        "step": facts["step"],
        "num_steps": facts["num_steps"],
        "jobs": {number: {"state": job.state, "restarts": job.restarts} for number, job in jobs.items()},
    }
    output.result(told, "\n".join(lines))
    return FINISHED


def cancel(arguments: list[str], output: Output) -> int:
    """End the jobs of a run, and say how."""
    run = words.open_run("cancel", [word for word in arguments if word != NOW])
    told = end(run, at_once=NOW in arguments)
    output.result({"run_dir": str(run.path), "done": told}, "\n".join(told) or "no job of this run is queued")
    return FINISHED


def end(run: RunDir, *, at_once: bool) -> list[str]:
    """Ask a running job to leave with a checkpoint; take those that wait, or with `at_once` all, out of the queue.

    Return what was done, a sentence each.
    """
    told = []
    for number in slurm.numbers(run.events()):
        job = slurm.ask(number)
        if job.has_ended:
            continue
        if job.state == "RUNNING" and not at_once:
            slurm.run(["scancel", "--batch", "--signal=USR2", number])  # train.sbatch knows what is meant
            told.append(f"job {number} leaves after this step with a checkpoint")
        else:
            slurm.run(["scancel", number])
            told.append(f"job {number} is cancelled")
    if not told and not slurm.numbers(run.events()):
        run.stop_file.touch()
        told.append("the run leaves after this step with a checkpoint")
    return told


def logs(arguments: list[str], output: Output) -> int:
    """Print what the run wrote; with -f go on until its jobs have ended."""
    rest = [word for word in arguments if word not in FOLLOW]
    run, follow = words.open_run("logs", rest), len(rest) < len(arguments)
    named = [run.path / slurm.LOG, run.logs / "ssh.log", *sorted(run.logs.glob("rank_*.log"))]
    path = next((path for path in named if path.exists()), named[0])
    end = End(run)
    for text in _grown(path, until=lambda: not follow or end.has_come()):
        output.say(text)
    output.result({"run_dir": str(run.path), "log": str(path)})
    return FINISHED


def _grown(path: Path, *, until: Callable[[], bool]) -> Iterator[str]:
    """Yield what a file has, and what is appended, as whole lines; a file that is not there yet may come."""
    position, last = 0, False
    while True:
        last = until()
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                text = file.read()
            whole = text if last else text[: text.rfind(b"\n") + 1]
            position += len(whole)
            if whole:
                yield whole.decode("utf-8", errors="replace").removesuffix("\n")
        if last:
            return
        time.sleep(_LOOK_S / 4)
