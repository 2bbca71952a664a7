"""The page as a whole: what was asked, the choice in figures and pictures, the other plans, what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from launcher import __version__
from launcher.planner.cost import GIB, parts
from launcher.planner.price.estimate import usable_bytes
from launcher.planner.price.stage_costs import memory_by_stage
from launcher.planner.problem import text_of
from launcher.planner.search.ranking import Ranking
from launcher.planner.words import by_engine, explain, sensitivity, why
from launcher.planner.words.by_engine import Contest
from launcher.planner.words.explain import cost_of
from launcher.planner.words.run_words import run_words
from launcher.planner.words.sensitivity import Shift
from launcher.planner.words.tables import (
    columns_of,
    describe,
    gib_text,
    key_of,
    percent_text,
    seconds_text,
)
from launcher.planner.words.why import Answer
from launcher.report import bars, rank_map, scatter, timeline
from launcher.report.document import document, section, tiles
from launcher.report.markup import table, tag, text
from strategies.spec import Plan

_COMPARED = 6  # plans


def page(
    ranking: Ranking,
    *,
    engines: Contest | None = None,
    absent: Mapping[str, str] | None = None,
    answers: Sequence[Answer] = (),
    shifts: Sequence[Shift] = (),
) -> str:
    """Return the page of a ranking with its further questions; raise PlanError when nothing fits.

    `absent` has the command that installs each of the engines that is not here.
    """
    best, problem = ranking.choose(), ranking.problem
    plan, cost = best.plan, cost_of(best)
    cluster = problem.cluster
    title = f"{problem.model.name} on {cluster.num_nodes} x {cluster.gpus_per_node} {cluster.gpu.name}"
    body = [
        tag("h1", text(title)),
        *(
            tag("p", text(" ".join(line.split())))
            for line in (*explain.header(ranking), *explain.searched(ranking))
        ),
        _tiles(ranking),
        section("The plan", _plan(plan)),
        section("Memory of each pipeline stage", _memory(ranking)),
        section("Seconds of one step", _time(ranking)),
        section("Schedule", tag("p", text(_schedule(plan, ranking))), timeline.timeline_chart(plan, cost)),
        section(
            "Ranks and nodes",
            tag("p", text(rank_map.cut(cluster))),
            rank_map.rank_map(plan, cluster),
        ),
        section("Plans that fit", _candidates(ranking)),
        _engines(engines, absent or {}),
        section("The whole run", *(tag("p", text(f"{w[0].upper()}{w[1:]}.")) for w in run_words(ranking))),
        _answers(ranking, answers),
        _shifts(ranking, shifts),
        _rejected(ranking),
        section("What the estimate leaves out", *(tag("p", text(words)) for words in _left_out(plan))),
        tag("footer", text(f"Meshwright {__version__}. Everything here is a prediction.")),
    ]
    return document(f"Plan: {title}", *body)


def _tiles(ranking: Ranking) -> str:
    cost, usable = cost_of(ranking.choose()), usable_bytes(ranking.problem.cluster)
    free = usable - cost.memory.total
    return tiles(
        [
            ("step", seconds_text(cost.step_s), "s"),
            ("speed", f"{cost.tokens_per_s_per_gpu:.0f}", "tokens/s/GPU"),
            ("model FLOPs utilisation", percent_text(cost.mfu), ""),
            ("memory of the fullest GPU", gib_text(cost.memory.total), f"of {gib_text(usable)} GiB"),
            ("headroom", gib_text(free), f"GiB, {percent_text(free / usable)}"),
        ]
    )


def _plan(plan: Plan) -> str:
    rows = [
        (key_of(field.name), text_of(getattr(plan, field.name)))
        for field in fields(Plan)
        if getattr(plan, field.name) not in ((), {}, None)
    ]
    whole = table(("key", "value"), rows, caption="Every key of the plan", words=(0, 1))
    words = tag("p", tag("strong", text(describe(plan))))
    return words + tag("details", tag("summary", "All keys"), whole)


def _memory(ranking: Ranking) -> str:
    cluster = ranking.problem.cluster
    stages = memory_by_stage(ranking.problem, ranking.choose().plan)
    words = f"{explain.headroom(ranking).removeprefix('headroom').strip()}."
    chart = bars.memory_bars(
        stages, usable_bytes=usable_bytes(cluster), gpu_bytes=cluster.gpu.memory_gib * GIB
    )
    figures = tag("details", tag("summary", "As a table"), bars.memory_table(stages))
    return tag("p", text(words)) + chart + figures


def _time(ranking: Ranking) -> str:
    steps = [
        ("chosen" if number == 1 else f"plan {number}", parts(cost_of(candidate).time))
        for number, candidate in enumerate(ranking.candidates[:_COMPARED], start=1)
    ]
    words = "Communication counts only where nothing hides it. Numbers are those of the table of plans below."
    figures = tag("details", tag("summary", "As a table"), bars.time_table(steps))
    return tag("p", text(words)) + bars.time_bars(steps) + figures


def _schedule(plan: Plan, ranking: Ranking) -> str:
    cost = cost_of(ranking.choose())
    drawn = timeline.cut(plan, timeline.timeline_of(plan, cost))
    bubble = f"The bubble takes {seconds_text(cost.time.bubble)} s of the step." if plan.pp > 1 else ""
    return f"{drawn} Every stage is drawn as slow as the slowest one. {bubble}".strip()


def _candidates(ranking: Ranking) -> str:
    model, shown = ranking.problem.model, ranking.candidates[:_COMPARED]
    columns = columns_of([candidate.plan for candidate in shown], model)
    header = ("", *(column.title for column in columns), "GiB", "s/step", "tokens/s/GPU", "MFU")
    rows = []
    for number, candidate in enumerate(shown, start=1):
        cost = cost_of(candidate)
        figures = (gib_text(cost.memory.total), seconds_text(cost.step_s))
        speed = (f"{cost.tokens_per_s_per_gpu:.0f}", percent_text(cost.mfu))
        rows.append(
            (str(number), *(column.text(candidate.plan, model) for column in columns), *figures, *speed)
        )
    words = [index for index, column in enumerate(columns, start=1) if column.words]
    caption = f"The best {len(shown)} of {len(ranking.candidates)} plans that fit; 1 is chosen"
    chart = scatter.scatter(ranking.candidates, usable_bytes=usable_bytes(ranking.problem.cluster))
    told = "".join(tag("p", text(f"{words}.")) for words in explain.tie(ranking))
    return chart + table(header, rows, caption=caption, words=words) + told


def _engines(engines: Contest | None, absent: Mapping[str, str]) -> str:
    if engines is None:
        return ""
    rows = by_engine.cells(engines, absent=absent)
    caption = f"The best plan of every engine: {engines.verdict}"
    figures = table(by_engine.HEADER, rows, caption=caption, words=by_engine.WORDS)
    told = (tag("p", text(f"{words}.")) for words in by_engine.sentences(engines))
    return section("Engines side by side", figures, *told)


def _answers(ranking: Ranking, answers: Sequence[Answer]) -> str:
    if not answers:
        return ""
    return section("Why not another plan", *(tag("pre", text(why.to_text(a, ranking))) for a in answers))


def _shifts(ranking: Ranking, shifts: Sequence[Shift]) -> str:
    if not shifts:
        return ""
    verdict = sensitivity.verdict(ranking, shifts)
    rows = [sensitivity.cells(ranking, shift) for shift in shifts]
    figures = table(sensitivity.HEADER, rows, caption="The answer on changed hardware", words=(0, 5))
    return section("Sensitivity", tag("p", text(f"{verdict[0].upper()}{verdict[1:]}.")), figures)


def _rejected(ranking: Ranking) -> str:
    if not ranking.rejected:
        return ""
    rows = [(str(rejection.count), rejection.reason) for rejection in ranking.rejected]
    return section("Rejected", table(("plans", "reason"), rows, caption="Classes of plans", words=(1,)))


def _left_out(plan: Plan) -> list[str]:
    return [explain.left_out(), *(f"{words}." for words in explain.unpriced(plan))]
