"""`meshwright compare`: one ordinary run an engine, from the same weights, on the same data; then their losses."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import strategies
from launcher import freeze, run_dir, torchrun
from launcher.config import Job, StrategyConfig
from launcher.environments import catalogue
from launcher.errors import FINISHED, CheckFailed, ConfigError, EngineError, RunDirError
from launcher.files import write_whole
from launcher.monitor.metrics import read
from launcher.output import Output, print_line
from launcher.planner.words.tables import describe, grid
from launcher.report.comparison import HEADER, WORDS, Comparison, Curve, rows, to_json, to_markdown
from launcher.report.curves import curves
from launcher.run_dir import RunDir
from launcher.supervise.supervisor import run_workers
from launcher.verbs import checks, words
from strategies.names import suggest

PICTURE, PAGE = "losses.svg", "comparison.md"


def compare(arguments: list[str], output: Output) -> int:
    """Compare the engines on each job; stop at the first that fails."""
    one = next((word for word in arguments if word.startswith(("strategy=", "strategy."))), None)
    if one is not None:
        raise ConfigError(f"{one} is meant for one engine; `meshwright compare` takes strategies=[a,b]")
    codes = (run(job, output) for job in words.jobs("compare", arguments, output))
    return next((code for code in codes if code != FINISHED), FINISHED)


def run(job: Job, output: Output) -> int:
    """Train with every engine in turn, write picture and table, and return the exit code; 11 above the limit."""
    names = _engines(job)
    folder = _folder(job)
    # All of them first: what cannot be planned is told before anything is written.
    decisions = [freeze.decide(_job_of(job, name, folder)) for name in names]
    runs = [freeze.write(decision, output, in_full=False) for decision in decisions]
    for begun in runs:
        if begun is not runs[0]:
            _begin_like(runs[0], begun)
        code = run_workers(begun, quiet_stdout=output.as_json)
        if code != FINISHED:
            return code
        checks.check(begun, quiet_stdout=output.as_json, say=output.say)
    return _report(job, runs, folder, output)


def _engines(job: Job) -> list[str]:
    """Return the engines to compare; raise ConfigError or EngineError where they cannot be."""
    names = list(job.strategies or strategies.engines())
    for name in names:
        if name not in strategies.ADAPTERS:
            raise ConfigError(f"strategies: '{name}' is unknown; {suggest(name, strategies.ADAPTERS)}")
    if len(set(names)) != len(names) or len(names) < 2:
        raise ConfigError(f"strategies=[{','.join(names)}] must name two engines or more, each once")
    if torchrun.started_us():
        raise ConfigError(
            "`meshwright compare` starts the ranks of every engine itself; call it without torchrun"
        )
    if job.submit.python is None and (absences := catalogue.absences(names)):
        raise EngineError("; ".join(absences))
    return names


def _folder(job: Job) -> Path:
    if job.run_dir is None:
        return run_dir.default_path(model=job.model.name, strategy="compare", root=Path.cwd())
    folder = Path(job.run_dir).expanduser().resolve()
    run_dir.check_free(folder)
    return folder


def _job_of(job: Job, name: str, folder: Path) -> Job:
    engine = StrategyConfig(name=name)
    return replace(job, strategy=engine, strategies=None, report=None, run_dir=str(folder / name))


def _begin_like(first: RunDir, other: RunDir) -> None:
    """Let a run begin from the weights that the first one drew: libraries of another version might draw others."""
    if not first.weights.exists():  # the job names a folder of weights, or the engine has none
        return
    if other.weights.exists():
        (other.weights / "config.json").unlink()
        other.weights.rmdir()
    other.weights.symlink_to(Path("..") / first.path.name / first.weights.name)


def _report(job: Job, runs: Sequence[RunDir], folder: Path, output: Output) -> int:
    found = Comparison(curves=tuple(map(_curve, runs)), max_deviation=job.checks.max_deviation)
    command = shlex.join(["meshwright", *sys.argv[1:]])
    title = f"{job.model.name} with {len(runs)} engines"
    page = to_markdown(found, title=title, command=command, picture=PICTURE)
    try:
        write_whole(folder / PICTURE, curves(found, title=title))
        write_whole(folder / PAGE, page)
    except OSError as error:
        raise RunDirError(f"{folder} cannot be written: {error.strerror}; make it writable") from error
    text = "\n".join([found.verdict, grid([HEADER, *rows(found)], words=WORDS), f"written to {folder}"])
    output.result({**to_json(found), "run_dir": str(folder), "picture": str(folder / PICTURE)}, text)
    try:
        found.check()
    except CheckFailed as error:
        # The figures are the answer; a fault would put its own document in their place.
        print_line(f"meshwright: {error}", sys.stderr)
        return error.exit_code
    return FINISHED


def _curve(run: RunDir) -> Curve:
    plan, python = run.plan(), run.interpreter()
    return Curve(
        strategy=plan.strategy,
        plan=describe(plan).removeprefix(f"{plan.strategy} "),
        versions=python.versions if python else {},
        losses={record["step"]: record["loss"] for record in read(run.metrics_file)},
    )
