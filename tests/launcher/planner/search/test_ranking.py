"""rank(): what it guarantees whatever the formulas say, and the sentences when nothing can be done."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from importlib import resources
from typing import Any, TypeVar

import pytest

import strategies
from launcher.cluster.spec import ClusterSpec
from launcher.compose import jobs
from launcher.errors import PlanError
from launcher.planner.cost import parts
from launcher.planner.search.order import step_s
from launcher.planner.search.ranking import PlanRequest, Ranking, rank, usable_bytes
from strategies.base import Capabilities, StateBytes
from strategies.model_spec import ModelSpec
from strategies.spec import TrainingSpec

T = TypeVar("T")

STATE = StateBytes(weights=2, gradients=4, optimizer=12)
DATA_PARALLEL = Capabilities(
    zero_stages=frozenset({0, 1, 2, 3}),
    precisions=frozenset({"bf16", "fp32"}),
    recompute=frozenset({"none", "full"}),
    state_bytes={"bf16": STATE, "fp32": STATE},
    offload_optimizer_stages=frozenset({1, 2, 3}),
    offload_parameters_stages=frozenset({3}),
)
EVERYTHING = replace(
    DATA_PARALLEL, degrees=frozenset({"tp", "pp", "vp", "cp", "ep", "etp"}), sequence_parallel=True
)


@cache
def preset(cls: type[T], group: str, name: str) -> T:
    """A packaged option as the command line composes it."""
    return getattr(jobs([f"{group}={name}"])[0], group)  # type: ignore[no-any-return]


H100 = preset(ClusterSpec, "cluster", "h100_sxm")
LLAMA_8B = preset(ModelSpec, "model", "llama3_8b")
LLAMA_70B = preset(ModelSpec, "model", "llama3_70b")
TRAINING = TrainingSpec(sequence_length=4096, global_batch_size=512, num_steps=10)
SHORT = replace(TRAINING, sequence_length=1024)


def use(monkeypatch: pytest.MonkeyPatch, table: dict[str, Capabilities]) -> None:
    known = strategies.capabilities
    monkeypatch.setattr(strategies, "capabilities", lambda name: table.get(name) or known(name))


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two invented engines, so that no adapter's progress changes these tests."""
    use(monkeypatch, {"plain": DATA_PARALLEL, "full": EVERYTHING})
    monkeypatch.setattr(strategies, "ENGINE_PACKAGES", {"plain": "plain"})


def ranked(
    *,
    model: ModelSpec = LLAMA_8B,
    cluster: ClusterSpec = H100,
    training: TrainingSpec = TRAINING,
    names: Sequence[str] = ("plain",),
    **pins: Any,
) -> Ranking:
    return rank(model, cluster, training, PlanRequest(**pins), strategies=names)


def refused(**arguments: Any) -> str:
    with pytest.raises(PlanError) as error:
        ranked(**arguments).choose()
    return str(error.value)


CLUSTERS = [
    entry.name.removesuffix(".yaml")
    for entry in sorted(
        (resources.files("hydra_configs") / "cluster").iterdir(), key=lambda entry: entry.name
    )
    # Two ask the machine, or Slurm, what there is.
    if entry.name.endswith(".yaml") and entry.name not in ("local.yaml", "slurm.yaml")
]
MODELS = [
    entry.name.removesuffix(".yaml")
    for entry in sorted((resources.files("hydra_configs") / "model").iterdir(), key=lambda entry: entry.name)
    if entry.name.endswith(".yaml")
]


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_preset_plans_a_small_model(name: str) -> None:
    cluster = preset(ClusterSpec, "cluster", name)
    training = replace(TRAINING, sequence_length=512, precision="bf16" if name != "v100" else "fp32")
    model = preset(ModelSpec, "model", "gpt2_124m")
    best = ranked(model=model, cluster=cluster, training=training).choose()
    assert best.plan.world_size == cluster.world_size
    assert best.plan.zero_stage <= 1
    assert best.cost is not None
    assert best.cost.mfu is not None
    assert 0.05 < best.cost.mfu < 0.8


@pytest.mark.parametrize("name", MODELS)
def test_every_model_preset_plans_on_many_gpus(name: str) -> None:
    model = preset(ModelSpec, "model", name)
    cluster = replace(H100, num_nodes=64)
    training = replace(
        TRAINING, sequence_length=min(2048, model.max_position_embeddings), global_batch_size=1024
    )
    best = ranked(model=model, cluster=cluster, training=training, names=["full"]).choose()
    assert best.plan.world_size == 512
    assert best.plan.global_batch_size == 1024


@pytest.mark.parametrize("engine", ["plain", "full"])
def test_all_candidates_are_legal_fit_and_add_up(engine: str) -> None:
    ranking = ranked(model=LLAMA_70B, cluster=replace(H100, num_nodes=8), names=[engine])
    assert ranking.candidates
    assert ranking.rejected
    for candidate in ranking.candidates:
        plan, cost = candidate.plan, candidate.cost
        assert cost is not None
        assert plan.world_size == 64
        assert plan.global_batch_size == TRAINING.global_batch_size
        assert cost.memory.total <= usable_bytes(H100)
        assert cost.memory.total == pytest.approx(sum(parts(cost.memory).values()))
        assert cost.step_s == pytest.approx(sum(parts(cost.time).values()))
        assert min(parts(cost.memory).values()) >= 0
        assert min(parts(cost.time).values()) >= 0


def test_more_memory_never_loses_a_plan() -> None:
    previous: set[str] = set()
    for memory_gib in (20.0, 40.0, 80.0, 160.0, 400.0):
        cluster = replace(H100, gpu=replace(H100.gpu, memory_gib=memory_gib))
        # Offloading is only weighed where nothing else fits, so it is held fixed here.
        ranking = ranked(cluster=cluster, offload_optimizer=False, offload_parameters=False)
        plans = {repr(candidate.plan) for candidate in ranking.candidates}
        assert previous <= plans
        previous = plans
    assert previous


@pytest.mark.parametrize("num_nodes", [1, 4, 32])
def test_memory_falls_weakly_with_the_zero_stage(num_nodes: int) -> None:
    cluster = replace(H100, num_nodes=num_nodes, gpu=replace(H100.gpu, memory_gib=10_000.0))
    totals = []
    for stage in (0, 1, 2, 3):
        best = ranked(cluster=cluster, zero_stage=stage, micro_batch_size=1, recompute="none").choose()
        assert best.cost is not None
        totals.append(best.cost.memory.total)
    assert totals == sorted(totals, reverse=True)
    assert totals[3] < totals[0]


def test_pinned_values_are_never_changed() -> None:
    pins: dict[str, Any] = {"tp": 4, "pp": 2, "zero_stage": 1, "micro_batch_size": 2, "recompute": "full"}
    ranking = ranked(cluster=replace(H100, num_nodes=8), names=["full"], sequence_parallel=False, **pins)
    assert len(ranking.candidates) > 1
    for candidate in ranking.candidates:
        assert candidate.plan.sequence_parallel is False
        assert {key: getattr(candidate.plan, key) for key in pins} == pins


def test_a_wholly_pinned_plan_is_the_only_candidate() -> None:
    pins: dict[str, Any] = {
        "dp": 8,
        "zero_stage": 3,
        "micro_batch_size": 1,
        "num_microbatches": 64,
        "recompute": "full",
        "offload_optimizer": True,
        "offload_parameters": True,
    }
    ranking = ranked(**pins)
    assert len(ranking.candidates) == 1
    assert {key: getattr(ranking.choose().plan, key) for key in pins} == pins


def test_the_order_of_strategies_does_not_matter() -> None:
    forward, backward = ranked(names=["full", "plain"]), ranked(names=["plain", "full"])
    assert forward.candidates == backward.candidates
    assert forward.rejected == backward.rejected
    assert {candidate.plan.strategy for candidate in forward.candidates} == {"full", "plain"}


def test_the_simplest_of_equally_fast_plans_is_chosen() -> None:
    best = ranked(
        model=preset(ModelSpec, "model", "gpt2_124m"), training=replace(TRAINING, sequence_length=512)
    )
    plan = best.choose().plan
    assert (plan.zero_stage, plan.recompute, plan.offload_optimizer) == (0, "none", False)
    assert plan.micro_batch_size > 1


def test_offload_is_weighed_only_where_nothing_fits_without() -> None:
    assert not any(c.plan.offload_optimizer for c in ranked().candidates)
    tight = replace(H100, gpu=replace(H100.gpu, memory_gib=24.0))
    assert ranked(cluster=tight).choose().plan.offload_optimizer
    assert ranked(offload_optimizer=True).choose().plan.offload_optimizer


def test_host_memory_limits_offload() -> None:
    tight = replace(H100, gpu=replace(H100.gpu, memory_gib=24.0), host_memory_gib=50.0)
    assert "cluster.host_memory_gib=50.0" in refused(cluster=tight, zero_stage=3, offload_optimizer=True)


def test_what_does_not_fit_says_by_how_much_and_what_would() -> None:
    sentence = refused(zero_stage=0)
    assert "no plan of llama3_8b with plan.zero_stage=0 fits 8 x H100-SXM5-80GB" in sentence
    assert "weights 15.0, gradients 29.9, optimizer 89.7" in sentence
    assert "of the 76.1 GiB usable" in sentence
    assert re.search(r"; plan\.zero_stage=[123] would fit$", sentence)
    assert ranked(zero_stage=3).candidates


def test_more_nodes_are_the_remedy_where_no_pin_is() -> None:
    no_host = replace(H100, host_memory_gib=1.0)
    sentence = refused(model=LLAMA_70B, cluster=no_host)
    nodes = int(sentence.rpartition("cluster.num_nodes=")[2].split()[0])
    assert ranked(model=LLAMA_70B, cluster=replace(no_host, num_nodes=nodes)).candidates
    assert not ranked(model=LLAMA_70B, cluster=replace(no_host, num_nodes=nodes // 2)).candidates


def test_a_remedy_grows_the_batch_where_the_ranks_outnumber_it() -> None:
    no_host = replace(H100, host_memory_gib=1.0)
    sentence = refused(model=LLAMA_70B, cluster=no_host, training=replace(TRAINING, global_batch_size=8))
    assert "with training.global_batch_size=" in sentence


def test_rejections_count_every_plan_once() -> None:
    ranking = ranked(zero_stage=0, cluster=replace(H100, gpu=replace(H100.gpu, memory_gib=60.0)))
    everything = ranked(zero_stage=0, cluster=replace(H100, gpu=replace(H100.gpu, memory_gib=9999.0)))
    assert sum(rejection.count for rejection in ranking.rejected) == len(everything.candidates)


def test_of_several_engines_one_may_be_unable() -> None:
    ranking = ranked(names=["plain", "full"], tp=2, cluster=replace(H100, num_nodes=2))
    assert {candidate.plan.strategy for candidate in ranking.candidates} == {"full"}
    assert any(
        "strategy=plain does not offer plan.tp=2" in rejection.reason for rejection in ranking.rejected
    )


def test_the_search_grows_slower_than_the_cluster() -> None:
    """Sixteen times the GPUs, far less than sixteen times the work: compared by CPU time in one process."""
    training = replace(TRAINING, global_batch_size=1024)

    def seconds(num_nodes: int) -> float:
        cluster = replace(H100, num_nodes=num_nodes)
        started = time.process_time()
        for _ in range(3):
            assert ranked(model=LLAMA_70B, cluster=cluster, training=training).candidates
        return time.process_time() - started

    seconds(8)  # warm
    assert seconds(128) < 8 * seconds(8)


def test_a_request_names_what_cannot_be_meant() -> None:
    for field in fields(PlanRequest):
        assert getattr(PlanRequest(), field.name) is None
    with pytest.raises(ValueError, match=r"plan\.tp=0 must be at least 1; null lets the planner choose"):
        PlanRequest(tp=0)
    with pytest.raises(ValueError, match=r"plan\.zero_stage=4 is not a ZeRO stage"):
        PlanRequest(zero_stage=4)


def test_another_engine_is_the_remedy_before_more_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`resident` cannot offload; `plain` can, and is named whether or not it is installed."""
    resident = replace(
        DATA_PARALLEL, offload_optimizer_stages=frozenset(), offload_parameters_stages=frozenset()
    )
    use(monkeypatch, {"resident": resident, "plain": DATA_PARALLEL})
    one = preset(ClusterSpec, "cluster", "l40s_pcie")
    one = replace(one, num_nodes=1, gpus_per_node=1)
    sentence = refused(cluster=one, names=["resident"])
    assert sentence.endswith("; strategy=plain would fit, with plan.offload_optimizer=true")
    assert ranked(cluster=one, names=["plain"]).choose().plan.offload_optimizer


def test_of_equally_fast_plans_a_much_lighter_one_is_chosen() -> None:
    """124 M parameters on one GPU: 64 sequences at a time are little faster than fewer, and take most of the memory."""
    one = replace(H100, gpus_per_node=1)
    ranking = ranked(model=preset(ModelSpec, "model", "gpt2_124m"), cluster=one, training=SHORT)
    chosen, fastest = ranking.candidates[:2]
    assert chosen.plan.micro_batch_size < fastest.plan.micro_batch_size == 64
    assert chosen.cost is not None
    assert fastest.cost is not None
    assert fastest.cost.step_s < chosen.cost.step_s < 1.05 * fastest.cost.step_s
    assert chosen.cost.memory.total < fastest.cost.memory.total - 0.1 * usable_bytes(H100)


def test_no_tied_plan_is_faster_and_much_lighter_than_the_chosen_one() -> None:
    """8 B parameters on 16 GPUs at 2048 tokens, where the simplest of the tied plans is the fullest."""
    ranking = ranked(cluster=replace(H100, num_nodes=2), training=replace(SHORT, sequence_length=2048))
    chosen = ranking.choose().cost
    assert chosen is not None
    limit = 1.05 * min(step_s(candidate) for candidate in ranking.candidates)
    for other in ranking.candidates:
        assert other.cost is not None
        if other.cost.step_s <= limit:
            assert other.cost.memory.total > chosen.memory.total - 0.1 * usable_bytes(H100)
