"""`meshwright verify`: asks the engine itself what ranks of a planned world hold, and compares the prediction."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import strategies as adapters
from launcher import freeze
from launcher.cluster import detect
from launcher.decode import decode, encode
from launcher.environments import catalogue, interpreter
from launcher.errors import FINISHED, CheckFailed, ConfigError, EngineError, PlanError
from launcher.output import Output, print_line
from launcher.planner.cost import MemoryCost
from launcher.planner.price.stage_costs import stages_in_memory
from launcher.planner.price.stages import StageShape, stages_of
from launcher.planner.words.tables import describe, grid, percent_text
from launcher.submit import local
from launcher.verbs import words
from strategies.engine_options import check
from strategies.inspection import Inspection
from strategies.model_spec import ModelSpec
from strategies.spec import Plan, TrainingSpec

WORKER = "launcher.verbs.verify_worker"
RANK, ALL_STAGES = "--rank", "--all-stages"
TOLERANCE = 0.02  # by which the bytes of model states may differ from the prediction
_LIMIT_S = 1800.0
_MOST_PROCESSES = 4  # of half a GiB each

STATES = ("weights", "gradients", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is verified, and the Python that has its engine."""

    model: ModelSpec
    plan: Plan
    training: TrainingSpec
    python: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which ranks to verify: some by number, one of each stage, or one of each kind of stage."""

    ranks: tuple[int, ...] = ()
    all_stages: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """One part of what a rank holds, as the engine has it and as it was predicted; None: nobody knows."""

    part: str
    engine: int | None
    predicted: int

    @property
    def difference(self) -> float | None:
        """By what share the engine's figure is above the prediction."""
        if self.engine is None or not self.predicted:
            return None if self.engine != self.predicted else 0.0
        return self.engine / self.predicted - 1


@dataclass(frozen=True, kw_only=True)
class RankFound:
    """One rank: its pipeline stage, rows by part, and what stayed open."""

    rank: int
    stage: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def states(self) -> Row:
        """Weights, gradients and optimizer together."""
        return next(row for row in self.rows if row.part == "states")


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Everything that was found out about one plan."""

    plan: Plan
    ranks: tuple[RankFound, ...]

    @property
    def problem(self) -> str | None:
        """One sentence where model states are not what was predicted, or None."""
        for found in self.ranks:
            difference = found.states.difference
            if difference is None or abs(difference) > TOLERANCE:
                return (
                    f"{self.plan.strategy} holds {found.states.engine:,} bytes of model states on rank {found.rank} "
                    f"(stage {found.stage}), {_signed(difference)} of what was predicted; the engine is right: "
                    "choose a plan with room for it, and report the difference"
                )
        return None


def run(arguments: list[str], output: Output) -> int:
    """Verify the plan of a run or of each job, and tell; exit code 11 where one does not hold."""
    asked, rest = take(arguments)
    for subject in _subjects(rest, output):
        verified = verify(subject, asked)
        output.result(to_json(verified), to_text(verified))
        if verified.problem is not None:
            # The figures are the answer; a fault would put its own document in their place.
            print_line(f"meshwright: {verified.problem}", sys.stderr)
            return CheckFailed.exit_code
    return FINISHED


def _subjects(arguments: Sequence[str], output: Output) -> Iterator[Subject]:
    if words.names_a_run(arguments):
        found = words.open_run("verify", arguments)
        python = interpreter.find(found.interpreter(), record=found.env_file)
        job = found.job()
        yield Subject(model=job.model, plan=found.plan(), training=job.training, python=python)
        return
    for job in words.jobs("verify", arguments, output):
        ranking = freeze.rank(job)
        plan, problem = ranking.choose().plan, ranking.problem
        python = catalogue.choose(plan.strategy, named=job.submit.python).path
        yield Subject(model=problem.model, plan=plan, training=problem.training, python=python)


def take(arguments: Sequence[str]) -> tuple[Asked, list[str]]:
    """Take our flags out of the words; the rest is a run directory or what `plan` reads."""
    ranks: list[int] = []
    rest: list[str] = []
    following = iter(arguments)
    for word in following:
        flag, equals, value = word.partition("=")
        if flag == RANK:
            ranks.append(_rank(value if equals else next(following, "")))
        elif word != ALL_STAGES:
            rest.append(word)
    return Asked(ranks=tuple(ranks), all_stages=ALL_STAGES in arguments), rest


def verify(subject: Subject, asked: Asked | None = None) -> Verified:
    """Ask the engine about every rank wanted; raise PlanError or EngineError with what it refuses."""
    asked = asked or Asked()
    model, plan, training = subject.model, subject.plan, subject.training
    _check(plan, model)
    ranks = _ranks(model, plan, asked)
    answers = _ask(subject, list(ranks))
    stages = stages_in_memory(model, plan, training)
    found = []
    for answer in answers:
        rank = answer["rank"]
        if "error" in answer:
            _refuse(plan, answer)
        inspection = decode(Inspection, answer["inspection"])
        found.append(
            RankFound(
                rank=rank,
                stage=ranks[rank],
                rows=tuple(_rows(inspection, _predicted(*stages[ranks[rank]]))),
                notes=inspection.notes,
                seconds=answer["seconds"],
            )
        )
    return Verified(plan=plan, ranks=tuple(found))


def _check(plan: Plan, model: ModelSpec) -> None:
    """Raise for what is known before an engine is asked: a plan that it does not offer."""
    for key in ("offload_optimizer", "offload_parameters"):
        if getattr(plan, key):
            raise ConfigError(
                f"plan.{key}=true cannot be verified: without a GPU, the host's memory and the device's are one; "
                f"use plan.{key}=false"
            )
    capabilities = adapters.capabilities(plan.strategy)
    if refusal := capabilities.why_not(plan, model):
        raise PlanError(refusal)
    try:
        check(plan.engine, capabilities)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _rank(text: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"{RANK}={text} is not the number of a rank; write {RANK} 0")
    return int(text)


def _ranks(model: ModelSpec, plan: Plan, asked: Asked) -> dict[int, int]:
    """Return rank -> pipeline stage of the ranks to inspect; elsewhere than in its stage, each is the first."""
    for rank in asked.ranks:
        if rank >= plan.world_size:
            raise ConfigError(f"{RANK}={rank} is not in a world of {plan.world_size} ranks; use less")
    if asked.ranks:
        return {rank: plan.coordinate("pp", rank) for rank in asked.ranks}
    stages = range(plan.pp) if asked.all_stages else [stage.index for stage in stages_of(model, plan)]
    return {stage * plan.stride("pp"): stage for stage in stages}


# ---- the prediction -----------------------------------------------------------------------------------------------


def _predicted(stage: StageShape, cost: MemoryCost) -> dict[str, float]:
    """Return what the planner expects on one rank of a stage, by the names of our rows."""
    return {
        "parameters": stage.all_parameters,
        "weights": cost.weights,
        "gradients": cost.gradients,
        "optimizer": cost.optimizer,
        "states": cost.weights + cost.gradients + cost.optimizer,
        "working": cost.activations + cost.logits + cost.buffers,
    }


def _rows(found: Inspection, predicted: Mapping[str, float]) -> Iterator[Row]:
    engine = {
        "parameters": found.parameters,
        "weights": found.weight_bytes,
        "gradients": found.gradient_bytes,
        "optimizer": found.optimizer_bytes,
        "states": found.state_bytes,
        "working": found.working_bytes,
    }
    for part, value in engine.items():
        yield Row(part=part, engine=value, predicted=round(predicted[part]))


# ---- the engine ---------------------------------------------------------------------------------------------------


def _ask(subject: Subject, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """Deal the ranks out to a few processes: each is one rank after the other, as importing an engine takes long."""
    count = max(1, min(len(ranks), detect.count_cores(), _MOST_PROCESSES))
    started: list[subprocess.Popen[bytes]] = []
    with (
        tempfile.TemporaryDirectory(prefix="meshwright-verify-") as folder,
        ThreadPoolExecutor(count) as pool,
    ):
        hands = [
            pool.submit(_run, Path(folder) / str(i), subject, ranks[i::count], started) for i in range(count)
        ]
        try:
            answers = [answer for hand in hands for answer in hand.result()]
        except BaseException:  # Ctrl-C reaches us alone: the engines have sessions of their own
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            raise
    return sorted(answers, key=lambda answer: ranks.index(answer["rank"]))


def _run(
    place: Path, subject: Subject, ranks: Sequence[int], started: list[subprocess.Popen[bytes]]
) -> list[dict[str, Any]]:
    request, results = place.with_suffix(".request.json"), place.with_suffix(".results.json")
    inputs = {name: encode(getattr(subject, name)) for name in ("model", "plan", "training")}
    content = {**inputs, "ranks": list(ranks), "results": str(results)}
    request.write_text(json.dumps(content), encoding="utf-8")
    command = local.argv(run_dir=request, num_processes=1, port=None, module=WORKER, python=subject.python)
    _finish(command, subject, started)
    answers: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))
    return answers


def _finish(command: Sequence[str], subject: Subject, started: list[subprocess.Popen[bytes]]) -> None:
    engine = subject.plan.strategy
    environment = local.environment(
        os.environ, num_processes=1, num_cores=detect.count_cores(), python=subject.python
    )
    # Shapes are all that is looked at: a GPU that is here stays untouched.
    environment.update({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        )
        started.append(process)
        try:
            code = process.wait(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"{engine} did not answer within {_LIMIT_S:.0f} s") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        stderr.seek(0)
        said = stderr.read().decode("utf-8", errors="replace").strip()
    if os.environ.get("MESHWRIGHT_DEBUG"):
        print(said, file=sys.stderr)
    if code:
        last = said.splitlines()[-1].strip() if said else "nothing was said"
        raise EngineError(f"{engine} cannot be asked (exit code {code}): {last}")


def _refuse(plan: Plan, answer: Mapping[str, Any]) -> None:
    """Raise what the engine, or our translation for it, said about a rank."""
    if answer["ours"]:
        raise PlanError(str(answer["error"]))
    raise EngineError(f"{plan.strategy} refuses this plan on rank {answer['rank']}: {answer['error']}")


# ---- telling ------------------------------------------------------------------------------------------------------


def to_json(verified: Verified) -> dict[str, Any]:
    """Plan, rows of every rank, what stayed open, and the sentence where states differ."""
    return {
        "plan": encode(verified.plan),
        "tolerance": TOLERANCE,
        "problem": verified.problem,
        "ranks": [
            {
                "rank": found.rank,
                "stage": found.stage,
                "seconds": found.seconds,
                "parts": {
                    row.part: {
                        "engine": row.engine,
                        "predicted": row.predicted,
                        "difference": row.difference,
                    }
                    for row in found.rows
                },
                "not_verified": list(found.notes),
            }
            for found in verified.ranks
        ],
    }


def to_text(verified: Verified) -> str:
    """The same for a person: a table, and what stayed open, a line each."""
    rows = [("part", "stage", "rank", "engine", "predicted", "difference")]
    for found in verified.ranks:
        for row in found.rows:
            engine = "-" if row.engine is None else f"{row.engine:,}"
            where = (str(found.stage), str(found.rank))
            rows.append((row.part, *where, engine, f"{row.predicted:,}", _signed(row.difference)))
    notes = dict.fromkeys(note for found in verified.ranks for note in found.notes)
    lines = [
        f"plan      {describe(verified.plan)}",
        f"verified  {len(verified.ranks)} of {verified.plan.world_size} ranks, elements and bytes:",
        grid(rows),
        *(f"not verified: {note}" for note in notes),
    ]
    return "\n".join(lines)


def _signed(share: float | None) -> str:
    return "-" if share is None else f"{'+' if share >= 0 else ''}{percent_text(share)}"
