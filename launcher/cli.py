"""The verbs: `meshwright VERB key=value ...`, the same as `python -m launcher VERB ...`. No torch here."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import psutil

import launcher.planner.explain as explain
from launcher import __version__, checks, compose, planner, provenance, run_dir, show, supervise
from launcher.config import Job
from launcher.data.tokens import prepare
from launcher.errors import FINISHED, INTERRUPTED, ConfigError, EngineError, LauncherError, RunDirError
from launcher.run_dir import RunDir
from strategies.names import suggest

USAGE = """\
meshwright VERB [key=value ...] [--json]

  plan              compute a parallelism plan, explain it, and stop
  train             plan, freeze a run directory, and train here
  resume RUN_DIR    go on from the newest good checkpoint
  show RUN_DIR      plan, state, metrics, predicted against measured

Configuration: group=option picks a part (model=llama3_8b cluster=h100_sxm), key=value sets a value;
`meshwright plan --help` lists all groups and keys. Hydra's flags work after plan and train:
--cfg job, --multirun, --config-dir DIR, --hydra-help. Tab completion: eval "$(meshwright -sc install=bash)".

Exit codes: 0 finished or stopped on request, 1 other, 2 configuration, 3 plan, 4 data, 5 run directory,
6 checkpoint, 7 engine, 8 cluster, 9 training, 10 memory, 11 a check failed, 130 Ctrl-C, 143 terminated."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go: text for a person, or one JSON document and nothing else on stdout."""

    as_json: bool

    def say(self, text: str) -> None:
        """Tell a person; with --json that is stderr's business."""
        print(text, file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def result(self, data: dict[str, Any], text: str | None = None) -> None:
        """Print the result of a verb."""
        if self.as_json:
            print(json.dumps(data), flush=True)
        elif text:
            print(text, flush=True)


def main() -> NoReturn:
    """Entry point of the console command."""
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
    except BrokenPipeError:
        # The reader of our output left (`| head`); there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINISHED
    except Exception as error:
        named = LauncherError(f"internal error, please report it: {type(error).__name__}: {error}")
        return _fail(named, named.exit_code, output)


def _fail(error: LauncherError, code: int, output: Output) -> int:
    if os.environ.get("MESHWRIGHT_DEBUG"):
        traceback.print_exc()
    print(f"meshwright: {' '.join(str(error).split())}", file=sys.stderr)
    output.result({"error": {"type": type(error).__name__, "message": str(error), "exit_code": code}})
    return code


def _dispatch(words: Sequence[str], output: Output) -> int:
    verb, rest = (words[0], list(words[1:])) if words else ("--help", [])
    if verb in ("--help", "-h", "help"):
        print(USAGE)
        return FINISHED
    if verb == "--version":
        print(f"meshwright {__version__}")
        return FINISHED
    if verb in ("-sc", "--shell-completion"):
        compose.complete_shell(words, list(VERBS))
        return FINISHED
    if verb not in VERBS:
        raise ConfigError(f"'{verb}' is not a verb; {suggest(verb, VERBS)}")
    return VERBS[verb](rest, output)


# ---- verbs that compose -------------------------------------------------------------------------------------------


def _plan(arguments: list[str], output: Output) -> int:
    def plan_one(job: Job) -> None:
        ranking = rank(job)
        ranking.choose()  # raises when nothing fits
        output.result({**explain.to_json(ranking), "notes": _notes(job)}, explain.table(ranking))
        for note in _notes(job):
            output.say(note)

    compose.run_hydra(arguments, plan_one)
    return FINISHED


def _train(arguments: list[str], output: Output) -> int:
    if _under_torchrun() and os.environ["RANK"] != "0" and not _only_asks(arguments):
        _become_worker(["--from-rank0"])
    codes: list[int] = []
    compose.run_hydra(arguments, lambda job: codes.append(_train_one(job, output)))
    return max(codes, default=FINISHED)


def _only_asks(arguments: Sequence[str]) -> bool:
    return any(
        word.startswith(("--help", "--cfg", "--info", "--hydra-help", "-c", "-h")) for word in arguments
    )


def _train_one(job: Job, output: Output) -> int:
    run = freeze(job, output)
    if _under_torchrun():
        run_dir.lock(run)  # the worker we become inherits it
        _become_worker(["--share", str(run.path)])
    return _drive(run, output)


def rank(job: Job) -> planner.Ranking:
    """Plan a job: every candidate of the engines it may use."""
    names = compose.installed_strategies() if job.strategy.name == "auto" else [job.strategy.name]
    return planner.rank(
        job.model, job.cluster, job.training, job.plan, strategies=names, engine=job.strategy.engine
    )


def freeze(job: Job, output: Output) -> RunDir:
    """Plan, prepare the data, and write the run directory; under a restarted torchrun find it again."""
    ranking = rank(job)
    chosen = ranking.choose()
    package = compose.missing_package(chosen.plan.strategy)
    if package is not None:
        raise EngineError(
            f"strategy={chosen.plan.strategy} needs the package '{package}', which is not installed; "
            f"pip install 'meshwright[{chosen.plan.strategy}]'"
        )
    path = _run_path(job, chosen.plan.strategy)
    job = replace(job, run_dir=str(path))
    if _under_torchrun() and (path / "plan.json").exists():
        return _same_run(run_dir.open_run(path), job)
    run_dir.check_free(path)
    output.say(explain.table(ranking))
    dataset = prepare(
        job.data, model_vocab_size=job.model.vocab_size, sequence_length=job.training.sequence_length
    )
    facts = provenance.collect(command=sys.argv, directory=Path.cwd())
    run = run_dir.create(path, job=job, plan=explain.to_json(ranking), dataset=dataset, provenance=facts)
    output.say(f"run directory {run.path}")
    return run


def _run_path(job: Job, strategy: str) -> Path:
    if job.run_dir is not None:
        return Path(job.run_dir).expanduser().absolute()
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
    package = compose.missing_package(job.strategy.name)
    return (
        [f"{job.strategy.name}: not installed here; pip install 'meshwright[{job.strategy.name}]'"]
        if package
        else []
    )


# ---- verbs on a run directory -------------------------------------------------------------------------------------


def _resume(arguments: list[str], output: Output) -> int:
    run = _open_argument("resume", arguments)
    if _under_torchrun():
        if os.environ["RANK"] == "0":
            run_dir.lock(run)
        _become_worker([str(run.path)])
    if show.describe(run)["state"] == "finished":
        return _report(run, output)
    return _drive(run, output)


def _show(arguments: list[str], output: Output) -> int:
    return _report(_open_argument("show", arguments), output)


def _open_argument(verb: str, arguments: Sequence[str]) -> RunDir:
    if len(arguments) != 1:
        raise ConfigError(
            f"`meshwright {verb}` takes one run directory, not {len(arguments)} words; the run is frozen"
        )
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


# ---- torchrun -----------------------------------------------------------------------------------------------------


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _become_worker(arguments: Sequence[str]) -> NoReturn:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "launcher.worker", *arguments])


VERBS: dict[str, Callable[[list[str], Output], int]] = {
    "plan": _plan,
    "train": _train,
    "resume": _resume,
    "show": _show,
}
