"""The drawn schedule: whole where it is short, cut with words where it is long, and as long as it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.planner.search.ranking import Ranking
from launcher.planner.words.explain import cost_of
from launcher.report.timeline import cut, passes_s, timeline_chart, timeline_of
from strategies.spec import Plan

PIPELINE = Plan(strategy="fake", dp=1, pp=4, num_microbatches=8)


def test_the_passes_of_all_micro_batches_are_the_working_time(mixture: Ranking) -> None:
    plan, cost = mixture.candidates[0].plan, cost_of(mixture.candidates[0])
    forward_s, backward_s = passes_s(plan, cost)
    working = cost.time.compute + cost.time.recompute + cost.time.tp + cost.time.cp + cost.time.ep
    assert (forward_s + backward_s) * plan.num_microbatches * plan.vp == pytest.approx(working)
    assert backward_s > 2 * forward_s


def test_a_short_schedule_is_drawn_whole(dense: Ranking) -> None:
    cost = cost_of(dense.candidates[0])
    timeline = timeline_of(PIPELINE, cost)
    assert (timeline.num_microbatches, timeline.stages) == (8, (0, 1, 2, 3))
    assert cut(PIPELINE, timeline) == "Drawn whole."
    working = cost.time.compute
    assert timeline.end_s == pytest.approx(working * (1 + 3 / 8))


def test_a_long_schedule_says_what_is_cut(dense: Ranking) -> None:
    plan = replace(PIPELINE, pp=64, num_microbatches=512)
    timeline = timeline_of(plan, cost_of(dense.candidates[0]))
    assert cut(plan, timeline) == (
        "Drawn are 128 of 512 micro-batches and 16 of 64 stages; the middle of the real step repeats."
    )
    html = timeline_chart(plan, cost_of(dense.candidates[0]))
    assert len(html) < 200_000


def test_interleaved_schedules_keep_whole_rounds(dense: Ranking) -> None:
    plan = replace(PIPELINE, pp=3, vp=2, num_microbatches=30)
    assert timeline_of(plan, cost_of(dense.candidates[0])).num_microbatches == 6
    html = timeline_chart(plan, cost_of(dense.candidates[0]))
    assert "interleaved 1F1B of 2 chunks a stage" in html
    assert "forward-later" in html


def test_the_table_tells_each_stage(dense: Ranking) -> None:
    html = timeline_chart(PIPELINE, cost_of(dense.candidates[0]))
    kept = [row.split("</td>")[-2].rpartition(">")[2] for row in html.split("<tr>")[2:]]
    assert kept == ["4", "3", "2", "1"], "earlier stages keep more micro-batches"
    assert html.count("stage 3") == 1


def test_one_stage_has_no_pipeline(dense: Ranking) -> None:
    plan = dense.candidates[0].plan
    html = timeline_chart(plan, cost_of(dense.candidates[0]))
    assert "nothing waits" in html
    assert "0.0%" in html
