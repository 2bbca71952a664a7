"""The pruned search against brute force: the same choice, the same first runners-up, the same counts by class."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

import strategies
from launcher.cluster.spec import ClusterSpec, GpuSpec, Link
from launcher.planner.cost import Candidate
from launcher.planner.price.estimate import Estimator, usable_bytes
from launcher.planner.problem import PlanRequest, Problem
from launcher.planner.search import sweep as subject
from launcher.planner.search.order import TIE, ordered, step_s
from launcher.planner.search.sweep import Outcome, sweep
from launcher.planner.space.plans import Space, legal_plans
from strategies.base import Capabilities, StateBytes
from strategies.model_spec import MlaSpec, ModelSpec, MoeSpec
from strategies.spec import Plan, TrainingSpec

DENSE = ModelSpec(
    name="dense",
    model_type="llama",
    num_layers=10,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_heads=8,
    ffn_hidden_size=14336,
    vocab_size=128256,
    max_position_embeddings=16384,
)
MIXTURE = replace(
    DENSE,
    name="mixture",
    model_type="deepseek_v3",
    num_layers=6,
    hidden_size=2048,
    num_attention_heads=16,
    num_kv_heads=None,
    moe=MoeSpec(num_experts=8, top_k=4, expert_ffn_hidden_size=1408, num_dense_layers=1),
    mla=MlaSpec(q_lora_rank=512, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
)
GPU = GpuSpec(name="G", memory_gib=80.0, memory_gb_per_s=3000.0, peak_tflops={"bf16": 900.0, "fp32": 60.0})
CLUSTER = ClusterSpec(
    name="c",
    num_nodes=2,
    gpus_per_node=8,
    gpu=GPU,
    links=(Link(size=8, gb_per_s=400.0, latency_us=10.0), Link(size=None, gb_per_s=25.0, latency_us=15.0)),
    host_memory_gib=500.0,
)
TRAINING = TrainingSpec(sequence_length=8192, global_batch_size=16, num_steps=10)
TIGHT = replace(GPU, memory_gib=14.0)
OFFLOADING = Capabilities(
    zero_stages=frozenset({1, 3}),
    precisions=frozenset({"bf16"}),
    recompute=frozenset({"none", "full"}),
    state_bytes={"bf16": StateBytes(weights=2, gradients=4, optimizer=12)},
    degrees=frozenset({"tp"}),
    offload_optimizer_stages=frozenset({1, 3}),
    offload_parameters_stages=frozenset({3}),
)

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "dense": ({}, {}, ("megatron",)),
    "dense, every engine": ({"cluster": replace(CLUSTER, num_nodes=1)}, {}, tuple(strategies.engines())),
    "dense, tight": ({"cluster": replace(CLUSTER, gpu=TIGHT)}, {}, ("megatron", "deepspeed")),
    "dense, nothing fits": (
        {"cluster": replace(CLUSTER, gpu=replace(GPU, memory_gib=4.0))},
        {},
        ("megatron", "offloading"),
    ),
    "mixture": ({"model": MIXTURE}, {}, ("megatron",)),
    "mixture, tight": (
        {"model": MIXTURE, "cluster": replace(CLUSTER, gpu=TIGHT)},
        {},
        ("megatron", "deepspeed"),
    ),
    "pins": ({"model": MIXTURE}, {"tp": 2, "recompute": "full", "zero_stage": 1}, ("megatron",)),
    "split pinned": ({}, {"pipeline_split": (2, 3, 3, 2)}, ("megatron", "colossalai")),
    "offload where nothing else fits": (
        {"cluster": replace(CLUSTER, num_nodes=1, gpu=replace(GPU, memory_gib=24.0))},
        {},
        ("offloading",),
    ),
    "offload for one of two": (
        {"cluster": replace(CLUSTER, num_nodes=1, gpu=replace(GPU, memory_gib=24.0))},
        {},
        ("megatron", "offloading"),
    ),
}


def capabilities(name: str) -> Capabilities:
    return OFFLOADING if name == "offloading" else strategies.capabilities(name)


def problem_of(case: str) -> tuple[Problem, list[Space]]:
    given, pins, names = CASES[case]
    problem = Problem(
        **{"model": DENSE, "cluster": CLUSTER, "training": TRAINING, **given},
        request=PlanRequest(**pins),
        strategies=names,
    )
    return problem, [Space(problem, strategy=name, capabilities=capabilities(name)) for name in names]


class BruteForce:
    """Costs every legal plan and applies the rules afterwards."""

    def __init__(self, problem: Problem, names: tuple[str, ...]) -> None:
        self.usable = usable_bytes(problem.cluster)
        self.estimators = {name: Estimator(problem, capabilities(name)) for name in names}
        self.costed: list[Candidate] = []
        for name in names:
            plans = list(legal_plans(problem, strategy=name, capabilities=capabilities(name)))
            asked = (bool(problem.request.offload_optimizer), bool(problem.request.offload_parameters))
            resident = [p for p in plans if (p.offload_optimizer, p.offload_parameters) == asked]
            found = [self._candidate(plan) for plan in resident]
            if all(candidate.rejected for candidate in found):
                found += [self._candidate(plan) for plan in plans if plan not in resident]
            self.costed += found
        self.fitting = ordered((c for c in self.costed if c.rejected is None), usable=self.usable)

    def limit_s(self, kept: int) -> float:
        times = sorted(step_s(candidate) for candidate in self.fitting)
        return max(times[0] * TIE, times[kept - 1]) if len(times) >= kept else math.inf

    def _candidate(self, plan: Plan) -> Candidate:
        estimator = self.estimators[plan.strategy]
        footprint = estimator.footprint(plan)
        return Candidate(
            plan=plan, cost=estimator.cost(plan, footprint), rejected=estimator.too_large(footprint)
        )

    def bound_s(self, plan: Plan) -> float:
        plain = replace(plan, recompute="none", recompute_num_layers=0, recompute_modules=())
        bounds = self.estimators[plan.strategy].bounds(plain)
        if plan.recompute != "full":
            return bounds.busy_s
        some = plan.recompute_num_layers
        return bounds.busy_s + bounds.recompute_s * (min(1.0, some / bounds.layers) if some else 1.0)

    def counts(self, kept: int) -> tuple[Counter[Any], int, dict[Any, Plan]]:
        """Return misses by class, how many are slow, and the nearest miss of each class."""
        misses: Counter[Any] = Counter()
        nearest: dict[Any, Candidate] = {}
        slow, limit_s = 0, self.limit_s(kept)
        for candidate in self.costed:
            plan, cost = candidate.plan, candidate.cost
            assert cost is not None
            heavy = self.estimators[plan.strategy].state_bytes(plan) > self.usable
            if not heavy and self.bound_s(plan) > limit_s:
                slow += 1
            elif candidate.rejected:
                key = (plan.strategy, plan.zero_stage)
                misses[key] += 1
                before = nearest.get(key)
                if before is None or self._size(candidate) < self._size(before):
                    nearest[key] = candidate
        return misses, slow, {key: candidate.plan for key, candidate in nearest.items()}

    @staticmethod
    def _size(candidate: Candidate) -> tuple[float, float, Any]:
        assert candidate.cost is not None
        return (
            candidate.cost.memory.total,
            candidate.cost.host_bytes,
            subject.simplicity(candidate.plan),
        )


@cache
def brute_force(case: str) -> BruteForce:
    return BruteForce(problem_of(case)[0], CASES[case][2])


def swept(
    case: str, *, kept: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Outcome, BruteForce, list[Candidate]]:
    monkeypatch.setattr(subject, "KEPT", kept)
    problem, spaces = problem_of(case)
    outcome, brute = sweep(problem, spaces, small=0), brute_force(case)
    return outcome, brute, ordered(outcome.fitting, usable=brute.usable)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kept", [6, 32])
def test_the_answer_is_that_of_brute_force(case: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, brute, found = swept(case, kept=kept, monkeypatch=monkeypatch)
    assert found[:kept] == brute.fitting[:kept]
    assert outcome.limit_s == brute.limit_s(kept)
    misses, slow, nearest = brute.counts(kept)
    assert {key: count for key, (count, _) in outcome.misses.items()} == misses
    assert {key: candidate.plan for key, (_, candidate) in outcome.misses.items()} == nearest
    assert outcome.num_slow == slow
    assert outcome.num_considered == len(brute.costed)
    assert outcome.num_considered == len(found) + slow + sum(misses.values())


@pytest.mark.parametrize("case", CASES)
def test_the_best_alone_is_that_of_brute_force_with_all_its_ties(case: str) -> None:
    problem, spaces = problem_of(case)
    outcome, brute = sweep(problem, spaces, small=0, only_best=True), brute_force(case)
    found = ordered(outcome.fitting, usable=brute.usable)
    best_s = min(map(step_s, brute.fitting), default=0.0)
    tied = [candidate for candidate in brute.fitting if step_s(candidate) <= best_s * TIE]
    assert found[: len(tied)] == tied and bool(found) == bool(brute.fitting)
    _, _, nearest = brute.counts(1)
    misses = {key: candidate.plan for key, (_, candidate) in outcome.misses.items()}
    assert misses == ({} if found else nearest)
    assert outcome.num_costed <= sweep(problem, spaces, small=0).num_costed


@pytest.mark.parametrize("case", ["dense", "mixture", "dense, tight"])
def test_few_plans_are_costed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, brute, _ = swept(case, kept=6, monkeypatch=monkeypatch)
    assert len(brute.fitting) > 6
    assert outcome.num_costed < len(brute.costed) / 4
    assert outcome.num_slow > 0


@pytest.mark.parametrize("case", CASES)
def test_no_step_is_shorter_than_its_bounds(case: str) -> None:
    brute = brute_force(case)
    for candidate in brute.costed:
        plan, cost = candidate.plan, candidate.cost
        assert cost is not None
        estimator = brute.estimators[plan.strategy]
        plain = replace(plan, recompute="none", recompute_num_layers=0, recompute_modules=())
        assert estimator.floor_s(plan) <= estimator.bounds(plain).busy_s * (1 + 1e-12)
        assert brute.bound_s(plan) <= cost.step_s * (1 + 1e-12)
        assert estimator.state_bytes(plan) <= cost.memory.total


@pytest.mark.parametrize("case", CASES)
def test_a_larger_micro_batch_never_needs_less_memory(case: str) -> None:
    ladders: dict[str, list[tuple[int, float]]] = {}
    for candidate in brute_force(case).costed:
        assert candidate.cost is not None
        rest = replace(candidate.plan, micro_batch_size=1, num_microbatches=1)
        ladder = ladders.setdefault(repr(rest), [])
        ladder.append((candidate.plan.micro_batch_size, candidate.cost.memory.total))
    for ladder in ladders.values():
        totals = [total for _, total in sorted(ladder)]
        assert totals == sorted(totals)


def test_a_small_space_is_weighed_in_full() -> None:
    problem, spaces = problem_of("dense")
    outcome = sweep(problem, spaces, small=10**9)
    assert outcome.num_slow == 0
    assert outcome.limit_s == math.inf
    assert outcome.num_costed == len(outcome.fitting)


def test_the_order_of_the_engines_does_not_matter() -> None:
    problem, spaces = problem_of("dense, every engine")
    forward, backward = sweep(problem, spaces, small=0), sweep(problem, spaces[::-1], small=0)
    assert forward.misses == backward.misses
    usable = usable_bytes(problem.cluster)
    assert ordered(forward.fitting, usable=usable) == ordered(backward.fitting, usable=usable)
