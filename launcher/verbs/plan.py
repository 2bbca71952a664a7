"""`meshwright plan`: the plan, and what was asked beside it: --why tp=4,pp=2, --sensitivity, report=plan.html."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import strategies
from launcher import compose, freeze
from launcher.config import Job
from launcher.environments import catalogue
from launcher.errors import FINISHED, ConfigError
from launcher.output import Output
from launcher.planner import Ranking
from launcher.planner.words import by_engine, explain, sensitivity, why
from launcher.report.document import write
from launcher.report.page import page
from launcher.verbs import words
from launcher.verbs.words import SENSITIVITY, WHY


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What was asked beside the plan."""

    why: tuple[Mapping[str, Any], ...] = ()
    sensitivity: bool = False


def plan(arguments: list[str], output: Output) -> int:
    """Compute the plan of each job, explain it, and stop."""
    questions, rest = take(arguments)
    jobs = words.jobs("plan", rest, output)
    check_reports(jobs)
    for job in jobs:
        data, text = tell(job, freeze.rank(job), questions)
        notes = _notes(job)
        output.result({**data, "notes": notes}, text)
        for note in notes:
            output.say(note)
    return FINISHED


def take(arguments: Sequence[str]) -> tuple[Questions, list[str]]:
    """Take our flags out of the words, which leaves what Hydra reads; raise ConfigError for a flag without a value."""
    asked: list[str] = []
    rest: list[str] = []
    wants_sensitivity = False
    following = iter(arguments)
    for word in following:
        if word == WHY:
            asked.append(_following(following))
        elif word.startswith(f"{WHY}="):
            asked.append(word.removeprefix(f"{WHY}="))
        elif word == SENSITIVITY:
            wants_sensitivity = True
        else:
            rest.append(word)
    return Questions(why=tuple(map(why.parse, asked)), sensitivity=wants_sensitivity), rest


def check_reports(jobs: Sequence[Job]) -> None:
    """Raise ConfigError where one job of a sweep would overwrite the page of another one."""
    named = [job.report for job in jobs if job.report is not None]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"report={twice} would be written by {named.count(twice)} jobs; name them apart, "
            "as in report='plan-${model.name}.html'"
        )


def tell(job: Job, ranking: Ranking, questions: Questions) -> tuple[dict[str, Any], str]:
    """Return plan and answers as data and as text, and write the page; raise PlanError when nothing fits."""
    if job.goal.name == "largest_micro_batch" and (questions.why or questions.sensitivity):
        raise ConfigError(
            f"{WHY} and {SENSITIVITY} compare the fastest plans; leave goal={job.goal.name} out"
        )
    ranking.choose()
    data, texts = explain.to_json(ranking), [explain.table(ranking)]
    # The largest micro-batch is a wish that says nothing about time: no engine wins.
    engines = None if job.goal.name == "largest_micro_batch" else by_engine.contest(ranking)
    absent = _absent()
    if engines is not None:
        data["engines"] = by_engine.to_json(engines, absent=absent)
        texts.append(by_engine.to_text(engines, absent=absent))
    answers = [why.answer(ranking, pins) for pins in questions.why]
    shifts = sensitivity.sensitivity(ranking) if questions.sensitivity else ()
    if answers:
        data["why"] = [why.to_json(answer, ranking) for answer in answers]
        texts += [why.to_text(answer, ranking) for answer in answers]
    if shifts:
        data["sensitivity"] = sensitivity.to_json(ranking, shifts)
        texts.append(sensitivity.to_text(ranking, shifts))
    if job.report is not None:
        html = page(ranking, engines=engines, absent=absent, answers=answers, shifts=shifts)
        path = write(job.report, html)
        data["report"] = str(path)
        texts.append(f"report    {path}")
    return data, "\n\n".join(texts)


def _notes(job: Job) -> list[str]:
    gpu = job.cluster.gpu
    notes = catalogue.absences(compose.strategies_of(job))
    if job.training.precision == "fp32" and gpu.device == "cuda" and "bf16" not in gpu.peak_tflops:
        notes.append(f"training.precision=fp32: {gpu.name} has no bf16; strategy=megatron offers fp16")
    return notes


def _absent() -> dict[str, str]:
    """Return the command that installs each engine that is not here."""
    return {
        name: catalogue.installation(name) for name in strategies.engines() if not catalogue.is_here(name)
    }


def _following(rest: Iterator[str]) -> str:
    word = next(rest, None)
    if word is None:
        raise ConfigError(f"{WHY} names no plan; write {WHY} tp=4,pp=2")
    return word
