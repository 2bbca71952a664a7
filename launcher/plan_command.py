"""What `meshwright plan` tells beside the plan itself: --why tp=4,pp=2, --sensitivity, report=plan.html."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import strategies
from launcher import environments
from launcher.config import Job
from launcher.errors import ConfigError
from launcher.planner import Ranking, by_engine, explain, sensitivity, why
from launcher.report.document import write
from launcher.report.page import page

WHY, SENSITIVITY = "--why", "--sensitivity"
FLAGS = (WHY, SENSITIVITY)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What was asked beside the plan."""

    why: tuple[Mapping[str, Any], ...] = ()
    sensitivity: bool = False


def take(arguments: Sequence[str]) -> tuple[Questions, list[str]]:
    """Take our flags out of the words, which leaves what Hydra reads; raise ConfigError for a flag without a value."""
    asked: list[str] = []
    rest: list[str] = []
    wants_sensitivity = False
    words = iter(arguments)
    for word in words:
        if word == WHY:
            asked.append(_following(words))
        elif word.startswith(f"{WHY}="):
            asked.append(word.removeprefix(f"{WHY}="))
        elif word == SENSITIVITY:
            wants_sensitivity = True
        else:
            rest.append(word)
    return Questions(why=tuple(map(why.parse, asked)), sensitivity=wants_sensitivity), rest


def refuse(verb: str, arguments: Sequence[str]) -> None:
    """Raise ConfigError where a verb that only runs is asked to explain."""
    for word in arguments:
        if word.split("=")[0] in FLAGS:
            flag = word.split("=")[0]
            raise ConfigError(f"{flag} is a flag of `meshwright plan`; leave it out of `meshwright {verb}`")


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
        path = write_report(job.report, html)
        data["report"] = str(path)
        texts.append(f"report    {path}")
    return data, "\n\n".join(texts)


def write_report(report: str, html: str) -> Path:
    """Write the page where the key `report` says, and return the place."""
    path = Path(report).expanduser().absolute()
    write(path, html)
    return path


def _absent() -> dict[str, str]:
    """Return the command that installs each engine that is not here."""
    return {
        name: environments.installation(name)
        for name in strategies.engines()
        if not environments.is_here(name)
    }


def _following(words: Iterator[str]) -> str:
    word = next(words, None)
    if word is None:
        raise ConfigError(f"{WHY} names no plan; write {WHY} tp=4,pp=2")
    return word
