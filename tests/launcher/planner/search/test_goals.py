"""Goals other than the fastest plan, on spaces small enough to try everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.decode import decode
from launcher.errors import ConfigError, PlanError
from launcher.planner.problem import PlanRequest, Problem
from launcher.planner.search.budget import budget
from launcher.planner.search.goals import Goal, achieve
from launcher.planner.search.order import step_s
from launcher.planner.search.ranking import Ranking, solve
from strategies.model_spec import ModelSpec
from strategies.spec import TrainingSpec

MODEL = ModelSpec(
    name="m",
    model_type="llama",
    num_layers=24,
    hidden_size=2048,
    num_attention_heads=16,
    ffn_hidden_size=5632,
    vocab_size=32000,
    max_position_embeddings=65536,
)
CLUSTER = ClusterSpec(
    name="c",
    num_nodes=8,
    gpus_per_node=8,
    gpu=GpuSpec(name="G", memory_gib=40.0, memory_gb_per_s=2000.0, peak_tflops={"bf16": 300.0}),
    links=(Link(size=8, gb_per_s=300.0, latency_us=10.0), Link(size=None, gb_per_s=25.0, latency_us=15.0)),
    host_memory_gib=1000.0,
)
PROBLEM = Problem(
    model=MODEL,
    cluster=CLUSTER,
    training=TrainingSpec(sequence_length=2048, global_batch_size=192, num_steps=1000),
    request=PlanRequest(tp=1, pp=1, cp=1),
    strategies=("deepspeed",),
)


def on(gpus: int) -> Problem:
    nodes, per_node = (gpus // 8, 8) if gpus >= 8 else (1, gpus)
    return replace(PROBLEM, cluster=replace(CLUSTER, num_nodes=nodes, gpus_per_node=per_node))


def seconds(ranking: Ranking) -> float:
    return step_s(ranking.choose())


def test_the_fastest_plan_is_that_of_the_search() -> None:
    assert achieve(Goal(), PROBLEM) == solve(PROBLEM)


def test_the_fewest_gpus_that_keep_a_step_time() -> None:
    limit = seconds(solve(on(16))) * 1.001
    found = achieve(Goal(name="fewest_gpus", max_step_s=limit), PROBLEM)
    assert found.problem.cluster.world_size == 16
    assert seconds(found) <= limit
    for gpus in (1, 2, 4, 8):
        assert seconds(solve(on(gpus))) > limit


def test_the_fewest_gpus_for_tokens_and_for_days() -> None:
    tokens = PROBLEM.training.tokens_per_step
    step = seconds(solve(on(24)))
    by_tokens = achieve(Goal(name="fewest_gpus", min_tokens_per_s=0.999 * tokens / step), PROBLEM)
    by_days = achieve(Goal(name="fewest_gpus", max_days=1.001 * 1000 * step / 86400), PROBLEM)
    assert by_tokens.problem.cluster.world_size == by_days.problem.cluster.world_size == 24


def test_days_count_failures() -> None:
    """Half a failure an hour more than doubles what 24 GPUs need."""
    failing = replace(CLUSTER, mttf_hours_per_gpu=24 * 0.1, storage_gb_per_s=0.1)
    problem = replace(PROBLEM, cluster=failing)
    days = 1.001 * 1000 * seconds(solve(on(24))) / 86400
    with pytest.raises(PlanError, match=r"reaches goal\.max_days"):
        achieve(Goal(name="fewest_gpus", max_days=days), problem)


def test_a_limit_out_of_reach_names_the_fastest() -> None:
    with pytest.raises(PlanError, match=r"even at its peak: the best plan takes .* s a step; use more GPUs"):
        achieve(Goal(name="fewest_gpus", max_step_s=1e-6), PROBLEM)
    almost = seconds(solve(PROBLEM)) * 0.9
    with pytest.raises(
        PlanError, match=r"no plan of m on up to 64 x G reaches goal\.max_step_s=.* on 64 GPUs"
    ):
        achieve(Goal(name="fewest_gpus", max_step_s=almost), PROBLEM)


def test_the_cheapest_part_of_the_cluster_takes_the_fewest_gpu_hours() -> None:
    found = achieve(Goal(name="cheapest"), PROBLEM)
    hours = {gpus: budget(solve(on(gpus))).gpu_hours for gpus in (1, 2, 4, 8, 16, 24, 32, 48, 64)}
    assert budget(found).gpu_hours == min(hours.values())
    limit = seconds(solve(on(32))) * 1.001
    within = achieve(Goal(name="cheapest", max_step_s=limit), PROBLEM)
    assert budget(within).gpu_hours == min(h for gpus, h in hours.items() if gpus >= 32)


def test_the_largest_micro_batch_that_fits() -> None:
    problem = on(8)
    found = achieve(Goal(name="largest_micro_batch"), problem).choose().plan.micro_batch_size
    assert 192 // 8 % found == 0
    for size in (24, 12, 8, 6, 4, 3, 2, 1):
        request = replace(problem.request, micro_batch_size=size)
        fits = bool(solve(replace(problem, request=request)).candidates)
        assert fits == (size <= found)


def test_the_longest_sequence_that_fits() -> None:
    small = replace(CLUSTER, num_nodes=1, gpu=replace(CLUSTER.gpu, memory_gib=12.0))
    problem = replace(PROBLEM, cluster=small, training=replace(PROBLEM.training, global_batch_size=8))
    found = achieve(Goal(name="longest_sequence"), problem)
    length = found.problem.training.sequence_length
    assert 1024 < length < MODEL.max_position_embeddings
    assert found.candidates
    longer = replace(problem.training, sequence_length=length + 1024)
    assert not solve(replace(problem, training=longer)).candidates


def test_where_all_lengths_fit_the_model_is_the_limit() -> None:
    roomy = replace(CLUSTER, num_nodes=1, gpu=replace(CLUSTER.gpu, memory_gib=4000.0))
    training = replace(PROBLEM.training, global_batch_size=8)
    found = achieve(Goal(name="longest_sequence"), replace(PROBLEM, cluster=roomy, training=training))
    assert found.problem.training.sequence_length == MODEL.max_position_embeddings


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "fewest_gpus"}, "goal=fewest_gpus needs something to reach; set goal.max_step_s"),
    ({"max_step_s": 1.0}, "goal.max_step_s=1.0 has no effect with goal=fastest; use goal=fewest_gpus"),
    ({"name": "cheapest", "max_days": 0}, "goal.max_days=0.0 must be above 0"),
    ({"name": "quickest"}, "goal.name=quickest is not accepted"),
]


@pytest.mark.parametrize(("given", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_a_goal_that_cannot_be_meant(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        decode(Goal, given, "goal")
    assert sentence in str(error.value)
