"""The verbs: `meshwright VERB key=value ...`, the same as `python -m launcher VERB ...`. No torch here."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from launcher import (
    __version__,
    checks,
    compare,
    compose,
    env_command,
    environments,
    freeze,
    interpreter,
    plan_command,
    probe,
    replan,
    run_dir,
    see_command,
    show,
    submit_command,
    torchrun,
    verify,
)
from launcher.cluster import nccl, placement
from launcher.config import Job
from launcher.errors import (
    FINISHED,
    INTERRUPTED,
    CheckFailed,
    ConfigError,
    LauncherError,
)
from launcher.output import Output, open_standard_streams, print_line
from launcher.run_dir import RunDir
from launcher.submit import local
from launcher.supervise.supervisor import run_workers
from strategies.names import suggest

USAGE = """\
meshwright VERB [key=value ...] [--json]

  plan              compute a parallelism plan, explain it, and stop; report=plan.html writes it as a page,
                    --why tp=4,pp=2 says why another plan is not the choice, --sensitivity which hardware
                    would change it
  verify [RUN_DIR]  build the engine's own model for ranks of the planned world, here and without its hardware,
                    and compare it with the prediction: --rank N for one rank, --all-stages for every stage
  train             plan, freeze a run directory, and train here
  compare           train the same model on the same data with several engines, strategies=[a,b] or all of them,
                    and hold their losses against each other: a table and a picture
  resume RUN_DIR    go on from the newest good checkpoint; plan.tp=1 and the like behind it go on under another
                    plan, where the engine's checkpoints allow it
  submit [RUN_DIR]  plan, freeze and queue with submit=slurm, print with submit=torchrun, start on hosts with
                    submit=ssh; --dry-run only tells. A RUN_DIR is queued again
  status RUN_DIR    where its jobs and its steps stand
  cancel RUN_DIR    leave with a checkpoint; --now without
  logs RUN_DIR      what it wrote; -f goes on
  export RUN_DIR FOLDER
                    write the weights of the newest good checkpoint as a Hugging Face folder
  show RUN_DIR      plan, state, metrics, predicted against measured
  report RUN_DIR ...
                    write one page of it, or of several runs beside each other: out=compare.html
  watch RUN_DIR     the run on this terminal as it goes; --once for one look
  probe             measure this machine, and write a file to plan with: cluster=FILE.yaml
  env               an environment for each engine: env create|check|remove ENGINE, env list

Configuration: group=option picks a part (model=llama3_8b cluster=h100_sxm), key=value sets a value;
`meshwright plan --help` lists all groups and keys. Hydra's flags work after plan, verify, train, compare, submit:
--cfg job, --multirun, --config-dir DIR, --hydra-help. Tab completion: eval "$(meshwright -sc install=bash)".

Exit codes: 0 finished or stopped on request, 1 other, 2 configuration, 3 plan, 4 data, 5 run directory,
6 checkpoint, 7 engine, 8 cluster, 9 training, 10 memory, 11 a check failed, 12 a lost rank, 13 a hang,
14 a bad loss, 129 hang-up, 130 Ctrl-C, 143 terminated."""


def main() -> NoReturn:
    """Entry point of the console command."""
    open_standard_streams()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one verb; every fault becomes one sentence on stderr and a documented exit code."""
    output = Output(as_json="--json" in arguments)
    words = [word for word in arguments if word != "--json"]
    try:
        return _dispatch(words, output)
    except LauncherError as error:
        return _fail(error, error.exit_code, output)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        named = LauncherError(f"internal error, please report it: {type(error).__name__}: {error}")
        return _fail(named, named.exit_code, output)


def _fail(error: LauncherError, code: int, output: Output) -> int:
    if os.environ.get("MESHWRIGHT_DEBUG"):
        traceback.print_exc()
    with contextlib.suppress(LauncherError):  # where nothing can be written, the exit code still speaks
        print_line(f"meshwright: {' '.join(str(error).split())}", sys.stderr)
        output.result({"error": {"type": type(error).__name__, "message": str(error), "exit_code": code}})
    return code


def _dispatch(words: Sequence[str], output: Output) -> int:
    verb, rest = (words[0], list(words[1:])) if words else ("--help", [])
    if verb in ("--help", "-h", "help") or (verb in _OWN_HELP and rest in (["--help"], ["-h"])):
        print_line(USAGE, sys.stdout)
        return FINISHED
    if verb == "--version":
        print_line(f"meshwright {__version__}", sys.stdout)
        return FINISHED
    if verb in ("-sc", "--shell-completion"):
        compose.complete_shell(words, list(VERBS))
        return FINISHED
    if verb not in VERBS:
        raise ConfigError(f"'{verb}' is not a verb; {suggest(verb, VERBS)}")
    return VERBS[verb](rest, output)


# ---- verbs that compose -------------------------------------------------------------------------------------------


def _plan(arguments: list[str], output: Output) -> int:
    questions, words = plan_command.take(arguments)
    jobs = _compose(words, output)
    plan_command.check_reports(jobs)
    for job in jobs:
        data, text = plan_command.tell(job, freeze.rank(job), questions)
        output.result({**data, "notes": _notes(job)}, text)
        for note in _notes(job):
            output.say(note)
    return FINISHED


def _check_asks(arguments: list[str], output: Output) -> None:
    if output.as_json and _only_asks(arguments):
        raise ConfigError(f"--json has no document for {' '.join(arguments)}; leave --json out")


def _compose(arguments: list[str], output: Output) -> list[Job]:
    _check_asks(arguments, output)
    jobs = compose.jobs(arguments)
    several = next((job.strategies for job in jobs if job.strategies is not None), None)
    if several is not None:
        raise ConfigError(
            f"strategies=[{','.join(several)}] is a key of `meshwright compare`; name one engine with strategy=NAME"
        )
    for job in jobs:
        _check_nccl(job)
    return jobs


def _check_nccl(job: Job) -> None:
    told = nccl.report(job.cluster, deterministic=job.training.deterministic)
    for sentence in nccl.warnings(told):
        print_line(f"meshwright: {sentence}", sys.stderr)


def _verify(arguments: list[str], output: Output) -> int:
    asked, words = verify.take(arguments)
    for subject in _plans_to_verify(words, output):
        verified = verify.verify(subject, asked)
        output.result(verify.to_json(verified), verify.to_text(verified))
        if verified.problem is not None:
            # The figures are the answer; a fault would put its own document in their place.
            print_line(f"meshwright: {verified.problem}", sys.stderr)
            return CheckFailed.exit_code
    return FINISHED


def _plans_to_verify(words: list[str], output: Output) -> Iterator[verify.Subject]:
    if verify.names_a_run(words):
        run = _open_argument("verify", words)
        job = run.job()
        python = interpreter.find(run.interpreter(), record=run.env_file)
        yield verify.Subject(model=job.model, plan=run.plan(), training=job.training, python=python)
        return
    plan_command.refuse("verify", words)
    for job in _compose(words, output):
        ranking = freeze.rank(job)
        plan, problem = ranking.choose().plan, ranking.problem
        python = environments.choose(plan.strategy, named=job.submit.python).path
        yield verify.Subject(model=problem.model, plan=plan, training=problem.training, python=python)


def _train(arguments: list[str], output: Output) -> int:
    plan_command.refuse("train", arguments)
    if torchrun.started_us() and os.environ["RANK"] != "0" and not _only_asks(arguments):
        torchrun.become_worker(["--from-rank0"])
    for job in _compose(arguments, output):
        code = _train_one(job, output)
        if code != FINISHED:
            return code
    return FINISHED


def _only_asks(arguments: Sequence[str]) -> bool:
    asking = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i"}
    return any(word.split("=")[0] in asking for word in arguments)


def _train_one(job: Job, output: Output) -> int:
    run = freeze.freeze(job, output)
    if torchrun.started_us():
        torchrun.take_over(run)
        torchrun.become_worker(["--share", str(run.path)])
    return _drive(run, output)


def _notes(job: Job) -> list[str]:
    gpu = job.cluster.gpu
    notes = environments.absences(compose.strategies_of(job))
    if job.training.precision == "fp32" and gpu.device == "cuda" and "bf16" not in gpu.peak_tflops:
        notes.append(f"training.precision=fp32: {gpu.name} has no bf16; strategy=megatron offers fp16")
    return notes


def _compare(arguments: list[str], output: Output) -> int:
    plan_command.refuse("compare", arguments)
    compare.refuse(arguments)
    _check_asks(arguments, output)
    jobs = compose.jobs(arguments)
    for job in jobs:
        _check_nccl(job)
    return next((code for job in jobs if (code := compare.run(job, output)) != FINISHED), FINISHED)


def _submit(arguments: list[str], output: Output) -> int:
    plan_command.refuse("submit", arguments)
    dry_run, words = submit_command.take(arguments)
    if verify.names_a_run(words):
        return submit_command.submit_run(_open_argument("submit", words), output, dry_run=dry_run)
    for job in _compose(words, output):
        submit_command.submit(job, output, dry_run=dry_run)
    return FINISHED


# ---- verbs on a run directory -------------------------------------------------------------------------------------


def _resume(arguments: list[str], output: Output) -> int:
    words = [word for word in arguments[1:] if not word.startswith("-")]
    for word in words:
        replan.read(word)  # before anything is opened
    run = _open_argument("resume", [word for word in arguments if word not in words])
    if words and torchrun.started_us():
        raise ConfigError(
            f"'{words[0]}' cannot be planned by ranks that torchrun has started already; "
            "`meshwright resume RUN_DIR plan.KEY=VALUE` replans and starts them itself"
        )
    if words and show.describe(run)["state"] == "finished":
        raise ConfigError(f"{run.path} is finished, there is nothing to plan anew; `show` tells of it")
    if words:
        replan.replan(
            run, words, rank=freeze.rank, check=lambda job, plan: local.check_gpus(job.cluster, plan)
        )
    if torchrun.started_us():
        if os.environ["RANK"] == "0":
            torchrun.take_over(run)
        torchrun.become_worker([str(run.path)])
    if show.describe(run)["state"] == "finished":
        return _report(run, output)
    local.check_host(run.job().cluster, run.plan(), start=f"resume {run.path}`")
    return _drive(run, output)


def _export(arguments: list[str], output: Output) -> int:
    if len(arguments) != 2 or any(word.startswith("-") for word in arguments):
        raise ConfigError(
            "`meshwright export RUN_DIR FOLDER` takes a run directory and a folder for the weights, "
            f"not '{' '.join(arguments)}'"
        )
    run, folder = _open_argument("export", arguments[:1]), Path(arguments[1]).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder; choose another for the weights")
    local.check_host(
        run.job().cluster, run.plan(), start=f"resume {run.path}`; for an export, plan one node first"
    )
    code = run_workers(run, quiet_stdout=output.as_json, export=folder)
    if code == FINISHED:
        output.result({"weights": str(folder)}, f"weights {folder}")
    return code


def _show(arguments: list[str], output: Output) -> int:
    return _report(_open_argument("show", arguments), output)


def _status(arguments: list[str], output: Output) -> int:
    return submit_command.status(_open_argument("status", arguments), output)


def _cancel(arguments: list[str], output: Output) -> int:
    at_once, words = "--now" in arguments, [word for word in arguments if word != "--now"]
    return submit_command.cancel(_open_argument("cancel", words), output, at_once=at_once)


def _logs(arguments: list[str], output: Output) -> int:
    words = [word for word in arguments if word not in ("-f", "--follow")]
    run = _open_argument("logs", words)
    return submit_command.logs(run, output, follow=len(words) < len(arguments))


def _open_argument(verb: str, arguments: Sequence[str]) -> RunDir:
    flags = [word for word in arguments if word.startswith("-")]
    if flags:
        raise ConfigError(
            f"'{flags[0]}' is not a flag of `meshwright {verb} RUN_DIR`; --json is the only one"
        )
    if len(arguments) != 1:
        raise ConfigError(f"`meshwright {verb}` takes one run directory, not {len(arguments)} words")
    return run_dir.open_run(Path(arguments[0]).expanduser())


def _drive(run: RunDir, output: Output) -> int:
    cluster = run.job().cluster
    if cluster.gpu.device == "cuda" and cluster.gpus_per_node > 1:
        placement.place(os.environ)  # the workers inherit it
    code = run_workers(run, quiet_stdout=output.as_json)
    if code == FINISHED and show.describe(run)["state"] == "finished":
        checks.check(run, quiet_stdout=output.as_json, say=output.say)
    _report(run, output)
    return code


def _report(run: RunDir, output: Output) -> int:
    facts = show.describe(run)
    output.result(facts, show.to_text(facts))
    return FINISHED


def _env(arguments: list[str], output: Output) -> int:
    output.result(*env_command.run(arguments, say=output.say))
    return FINISHED


def _probe(arguments: list[str], output: Output) -> int:
    probed = probe.run(arguments)
    if probed is not None:
        output.result(probe.to_json(probed), probe.to_text(probed))
    return FINISHED


_OWN_HELP = ("resume", "export", "show", "report", "watch", "status", "cancel", "logs", "probe", "env")
VERBS: dict[str, Callable[[list[str], Output], int]] = {
    "plan": _plan,
    "verify": _verify,
    "train": _train,
    "submit": _submit,
    "status": _status,
    "cancel": _cancel,
    "logs": _logs,
    "compare": _compare,
    "resume": _resume,
    "show": _show,
    "report": see_command.report,
    "watch": see_command.watch,
    "export": _export,
    "probe": _probe,
    "env": _env,
}
