"""`meshwright train`, `resume` and `export`: what starts the workers of a run here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from launcher import freeze, replan, torchrun
from launcher.config import Job
from launcher.errors import FINISHED, ConfigError
from launcher.output import Output
from launcher.run_dir import RunDir
from launcher.submit import local
from launcher.supervise.supervisor import run_workers
from launcher.verbs import see, show, words
from launcher.verbs.drive import drive


def train(arguments: list[str], output: Output) -> int:
    """Plan each job, freeze its run directory, and train here; stop at the first that fails."""
    if torchrun.started_us() and os.environ["RANK"] != "0" and not words.only_asks(arguments):
        torchrun.become_worker(["--from-rank0"])
    for job in freeze.possible(words.jobs("train", arguments, output)):
        code = _train_one(job, output)
        if code != FINISHED:
            return code
    return FINISHED


def _train_one(job: Job, output: Output) -> int:
    run = freeze.freeze(job, output)
    if torchrun.started_us():
        torchrun.take_over(run)
        torchrun.become_worker(["--share", str(run.path)])
    return drive(run, output)


def resume(arguments: list[str], output: Output) -> int:
    """Go on from the newest good checkpoint, under another plan where words behind RUN_DIR say so."""
    changes = [word for word in arguments[1:] if not word.startswith("-")]
    for word in changes:
        replan.read(word)  # before anything is opened
    run = words.open_run("resume", [word for word in arguments if word not in changes])
    if changes:
        _replan(run, changes)
    if torchrun.started_us():
        if os.environ["RANK"] == "0":
            torchrun.take_over(run)
        torchrun.become_worker([str(run.path)])
    if show.describe(run)["state"] == "finished":
        return see.tell(run, output)
    local.check_host(run.job().cluster, run.plan(), start=f"resume {run.path}`")
    return drive(run, output)


def _replan(run: RunDir, changes: Sequence[str]) -> None:
    if torchrun.started_us():
        raise ConfigError(
            f"'{changes[0]}' cannot be planned by ranks that torchrun has started already; "
            "`meshwright resume RUN_DIR plan.KEY=VALUE` replans and starts them itself"
        )
    if show.describe(run)["state"] == "finished":
        raise ConfigError(f"{run.path} is finished, there is nothing to plan anew; `show` tells of it")
    replan.replan(run, changes, rank=freeze.rank, check=lambda job, plan: local.check_gpus(job.cluster, plan))


def export(arguments: list[str], output: Output) -> int:
    """Write the weights of the newest good checkpoint as a Hugging Face folder."""
    if len(arguments) != 2 or any(word.startswith("-") for word in arguments):
        raise ConfigError(
            "`meshwright export RUN_DIR FOLDER` takes a run directory and a folder for the weights, "
            f"not '{' '.join(arguments)}'"
        )
    run, folder = words.open_run("export", arguments[:1]), Path(arguments[1]).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder; choose another for the weights")
    local.check_host(
        run.job().cluster, run.plan(), start=f"resume {run.path}`; for an export, plan one node first"
    )
    code = run_workers(run, quiet_stdout=output.as_json, export=folder)
    if code == FINISHED:
        output.result({"weights": str(folder)}, f"weights {folder}")
    return code
