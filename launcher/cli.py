"""The verbs: `meshwright VERB key=value ...`, the same as `python -m launcher VERB ...`. No torch here."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import psutil

import launcher.planner.explain as explain
from launcher import (
    __version__,
    checks,
    compose,
    env_command,
    environments,
    interpreter,
    plan_command,
    planner,
    probe,
    provenance,
    replan,
    run_dir,
    show,
    supervise,
    verify,
)
from launcher.config import Job
from launcher.data.tokens import prepare
from launcher.errors import (
    FINISHED,
    INTERRUPTED,
    CheckFailed,
    ConfigError,
    LauncherError,
    RunDirError,
)
from launcher.output import Output, open_standard_streams, print_line
from launcher.report.page import page
from launcher.run_dir import RunDir
from launcher.submit import local
from strategies.names import suggest

USAGE = """\
meshwright VERB [key=value ...] [--json]

  plan              compute a parallelism plan, explain it, and stop; report=plan.html writes it as a page,
                    --why tp=4,pp=2 says why another plan is not the choice, --sensitivity which hardware
                    would change it
  verify [RUN_DIR]  build the engine's own model for ranks of the planned world, here and without its hardware,
                    and compare it with the prediction: --rank N for one rank, --all-stages for every stage
  train             plan, freeze a run directory, and train here
  resume RUN_DIR    go on from the newest good checkpoint; plan.tp=1 and the like behind it go on under another
                    plan, where the engine's checkpoints allow it
  export RUN_DIR FOLDER
                    write the weights of the newest good checkpoint as a Hugging Face folder
  show RUN_DIR      plan, state, metrics, predicted against measured
  probe             measure this machine, and write a file to plan with: cluster=FILE.yaml
  env               an environment for each engine: env create|check|remove ENGINE, env list

Configuration: group=option picks a part (model=llama3_8b cluster=h100_sxm), key=value sets a value;
`meshwright plan --help` lists all groups and keys. Hydra's flags work after plan, verify and train:
--cfg job, --multirun, --config-dir DIR, --hydra-help. Tab completion: eval "$(meshwright -sc install=bash)".

Exit codes: 0 finished or stopped on request, 1 other, 2 configuration, 3 plan, 4 data, 5 run directory,
6 checkpoint, 7 engine, 8 cluster, 9 training, 10 memory, 11 a check failed, 129 hang-up,
130 Ctrl-C, 143 terminated."""


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
    if verb in ("--help", "-h", "help") or (
        verb in ("resume", "export", "show", "probe", "env") and rest in (["--help"], ["-h"])
    ):
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
        data, text = plan_command.tell(job, rank(job), questions)
        output.result({**data, "notes": _notes(job)}, text)
        for note in _notes(job):
            output.say(note)
    return FINISHED


def _compose(arguments: list[str], output: Output) -> list[Job]:
    if output.as_json and _only_asks(arguments):
        raise ConfigError(f"--json has no document for {' '.join(arguments)}; leave --json out")
    return compose.jobs(arguments)


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
        ranking = rank(job)
        plan, problem = ranking.choose().plan, ranking.problem
        python = environments.choose(plan.strategy, named=job.submit.python).path
        yield verify.Subject(model=problem.model, plan=plan, training=problem.training, python=python)


def _train(arguments: list[str], output: Output) -> int:
    plan_command.refuse("train", arguments)
    if _under_torchrun() and os.environ["RANK"] != "0" and not _only_asks(arguments):
        _become_worker(["--from-rank0"])
    for job in _compose(arguments, output):
        code = _train_one(job, output)
        if code != FINISHED:
            return code
    return FINISHED


def _only_asks(arguments: Sequence[str]) -> bool:
    asking = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i"}
    return any(word.split("=")[0] in asking for word in arguments)


def _train_one(job: Job, output: Output) -> int:
    run = freeze(job, output)
    if _under_torchrun():
        _take_over(run)
        _become_worker(["--share", str(run.path)])
    return _drive(run, output)


def rank(job: Job) -> planner.Ranking:
    """Plan a job: every candidate of the engines it may use."""
    problem = planner.Problem(
        model=job.model,
        cluster=job.cluster,
        training=job.training,
        request=job.plan,
        strategies=tuple(sorted(compose.strategies_of(job))),
        engine=job.strategy.engine,
        calibration=job.calibration,
    )
    return planner.achieve(job.goal, problem)


def freeze(job: Job, output: Output) -> RunDir:
    """Plan, prepare the data, and write the run directory; under a restarted torchrun find it again."""
    ranking = rank(job)
    chosen = ranking.choose()
    _check_goal(job, ranking)
    python = environments.choose(chosen.plan.strategy, named=job.submit.python, is_given=_under_torchrun())
    if not _under_torchrun():
        local.check_host(
            job.cluster, chosen.plan, start="train ...` with the same words and a shared run_dir"
        )
    path = _run_path(job, chosen.plan.strategy)
    job = replace(job, run_dir=str(path))
    if _under_torchrun() and (path / "plan.json").exists():
        return _same_run(run_dir.open_run(path), job)
    run_dir.check_free(path)
    output.say(explain.table(ranking))
    if job.report is not None:
        output.say(f"report {plan_command.write_report(job.report, page(ranking))}")
    dataset = prepare(
        job.data, model_vocab_size=job.model.vocab_size, sequence_length=job.training.sequence_length
    )
    facts = provenance.collect(command=sys.argv, directory=Path.cwd(), interpreter=python)
    run = run_dir.create(path, job=job, plan=explain.to_json(ranking), dataset=dataset, provenance=facts)
    output.say(f"run directory {run.path}")
    return run


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
    started = psutil.Process(os.getppid()).create_time() if _under_torchrun() else None
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


def _notes(job: Job) -> list[str]:
    gpu = job.cluster.gpu
    notes = environments.absences(compose.strategies_of(job))
    if job.training.precision == "fp32" and gpu.device == "cuda" and "bf16" not in gpu.peak_tflops:
        notes.append(f"training.precision=fp32: {gpu.name} has no bf16; strategy=megatron offers fp16")
    return notes


# ---- verbs on a run directory -------------------------------------------------------------------------------------


def _resume(arguments: list[str], output: Output) -> int:
    words = [word for word in arguments[1:] if not word.startswith("-")]
    for word in words:
        replan.read(word)  # before anything is opened
    run = _open_argument("resume", [word for word in arguments if word not in words])
    if words and _under_torchrun():
        raise ConfigError(
            f"'{words[0]}' cannot be planned by ranks that torchrun has started already; "
            "`meshwright resume RUN_DIR plan.KEY=VALUE` replans and starts them itself"
        )
    if words and show.describe(run)["state"] == "finished":
        raise ConfigError(f"{run.path} is finished, there is nothing to plan anew; `show` tells of it")
    if words:
        replan.replan(run, words, rank=rank, check=lambda job, plan: local.check_gpus(job.cluster, plan))
    if _under_torchrun():
        if os.environ["RANK"] == "0":
            _take_over(run)
        _become_worker([str(run.path)])
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
    code = supervise.run_workers(run, quiet_stdout=output.as_json, export=folder)
    if code == FINISHED:
        output.result({"weights": str(folder)}, f"weights {folder}")
    return code


def _show(arguments: list[str], output: Output) -> int:
    return _report(_open_argument("show", arguments), output)


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
    code = supervise.run_workers(run, quiet_stdout=output.as_json)
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


# ---- torchrun -----------------------------------------------------------------------------------------------------


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _take_over(run: RunDir) -> None:
    """Do for a start by torchrun what the supervisor does for ours; the worker we become inherits the lock."""
    run_dir.lock(run)
    run.stop_file.unlink(missing_ok=True)


def _become_worker(arguments: Sequence[str]) -> NoReturn:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "launcher.worker", *arguments])


VERBS: dict[str, Callable[[list[str], Output], int]] = {
    "plan": _plan,
    "verify": _verify,
    "train": _train,
    "resume": _resume,
    "show": _show,
    "export": _export,
    "probe": _probe,
    "env": _env,
}
